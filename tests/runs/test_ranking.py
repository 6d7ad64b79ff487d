"""Modules chosen by one backward pass: the gradient against finite differences, and runs that choose by it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import recipes
import tiny
from flax import nnx

from lorafusion_jax._fuse import fuse
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.runs import ranking
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.runs.predict import EvaluateOptions, evaluate_run
from lorafusion_jax.runs.prepare import prepare
from lorafusion_jax.runs.run import load_run, run_path
from lorafusion_jax.training.loss import objective
from lorafusion_jax.training.problem import Problem

_MODEL = tiny.t5()
_GRAPH, _BASE = nnx.split(_MODEL)
_INDEX = jnp.array([2, 0])
_FUSION, _PLAIN = Fusion(), Fusion(magnitudes=False)


def _problem(method, frozen, index=_INDEX):
    return Problem(graph=_GRAPH, method=method, frozen=frozen, index=index)


@pytest.fixture(scope="module")
def frozen():
    return tiny.frozen(_MODEL)


def _losses(frozen, method):
    @jax.jit
    def loss(params):
        return objective(params, tiny.batch(), _problem(method, frozen), jnp.float32(0))[0]

    return loss


def test_the_gradient_that_ranks_equals_finite_differences(frozen):
    method = _FUSION
    params = method.init(frozen, _INDEX, jax.random.key(0))
    params = params | {"coefficients": jnp.zeros_like(params["coefficients"])}
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], tiny.batch())
    seeds = jax.tree.map(lambda a: a[None], params)
    problem = _problem(method, frozen, _INDEX[None]).replace(seed_mode="sequential")
    got = ranking.coefficient_gradients(seeds, batch, problem)[0]
    # At c = 0 magnitudes rescale nothing, and their norm counts as constant: the oracle goes without them.
    loss = _losses(frozen, _PLAIN)
    wanted, eps = np.zeros(got.shape), 3e-3
    for place in np.ndindex(*got.shape):
        moved = np.zeros(got.shape, np.float32)
        moved[place] = eps
        wanted[place] = (
            (loss({"coefficients": jnp.asarray(moved)}) - loss({"coefficients": jnp.asarray(-moved)})) / 2 / eps
        )
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())
    assert np.all(np.asarray(got)[1, 3:] == 0) and np.all(np.abs(got)[0] > 0)  # module 0 has no decoder sites


@pytest.mark.long
def test_one_coefficient_a_module_descends_as_the_sum_of_its_blocks(frozen):
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], tiny.batch())

    def gradient(granularity):
        method = Fusion(granularity=granularity, magnitudes=False)
        c = method.init(frozen, _INDEX, jax.random.key(0))["coefficients"]
        params = {"coefficients": jnp.zeros_like(c)[None]}
        return ranking.coefficient_gradients(params, batch, _problem(method, frozen, _INDEX[None]))

    by_block, by_module = gradient("block"), gradient("global")
    np.testing.assert_allclose(jnp.sum(by_block, axis=2), by_module, atol=1e-6)
    wanted = np.argsort(np.asarray(by_module), axis=1)
    np.testing.assert_array_equal(ranking.most_descent(np.asarray(by_block), 2), wanted)


def _options(out: Path, **changes) -> FuseOptions:
    recipe = {"choose": "gradient", "modules": 3, "epochs": 1, "batch_size": 32, "max_new_tokens": 8}
    values = {
        "base": str(out / "base"),
        "pool": str(out / "pool"),
        "task": str(one_block.SMALL / "tasks" / "double_digit"),
        "seeds": (1, 2),
        "out": out,
        "name": "ranked",
        "test_rows": 5,
    }
    return recipes.options(recipe, **values | changes)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one_block.cut(folder, adapters=None)
    options = _options(folder)
    return options, fuse(options)


def test_a_run_fuses_the_modules_of_the_greatest_descent(ranked, monkeypatch):
    options, results = ranked
    setup = prepare(options)
    assert [len(modules) for modules in setup.modules] == [26, 26]
    gradient = np.asarray(ranking.gradients_at_zero(setup, options.seeds, batch_size=32)).sum(axis=2)
    for seed, modules, descent in zip(results["seeds"], setup.modules, -gradient, strict=True):
        assert seed["modules"] == [modules[i] for i in np.argsort(-descent)[:3]]
        # 95 rows trained once and ranked once, 5 validated.
        assert (seed["forward_rows"], seed["backward_rows"]) == (195, 190)
    assert any("digit" in name for name in results["seeds"][0]["modules"])  # the task's own character op

    def rows_at_zero(params, batch, problem):
        assert not params["coefficients"].any()
        return jnp.full_like(params["coefficients"], float(np.sum(batch.row_mask[0])))

    monkeypatch.setattr(ranking, "coefficient_gradients", rows_at_zero)
    assert (ranking.gradients_at_zero(setup, options.seeds, batch_size=32) == 95).all()


def test_a_run_that_chose_is_resumed_and_evaluated_with_its_modules(ranked):
    options, results = ranked
    rows = evaluate_run(EvaluateOptions(run=run_path(options)))
    for row, seed in zip(rows, results["seeds"], strict=True):
        assert row == {name: seed[name] for name in row}
    _, params, config = load_run(run_path(options))
    (run_path(options) / "results.json").unlink()
    again = fuse(dataclasses.replace(options, resume=True))
    assert again["seeds"] == results["seeds"]
    assert [seed["modules"] for seed in again["seeds"]] == config["modules"]
    assert params["coefficients"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition": "mix"}, "cannot choose modules of a mix"),
        ({"method": "mean-fusion"}, "use the method fusion or coefficients"),
        ({"adapters": ("double_next",)}, "--adapters names the modules already"),
        ({"modules": 5}, "5 modules to be chosen from a pool of 4"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    one_block.cut(tmp_path)
    with pytest.raises(ValueError, match=message):
        fuse(_options(tmp_path, **changes))
    assert not (tmp_path / "ranked").exists()
