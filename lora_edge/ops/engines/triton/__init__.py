"""The Triton engine: the ops as Triton kernels, compiled at their first call."""
