"""Fusion by its definition: oracles in NumPy, float64."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.adapters import column_names, expand
from lorafusion_jax.adapters.coefficients import initial, present, shape
from lorafusion_jax.adapters.composition import compose_in_basis
from lorafusion_jax.adapters.merges import merge
from lorafusion_jax.adapters.norms import PairTerms, pair_terms, pairs_are_smaller
from lorafusion_jax.adapters.updates import Dense, Outputs, settled
from lorafusion_jax.io import fused_adapter
from lorafusion_jax.models import dense, set_matrices
from lorafusion_jax.models.weights import at_layer

_GRANULARITIES = ("global", "block", "site", "rank")
_INDEX = [3, 0, 2]  # of a pool of four


def _several(n, site, layer):
    """Ranks from 0 to 5, another one for every module, site and layer, and no more than 3 at some sites."""
    return (n + 2 * layer) % (4 if "cross" in site else 6)


def _full(n, site, layer):
    """Together three modules reach the rank of the matrices that they adapt."""
    return 6


_MODEL = tiny.t5()
_KERNELS = lf.kernels(_MODEL)
_IN_NUMPY = jax.device_get(_KERNELS)


def _layer(tree, layer):
    return jax.tree.map(lambda a: a[layer], tree)


def _matrices(adapters):
    """What each adapted linear map multiplies by, (W + dW) times the scale, by site [L, d_in, d_out] in NumPy."""
    return jax.device_get(_multiplied(adapters))


@jax.jit
def _multiplied(adapters):
    def of_layer(adapter, kernel):
        return adapter(jnp.eye(kernel.shape[0]), kernel)

    return {
        site: jax.vmap(of_layer)(adapter, _KERNELS[site])
        for site, adapter in adapters.items()
    }


# The modules of `_INDEX`, fused; compiled, since operations one by one take longer to compile than together.
@functools.partial(
    jax.jit, static_argnames=("granularity", "composition", "differentiate_norm")
)
def _fuse(
    c,
    pool,
    granularity,
    composition,
    gram=None,
    magnitudes=None,
    differentiate_norm=False,
):
    return lf.compose(
        pool,
        jnp.array(_INDEX),
        expand(c, pool, granularity),
        composition,
        gram=gram,
        magnitudes=magnitudes,
        differentiate_norm=differentiate_norm,
    )


def _close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance
    )


def _gram(pool, terms=lf.gram):
    return jax.jit(terms)(pool, {site: _KERNELS[site] for site in pool.A})


def _kernel(site, layer):
    return _IN_NUMPY[site][layer].astype(np.float64)


# The definition, whatever the order of evaluation.


@pytest.mark.parametrize("granularity", _GRANULARITIES)
@pytest.mark.parametrize(
    ("composition", "ranks", "kind"),
    [
        ("mix", tiny.somewhere, lf.LowRank),
        ("sum", _several, lf.Modules),
        ("sum", _full, Dense),
    ],
)
def test_adapters_are_the_definition(composition, granularity, ranks, kind):
    pool = tiny.pool(4, ranks)
    c = tiny.coefficients(shape(pool, len(_INDEX), granularity))
    adapters, floored = _fuse(c, pool, granularity, composition)
    assert adapters.keys() == pool.A.keys() and floored == 0
    assert all(isinstance(adapter, kind) for adapter in adapters.values())
    matrices = _matrices(adapters)
    wanted = tiny.updates(
        pool, _INDEX, tiny.coefficient_of(c, pool, granularity), composition
    )
    for (site, layer), update in wanted.items():
        _close(matrices[site][layer], _kernel(site, layer) + update)


@pytest.mark.parametrize(
    ("tokens", "dtype", "used"),
    [(40, "float32", True), (4, "float32", False), (40, "bfloat16", False)],
)
def test_a_sum_that_norms_form_is_multiplied_by_many_tokens_in_float32(
    tokens, dtype, used
):
    pool = tiny.pool(4, lambda n, site, layer: 4)
    site = "encoder.self.q"
    terms = _gram(pool)
    c = tiny.coefficients(shape(pool, len(_INDEX), "block"))
    x = np.random.default_rng(0).normal(size=(tokens, 16))
    weights = np.random.default_rng(1).normal(size=(tokens, 12))
    x = jnp.asarray(x, dtype)
    weights = jnp.asarray(weights, dtype)

    @functools.partial(jax.jit, static_argnames="changed")
    @functools.partial(jax.value_and_grad, has_aux=True)
    def value(c, changed=lambda adapter: adapter):
        adapters, _ = _fuse(c, pool, "block", "sum", terms, lf.column_norms(terms))
        of_layer = _layer(changed(adapters[site]), 1)
        y = of_layer(x, _KERNELS[site][1].astype(dtype))
        return jnp.sum((y * weights).astype(jnp.float32)), y

    (_, y), gradient = value(c)
    (_, of_factors), from_factors = value(
        c, lambda adapter: dataclasses.replace(adapter, delta=None)
    )
    _close(y, of_factors)
    _close(gradient, from_factors, 1e-4)
    (_, without), _ = value(
        c,
        lambda adapter: dataclasses.replace(
            adapter, delta=jnp.zeros_like(adapter.delta)
        ),
    )
    assert np.array_equal(y, without) == (not used)


@pytest.mark.parametrize("kind", ["float32", "int8", "dora"])
def test_settled_updates_leave_generation_the_products_alone(kind):
    """Oracle: the updates as training calls them, which gather modules or compute norms in every call. Of the products,
    three are the branches of a kernel whose layers lie apart."""
    model = tiny.t5()
    pool = tiny.pool(4)
    if kind == "int8":
        codes = {
            n: lf.quantise(dense(w, jnp.float32), kind, tiled_axis=1)
            for n, w in lf.kernels(model).items()
        }
        set_matrices(model, codes)
        pool = pool.quantised(kind)
    terms = lf.gram(
        pool,
        {site: kernel for site, kernel in lf.kernels(model).items() if site in pool.A},
    )
    m = {site: 1.3 * norms for site, norms in lf.column_norms(terms).items()}
    if kind == "dora":
        model = nnx.merge(
            nnx.graphdef(model), lf.Frozen(nnx.state(model)).unstacked().base
        )
        adapters = {
            site: lf.WeightDecomposed(pool.A[site][:, 1], pool.B[site][:, 1], m[site])
            for site in m
        }
    else:
        adapters, _ = _fuse(
            tiny.coefficients(shape(pool, 3, "block")), pool, "block", "sum", terms, m
        )
    ready = jax.jit(lambda adapters: settled(adapters, model))(adapters)
    x = jnp.linspace(-1, 1, 16)[None]
    for site in ("encoder.self.q", "decoder.self.v"):
        kernel = at_layer(lf.kernels(model)[site], jnp.int32(1))
        got = _layer(ready[site], 1)
        wanted = _layer(adapters[site], 1)
        _close(got(x, kernel), wanted(x, kernel))
        program = str(jax.make_jaxpr(got)(x, kernel))
        assert program.count(" dot_general[") <= 5 and "gather" not in program


@pytest.mark.parametrize("granularity", ["block", "rank"])
@pytest.mark.parametrize("composition", ["mix", "sum"])
def test_orders_of_evaluation_are_equal(composition, granularity):
    pool = tiny.pool(4)
    c = tiny.coefficients(shape(pool, 3, granularity))
    adapters, _ = _fuse(c, pool, granularity, composition)
    matrices = _matrices(adapters)
    spread = expand(c, pool, granularity)
    rng = np.random.default_rng(1)

    @jax.jit
    def both_orders(x, stacked, layer):
        adapter, kernel, A, B, c = _layer(stacked, layer)
        return adapter(x, kernel), Outputs(A, B, jnp.array(_INDEX), c, composition)(
            x, kernel
        )

    for site, adapter in adapters.items():
        x = rng.normal(size=(2, 5, pool.A[site].shape[2])).astype(np.float32)
        for layer in range(pool.A[site].shape[0]):
            stacked = (
                adapter,
                _KERNELS[site],
                pool.A[site],
                pool.B[site],
                spread[site],
            )
            in_weights, in_outputs = both_orders(x, stacked, layer)
            _close(in_weights, in_outputs)
            _close(in_outputs, x @ matrices[site][layer])


def test_blocks_of_unequal_depths_have_columns_of_their_own():
    pool = tiny.pool(2)
    assert shape(pool, 2, "block") == (2, 5)
    assert column_names(pool, "block") == [
        "encoder.0",
        "encoder.1",
        "encoder.2",
        "decoder.0",
        "decoder.1",
    ]
    assert column_names(pool, "global") == ["all"]
    labels = column_names(pool, "site")
    assert labels[:3] == ["encoder.0.self.q", "encoder.0.self.v", "encoder.1.self.q"]
    assert labels[-2:] == ["decoder.1.cross.q", "decoder.1.cross.v"]
    # Every block's coefficient moves the matrices of that block and no other.
    c = tiny.coefficients((2, 5))
    for column, (stack, layer) in enumerate(
        (label.split(".")) for label in column_names(pool, "block")
    ):
        changed = expand(c.at[:, column].add(1.0), pool, "block")
        for site, before in expand(c, pool, "block").items():
            moved = np.asarray(before != changed[site]).any(axis=(1, 2))
            wanted = (
                np.arange(len(moved)) == int(layer)
                if site.startswith(stack)
                else np.zeros(len(moved), bool)
            )
            np.testing.assert_array_equal(moved, wanted)


# Norms without W + dW.


@pytest.mark.parametrize(
    ("composition", "ranks", "granularity", "terms"),
    [
        *(
            ("mix", tiny.somewhere, granularity, lf.gram)
            for granularity in ("block", "rank")
        ),
        *(
            ("sum", ranks, granularity, lf.gram)
            for ranks in (_several, _full)
            for granularity in ("block", "rank")
        ),
        *(("sum", ranks, "block", pair_terms) for ranks in (_several, _full)),
        *(
            pytest.param("sum", _several, of, pair_terms, marks=pytest.mark.long)
            for of in ("global", "site")
        ),
    ],
)
def test_gram_norm_is_the_norm(composition, granularity, ranks, terms):
    pool = tiny.pool(4, ranks)
    c = tiny.coefficients(shape(pool, len(_INDEX), granularity))
    terms = _gram(pool, terms)
    magnitudes = {site: 2.0 * norm for site, norm in lf.column_norms(terms).items()}
    adapters, floored = _fuse(
        c, pool, granularity, composition, gram=terms, magnitudes=magnitudes
    )
    assert floored == 0
    matrices = _matrices(adapters)
    wanted = tiny.updates(
        pool, _INDEX, tiny.coefficient_of(c, pool, granularity), composition
    )
    for (site, layer), update in wanted.items():
        W = _kernel(site, layer)
        m = 2.0 * np.linalg.norm(W, axis=0)
        _close(
            matrices[site][layer], m * (W + update) / np.linalg.norm(W + update, axis=0)
        )


def _cancelling():
    """One module whose product is -W at every encoder query."""
    site = "encoder.self.q"
    W = _KERNELS[site]
    unit = jnp.broadcast_to(
        jnp.eye(W.shape[1])[None, None], (3, 1, W.shape[1], W.shape[1])
    )
    return lf.LoraPool(
        A={site: unit},
        B={site: -W[:, None]},
        rank={site: jnp.full((3, 1), W.shape[1])},
        names=("minus W",),
    )


@pytest.mark.parametrize(
    ("composition", "terms", "c", "floored"),
    [
        *(
            ("sum", lf.gram, *of)
            for of in ((0.0, False), (0.99, False), (1 - 1e-5, True), (1.0, True))
        ),
        *(("sum", pair_terms, *of) for of in ((0.99, False), (1.0, True))),
        *(("mix", lf.gram, *of) for of in ((0.0, False), (0.99, False), (1.0, True))),
    ],
)
def test_norms_near_cancellation_are_floored_and_counted(
    composition, terms, c, floored
):
    pool = _cancelling()
    site = "encoder.self.q"
    frozen = lf.Frozen(nnx.split(_MODEL)[1], pool, _gram(pool, terms))
    method = lf.Fusion(composition=composition, granularity="global", start="uniform")
    params = method.init(frozen, jnp.arange(1), jax.random.key(0))
    # A mix is quadratic: its dW is -c^2 W.
    params["coefficients"] = jnp.float32([c if composition == "sum" else c**0.5])

    @jax.jit
    def scale_of(params):
        adapters, metrics = method.adapters(params, frozen, jnp.arange(1))
        return adapters[site].scale, metrics["floored_norms"]

    scale, count = scale_of(params)
    columns = scale.size
    assert count == (columns if floored else 0)
    W = np.stack([_kernel(site, layer) for layer in range(3)])
    norm = np.linalg.norm(W, axis=1)
    if floored:
        # 8 eps of what cancelled: ||W||^2 + ||dW||^2.
        _close(scale, 1 / np.sqrt(8 * np.finfo(np.float32).eps * 2) + 0 * norm, 1e-3)
    else:
        # The difference keeps all digits but those that cancelled.
        _close(
            scale, 1 / (1 - c) + 0 * norm, 8 * np.finfo(np.float32).eps / (1 - c) ** 2
        )
    learned = dataclasses.replace(method, differentiate_norm=True)
    for fusion in (method, learned):

        def total(params, fusion=fusion):
            return jnp.sum(
                fusion.adapters(params, frozen, jnp.arange(1))[0][site].scale
            )

        gradients = jax.jit(jax.grad(total))(params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        # Through the norm alone; a mix has none at zero.
        assert np.any(gradients["coefficients"]) == (
            fusion.differentiate_norm and (c > 0 or composition == "sum")
        )


# Inner products of modules, on accelerators alone.


def test_pair_terms_are_inner_products_of_columns():
    pool = tiny.pool(4, _several)
    terms = _gram(tiny.pool(4, _several), pair_terms)
    for site, A in pool.A.items():
        dW = np.einsum(
            "lnir,lnro->lnio",
            np.asarray(A, np.float64),
            np.asarray(pool.B[site], np.float64),
        )
        W = _IN_NUMPY[site].astype(np.float64)
        _close(terms.squared[site], np.sum(W**2, axis=1))
        _close(terms.cross[site], np.einsum("lio,lnio->lno", W, dW))
        pairs = np.einsum("lnio,lmio->lnmo", dW, dW)
        _close(
            terms.pairs[site],
            np.stack([pairs[:, n, m] for n in range(4) for m in range(n, 4)], axis=1),
        )


def test_a_sum_has_pair_terms_on_accelerators_where_they_take_no_more_memory():
    def precomputed(pool, **changes):
        found = []
        frozen = lf.Frozen(nnx.split(_MODEL)[1], pool)

        def kind_and_size():
            terms = lf.Fusion(**changes).precompute(frozen, _KERNELS).gram
            found.append((type(terms), sum(a.size for a in jax.tree.leaves(terms))))

        jax.eval_shape(kind_and_size)
        return found[0]

    pools = {
        modules: tiny.pool(modules, names="q") for modules in (4, 5, 6)
    }  # of rank 4
    grams = {modules: precomputed(pool) for modules, pool in pools.items()}
    assert {kind for kind, _ in grams.values()} == {lf.Gram}
    with tiny.for_tpu():
        assert (
            precomputed(pools[4])[0] == PairTerms
            and precomputed(pools[4])[1] < grams[4][1]
        )
        assert (
            precomputed(pools[5]) == (PairTerms, grams[5][1])
            and precomputed(pools[6]) == grams[6]
        )
        for granularity in ("global", "site"):
            assert precomputed(pools[4], granularity=granularity)[0] == PairTerms
        for others in (
            {"composition": "mix"},
            {"granularity": "rank"},
            {"magnitudes": False},
        ):
            assert precomputed(pools[4], **others) == grams[4]
        assert precomputed(lf.shared_basis(pools[4], 3))[0] == lf.Gram
    for modules in range(1, 40):
        fewer = modules * (modules + 1) // 2 + modules <= 16 * modules
        assert pairs_are_smaller(modules, 16) == fewer


# Gradients.


def _objective_in_numpy(pool, site, x, direction, composition, m, norm):
    """Return a function of c [N], in float64; `norm` None lets the norm follow c."""

    def value(c):
        total = 0.0
        look_up = tiny.coefficient_of(c, pool, "global")
        for (name, layer), update in tiny.updates(
            pool, _INDEX, look_up, composition
        ).items():
            if name == site:
                matrix = _kernel(site, layer) + update
                divisor = (
                    np.linalg.norm(matrix, axis=0) if norm is None else norm[layer]
                )
                total += np.sum(x @ (matrix * m[layer] / divisor) * direction)
        return total

    return value


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
    composition, ranks, terms, differentiate_norm
):
    site = "decoder.cross.v"
    pool = tiny.pool(4, ranks, names="v")
    rng = np.random.default_rng(
        2
    )  # coefficients of both signs: the paper's code multiplies gradients by 2c
    x = rng.normal(size=(6, 16))
    direction = rng.normal(size=(6, 12))
    c = tiny.coefficients((3,))
    assert np.any(c < 0) and np.any(c > 0)
    terms = _gram(pool, terms)
    magnitudes = {
        s: jnp.asarray(rng.uniform(0.5, 2, n.shape), jnp.float32)
        for s, n in lf.column_norms(terms).items()
    }

    def value(c, magnitudes):
        adapters, _ = _fuse(
            c, pool, "global", composition, terms, magnitudes, differentiate_norm
        )
        outputs = [
            _layer(adapters[site], n)(jnp.asarray(x, jnp.float32), _KERNELS[site][n])
            for n in range(2)
        ]
        return sum(jnp.sum(y * jnp.asarray(direction, jnp.float32)) for y in outputs)

    of_c, of_m = jax.jit(jax.grad(value, argnums=(0, 1)))(c, magnitudes)
    look_up = tiny.coefficient_of(c, pool, "global")
    here = tiny.updates(pool, _INDEX, look_up, composition)
    norm = [
        np.linalg.norm(_kernel(site, layer) + here[site, layer], axis=0)
        for layer in range(2)
    ]
    m = np.asarray(magnitudes[site], np.float64)
    function = _objective_in_numpy(
        pool, site, x, direction, composition, m, None if differentiate_norm else norm
    )
    # float64 and second order: the differences are good to 1e-9.
    at = np.asarray(c, np.float64)
    step = 1e-5
    differences = [
        (function(at + step * e) - function(at - step * e)) / (2 * step)
        for e in np.eye(3)
    ]
    _close(of_c, differences, 1e-4)
    for layer in range(2):
        _close(
            of_m[site][layer],
            np.sum(
                x
                @ ((_kernel(site, layer) + here[site, layer]) / norm[layer])
                * direction,
                0,
            ),
        )


def test_a_mix_of_several_ranks_is_refused():
    pool = tiny.pool(4, _several)
    index = jnp.array(_INDEX)
    frozen = lf.Frozen(nnx.split(_MODEL)[1], pool, _gram(pool))
    spread = expand(tiny.coefficients((3, 5)), pool, "block")
    mix = lf.Fusion(composition="mix")
    for refused in (
        lambda: mix.check(pool),
        lambda: mix.init(frozen, index, jax.random.key(0)),
        lambda: lf.compose(pool, index, spread, "mix"),
        # The values of an index are not known inside a compiled function, so all modules count.
        lambda: jax.jit(lambda index: lf.compose(pool, index, spread, "mix"))(index),
        lambda: fused_adapter(tiny.CONFIG, pool, index, spread, "mix", base="b"),
    ):
        with pytest.raises(
            ValueError, match="different ranks.*use the composition sum"
        ):
            refused()
    mix.check(tiny.pool(4, tiny.somewhere))
    lf.Fusion(composition="sum").check(pool)


def test_fusions_that_cannot_be_are_refused():
    pool = tiny.pool(2, names="q")
    index = jnp.arange(2)
    base = nnx.split(_MODEL)[1]
    frozen = lf.Frozen(base, pool, _gram(pool, pair_terms))
    key = jax.random.key(0)
    basis = lf.shared_basis(pool, 4)
    m = lf.column_norms(frozen.gram)
    ones = expand(jnp.ones(2), pool, "global")
    method = lf.Fusion(granularity="rank")
    by_pairs = (
        "a sum of digital modules with one coefficient each: precompute the frozen"
    )
    for refused, message in (
        (
            lambda: lf.Fusion(composition="mix", start="zeros"),
            "a mix that starts at zero never moves.*composition sum",
        ),
        (
            lambda: lf.Fusion().init(lf.Frozen(base), index, key),
            "needs a pool and its Gram terms",
        ),
        (
            lambda: lf.compose(pool, index, ones, "sum", magnitudes=m),
            r"Gram terms .* give gram\(pool, kernels\)",
        ),
        (
            lambda: compose_in_basis(basis, index, ones, magnitudes=m),
            r"Gram terms .* give gram\(basis, kernels\)",
        ),
        (
            lambda: lf.compose(
                pool, index, ones, "mix", gram=frozen.gram, magnitudes=m
            ),
            by_pairs,
        ),
        (
            lambda: method.adapters(method.init(frozen, index, key), frozen, index),
            by_pairs,
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize("index", [(0, 4), (0, -1), (7, 9)])
@pytest.mark.parametrize("kind", ["sum", "mix", "basis", "ties"])
def test_no_module_stands_for_one_outside_of_the_pool(kind, index):
    pool = tiny.pool(4, names="q")
    ones = expand(jnp.ones(2), pool, "global")
    basis = lf.shared_basis(pool, 4)

    def fuse(index):
        if kind == "basis":
            return compose_in_basis(basis, index, ones)[0]
        return (
            merge(pool, index, jnp.ones(2), kind)
            if "ties" in kind
            else lf.compose(pool, index, ones, kind)[0]
        )

    with pytest.raises(
        ValueError,
        match=rf"index from 0 to 3, for a pool of 4, got \[{index[0]}, {index[1]}\]",
    ):
        fuse(jnp.array(index))
    assert all(
        np.isnan(matrix).all()
        for matrix in _matrices(jax.jit(fuse)(jnp.array(index))).values()
    )


# Modules that are not everywhere, and ranks that differ.


@pytest.mark.parametrize("granularity", _GRANULARITIES)
@pytest.mark.parametrize("ranks", [tiny.somewhere, _several])
def test_only_coefficients_that_act_are_counted(granularity, ranks):
    pool = tiny.pool(4, ranks)
    found = np.asarray(present(pool, jnp.array(_INDEX), granularity))
    # A coefficient acts where changing it changes a matrix.
    c = tiny.coefficients(found.shape)
    before = tiny.updates(
        pool, _INDEX, tiny.coefficient_of(c, pool, granularity), "sum"
    )
    for position in np.ndindex(found.shape):
        moved = tiny.updates(
            pool,
            _INDEX,
            tiny.coefficient_of(c.at[position].add(1.0), pool, granularity),
            "sum",
        )
        assert found[position] == any(
            np.abs(moved[where] - before[where]).max() > 0 for where in before
        )


def test_magnitudes_act_only_where_a_module_does():
    pool = tiny.pool(
        2, lambda n, site, layer: 4 * (site.startswith("encoder") and layer == n)
    )
    pool = dataclasses.replace(
        pool,
        **{
            field: {s: w for s, w in getattr(pool, field).items() if "encoder" in s}
            for field in ("A", "B", "rank")
        },
    )
    frozen = lf.Frozen(nnx.split(_MODEL)[1], pool, _gram(pool))
    method = lf.Fusion(composition="sum")
    for index, layers in ([0], [0]), ([1], [1]), ([0, 1], [0, 1]):
        params = method.init(frozen, jnp.array(index), jax.random.key(0))
        acting = method.trainable(params, frozen, jnp.array(index))["magnitudes"][
            "encoder.self.q"
        ]
        np.testing.assert_array_equal(np.flatnonzero(acting.any(axis=1)), layers)
        params["magnitudes"] = {s: 3.0 * m for s, m in params["magnitudes"].items()}
        matrices = _matrices(
            jax.jit(method.adapters)(params, frozen, jnp.array(index))[0]
        )
        for layer in range(3):
            matrix = matrices["encoder.self.q"][layer]
            W = _kernel("encoder.self.q", layer)
            norm = np.linalg.norm(matrix, axis=0) / np.linalg.norm(W, axis=0)
            _close(norm, np.full(norm.shape, 3.0 if layer in layers else 1.0))


def test_a_mix_takes_ranks_that_differ_where_modules_do_not_meet():
    """One adapter with a rank pattern; and modules of one rank out of a pool of several."""
    pool = tiny.pool(2, lambda n, site, layer: 1 + layer if n == 0 else 5)
    for index in ([0], [1]):
        c = tiny.coefficients((1,))
        adapters, _ = lf.compose(
            pool, jnp.array(index), expand(c, pool, "global"), "mix"
        )
        matrices = _matrices(adapters)
        for (site, layer), update in tiny.updates(
            pool, index, tiny.coefficient_of(c, pool, "global"), "mix"
        ).items():
            _close(matrices[site][layer], _kernel(site, layer) + update)


@pytest.mark.parametrize(("composition", "loop"), [("mix", False), ("sum", True)])
def test_a_mix_copies_no_layers_of_the_pool_for_a_loop(composition, loop):
    A = jnp.ones((5, 2, *(16, 4)))
    B = jnp.ones((5, 2, *(4, 12)))
    pool = lf.LoraPool(
        A={"q": A}, B={"q": B}, rank={"q": jnp.full((5, 2), 4)}, names=("a", "b")
    )
    program = jax.make_jaxpr(
        lambda c: lf.compose(pool, jnp.arange(2), {"q": c}, composition)
    )
    assert ("scan[" in str(program(jnp.ones((5, 2, 1))))) == loop


# Pools in few bits.


@pytest.mark.parametrize(
    ("composition", "qtype", "bits", "error"),
    [("sum", "nf4", 4, 0.15), ("mix", "int8", 8, 0.02)],
)
def test_a_quantised_pool_is_really_quantised_and_close(
    composition, qtype, bits, error
):
    pool = tiny.pool(4)
    small = pool.quantised(qtype)
    for weight in (*small.A.values(), *small.B.values()):
        assert isinstance(weight, qwix.QArray)
        assert jnp.iinfo(weight.qvalue.dtype).bits == bits
    for A, B in zip(
        small.A.values(), small.B.values(), strict=True
    ):  # one scale for each rank, along d_in and d_out
        assert A.scale.shape == (len(A.qvalue), 4, 1, 4) and B.scale.shape == (
            len(B.qvalue),
            4,
            4,
            1,
        )
    again = dataclasses.replace(
        small,
        **{
            f: {s: dense(w, jnp.float32) for s, w in getattr(small, f).items()}
            for f in ("A", "B")
        },
    )
    c = tiny.coefficients((3, 5))
    whole = _matrices(_fuse(c, pool, "block", composition)[0])
    quantised = _matrices(_fuse(c, small, "block", composition)[0])
    dequantised = _matrices(_fuse(c, again, "block", composition)[0])
    for site, matrices in whole.items():
        _close(quantised[site], dequantised[site], 1e-6)
        update = np.linalg.norm(matrices - _IN_NUMPY[site])
        assert 0 < np.linalg.norm(quantised[site] - matrices) < error * update


# Starts and pools.


def test_starts():
    key = jax.random.key(0)
    c = np.asarray(initial((20, 48), "xavier", key))
    bound = np.sqrt(6 / 68)
    assert (
        np.abs(c).max() <= bound
        and np.abs(c).max() > 0.99 * bound
        and abs(c.mean()) < 0.02
    )
    by_rank = np.abs(initial((20, 48, 4), "xavier", key)).max()
    assert by_rank <= np.sqrt(6 / (20 + 48 * 4)) < 1.01 * by_rank
    np.testing.assert_array_equal(
        initial((4, 5), "uniform", key), np.full((4, 5), 0.25, np.float32)
    )
    np.testing.assert_array_equal(
        initial((4, 5), "twice", key), np.full((4, 5), 0.5, np.float32)
    )
    np.testing.assert_array_equal(initial((4, 5), "zeros", key), np.zeros((4, 5)))


def test_pools_choose_by_name_and_index():
    pool = tiny.pool(4)
    for empty in (pool, lf.shared_basis(pool, 4)):
        with pytest.raises(
            ValueError, match="a pool needs at least one adapter: none was given"
        ):
            empty.select([])
    chosen = pool.select(["module_2", 0])
    assert chosen.names == ("module_2", "module_0") and len(chosen) == 2
    for site in pool.A:
        np.testing.assert_array_equal(
            chosen.A[site], np.asarray(pool.A[site])[:, [2, 0]]
        )
        np.testing.assert_array_equal(
            chosen.rank[site], np.asarray(pool.rank[site])[:, [2, 0]]
        )
    for wrong, message in (
        (
            ["module_9"],
            "the pool lacks 'module_9': choose one of 4, 'module_0' to 'module_3'",
        ),
        ([4], "the pool lacks 4"),
        ([-1], "the pool lacks -1"),
        (["module_1", 1], "chosen twice"),
        ("module_1", r"'module_1' is one name: give a list"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.select(wrong)


def test_the_random_control_keeps_norms_sites_and_ranks():
    pool = tiny.pool(4, _several, names="v")
    control = jax.jit(lf.random_pool)(pool, jax.random.key(0))
    for field in ("A", "B"):
        for site, weight in getattr(pool, field).items():
            replaced = np.asarray(getattr(control, field)[site])
            np.testing.assert_array_equal(replaced == 0, np.asarray(weight) == 0)
            _close(
                np.linalg.norm(replaced, axis=(2, 3)),
                np.linalg.norm(np.asarray(weight), axis=(2, 3)),
            )
            assert np.abs(replaced - np.asarray(weight)).max() > 0.1
    # Zeros within a module's rank are replaced too.
    pruned = dataclasses.replace(
        pool, A={site: a.at[:, :, 0].set(0.0) for site, a in pool.A.items()}
    )
    for site, a in jax.jit(lf.random_pool)(pruned, jax.random.key(0)).A.items():
        np.testing.assert_array_equal(a != 0, control.A[site] != 0)


def _updates(pool, site):
    """[L, N, d_in, d_out] in float64."""
    A = np.asarray(pool.A[site], float)
    B = np.asarray(pool.B[site], float)
    return A @ B


def test_the_rotated_control_keeps_spectra_and_turns_singular_vectors():
    pool = tiny.pool(3, _several, names="v")
    control = lf.rotated_pool(pool, jax.random.key(0))
    other = lf.rotated_pool(pool, jax.random.key(1))
    for site in pool.A:
        before = _updates(pool, site)
        after = _updates(control, site)
        singular = [
            np.linalg.svd(updates, compute_uv=False) for updates in (before, after)
        ]
        _close(singular[1], singular[0])
        _close(np.linalg.norm(after, axis=(2, 3)), np.linalg.norm(before, axis=(2, 3)))
        inner = [
            np.einsum("lnij,lmij->lnm", updates, updates) for updates in (before, after)
        ]
        assert not np.allclose(*inner, atol=1e-4 * np.abs(inner[0]).max())
        assert np.abs(after - before).max() > 0.1 * np.abs(before).max()
        assert np.abs(after - _updates(other, site)).max() > 0.1 * np.abs(before).max()
    # A separate rotation depends on its own module alone.
    alone = lf.rotated_pool(pool.select([2]), jax.random.key(0))
    for site in pool.A:
        _close(_updates(alone, site)[:, 0], _updates(control, site)[:, 2])


def test_a_compiled_rotation_factors_one_matrix_at_a_time():
    """Batched factorisations of one compiled function wait for each other for ever on two cores."""
    pool = tiny.pool(2, _several, names="v")
    text = str(jax.make_jaxpr(lf.rotated_pool)(pool, jax.random.key(0)))
    factored = re.findall(r"f32\[([\d,]+)\] = qr\[", text)
    assert factored and all(shape.count(",") == 1 for shape in factored)


def test_another_rotation_of_a_pool_compiles_nothing(caplog):
    pool = tiny.pool(2, _several, names="v")
    lf.rotated_pool(pool, jax.random.key(0))
    with jax.log_compiles():
        lf.rotated_pool(pool, jax.random.key(1))
    assert "Compiling" not in caplog.text


def test_a_random_module_depends_on_matrix_site_layer_and_key_alone():
    pool = tiny.pool(
        3, lambda n, site, layer: (3, 6, 0 if "cross" in site else 2)[n], names="v"
    )
    control = lf.random_pool(pool, jax.random.key(0))
    other = lf.random_pool(pool, jax.random.key(1))
    assert np.abs(other.A["encoder.self.v"] - control.A["encoder.self.v"]).max() > 0.1
    # Not on other modules, nor on how they pad it.
    alone = pool.select([2])
    alone = dataclasses.replace(
        alone,
        A={site: a[..., :2] for site, a in alone.A.items()},
        B={site: b[:, :, :2] for site, b in alone.B.items()},
    )
    drawn = lf.random_pool(alone, jax.random.key(0))
    for site in pool.A:
        np.testing.assert_array_equal(
            np.asarray(control.A[site])[:, [2], :, :2], drawn.A[site]
        )
        np.testing.assert_array_equal(
            np.asarray(control.B[site])[:, [2], :2], drawn.B[site]
        )
    even = jax.jit(lf.random_pool)(tiny.pool(2, names="v"), jax.random.key(0))
    first = [
        of[site][layer, 0].ravel()[:40]
        for of in (even.A, even.B)
        for site in even.A
        for layer in (0, 1)
    ]
    assert np.abs(np.corrcoef(first) - np.eye(len(first))).max() < 0.7


@pytest.mark.parametrize("others", [pytest.param(1, marks=pytest.mark.long), 12])
def test_a_mix_and_its_gradient_do_not_depend_on_modules_beside_it(others):
    """To the last bit: which modules lie in memory depends on the seeds of a run."""
    many = tiny.pool(4 + others, names="q")
    chosen = jnp.sort(jax.random.permutation(jax.random.key(others), 4 + others)[:4])
    few = dataclasses.replace(
        many,
        **{
            name: {site: a[:, chosen] for site, a in getattr(many, name).items()}
            for name in ("A", "B", "rank")
        },
    )
    coefficients = {
        site: jnp.tile(jnp.array([0.3, -0.2, 0.7, 0.1])[:, None], (len(a), 1, 1))
        for site, a in few.A.items()
    }

    @jax.jit
    def squared(pool, index):
        def loss(coefficients):
            adapters, _ = lf.compose(pool, index, coefficients, "mix")
            return sum(
                jnp.sum(jnp.square(a.A @ a.B)) for a in adapters.values()
            ), adapters

        return jax.grad(loss, has_aux=True)(coefficients)

    for a, b in zip(
        *(
            jax.tree.leaves(squared(*of))
            for of in ((many, chosen), (few, jnp.arange(4)))
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
