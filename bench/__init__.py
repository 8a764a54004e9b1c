"""Benchmarks of deeplab_fast: kernels and models against the best that PyTorch offers.

    python -m bench.run --suite quick --out DIR    measure; rows go to DIR/quick.csv
    python -m bench.report DIR/quick.csv           tables, plots and the README's table from rows
    python -m bench.run --suite rivals --out DIR   models on a CPU beside OpenVINO and ONNX Runtime
    python -m bench.compare BASE -k PATTERN        this commit against another
    bench/gpu.sh                                   all that a borrowed GPU is used for (GPU.md)
    python -m bench.apply_gpu RESULTS.jsonl        what follows from its results
    bench/prepare_gpu.sh                           builds beforehand what a GPU machine takes along
    pytest bench/ --benchmark-only -k PATTERN      the same cases under pytest-benchmark

Run from the root of the repository; nothing of this package is installed.
"""
