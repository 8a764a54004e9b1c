"""Models under pytest-benchmark; see suite.py."""

import pytest

from bench import suite


@pytest.mark.parametrize(("case", "mode", "provider"), suite.parameters("model"))
def test_model(benchmark, case, mode, provider) -> None:
    suite.bench(benchmark, case, mode, provider)
