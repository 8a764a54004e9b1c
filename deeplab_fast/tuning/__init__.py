"""Checking and measuring the GPU kernels on the GPU at hand: `deeplab_fast.tune`."""
