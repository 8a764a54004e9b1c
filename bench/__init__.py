"""Benchmarks of deeplab_fast: kernels and models against the best that PyTorch offers.

    python -m bench.run --suite quick --out DIR    measure; rows go to DIR/quick.csv
    python -m bench.report DIR/quick.csv           tables, plots and the README's table from rows
    python -m bench.compare BASE -k PATTERN        this commit against another
    python -m bench.tune                           configurations of Triton kernels, on a GPU
    bench/prepare_gpu.sh                           builds beforehand what a GPU machine takes along
    pytest bench/ --benchmark-only -k PATTERN      the same cases under pytest-benchmark

Run from the root of the repository; nothing of this package is installed.
"""
