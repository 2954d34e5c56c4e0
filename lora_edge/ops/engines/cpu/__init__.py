"""The CPU engine: the C++ kernels of csrc/cpu, on torch's threads."""
