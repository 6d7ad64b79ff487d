"""The model of a step's time against sums by hand."""

import dataclasses
import sys
from pathlib import Path

import pytest
import tiny

from lorafusion_jax.estimates.flops import Shape, step_flops
from lorafusion_jax.methods.fused import MixUpdate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
try:
    from _step_time import Rates, step_seconds, sum_bytes, sums
finally:
    sys.path.pop(0)

_UPDATE = MixUpdate(modules=2, pool=2, magnitudes=True)
_SHAPE = Shape(5, 12, 4)
_RATES = Rates(flops=1e9, bandwidth=1e6, latency=1e-3)


def _seconds(**mesh):
    return step_seconds(tiny.CONFIG, _SHAPE, _UPDATE, _RATES, trainable=100, **mesh)


def test_seeds_are_shared_out_evenly_and_exchange_nothing():
    one = step_flops(tiny.CONFIG, _SHAPE, _UPDATE, trainable=100) / 1e9
    assert _seconds(seeds=8) == pytest.approx(8 * one)
    assert _seconds(seeds=8, seed=4) == pytest.approx(2 * one)
    with pytest.raises(ValueError, match="8 seeds cannot be shared out evenly over 3"):
        _seconds(seeds=8, seed=3)


def test_matrices_cost_sums():
    # Three layers of the encoder (12 source tokens), two of the decoder (4 target tokens), five rows of width 16.
    assert sums(tiny.CONFIG) == 2 * (2 * 3 + 3 * 2)
    array = 2 * (2 * 3 * 5 * 12 + 3 * 2 * 5 * 4) * 16 * 4
    assert sum_bytes(tiny.CONFIG, _SHAPE, 2) == array
    assert sum_bytes(tiny.CONFIG, _SHAPE, 4) == 1.5 * array
    assert sum_bytes(dataclasses.replace(tiny.CONFIG, dtype="bfloat16"), _SHAPE, 2) == array / 2
    one = step_flops(tiny.CONFIG, _SHAPE, _UPDATE, trainable=100) / 1e9
    assert _seconds(seeds=1, model=4) == pytest.approx(one / 4 + 24 * 1e-3 + 1.5 * array / 1e6)


def test_what_exchange_costs_bounds_what_devices_bring():
    assert _seconds(seeds=1, model=1000) > 24 * 1e-3
