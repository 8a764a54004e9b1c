"""Checking and measuring the GPU kernels on the GPU at hand: `deeplab_fast.tune`.

steps           the ops at example sizes, their exact results, PyTorch's own forms of them
workloads       which of them a model calls
checks, errors  whether a kernel is right
speeds, timing  how long it takes beside PyTorch
configurations  its fastest launch configuration
runner          each of these in a process of its own, within a budget
tune, machine   all of it on one GPU, and the records that follow
"""
