"""Checking and measuring the GPU kernels on the GPU at hand: `deeplab_fast.tune`.

workloads       which of the ops' examples a model calls
speeds, timing  how long it takes beside PyTorch
configurations  its fastest launch configuration
runner          each of these in a process of its own, within a budget
defaults        what it takes where nothing is said
tune, machine   all of it on one GPU, and the records that follow
"""
