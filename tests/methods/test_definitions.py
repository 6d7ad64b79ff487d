"""Every method against the matrices that it is by definition, in float64. A new one is an entry of `_MEMBERS`."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose

import lorafusion_jax as lf
from lorafusion_jax.io import load_arrays, save_arrays
from lorafusion_jax.methods import FullFineTuning, Magnitudes, VeRA

_MODEL = tiny.t5()
_KERNELS = lf.kernels(_MODEL)
_FROZEN = tiny.frozen(_MODEL)
_KEY = jax.random.key(3)
_POOL = _FROZEN.pool
_SITES = tuple(
    (name, site)
    for name, site in tiny.CONFIG.sites.items()
    if name.rpartition(".")[2] in ("q", "wo")
)
_LORA = lf.LoRA(sites=_SITES, rank=3, alpha=5.0)
_VERA = VeRA(sites=_SITES, rank=7)


class _Member(NamedTuple):
    """A method and what each adapted matrix is: a function of parameters in float64, a site and its W."""

    method: lf.Method
    matrix: Callable
    index: tuple[int, ...] = ()  # modules; without any a method starts at the base


def _of_lora(params, site, W):
    return _scaled(
        params,
        site,
        W
        + _LORA.alpha
        / _LORA.rank
        * params["lora"]["A"][site]
        @ params["lora"]["B"][site],
    )


def _of_vera(params, site, W):
    projections = _VERA.projections(jax.random.key(0))
    A = np.asarray(projections.A, np.float64)
    B = np.asarray(projections.B, np.float64)
    d = params["vera"]["d"][site]
    b = params["vera"]["b"][site]
    return W + (A[: W.shape[1]] * d[:, None]) @ (B[:, : W.shape[2]] * b[:, None])


def _scaled(params, site, W):
    if "magnitudes" in params:
        W = (
            W
            / np.linalg.norm(W, axis=1, keepdims=True)
            * params["magnitudes"][site][:, None]
        )
    return W


def _fused(index, composition="sum"):
    def matrix(params, site, W):
        c = params["coefficients"]
        updates = tiny.updates(
            _POOL, index, tiny.coefficient_of(c, _POOL, "block"), composition
        )
        return _scaled(
            params,
            site,
            W + np.stack([updates[site, layer] for layer in range(len(W))]),
        )

    return matrix


_MEMBERS = {
    "lora": _Member(_LORA, _of_lora),
    "dora": _Member(replace(_LORA, dora=True), _of_lora),
    "vera": _Member(_VERA, _of_vera),
    "magnitudes": _Member(Magnitudes(tuple(name for name, _ in _SITES)), _scaled),
    "fusion": _Member(lf.Fusion(differentiate_norm=True), _fused([2, 0]), (2, 0)),
    "mix": _Member(
        lf.Fusion(composition="mix", magnitudes=False), _fused([2, 0], "mix"), (2, 0)
    ),
}
_SOME_LONG = [
    pytest.param(name, marks=() if name == "lora" else pytest.mark.long)
    for name in (*_MEMBERS, "full")
]


def _problem(name):
    """The problem of a member, or of full fine-tuning, whose parameters are the base's weights."""
    method, _, index = _MEMBERS.get(name, _Member(FullFineTuning(), _scaled))
    return tiny.problem(
        method,
        method.precompute(lf.Frozen(_FROZEN.base, _POOL if index else None), _KERNELS),
        index,
    )


def _moved(params, seed=1):
    """The parameters that a method starts from, each moved by something of its own size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        params,
    )


def _adapters(problem, params):
    return jax.jit(problem.method.adapters)(params, problem.frozen, problem.index)[0]


@pytest.mark.parametrize("name", _MEMBERS)
def test_adapters_are_the_definition(name, tmp_path):
    """At the start, and from parameters that were moved, saved and loaded."""
    problem = _problem(name)
    member = _MEMBERS[name]
    start = problem.init(_KEY)
    save_arrays(tmp_path / "saved", "parameters", _moved(start), {})
    loaded, _ = load_arrays(tmp_path / "saved", "parameters")
    for params in (start, loaded):
        adapters = _adapters(problem, params)
        merged = lf.kernels(lf.merged_base(_MODEL, adapters))
        exact = jax.tree.map(np.float64, jax.device_get(params))
        assert adapters
        for site in adapters:
            W = np.asarray(_KERNELS[site], np.float64)
            wanted = (
                W
                if params is start and not member.index
                else member.matrix(exact, site, W)
            )
            assert_allclose(merged[site], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _SOME_LONG)
def test_gradients_are_finite_differences(name):
    """DoRA's norm counts as a constant, so its direction is checked on the magnitudes alone."""
    problem = _problem(name)
    params = problem.init(_KEY)
    params = params if name == "full" else _moved(params)
    along = jax.jit(jax.grad(tiny.loss))(params, problem)
    if name == "dora":
        along |= {"lora": jax.tree.map(jnp.zeros_like, along["lora"])}
    size = sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(along))
    assert size > 0
    step = 1e-2 / size**0.5
    ahead = jax.jit(tiny.loss)(
        jax.tree.map(lambda p, g: p + step * g, params, along), problem
    )
    behind = jax.jit(tiny.loss)(
        jax.tree.map(lambda p, g: p - step * g, params, along), problem
    )
    assert float(ahead - behind) / (2 * step) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("name", _SOME_LONG)
def test_seeds_of_one_program_are_those_of_two(name):
    problem = _problem(name)
    keys = jax.random.split(_KEY, 2)
    together = jax.jit(
        jax.vmap(lambda key: tiny.loss(_moved(problem.init(key)), problem))
    )(keys)
    alone = [
        jax.jit(lambda key: tiny.loss(_moved(problem.init(key)), problem))(key)
        for key in keys
    ]
    assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize("name", _SOME_LONG)
def test_a_base_in_bfloat16_trains_the_same_numbers(name):
    """Parameters and gradients stay in float32."""
    exact = _problem(name)
    config = replace(tiny.CONFIG, dtype="bfloat16")
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact.frozen.base)
    frozen = replace(exact.frozen, base=base)
    narrow = exact.replace(graph=nnx.split(tiny.t5(config))[0], frozen=frozen)
    params = exact.init(_KEY)
    value_and_grad = jax.jit(jax.value_and_grad(tiny.loss))
    loss, slope = value_and_grad(params, narrow)
    wanted, exact_slope = value_and_grad(params, exact)
    assert float(loss) == pytest.approx(float(wanted), rel=0.02)
    for got, of_exact in zip(
        jax.tree.leaves(slope), jax.tree.leaves(exact_slope), strict=True
    ):
        assert got.dtype == jnp.float32
        assert_allclose(
            got, of_exact, atol=0.2 * float(jnp.max(jnp.abs(of_exact))) + 1e-6
        )


def test_the_norm_of_a_dora_update_counts_as_constant():
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    A = drawn(7, 2)
    B = drawn(2, 5)
    m = drawn(5)
    W = drawn(7, 5)
    x = drawn(3, 7)
    norm = np.linalg.norm(W + A @ B, axis=0)

    def adapted(A, B, m):
        return lf.WeightDecomposed(A, B, m)(x, W).sum()

    def wanted(A, B, m):
        return (x @ (W + A @ B) @ jnp.diag(m / norm)).sum()

    slopes = [jax.jit(jax.grad(f, (0, 1, 2)))(A, B, m) for f in (adapted, wanted)]
    for got, of_matrix in zip(*slopes, strict=True):
        assert_allclose(got, of_matrix, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_replaces_the_frozen_weights():
    method = FullFineTuning()
    loss = jax.jit(tiny.loss)
    here = tiny.problem(method, lf.Frozen(nnx.state(tiny.t5(seed=0))), ())
    elsewhere = tiny.problem(method, lf.Frozen(nnx.state(tiny.t5(seed=1))), ())
    weights = elsewhere.init(jax.random.key(0))
    assert loss(weights, elsewhere) == loss(weights, here)
    assert (
        abs(float(loss(here.init(jax.random.key(0)), here) - loss(weights, here)))
        > 0.01
    )


def test_random_starts_are_drawn_as_in_peft():
    drawn = _LORA.init(_FROZEN, jnp.arange(0), _KEY)["lora"]["A"]
    for name, site in _SITES:
        assert (
            0.95 * site.d_in**-0.5
            < float(jnp.abs(drawn[name]).max())
            <= site.d_in**-0.5
        )
    assert (drawn["decoder.self.q"] != drawn["decoder.cross.q"]).all()
    vera = replace(_VERA, rank=500)
    start = vera.init(_FROZEN, jnp.arange(0), _KEY)["vera"]
    assert all((d == np.float32(0.1)).all() for d in start["d"].values())
    widest_in = max((site.d_in for _, site in _SITES))
    widest_out = max((site.d_out for _, site in _SITES))
    A, B = vera.projections(jax.random.key(0))
    assert A.shape == (widest_in, 500) and B.shape == (500, widest_out)
    for matrix, fan in ((A, widest_in), (B, 500)):  # Kaiming uniform
        assert float(jnp.abs(matrix).max()) <= (6 / fan) ** 0.5
        assert float(jnp.std(matrix)) == pytest.approx((2 / fan) ** 0.5, rel=0.02)


_INDEX = jnp.array([2, 0, 1])


def test_a_fusion_with_other_adapters_is_not_exported_as_a_plain_one():
    class Squared(lf.Fusion):
        def adapters(self, params, frozen, index):
            return super().adapters(
                params | {"coefficients": params["coefficients"] ** 2}, frozen, index
            )

    params = Squared().init(_FROZEN, _INDEX, _KEY)
    assert Squared().as_fusion(params, _FROZEN, _INDEX) is None
    assert lf.Fusion().as_fusion(params, _FROZEN, _INDEX) is not None
