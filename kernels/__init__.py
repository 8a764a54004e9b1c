"""Triton kernels, imported as `deeplab_fast.kernels`; this file imports no Triton."""
