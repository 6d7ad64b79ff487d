"""Baselines against the matrices that they are by definition, in float64, and their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.methods.magnitudes import Magnitudes
from lorafusion_jax.methods.vera import VeRA
from lorafusion_jax.parts import FullFineTuning

_MODEL = tiny.t5()
_BASE = nnx.state(_MODEL)
_SITES = tuple((name, site) for name, site in tiny.CONFIG.sites.items() if name.rpartition(".")[2] in ("q", "wo"))
_INDEX = jnp.arange(0)
_METHODS = {
    "lora": lf.LoRA(sites=_SITES, rank=3, alpha=5.0),
    "dora": lf.LoRA(sites=_SITES, rank=3, alpha=5.0, dora=True),
    "vera": VeRA(sites=_SITES, rank=7),
    "magnitudes": Magnitudes(tuple(name for name, _ in _SITES)),
}
_ALL = _METHODS | {"full": FullFineTuning()}


def _frozen(method):
    return method.prepare(lf.Frozen(_BASE), lf.kernels(_MODEL))


def _moved(params, seed=1):
    """The numbers that a method starts from, each moved by something of its own size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), params)


def _merged(method, params):
    """Site -> [L, d_in, d_out]: the matrices that the adapted model multiplies by."""
    adapters, _ = jax.jit(method.adapters)(params, _frozen(method), _INDEX)
    merged = lf.kernels(lf.merged_base(_MODEL, adapters))
    return {name: np.asarray(merged[name], np.float64) for name, _ in _SITES}


def _definition(method, params, name):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    W = np.asarray(lf.kernels(_MODEL)[name], np.float64)
    if isinstance(method, VeRA):
        A, B = (np.asarray(m, np.float64) for m in method.projections(jax.random.key(0)))
        d, b = (params["vera"][part][name] for part in "db")
        return W + (A[: W.shape[1]] * d[:, None]) @ (B[:, : W.shape[2]] * b[:, None])
    if isinstance(method, lf.LoRA):
        W = W + method.alpha / method.rank * params["lora"]["A"][name] @ params["lora"]["B"][name]
    if "magnitudes" in params:
        W = W / np.linalg.norm(W, axis=1, keepdims=True) * params["magnitudes"][name][:, None]
    return W


@pytest.mark.parametrize("method", _METHODS.values(), ids=_METHODS)
def test_adapters_are_the_definition(method):
    params = method.init(_frozen(method), _INDEX, jax.random.key(3))
    for name, started in _merged(method, params).items():  # no method changes the base before its first step
        np.testing.assert_allclose(started, np.asarray(lf.kernels(_MODEL)[name]), rtol=1e-5, atol=1e-6)
    params = _moved(params)
    for name, merged in _merged(method, params).items():
        np.testing.assert_allclose(merged, _definition(method, params, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "lora" else pytest.mark.long) for name in _ALL]
)
def test_gradients_are_finite_differences(name):
    """DoRA's norm counts as a constant, so its direction is checked on the magnitudes alone."""
    method = _ALL[name]
    problem = tiny.problem(method, _frozen(method), ())
    params = problem.init(jax.random.key(3))
    params = params if name == "full" else _moved(params)
    along = jax.jit(jax.grad(tiny.loss))(params, problem)
    if name == "dora":
        along |= {"lora": jax.tree.map(jnp.zeros_like, along["lora"])}
    size = sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(along))
    assert size > 0
    step = 1e-2 / size**0.5
    ahead, behind = (
        jax.jit(tiny.loss)(jax.tree.map(lambda p, g, sign=sign: p + sign * step * g, params, along), problem)
        for sign in (1, -1)
    )
    assert float(ahead - behind) / (2 * step) == pytest.approx(size, rel=0.02)


def test_the_norm_of_a_dora_update_counts_as_constant():
    shapes = (7, 5), (7, 2), (2, 5), (5,), (3, 7), (3, 5)
    rng = np.random.default_rng(0)
    W, A, B, m, x, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def value(A, B, m):
        return jnp.sum(direction * lf.WeightDecomposed(A, B, m)(x, W))

    found = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(A, B, m)
    W, A, B, m, x, direction = (np.asarray(a, np.float64) for a in (W, A, B, m, x, direction))
    adapted = W + A @ B
    norm = np.linalg.norm(adapted, axis=0)
    of_update = x.T @ (direction * m / norm)
    wanted = of_update @ B.T, A.T @ of_update, np.sum(x @ adapted * direction / norm, axis=0)
    for got, of_matrix in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, of_matrix, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_replaces_the_frozen_weights():
    method, loss = FullFineTuning(), jax.jit(tiny.loss)
    here, elsewhere = (tiny.problem(method, lf.Frozen(nnx.state(tiny.t5(seed=seed))), ()) for seed in (0, 1))
    weights = elsewhere.init(jax.random.key(0))
    assert loss(weights, elsewhere) == loss(weights, here)
    assert abs(float(loss(here.init(jax.random.key(0)), here) - loss(weights, here))) > 0.01


def test_random_starts_are_drawn_as_in_peft():
    drawn = _METHODS["lora"].init(lf.Frozen(_BASE), _INDEX, jax.random.key(3))["lora"]["A"]
    for name, site in _SITES:
        assert 0.95 * site.d_in**-0.5 < float(jnp.abs(drawn[name]).max()) <= site.d_in**-0.5
    assert (drawn["decoder.self.q"] != drawn["decoder.cross.q"]).all()
    vera = dataclasses.replace(_METHODS["vera"], rank=500)
    start = vera.init(lf.Frozen(_BASE), _INDEX, jax.random.key(3))["vera"]
    assert all((d == np.float32(0.1)).all() for d in start["d"].values())
    widest_in, widest_out = (max(getattr(site, d) for _, site in _SITES) for d in ("d_in", "d_out"))
    A, B = vera.projections(jax.random.key(0))
    assert A.shape == (widest_in, 500) and B.shape == (500, widest_out)
    for matrix, fan in ((A, widest_in), (B, 500)):  # Kaiming uniform
        assert float(jnp.abs(matrix).max()) <= (6 / fan) ** 0.5
        assert float(jnp.std(matrix)) == pytest.approx((2 / fan) ** 0.5, rel=0.02)
