"""A Flax model on arrays, under whatever name this folder has."""

import jax
import numpy as np
import pytest

from .. import ADC, PRESETS, CrossbarConfig

nnx = pytest.importorskip("flax.nnx")


def test_a_model_goes_onto_arrays_in_one_call():
    from ..flax import calibrate, convert

    rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(0), (8, 6))
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 3, rngs=rngs))
    np.testing.assert_allclose(convert(model, {"*": PRESETS["ideal"]}, jax.random.key(1))(x), model(x), atol=1e-5)
    on_arrays = convert(model, {"layers.2": None, "*": CrossbarConfig(adc=ADC(bits=6))}, jax.random.key(1))
    assert 0 < np.abs(calibrate(on_arrays, [x])(x) - model(x)).max() < 0.5
