"""The kernels on a model of Orin (sm_87): ``python -m benchmarks.orin``."""
