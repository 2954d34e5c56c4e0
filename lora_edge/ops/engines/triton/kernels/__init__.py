"""The ops as Triton kernels, the same stems as in csrc/. Importing a kernel's file imports triton."""
