"""The CUDA engine: the kernels of csrc/cuda."""
