"""Ops under pytest-benchmark; see suite.py."""

import pytest

from bench import suite


@pytest.mark.parametrize(("case", "mode", "provider"), suite.parameters("op"))
def test_op(benchmark, case, mode, provider) -> None:
    suite.bench(benchmark, case, mode, provider)
