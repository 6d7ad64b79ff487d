"""One tester per protocol of the crossbar. A new member is a row of the table next to its tester's test.

| protocol | tester | rows |
|---|---|---|
| cell technology | `check_technology` | `test_device.py` |
| ADC, read path | `check_chip` | `test_adc_architectures.py`, `test_paths.py` |
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossbar_oracle
import jax
import jax.numpy as jnp
import numpy as np
from crossbar_strategies import problem

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import CrossbarConfig, matmul, program

KEY = jax.random.key(7)
_LEVELS = np.array([0.25, 0.5, 0.75, 1.0])


def product(x: jax.Array, weight: Any) -> jax.Array:
    """Return a digital product, or the read of a chip."""
    return matmul(x, weight) if isinstance(weight, crossbar.Chip) else x @ weight


def assert_normal(draws: Any, mean: Any, deviation: Any) -> None:
    """Mean, variance and fourth moment of every row within five standard errors of a normal distribution's."""
    draws = np.asarray(draws, float)
    deviation = np.asarray(deviation, float)
    z = (draws - np.asarray(mean, float)[:, None]) / deviation[:, None]
    n = z.shape[1]
    assert np.abs(z.mean(1)).max() < 5 / math.sqrt(n)
    assert np.abs((z**2).mean(1) - 1).max() < 5 * math.sqrt(2 / n)
    assert np.abs((z**4).mean(1) - 3).max() < 5 * math.sqrt(96 / n)


def check_technology(
    model: Callable[..., jax.Array],
    mean: Callable[..., Any],
    deviation: Callable[..., Any],
    age: float | None,
) -> None:
    """Hold a model of cells against the mean and the deviation of its formula, as functions of G / Gmax."""
    G = jnp.repeat(jnp.asarray(_LEVELS, jnp.float32)[:, None], 40_000, 1)
    draw = jax.jit(lambda G, key: model(G, key, age))
    assert_normal(draw(G, KEY), mean(_LEVELS), np.broadcast_to(deviation(_LEVELS), 4))
    few = G[:, :3]
    keys = jax.random.split(KEY, 3)
    eager = jnp.stack([model(few, key, age) for key in keys])
    assert len(np.unique(eager[:, 0, 0])) == 3
    np.testing.assert_allclose(jax.vmap(draw, (None, 0))(few, keys), eager, rtol=1e-5)
    assert jnp.isfinite(
        jax.grad(lambda G: jnp.sum(draw(G, KEY)))(few.at[0].set(0.0))
    ).all()
    with jax.enable_x64(True):
        assert model(few.astype(jnp.float64), KEY, age).dtype == jnp.float64


def check_chip(
    config: CrossbarConfig,
    folder: Path,
    path: str | None = None,
    wanted: Callable[[crossbar.Chip], np.ndarray] | None = None,
) -> None:
    """Hold quiet reads of a chip against an oracle, by default loops in NumPy, the definition, and each other."""
    W, x = problem()
    make = jax.jit(lambda W, key: program(W, config, key, path=path))
    read = jax.jit(matmul)
    chip = make(W, KEY)
    defined = program(W, config, KEY, path="definition")
    chip = dataclasses.replace(chip, name="blocks.0")
    y = read(x, chip)
    assert crossbar.explain(chip).path == chip.plan.path and path in (
        None,
        chip.plan.path,
    )

    def same(found: Any, wanted: Any) -> None:
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(initial=0)
        )

    if wanted is None:
        of_cells = crossbar_oracle.Chip(
            np.asarray(defined.cells, float),
            None,
            np.broadcast_to(
                np.asarray(defined.scale, float),
                (len(defined.geometry.rows), W.shape[1]),
            ),
        )
        same(y, crossbar_oracle.read(of_cells, np.asarray(x), config).y)
    else:
        same(y, wanted(chip))
    same(y, read(x, defined))
    same(y, matmul(x, program(W, config, KEY, path=path)))
    # A saved chip reads the same.
    crossbar.save_chip(chip, folder / "chip.safetensors")
    loaded = crossbar.load_chip(folder / "chip.safetensors")
    assert loaded.config == config and jax.tree.structure(loaded) == jax.tree.structure(
        chip
    )
    np.testing.assert_array_equal(read(x, loaded), y)
    # Any leading axes are a batch: none, two, and an empty one.
    for shape in ((), (2, 2), (3, 0)):
        count = math.prod(shape)
        same(
            read(x[:count].reshape(*shape, x.shape[1]), chip),
            y[:count].reshape(*shape, y.shape[1]),
        )
    # Chips and matrices are an axis.
    both = jnp.stack([W, -2 * W])
    keys = jax.random.split(KEY, 2)
    for found, of_one, key in zip(
        jax.vmap(read, (None, 0))(x, jax.vmap(make)(both, keys)),
        both,
        keys,
        strict=True,
    ):
        same(found, read(x, make(of_one, key)))
    # Results have the dtype of the inputs.
    narrow = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        read(narrow, chip), read(narrow.astype(x.dtype), chip).astype(jnp.bfloat16)
    )
    # Derivatives pass straight through the converters, forwards and backwards, and through programming.
    weights = np.asarray(crossbar.programmed_weights(chip))
    same(
        jax.jit(lambda dx: jax.jvp(lambda x: matmul(x, chip), (x,), (dx,))[1])(x),
        np.asarray(x) @ weights,
    )
    same(
        jax.jit(jax.grad(lambda x: jnp.sum(y * matmul(x, chip))))(x),
        np.asarray(y) @ weights.T,
    )
    same(
        jax.grad(lambda W: jnp.sum(crossbar.programmed_weights(make(W, KEY))))(W),
        np.ones_like(W),
    )
