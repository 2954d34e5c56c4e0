"""The ops as Triton kernels; the file names match csrc/. Importing a kernel's file imports triton."""
