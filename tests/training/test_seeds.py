"""Seeds x learning rates as one program against runs of their own at those rates."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest

from lorafusion_jax.methods.fusion import PRESETS
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.runs.prepare import prepare
from lorafusion_jax.tasks import Split
from lorafusion_jax.training.fit import fit, recipe_rates, start

pytestmark = pytest.mark.usefixtures("fusion_emitters")

_SEEDS = (1, 2)
_RATES = ((0.05, 0.02), (0.3, 0.003), (0.0, 0.02))  # of coefficients and magnitudes
_RECIPE = dataclasses.replace(PRESETS["default"], modules=2, epochs=2, batch_size=48, l2=1e-3, l1=1e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return one_block.cut(tmp_path_factory.mktemp("small"))


def _trained(small, pairs, seed_mode):
    """Return the last state of seeds at (rate of coefficients, rate of magnitudes), an entry for each pair."""
    base, pool = small
    seeds = tuple(seed for seed, _ in pairs)
    options = FuseOptions(
        base=str(base),
        pool=str(pool),
        task=str(one_block.SMALL / "tasks" / "double_digit"),
        seeds=tuple(dict.fromkeys(seeds)),
        recipe=_RECIPE,
        seed_mode=seed_mode,
    )
    setup = prepare(options)
    place = np.array([options.seeds.index(seed) for seed in seeds])
    assert setup.split is not None
    rows = Split(setup.split.train[place], setup.split.validation[place])
    setup = dataclasses.replace(setup.with_problem(index=setup.problem.index[place]), split=rows)
    rates = recipe_rates(setup.problem.method, _RECIPE, len(pairs))
    of_group = dict(zip(("coefficients", "magnitudes"), zip(*(rate for _, rate in pairs), strict=True), strict=True))
    learning_rate = rates.learning_rate | {group: jnp.asarray(of_group[group], jnp.float32) for group in of_group}
    state = start(setup.problem, seeds)
    rates = rates._replace(learning_rate=learning_rate)
    return fit(setup.problem, setup.rows, state, _RECIPE, seeds, rates=rates)


def _entry(state, number):
    return jax.tree.map(lambda leaf: np.asarray(leaf[number]), state)


@pytest.fixture(scope="module")
def swept(small):
    pairs = list(itertools.product(_SEEDS, _RATES))
    return pairs, _trained(small, pairs, "sequential")


@pytest.mark.nightly
def test_seeds_and_rates_equal_runs_of_their_own(small, swept):
    pairs, together = swept
    for number, pair in enumerate(pairs):
        alone = _trained(small, [pair], "sequential")
        for a, b in zip(jax.tree.leaves(_entry(together, number)), jax.tree.leaves(_entry(alone, 0)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rates_are_the_recipes_own_where_none_are_given(small, swept):
    """The program of given rates is that of a recipe, which is what a run trains."""
    pairs, together = swept
    (coefficients, magnitudes), base = _RATES[1], dataclasses.replace(_RECIPE)
    recipe = dataclasses.replace(base, lr_coefficients=coefficients, lr_magnitudes=magnitudes)
    options = FuseOptions(
        base=str(small[0]),
        pool=str(small[1]),
        task=str(one_block.SMALL / "tasks" / "double_digit"),
        seeds=(2,),
        recipe=recipe,
        seed_mode="sequential",
    )
    setup = prepare(options)
    own = fit(setup.problem, setup.rows, start(setup.problem, (2,)), recipe, (2,))
    for a, b in zip(
        jax.tree.leaves(_entry(own, 0)), jax.tree.leaves(_entry(together, pairs.index((2, _RATES[1])))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_each_entry_goes_its_own_way(swept):
    pairs, together = swept
    start_of = 1 / 2  # uniform over two modules
    moved = np.abs(np.asarray(together.params["coefficients"]) - start_of).max(axis=(1, 2))
    for (_, (rate, _)), distance in zip(pairs, moved, strict=True):
        assert distance == 0 if rate == 0 else distance > rate / 10
    flat = np.asarray(together.params["magnitudes"]["encoder.self.q"]).reshape(len(pairs), -1)
    assert len(np.unique(flat, axis=0)) == len(pairs)


@pytest.mark.nightly
def test_batched_entries_equal_mapped_ones(small, swept):
    pairs, together = swept
    batched = _trained(small, pairs, "batched")
    for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(batched.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
