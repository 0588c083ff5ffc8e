"""A fixed hundred cases of the fuzzer."""

import fuzz
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 20))
def test_losses_are_those_without_the_cache(first):
    with fuzz.quiet():
        results = [fuzz.check(seed) for seed in range(first, first + 20)]
    assert not [result for result in results if result["wrong"]]
    assert sum(result["hits"] for result in results) > 100
