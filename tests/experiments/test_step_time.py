"""The model of a step's time against sums by hand."""

import dataclasses

import pytest
import tiny
from _step_time import Rates, step_seconds, sum_bytes, sums

from lorafusion_jax.estimates.flops import Shape, step_flops
from lorafusion_jax.methods.fused import MixUpdate

_UPDATE = MixUpdate(modules=2, pool=2, magnitudes=True)
_SHAPE = Shape(5, 12, 4)
_ONE = step_flops(tiny.CONFIG, _SHAPE, _UPDATE, trainable=100) / 1e9


def _seconds(**mesh):
    rates = Rates(flops=1e9, bandwidth=1e6, latency=1e-3)
    return step_seconds(tiny.CONFIG, _SHAPE, _UPDATE, rates, trainable=100, **mesh)


def test_seeds_are_shared_out_evenly_and_exchange_nothing():
    assert _seconds(seeds=8) == pytest.approx(8 * _ONE)
    assert _seconds(seeds=8, seed=4) == pytest.approx(2 * _ONE)
    with pytest.raises(ValueError, match="8 seeds cannot be shared out evenly over 3"):
        _seconds(seeds=8, seed=3)


def test_split_matrices_cost_sums_whose_time_has_a_floor():
    # Three layers of the encoder (12 source tokens), two of the decoder (4 target tokens), five rows of width 16.
    assert sums(tiny.CONFIG) == 2 * (2 * 3 + 3 * 2)
    array = 2 * (2 * 3 * 5 * 12 + 3 * 2 * 5 * 4) * 16 * 4
    assert sum_bytes(tiny.CONFIG, _SHAPE, 2) == array
    assert sum_bytes(tiny.CONFIG, _SHAPE, 4) == 1.5 * array
    assert sum_bytes(dataclasses.replace(tiny.CONFIG, dtype="bfloat16"), _SHAPE, 2) == array / 2
    assert _seconds(seeds=1, model=4) == pytest.approx(_ONE / 4 + 24 * 1e-3 + 1.5 * array / 1e6)
    assert _seconds(seeds=1, model=1000) > 24 * 1e-3
