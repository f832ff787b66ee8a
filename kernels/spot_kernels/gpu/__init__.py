"""The Triton kernels and their launchers, one module an operator. Imported on first use, not by `import spot_kernels`.

A launcher takes checked tensors and allocates what it returns. Nothing here waits for the device, so everything can be
captured in a CUDA graph; no kernel uses atomics, so results repeat bit for bit.
"""
