"""Ideas beyond the paper: their gradients, products, counts. Oracles: finite differences, dense NumPy, a callback."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.runs import ranking
from lorafusion_jax.training import fit as fit_lib
from lorafusion_jax.training.loss import batch_logits, objective
from lorafusion_jax.training.problem import Problem

_ROOT = Path(__file__).resolve().parents[2]
_TASK = _ROOT / "examples" / "small" / "tasks" / "double_digit"
_MODEL = tiny.t5()
_GRAPH, _BASE = nnx.split(_MODEL)
_INDEX = jnp.array([2, 0])
_FUSION, _PLAIN = Fusion(), Fusion(magnitudes=False)


def _problem(method, frozen, index=_INDEX):
    return Problem(graph=_GRAPH, method=method, frozen=frozen, index=index)


@pytest.fixture(scope="module", autouse=True)
def experiments():
    """The folder of the experiments, whose scripts import each other as if from there."""
    sys.path.insert(0, str(_ROOT / "experiments"))
    yield
    sys.path.remove(str(_ROOT / "experiments"))


@pytest.fixture(scope="module")
def beyond(experiments):
    return importlib.import_module("beyond")


@pytest.fixture(scope="module")
def ideas(experiments):
    return importlib.import_module("_beyond")


@pytest.fixture(scope="module")
def newton(experiments):
    return importlib.import_module("_gauss_newton")


@pytest.fixture(scope="module")
def frozen():
    return tiny.frozen(_MODEL)


def _losses(frozen, method):
    @jax.jit
    def loss(params):
        return objective(params, tiny.batch(), _problem(method, frozen), jnp.float32(0))[0]

    return loss


def test_modules_are_ranked_by_descent_or_by_size_of_the_blocks_gradients(ideas):
    gradient = jnp.array([[[1.0, -1.5], [-2.0, 1.0], [5.0, -4.9], [0.1, 0.1]]])
    np.testing.assert_array_equal(ideas.best(gradient, 3, "module"), [[1, 0, 2]])
    np.testing.assert_array_equal(ideas.best(gradient, 2, "block"), [[2, 1]])


def test_a_start_from_the_gradient_descends_and_is_as_long_as_the_uniform_start(ideas):
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    start = ideas.descent_like(gradient, jnp.full((2, 4, 3), 0.25))
    np.testing.assert_allclose(np.abs(start).sum(axis=(1, 2)), 3.0, rtol=1e-6)
    ratio = np.asarray(start / gradient)
    assert np.all(ratio < 0)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)


def test_softmax_coefficients_sum_to_one_over_the_modules_that_are_there(ideas, frozen):
    method = ideas.SoftmaxFusion(Fusion())
    params = method.init(frozen, _INDEX, jax.random.key(0))
    start = method.mixed(params, frozen, _INDEX)["coefficients"]
    # Module 0, second of the two, has no sites in the decoder's blocks.
    np.testing.assert_allclose(start, [[0.5, 0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0, 0]], atol=1e-7)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)
    moved = jax.jit(method.mixed)(params | {"coefficients": logits}, frozen, _INDEX)
    np.testing.assert_allclose(jnp.sum(moved["coefficients"], axis=0), 1, atol=1e-6)
    exp = np.exp(np.asarray(logits[:, :3], np.float64))
    np.testing.assert_allclose(moved["coefficients"][:, :3], exp / exp.sum(axis=0), rtol=1e-5)
    got = _losses(frozen, method)(params | {"coefficients": logits})
    np.testing.assert_allclose(got, _losses(frozen, Fusion())(moved), rtol=1e-6)


def test_pruned_modules_are_as_if_they_were_not_there(ideas, frozen):
    c = jnp.array([[[0.1, -0.2, 0.1, 0.0, 0.1], [0.4, -0.4, 0.4, 0.4, -0.4], [0.3, 0.1, 0.1, -0.3, 0.2]]])
    kept = ideas.without_smallest(c, 2)
    np.testing.assert_array_equal(kept[0], np.asarray(c[0]) * [[0], [1], [1]])

    @jax.jit
    def logits(c, index):
        params = _FUSION.init(frozen, index, jax.random.key(0)) | {"coefficients": c}
        return batch_logits(params, tiny.batch(), _problem(_FUSION, frozen, index))[0]

    whole = logits(kept[0], jnp.array([0, 1, 2]))
    np.testing.assert_allclose(whole, logits(c[0, 1:], jnp.array([1, 2])), atol=1e-5)


@jax.jit
def _logits(frozen, c):
    return batch_logits({"coefficients": c}, tiny.batch(), _problem(_PLAIN, frozen))[0]


def _dense(frozen, c):
    """The gradient and J^T H J of the mean cross-entropy, with J a matrix, in NumPy and float64."""
    labels = np.asarray(tiny.batch().labels).reshape(-1)
    z = np.asarray(_logits(frozen, c), np.float64).reshape(len(labels), -1)
    # Forward: compiled for a CPU, jax.jacrev of a norm and a product came out wrong (jax 0.10.2).
    J = np.asarray(jax.jit(jax.jacfwd(lambda c: _logits(frozen, c)))(c), np.float64).reshape(*z.shape, -1)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    gradient, product = 0, 0
    real = np.flatnonzero(labels != -100)
    for t in real:
        gradient = gradient + J[t].T @ (p[t] - np.eye(len(p[t]))[labels[t]]) / len(real)
        product = product + J[t].T @ (np.diag(p[t]) - np.outer(p[t], p[t])) @ J[t] / len(real)
    return gradient, product


@pytest.mark.long
def test_a_converged_step_equals_the_dense_solution(newton, frozen):
    c, damping = 0.1 * tiny.coefficients((2, 5)), 0.05
    fit = newton.Fit(c, jnp.float32(damping))
    problem = _problem(_PLAIN, frozen, _INDEX[None])
    seeds = jax.tree.map(lambda a: jnp.asarray(a)[None], (fit, tiny.batch()))
    new, metrics = newton.step_seeds(*seeds, problem.replace(path="map"), iterations=30)
    gradient, product = _dense(frozen, c)
    wanted = -np.linalg.solve(product + damping * np.eye(len(gradient)), gradient)
    assert metrics["candidate"] < metrics["loss"]
    got = np.asarray(new.coefficients[0] - c).reshape(-1)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    vmapped, _ = newton.step_seeds(*seeds, problem, iterations=30)
    np.testing.assert_allclose(vmapped.coefficients, new.coefficients, atol=1e-5)
    # The damping follows the ratio of the descent to what the quadratic model predicted.
    predicted = -(gradient @ wanted + 0.5 * wanted @ product @ wanted)
    ratio = float(metrics["loss"][0] - metrics["candidate"][0]) / predicted
    assert ratio > 0.8 or 0.3 < ratio < 0.7  # away from where the rule changes
    assert new.damping[0] == pytest.approx(damping / 4 if ratio > 0.75 else damping)


@pytest.mark.usefixtures("own_programs")
def test_a_step_that_raises_the_loss_is_taken_back(newton, frozen, monkeypatch):
    c = 0.1 * tiny.coefficients((2, 5))
    monkeypatch.setattr(newton, "conjugate_gradients", lambda product, right, n: (-0.1 * right, right))
    fit = newton.Fit(c, jnp.float32(0.05))
    problem = _problem(_PLAIN, frozen)
    new, metrics = jax.jit(lambda fit: newton.step(fit, tiny.batch(), problem, iterations=1))(fit)
    assert metrics["candidate"] > metrics["loss"]
    np.testing.assert_array_equal(new.coefficients, c)
    assert new.damping == pytest.approx(0.2)


@pytest.mark.long
@pytest.mark.usefixtures("own_programs")
def test_a_step_passes_the_rows_that_it_counts(newton, frozen, monkeypatch):
    """Counted where they pass: an identity behind the logits calls back in forward, tangent and backward direction."""
    passed = {"forward": 0, "tangent": 0, "backward": 0}

    def counted(what, value):
        def count(value):
            passed[what] += value.shape[0]
            return value

        return jax.pure_callback(count, jax.ShapeDtypeStruct(value.shape, value.dtype), value)

    @jax.custom_jvp
    def identity(logits):
        return counted("forward", logits)

    @identity.defjvp
    def _(primals, tangents):
        def forward(_, tangent):
            return counted("tangent", tangent)

        def backward(_, cotangent):
            return counted("backward", cotangent)

        return identity(*primals), jax.custom_derivatives.linear_call(forward, backward, (), *tangents)

    def logits(*args, **kwargs):
        found, metrics = batch_logits(*args, **kwargs)
        return identity(found), metrics

    monkeypatch.setattr(newton, "batch_logits", logits)
    batch, iterations = tiny.batch(rows=3), 4
    fit = newton.Fit(0.1 * tiny.coefficients((2, 5)), jnp.float32(0.05))
    problem = _problem(_PLAIN, frozen)
    jax.block_until_ready(jax.jit(lambda fit: newton.step(fit, batch, problem, iterations=iterations))(fit))
    forward, backward = newton.rows_of_step(3, iterations)
    assert (passed["forward"], passed["tangent"]) == (3 * 2, 3 * iterations)
    assert (passed["forward"] + passed["tangent"], passed["backward"]) == (forward, backward)


def test_conjugate_gradients_stand_still_when_solved(newton):
    right = jnp.array([1.0, 2.0])
    x, residual = newton.conjugate_gradients(lambda v: 2 * v, right, 5)
    np.testing.assert_allclose(x, right / 2)
    np.testing.assert_array_equal(residual, 0)


@pytest.fixture
def rows_seen(ideas, monkeypatch):
    """Rows that the programs of training are given, forward and backward, by seed; stand-ins compute nothing."""
    seen = {"forward": 0, "backward": 0}

    def watch(module, name, answer, backward):
        def stand_in(first, batch, *args, **kwargs):
            rows = int(np.sum(batch.row_mask)) // batch.row_mask.shape[0]
            seen["forward"] += rows
            seen["backward"] += rows * backward
            return answer(first)

        monkeypatch.setattr(module, name, stand_in)

    watch(
        fit_lib,
        "train_seeds",
        lambda state: (state._replace(step=state.step + 1), {"loss": np.zeros(1)}),
        backward=True,
    )
    watch(fit_lib, "seed_entropies", lambda params: jnp.ones(len(params["coefficients"])), backward=False)
    watch(ranking, "coefficient_gradients", lambda params: 1 + params["coefficients"], backward=True)
    return seen


def test_ideas_pass_the_rows_that_they_report_and_no_more_than_plain_fusion(beyond, ideas, rows_seen):
    options = beyond.BeyondOptions(epochs=2)
    found = {}
    for name in ("LoRAFusion", "best 5 by gradient", "gradient start"):
        variant = beyond.variants(())[name]
        found[name] = variant.train(beyond._fuse_options(options, _TASK, variant, (1, 2)), **variant.settings)
        assert found[name].forward_rows == rows_seen["forward"]
        assert found[name].backward_rows == rows_seen["backward"]
        rows_seen |= {"forward": 0, "backward": 0}
    # Two epochs of 95 rows and 5 that validate; one epoch, and one pass beforehand.
    counts = [(t.forward_rows, t.backward_rows) for t in found.values()]
    assert counts == [(200, 190), (195, 190), (195, 190)]
    ranked = found["best 5 by gradient"].setup
    index, pool = ranked.problem.index, ranked.problem.frozen.pool
    assert index.shape == (2, 5) and pool is not None
    names = np.array(pool.names)
    assert [tuple(names[row]) for row in np.asarray(index)] == list(ranked.modules)


@pytest.mark.nightly
def test_a_resumed_run_repeats_nothing(beyond, monkeypatch, tmp_path, capsys):
    asked = ["--tasks", str(_TASK), "--ideas", "prune", "--epochs", "1", "--test-rows", "4", "--out", str(tmp_path)]
    run = []
    evaluate_seeds = beyond.evaluate_seeds

    def watched(setup, options, params):
        run.append(options.seeds)
        return evaluate_seeds(setup, options, params)

    monkeypatch.setattr(beyond, "evaluate_seeds", watched)
    beyond.main([*asked, "--seeds", "1"])
    file = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["LoRAFusion", "pruned to 15", "pruned to 10", "pruned to 5"]
    assert (tmp_path / "report" / "report.html").is_file()
    assert "[4/4] double_digit, pruned to 5" in capsys.readouterr().err
    # As if killed before the last row: nothing else is run again.
    first = "".join(json.dumps(row) + "\n" for row in rows[:-1])
    file.write_text(first)
    run.clear()
    beyond.main([*asked, "--seeds", "1"])
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.read_text().startswith(first)
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    assert run == [(1,)]
    beyond.main([*asked, "--seeds", "1"])
    assert run == [(1,)]
    # Another seed is run alone.
    beyond.main([*asked, "--seeds", "1", "2"])
    assert run[1:] == [(2,)] * 4
    keys = [(row["method"], row["seed"]) for row in map(json.loads, file.read_text().splitlines())]
    assert len(keys) == len(set(keys)) == 8
    asked[asked.index("--epochs") + 1] = "2"
    with pytest.raises(
        ValueError, match=r"LoRAFusion, seed 1 was run with other settings \(epochs was 1, is 2\): give another --out"
    ):
        beyond.main([*asked, "--seeds", "1"])


def test_what_cannot_be_run(beyond, ideas, tmp_path):
    with pytest.raises(ValueError, match="no task or no seed: give at least one of each"):
        beyond.main(["--tasks", "--out", str(tmp_path)])
    options = beyond.BeyondOptions(epochs=1)

    def run(name):
        variant = beyond.variants(())[name]
        variant.train(beyond._fuse_options(options, _TASK, variant, (1,)), **variant.settings)

    with pytest.raises(ValueError, match="epochs 1, but 1 is spent beforehand: give more"):
        run("gradient start")
    with pytest.raises(ValueError, match="epochs 1 passes 195 rows, one step of 2 iterations 665: give more --epochs"):
        run("Gauss-Newton, 2 CG")
