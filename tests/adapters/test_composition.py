"""Fusion by its definition: oracles in NumPy, float64."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny
from flax import nnx
from numpy.testing import assert_array_equal
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.adapters import column_names, expand
from lorafusion_jax.adapters.coefficients import initial, present, shape
from lorafusion_jax.adapters.composition import compose_in_basis
from lorafusion_jax.adapters.merges import merge
from lorafusion_jax.adapters.norms import PairTerms, pair_terms, pairs_are_smaller
from lorafusion_jax.adapters.updates import Dense, Outputs, precomputed
from lorafusion_jax.models import dense, set_matrices
from lorafusion_jax.models.weights import at_layer

_GRANULARITIES = ("global", "block", "site", "rank")
_INDEX = [3, 0, 2]  # of a pool of four
_MODEL = tiny.t5()
_KERNELS = lf.kernels(_MODEL)
_EPS = np.finfo(np.float32).eps


def _several(n, site, layer):
    """Ranks from 0 to 5, another one for every module, site and layer, and no more than 3 at some sites."""
    return (n + 2 * layer) % (4 if "cross" in site else 6)


def _full(n, site, layer):
    """Together three modules reach the rank of the matrices that they adapt."""
    return 6


# The modules of `_INDEX`, fused; compiled, since operations one by one take longer to compile than together.
@functools.partial(
    jax.jit, static_argnames=("granularity", "composition", "differentiate_norm")
)
def _fuse(c, pool, granularity, composition, **norms):
    coefficients = expand(c, pool, granularity)
    return lf.compose(pool, jnp.array(_INDEX), coefficients, composition, **norms)


def _close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance
    )


def _kernel(site, layer):
    return np.asarray(_KERNELS[site][layer], np.float64)


def _layer(tree, layer):
    return jax.tree.map(lambda a: a[layer], tree)


@pytest.mark.parametrize("granularity", _GRANULARITIES)
@pytest.mark.parametrize(
    ("composition", "ranks", "kind"),
    [
        ("mix", tiny.somewhere, lf.LowRank),
        ("sum", _several, lf.Modules),
        ("sum", _full, Dense),
    ],
)
@pytest.mark.parametrize("terms", [None, lf.gram, pair_terms])
def test_adapters_are_the_definition(composition, granularity, ranks, kind, terms):
    """With magnitudes, each column has the length of its magnitude."""
    if terms is pair_terms and (composition == "mix" or granularity == "rank"):
        return  # refused
    pool = tiny.pool(4, ranks)
    c = tiny.coefficients(shape(pool, len(_INDEX), granularity))
    gram = None
    magnitudes = None
    if terms is not None:
        gram = tiny.frozen(_MODEL, pool, terms).gram
        magnitudes = {site: 2.0 * norm for site, norm in lf.column_norms(gram).items()}
    adapters, floored = _fuse(
        c, pool, granularity, composition, gram=gram, magnitudes=magnitudes
    )
    assert adapters.keys() == pool.A.keys() and floored == 0
    assert all(isinstance(adapter, kind) for adapter in adapters.values())
    matrices = tiny.matrices(adapters, _KERNELS)
    updates = tiny.updates(
        pool, _INDEX, tiny.coefficient_of(c, pool, granularity), composition
    )
    for (site, layer), update in updates.items():
        W = _kernel(site, layer)
        wanted = W + update
        if terms is not None:
            length = 2.0 * np.linalg.norm(W, axis=0)
            wanted = length * wanted / np.linalg.norm(wanted, axis=0)
        _close(matrices[site][layer], wanted)


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("differentiate_norm", [False, True])
@pytest.mark.parametrize(
    ("composition", "ranks", "terms"),
    [
        ("mix", tiny.somewhere, lf.gram),
        ("sum", tiny.somewhere, lf.gram),
        ("sum", _full, lf.gram),
        ("sum", tiny.somewhere, pair_terms),
    ],
)
def test_gradients_and_the_norm_as_a_constant(
    composition, ranks, terms, differentiate_norm, tokens
):
    """Few tokens, and many, which a matrix that norms form already is faster for. Oracle: the definition in JAX."""
    site = "decoder.cross.v"
    pool = tiny.pool(4, ranks, names="v")
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(tokens, 16)), jnp.float32)
    direction = jnp.asarray(rng.normal(size=(2, tokens, 12)), jnp.float32)
    gram = tiny.frozen(_MODEL, pool, terms).gram
    magnitudes = {
        s: jnp.asarray(rng.uniform(0.5, 2, n.shape), jnp.float32)
        for s, n in lf.column_norms(gram).items()
    }

    def fused(c, magnitudes):
        adapters, _ = _fuse(
            c,
            pool,
            "global",
            composition,
            gram=gram,
            magnitudes=magnitudes,
            differentiate_norm=differentiate_norm,
        )
        return jax.vmap(lambda adapter, W: adapter(x, W))(
            adapters[site], _KERNELS[site]
        )

    def defined(c, magnitudes):
        c = c[None, :, None, None]
        A = c * pool.A[site][:, jnp.array(_INDEX)]
        B = pool.B[site][:, jnp.array(_INDEX)]
        if composition == "sum":
            update = jnp.sum(A @ B, axis=1)
        else:
            update = jnp.sum(A, axis=1) @ jnp.sum(c * B, axis=1)
        matrix = _KERNELS[site] + update
        norm = jnp.linalg.norm(matrix, axis=1, keepdims=True)
        norm = norm if differentiate_norm else jax.lax.stop_gradient(norm)
        adapted = matrix * magnitudes[site][:, None] / norm
        return jnp.einsum("ti,lio->lto", x, adapted)

    # Of both signs: the paper's code multiplies gradients by 2c.
    given = tiny.coefficients((3,)), magnitudes
    gradients = [
        jax.jit(jax.grad(lambda *p, f=f: jnp.sum(f(*p) * direction), (0, 1)))(*given)
        for f in (fused, defined)
    ]
    for got, wanted in zip(*map(jax.tree.leaves, gradients), strict=True):
        _close(got, wanted, 1e-4)


@pytest.mark.parametrize(
    ("composition", "terms", "c", "floored"),
    [
        *(("sum", lf.gram, c, c > 0.999) for c in (0.0, 0.99, 1 - 1e-5, 1.0)),
        *(("sum", pair_terms, c, c > 0.999) for c in (0.99, 1.0)),
        *(("mix", lf.gram, c, c > 0.999) for c in (0.0, 0.99, 1.0)),
    ],
)
def test_norms_near_cancellation_are_floored_and_counted(
    composition, terms, c, floored
):
    """Of a module whose product is -W at every encoder query."""
    site = "encoder.self.q"
    W = _KERNELS[site]
    unit = jnp.broadcast_to(jnp.eye(16), (3, 1, 16, 16))
    rank = {site: jnp.full((3, 1), 16)}
    pool = lf.LoraPool(
        A={site: unit}, B={site: -W[:, None]}, rank=rank, names=("minus W",)
    )
    frozen = tiny.frozen(_MODEL, pool, terms)
    method = lf.Fusion(composition=composition, granularity="global", start="uniform")
    params = method.init(frozen, jnp.arange(1), jax.random.key(0))
    # A mix is quadratic: its dW is -c^2 W.
    params["coefficients"] = jnp.float32([c if composition == "sum" else c**0.5])
    # 8 eps of what cancelled, ||W||^2 + ||dW||^2; else the difference keeps all digits but those that cancelled.
    wanted = 1 / np.sqrt(16 * _EPS) if floored else 1 / (1 - c)
    for fusion in (method, replace(method, differentiate_norm=True)):

        def total(params, fusion=fusion):
            adapters, metrics = fusion.adapters(params, frozen, jnp.arange(1))
            scale = adapters[site].scale
            return jnp.sum(scale), (scale, metrics["floored_norms"])

        gradients, (scale, count) = jax.jit(jax.grad(total, has_aux=True))(params)
        assert count == (scale.size if floored else 0)
        tolerance = 1e-3 if floored else 8 * _EPS / (1 - c) ** 2
        _close(scale, np.full(scale.shape, wanted), tolerance)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        # Through the norm alone; a mix has none at zero.
        assert np.any(gradients["coefficients"]) == (
            fusion.differentiate_norm and (c > 0 or composition == "sum")
        )


@pytest.mark.parametrize("kind", ["float32", "int8", "dora"])
def test_settled_updates_leave_generation_the_products_alone(kind):
    """Oracle: the updates as training calls them, which gather modules or compute norms in every call."""
    model = tiny.t5()
    pool = tiny.pool(4)
    if kind == "int8":
        codes = {
            site: lf.quantise(w, kind, tiled_axis=1) for site, w in _KERNELS.items()
        }
        set_matrices(model, codes)
        pool = pool.quantised(kind)
    terms = lf.gram(pool, {site: lf.kernels(model)[site] for site in pool.A})
    m = {site: 1.3 * norms for site, norms in lf.column_norms(terms).items()}
    if kind == "dora":
        per_layer = lf.Frozen(nnx.state(model)).per_layer().base
        model = nnx.merge(nnx.graphdef(model), per_layer)
        adapters = {
            site: lf.WeightDecomposed(pool.A[site][:, 1], pool.B[site][:, 1], m[site])
            for site in m
        }
    else:
        c = tiny.coefficients(shape(pool, 3, "block"))
        adapters, _ = _fuse(c, pool, "block", "sum", gram=terms, magnitudes=m)
    ready = jax.jit(lambda adapters: precomputed(adapters, model))(adapters)
    x = jnp.linspace(-1, 1, 16)[None]
    for site in ("encoder.self.q", "decoder.self.v"):
        kernel = at_layer(lf.kernels(model)[site], jnp.int32(1))
        update = _layer(ready[site], 1)
        _close(update(x, kernel), _layer(adapters[site], 1)(x, kernel))
        # Three of the products are the branches of a kernel whose layers lie apart.
        program = str(jax.make_jaxpr(update)(x, kernel))
        assert program.count(" dot_general[") <= 5 and "gather" not in program


@pytest.mark.parametrize("granularity", ["block", "rank"])
@pytest.mark.parametrize("composition", ["mix", "sum"])
def test_modules_mixed_in_their_outputs_are_the_same_fusion(composition, granularity):
    pool = tiny.pool(4)
    c = tiny.coefficients(shape(pool, 3, granularity))
    in_weights, _ = _fuse(c, pool, granularity, composition)
    in_outputs = {
        site: Outputs(
            pool.A[site],
            pool.B[site],
            jnp.tile(jnp.array(_INDEX), (len(coefficients), 1)),
            jnp.broadcast_to(coefficients, (*coefficients.shape[:2], 4)),
            composition,
        )
        for site, coefficients in expand(c, pool, granularity).items()
    }
    matrices = tiny.matrices(in_outputs, _KERNELS)
    for site, matrix in tiny.matrices(in_weights, _KERNELS).items():
        _close(matrices[site], matrix)


def test_columns_of_coefficients_are_named_after_blocks_and_sites():
    pool = tiny.pool(2)
    assert column_names(pool, "global") == ["all"]
    blocks = ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"]
    assert column_names(pool, "block") == blocks
    sites = column_names(pool, "site")
    assert sites[:3] == ["encoder.0.self.q", "encoder.0.self.v", "encoder.1.self.q"]
    assert sites[-2:] == ["decoder.1.cross.q", "decoder.1.cross.v"]


def test_a_sum_has_pair_terms_on_accelerators_where_they_take_no_more_memory():
    def kind_of_terms(modules, **changes):
        pool = tiny.pool(modules, names="q")
        pool = lf.shared_basis(pool, 3) if changes.pop("in_basis", False) else pool
        frozen = lf.Frozen(nnx.state(_MODEL), pool)
        kinds = []

        def precompute():
            kinds.append(type(lf.Fusion(**changes).precompute(frozen, _KERNELS).gram))

        jax.eval_shape(precompute)
        return kinds[0]

    assert kind_of_terms(4) == lf.Gram
    with tiny.for_tpu():
        kinds = [kind_of_terms(modules) for modules in (4, 5, 6)]  # of rank 4
        assert kinds == [PairTerms, PairTerms, lf.Gram]
        for granularity in ("global", "site"):
            assert kind_of_terms(4, granularity=granularity) == PairTerms
        for changes in (
            {"composition": "mix"},
            {"granularity": "rank"},
            {"magnitudes": False},
            {"in_basis": True},
        ):
            assert kind_of_terms(4, **changes) == lf.Gram
    for modules in range(1, 40):
        numbers = modules * (modules + 1) // 2 + modules
        assert pairs_are_smaller(modules, 16) == (numbers <= 16 * modules)


@pytest.mark.parametrize("index", [(0, 4), (0, -1), (7, 9)])
@pytest.mark.parametrize("kind", ["sum", "mix", "basis", "ties"])
def test_an_index_outside_of_the_pool_is_refused_or_gives_nan(kind, index):
    pool = tiny.pool(4, names="q")
    basis = lf.shared_basis(pool, 4)
    ones = expand(jnp.ones(2), pool, "global")

    def fuse(index):
        if kind == "basis":
            return compose_in_basis(basis, index, ones)[0]
        if kind == "ties":
            return merge(pool, index, jnp.ones(2), kind)
        return lf.compose(pool, index, ones, kind)[0]

    message = rf"index from 0 to 3, for a pool of 4, got \[{index[0]}, {index[1]}\]"
    with refused(message):
        fuse(jnp.array(index))
    for matrix in tiny.matrices(jax.jit(fuse)(jnp.array(index)), _KERNELS).values():
        assert np.isnan(matrix).all()


@pytest.mark.parametrize("granularity", _GRANULARITIES)
@pytest.mark.parametrize("ranks", [tiny.somewhere, _several])
def test_only_coefficients_that_act_are_counted(granularity, ranks):
    """A coefficient acts where changing it changes a matrix."""
    pool = tiny.pool(4, ranks)
    acting = np.asarray(present(pool, jnp.array(_INDEX), granularity))

    def updates(c):
        coefficient = tiny.coefficient_of(c, pool, granularity)
        return tiny.updates(pool, _INDEX, coefficient, "sum")

    c = tiny.coefficients(acting.shape)
    before = updates(c)
    for position in np.ndindex(acting.shape):
        after = updates(c.at[position].add(1.0))
        moved = any(np.any(after[place] != before[place]) for place in before)
        assert acting[position] == moved


def test_magnitudes_act_only_where_a_module_does():
    site = "encoder.self.q"
    ranks = tiny.pool(2, lambda n, site, layer: 4 * (layer == n), names="q")
    fields = {
        field: {site: getattr(ranks, field)[site]} for field in ("A", "B", "rank")
    }
    frozen = tiny.frozen(_MODEL, replace(ranks, **fields))
    method = lf.Fusion(composition="sum")
    for modules in ([0], [1], [0, 1]):
        index = jnp.array(modules)
        params = method.init(frozen, index, jax.random.key(0))
        acting = method.trainable(params, frozen, index)["magnitudes"][site]
        assert_array_equal(np.flatnonzero(acting.any(axis=1)), modules)
        params["magnitudes"] = {site: 3.0 * params["magnitudes"][site]}
        adapters, _ = jax.jit(method.adapters)(params, frozen, index)
        matrix = tiny.matrices(adapters, _KERNELS)[site]
        lengths = np.linalg.norm(matrix, axis=1) / np.linalg.norm(
            _KERNELS[site], axis=1
        )
        wanted = [3.0 if layer in modules else 1.0 for layer in range(3)]
        _close(lengths, np.broadcast_to(np.array(wanted)[:, None], lengths.shape))


@pytest.mark.parametrize("module", [0, 1])
def test_a_mix_takes_ranks_that_differ_where_modules_do_not_meet(module):
    """One adapter with a rank pattern; and modules of one rank out of a pool of several."""
    pool = tiny.pool(2, lambda n, site, layer: 1 + layer if n == 0 else 5)
    c = tiny.coefficients((1,))
    spread = expand(c, pool, "global")
    adapters, _ = lf.compose(pool, jnp.array([module]), spread, "mix")
    matrices = tiny.matrices(adapters, _KERNELS)
    coefficient = tiny.coefficient_of(c, pool, "global")
    for (site, layer), update in tiny.updates(
        pool, [module], coefficient, "mix"
    ).items():
        _close(matrices[site][layer], _kernel(site, layer) + update)


@pytest.mark.parametrize(
    ("composition", "qtype", "bits", "error"),
    [("sum", "nf4", 4, 0.15), ("mix", "int8", 8, 0.02)],
)
def test_a_quantised_pool_is_really_quantised_and_close(
    composition, qtype, bits, error
):
    """Oracle: the fusion of the dequantised pool."""
    pool = tiny.pool(4)
    codes = pool.quantised(qtype)
    dequantised = {}
    for field, scale in (("A", (4, 1, 4)), ("B", (4, 4, 1))):  # one for each rank
        for weight in getattr(codes, field).values():
            assert isinstance(weight, qwix.QArray) and weight.scale.shape[1:] == scale
            assert jnp.iinfo(weight.qvalue.dtype).bits == bits
        dequantised[field] = {
            site: dense(weight, jnp.float32)
            for site, weight in getattr(codes, field).items()
        }
    c = tiny.coefficients((3, 5))

    def fused(pool):
        return tiny.matrices(_fuse(c, pool, "block", composition)[0], _KERNELS)

    exact = fused(pool)
    quantised = fused(codes)
    for site, wanted in fused(replace(codes, **dequantised)).items():
        _close(quantised[site], wanted, 1e-6)
        update = np.linalg.norm(exact[site] - _KERNELS[site])
        assert 0 < np.linalg.norm(quantised[site] - exact[site]) < error * update


@pytest.mark.parametrize("others", [pytest.param(1, marks=pytest.mark.long), 12])
def test_a_mix_and_its_gradient_do_not_depend_on_other_modules_in_memory(others):
    """To the last bit: which modules lie in memory depends on the seeds of a run."""
    many = tiny.pool(4 + others, names="q")
    chosen = jnp.sort(jax.random.permutation(jax.random.key(others), 4 + others)[:4])
    few = many.select([int(n) for n in chosen])
    c = jnp.array([0.3, -0.2, 0.7, 0.1])
    order = jnp.array([2, 0, 3, 1])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def squared(c, pool, index):
        adapters, _ = lf.compose(pool, index, expand(c, pool, "global"), "mix")
        loss = sum(jnp.sum(jnp.square(a.A @ a.B)) for a in adapters.values())
        return loss, adapters

    of_many = squared(c, many, chosen[order])
    of_few = squared(c, few, order)
    for a, b in zip(*map(jax.tree.leaves, (of_many, of_few)), strict=True):
        assert_array_equal(a, b)


def test_coefficients_start_within_xaviers_bound_or_at_a_number():
    key = jax.random.key(0)
    c = np.asarray(initial((20, 48), "xavier", key))
    bound = np.sqrt(6 / (20 + 48))
    assert 0.99 * bound < np.abs(c).max() <= bound and abs(c.mean()) < 0.02
    bound = np.sqrt(6 / (20 + 48 * 4))
    by_rank = np.abs(initial((20, 48, 4), "xavier", key)).max()
    assert 0.99 * bound < by_rank <= bound
    for start, value in (("uniform", 0.25), ("twice", 0.5), ("zeros", 0)):
        assert np.all(initial((4, 5), start, key) == value)


def test_a_sum_in_bfloat16_is_that_in_float32():
    rng = np.random.default_rng(0)
    sizes = ((3, 96, 4), (3, 4, 80), (3, 1), (96, 80), (2, 5, 96))
    given = [rng.normal(size=size) / size[-1] ** 0.5 for size in sizes]

    @jax.jit
    def output_and_gradients(A, B, c, W, x):
        modules = jnp.arange(3)
        y, backward = jax.vjp(lambda c, x: lf.Modules(A, B, modules, c)(x, W), c, x)
        return y, *backward(jnp.ones_like(y))

    narrow = [jnp.asarray(a, jnp.bfloat16) for a in given]
    exact = output_and_gradients(*(a.astype(jnp.float32) for a in narrow))
    for got, wanted in zip(output_and_gradients(*narrow), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        _close(np.float64(got), wanted, 0.03)
