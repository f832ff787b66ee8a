"""The Triton kernels and their launchers; operators import them on first use, `import spot_kernels` does not.

Launchers take checked tensors and fill the outputs they are given. Nothing waits for the device, so everything can be
captured in a CUDA graph; no kernel uses atomics, so results repeat bit for bit.
"""
