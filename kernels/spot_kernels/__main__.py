"""`python -m spot_kernels`: one line on whether the native library is there, and what runs if it is not."""

from spot_kernels import native

print(native.describe())
