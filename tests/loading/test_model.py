"""The structure that training is compiled with. Oracle: the seconds in docs/concepts/speed.md."""

import numpy as np
import pytest

import lorafusion_jax as lf
from lorafusion_jax.tasks import Encoded


@pytest.mark.parametrize(
    ("shape", "length", "epochs", "packed", "unrolled"),
    [
        (
            "flan-t5-small",
            100,
            1,
            True,
            False,
        ),  # 10 steps save 0.3 s, and compilation takes 4 s longer
        ("flan-t5-small", 100, 20, True, True),
        ("flan-t5-small", 100, 100, False, True),
        ("flan-t5-base", 100, 20, True, True),
        (
            "flan-t5-large",
            300,
            20,
            True,
            False,
        ),  # attention weights and gates of 48 layers
        ("flan-t5-small", 900, 20, True, False),
    ],
)
def test_layers_are_unrolled_for_long_trainings_in_little_memory(
    shape, length, epochs, packed, unrolled
):
    rng = np.random.default_rng(0)
    config = lf.models.known_shapes()[shape]
    inputs = tuple(
        np.zeros(rng.integers(length // 2, length), np.int32) for _ in range(100)
    )
    encoded = Encoded(inputs, tuple(np.zeros(4, np.int32) for _ in inputs))
    orders = np.stack(
        [rng.permutation(100).astype(np.int32).reshape(10, 10) for _ in range(epochs)]
    )
    packing = lf.loading.packing_of(config, on_cpu=True) if packed else None
    assert (
        lf.loading.pays_unrolled(config, encoded, orders.reshape(1, -1, 10), packing)
        == unrolled
    )
