"""Runs whose modules are chosen by one backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import recipes
import tiny

import lorafusion_jax as lf
from lorafusion_jax.runs import load_setup, run_path
from lorafusion_jax.runs.start import gradient_at_zero


def _options(folder, **changes):
    values = {
        "choose": "gradient",
        "modules": 3,
        "epochs": 1,
        "batch_size": 32,
        "name": "ranked",
    } | changes
    return recipes.small_run((folder / "base", folder / "pool"), folder, **values)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one_block.cut(folder, adapters=None)
    options = _options(folder)
    return options, lf.fuse(options)


def test_a_run_fuses_the_modules_with_the_least_gradient_at_zero(ranked):
    options, results = ranked
    setup = load_setup(options)
    assert [len(modules) for modules in setup.modules] == [26, 26]
    gradient = gradient_at_zero(
        setup.problem, options.seeds, list(setup.rows.once(95))
    )  # in one batch
    for seed, modules, descent in zip(
        results.seeds, setup.modules, -gradient.sum(axis=2), strict=True
    ):
        assert seed["modules"] == [modules[i] for i in np.argsort(-descent)[:3]]
        # 95 rows trained once and ranked once, 5 validated.
        assert (seed["forward_rows"], seed["backward_rows"]) == (195, 190)
    assert any(
        "digit" in name for name in results.seeds[0]["modules"]
    )  # the task's own character op


def test_the_gradient_is_a_finite_difference_of_the_loss():
    problem = tiny.problem(lf.Fusion(magnitudes=False), tiny.frozen(tiny.t5()))
    of_seed = jax.tree.map(lambda leaf: np.asarray(leaf)[None], tiny.batch())
    (gradient,) = gradient_at_zero(
        problem.replace(index=problem.index[None]), (0,), [of_seed]
    )
    size = float(np.sum(gradient**2))
    step = 1e-2 / size**0.5
    ahead = lf.objective(
        {"coefficients": jnp.asarray(1 * step * gradient)}, tiny.batch(), problem
    )[1]
    behind = lf.objective(
        {"coefficients": jnp.asarray(-1 * step * gradient)}, tiny.batch(), problem
    )[1]
    slope = float(ahead["cross_entropy"] - behind["cross_entropy"]) / (2 * step)
    assert slope == pytest.approx(size, rel=0.02)


def test_rows_count_alike_in_batches_of_any_size(ranked):
    options, _ = ranked
    setup = load_setup(options)
    in_one = gradient_at_zero(setup.problem, options.seeds, list(setup.rows.once(95)))
    in_batches = gradient_at_zero(
        setup.problem, options.seeds, list(setup.rows.once(60))
    )
    np.testing.assert_allclose(in_batches, in_one, rtol=1e-3, atol=1e-6)


def test_a_run_that_chose_is_resumed_and_evaluated_with_its_modules(ranked):
    options, results = ranked
    rows = recipes.evaluate(run=run_path(options))
    for row, seed in zip(rows, results.seeds, strict=True):
        assert row == {name: seed[name] for name in row}
    _, params, config = lf.load_run(run_path(options))
    (run_path(options) / "results.json").unlink()
    again = lf.fuse(dataclasses.replace(options, resume=True))
    assert again.seeds == results.seeds
    assert [seed["modules"] for seed in again.seeds] == config["modules"]
    assert params["coefficients"].shape == (2, 3, 2)
