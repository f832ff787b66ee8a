"""`python -m spot_kernels` prints the path of the native library, or why it cannot be used and what runs instead."""

from spot_kernels import native

print(native.describe())
