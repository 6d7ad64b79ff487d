"""Baselines against the matrices that they are by definition, in float64, and their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax.adapters.norms import norms
from lorafusion_jax.adapters.updates import WeightDecomposed
from lorafusion_jax.io.export import merged_base
from lorafusion_jax.methods.full import FullFineTuning
from lorafusion_jax.methods.lora import LoRA
from lorafusion_jax.methods.magnitudes import Magnitudes
from lorafusion_jax.methods.vera import VeRA
from lorafusion_jax.models.architecture import kernels
from lorafusion_jax.models.t5 import T5
from lorafusion_jax.training.frozen import Frozen
from lorafusion_jax.training.loss import objective
from lorafusion_jax.training.problem import Problem

_MODEL = T5(tiny.CONFIG, rngs=nnx.Rngs(0))
_GRAPH, _BASE = nnx.split(_MODEL)
_SITES = tuple((name, site) for name, site in tiny.CONFIG.sites.items() if name.rpartition(".")[2] in ("q", "wo"))
_INDEX = jnp.arange(0)


def _problem(method, frozen, index=_INDEX):
    return Problem(graph=_GRAPH, method=method, frozen=frozen, index=index)


def _frozen(method) -> Frozen:
    projections = method.projections(jax.random.key(0)) if isinstance(method, VeRA) else None
    adapted = {name: kernels(_MODEL)[name] for name, _ in _SITES}
    return Frozen(_BASE, norms=norms(adapted), prepared=projections)


def _moved(params, seed=1):
    """The numbers that a method starts from, each moved by something of its own size."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype) for leaf in leaves]
    return tree.unflatten(moved)


def _merged(method, params):
    """Site -> [L, d_in, d_out]: the matrices that the adapted model multiplies by."""
    adapters, _ = jax.jit(method.adapters)(params, _frozen(method), _INDEX)
    merged = kernels(merged_base(_MODEL, adapters))
    return {name: np.asarray(merged[name], np.float64) for name, _ in _SITES}


def _definition(method, params, name) -> np.ndarray:
    W = np.asarray(kernels(_MODEL)[name], np.float64)
    if isinstance(method, Magnitudes):
        return W / np.linalg.norm(W, axis=1, keepdims=True) * np.asarray(params["magnitudes"][name])[:, None]
    if isinstance(method, VeRA):
        A, B = (np.asarray(m, np.float64) for m in method.projections(jax.random.key(0)))
        d, b = (np.asarray(params["vera"][part][name], np.float64) for part in "db")
        return W + (A[: W.shape[1]] * d[:, None]) @ (B[:, : W.shape[2]] * b[:, None])
    A, B = (np.asarray(params["lora"][part][name], np.float64) for part in "AB")
    W = W + method.alpha / method.rank * A @ B
    if method.dora:
        W = W / np.linalg.norm(W, axis=1, keepdims=True) * np.asarray(params["magnitudes"][name])[:, None]
    return W


_METHODS = {
    "lora": LoRA(sites=_SITES, rank=3, alpha=5.0),
    "dora": LoRA(sites=_SITES, rank=3, alpha=5.0, dora=True),
    "vera": VeRA(sites=_SITES, rank=7),
    "magnitudes": Magnitudes(),
}
_ALL = _METHODS | {"full": FullFineTuning()}


@pytest.mark.parametrize("method", _METHODS.values(), ids=_METHODS)
def test_adapters_are_the_definition(method):
    params = method.init(_frozen(method), _INDEX, jax.random.key(3))
    started = _merged(method, params)
    for name, _ in _SITES:  # no method changes the base before its first step
        np.testing.assert_allclose(started[name], np.asarray(kernels(_MODEL)[name]), rtol=1e-5, atol=1e-6)
    params = _moved(params)
    for name, merged in _merged(method, params).items():
        np.testing.assert_allclose(merged, _definition(method, params, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=() if name == "lora" else pytest.mark.long) for name, method in _ALL.items()],
    ids=_ALL,
)
def test_gradients_are_finite_differences(method):
    """DoRA's apart, whose norm counts as a constant: its direction is checked on the magnitudes alone."""
    frozen, batch = _frozen(method), tiny.batch()
    params = method.init(frozen, _INDEX, jax.random.key(3))
    params = params if isinstance(method, FullFineTuning) else _moved(params)

    def loss(params):
        return objective(params, batch, _problem(method, frozen), jnp.float32(0))[0]

    gradient = jax.jit(jax.grad(loss))(params)
    along = (
        gradient | {"lora": jax.tree.map(jnp.zeros_like, gradient["lora"])}
        if "magnitudes" in gradient and ("lora" in gradient)
        else gradient
    )
    size = sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(along))
    assert size > 0
    step = 1e-2 / size**0.5
    ahead, behind = (
        jax.jit(loss)(jax.tree.map(lambda p, g, sign=sign: p + sign * step * g, params, along)) for sign in (1, -1)
    )
    assert float(ahead - behind) / (2 * step) == pytest.approx(size, rel=0.02)


def test_the_norm_of_a_dora_update_counts_as_constant():
    shapes = (7, 5), (7, 2), (2, 5), (5,), (3, 7), (3, 5)
    rng = np.random.default_rng(0)
    W, A, B, m, x, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def value(A, B, m):
        return jnp.sum(direction * WeightDecomposed(A, B, m)(x, W))

    found = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(A, B, m)
    W, A, B, m, x, direction = (np.asarray(a, np.float64) for a in (W, A, B, m, x, direction))
    adapted = W + A @ B
    norm = np.linalg.norm(adapted, axis=0)
    of_update = x.T @ (direction * m / norm)
    wanted = of_update @ B.T, A.T @ of_update, np.sum(x @ adapted * direction / norm, axis=0)
    for got, of_matrix in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, of_matrix, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_runs_on_its_own_weights():
    method, frozen, batch = FullFineTuning(), Frozen(_BASE), tiny.batch()
    params = method.init(frozen, _INDEX, jax.random.key(0))
    other = T5(tiny.CONFIG, rngs=nnx.Rngs(1))
    elsewhere = Frozen(nnx.state(other))
    loss = {}
    for name, at in (("other's", elsewhere), ("swapped in", frozen)):
        weights = method.init(elsewhere, _INDEX, jax.random.key(0))
        loss[name] = objective(weights, batch, _problem(method, at), jnp.float32(0))[0]
    assert loss["other's"] == loss["swapped in"]
    own = objective(params, batch, _problem(method, frozen), jnp.float32(0))[0]
    assert abs(float(own - loss["other's"])) > 0.01


def test_lora_starts_from_a_uniform_draw_for_every_site():
    drawn = _METHODS["lora"].init(Frozen(_BASE), _INDEX, jax.random.key(3))["lora"]["A"]
    for name, site in _SITES:
        largest, bound = float(jnp.abs(drawn[name]).max()), site.d_in**-0.5
        assert 0.95 * bound < largest <= bound
    assert (drawn["decoder.self.q"] != drawn["decoder.cross.q"]).all()


def test_veras_matrices_are_kaiming_uniform():
    method = dataclasses.replace(_METHODS["vera"], rank=500)
    A, B = method.projections(jax.random.key(0))
    start = method.init(Frozen(_BASE), _INDEX, jax.random.key(3))["vera"]
    assert all((d == np.float32(0.1)).all() for d in start["d"].values())  # PEFT's
    widest_in, widest_out = (max(getattr(site, d) for _, site in _SITES) for d in ("d_in", "d_out"))
    assert A.shape == (widest_in, 500) and B.shape == (500, widest_out)
    for matrix, fan in ((A, widest_in), (B, 500)):
        assert float(jnp.abs(matrix).max()) <= (6 / fan) ** 0.5
        assert float(jnp.std(matrix)) == pytest.approx((2 / fan) ** 0.5, rel=0.02)
