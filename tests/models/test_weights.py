"""Products whose gradients are written out, and from separate arrays: against NumPy and stacks."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.models import PerLayerWeights, dense, set_matrices
from lorafusion_jax.models.weights import embed, heads_matmul, per_layer, unembed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("function", "formula", "shapes"),
    [
        *((lf.matmul, "bti,io->bto", ((2, 3, 5), (5, d_out))) for d_out in (4, 6)),
        *(
            (heads_matmul, "bhtc,bhcs->bhts", ((2, 3, 4, 5), (2, 3, 5, width)))
            for width in (3, 7)
        ),
        *(
            (unembed, "btd,vd->btv", ((*batch, 5), (7, 5)))
            for batch in ((2, 3), (1, 1))
        ),
        (unembed, "bd,vd->bv", ((1, 5), (7, 5))),
    ],
)
def test_products_and_their_gradients(function, formula, shapes, dtype):
    first, second, out = re.split(",|->", formula)
    rng = np.random.default_rng(0)
    # Small integers: exact in bfloat16, and so are their sums.
    x = rng.integers(-3, 4, shapes[0])
    w = rng.integers(-3, 4, shapes[1])
    y = np.einsum(formula, x, w)
    g = rng.integers(-3, 4, y.shape)
    wanted = (
        y,
        np.einsum(f"{out},{second}->{first}", g, w),
        np.einsum(f"{first},{out}->{second}", x, g),
    )

    def product(x, w, g):
        y, back = jax.vjp(function, x, w)
        return y, *back(g.astype(y.dtype))

    x = jnp.asarray(x, dtype)
    w = jnp.asarray(w, dtype)
    g = jnp.asarray(g, dtype)
    found = jax.jit(product)(x, w, g)
    assert [a.dtype for a in found] == [
        "float32" if function is heads_matmul else dtype,
        dtype,
        dtype,
    ]
    mapped = jax.vmap(product, in_axes=(0, None, 0))(
        jnp.stack([x, -x]), w, jnp.stack([g, g])
    )
    for ours, both, theirs, sign in zip(
        found, mapped, wanted, (-1, 1, -1), strict=True
    ):
        assert both.dtype == ours.dtype
        assert_array_equal(np.asarray(ours, np.float64), theirs)
        assert_array_equal(np.asarray(both, np.float64), [theirs, sign * theirs])


def test_rows_of_an_embedding_and_their_gradients():
    table = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (7, 5)), jnp.bfloat16)
    ids = jnp.array([[1, 6, 1], [0, 1, 4]])
    rows, back = jax.vjp(jax.jit(lambda table: embed(table, ids)), table)
    assert_array_equal(rows, table[ids])
    (found,) = back(jnp.ones_like(rows))
    assert_array_equal(np.asarray(found[:, 0], int), [1, 3, 0, 0, 1, 0, 1])


def test_nf4_is_read_without_a_gather_where_there_is_an_accelerator():
    w = lf.quantise(
        jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 8)), jnp.float32),
        "nf4",
        tiled_axis=-2,
    )
    wanted = dense(w, jnp.float32)
    assert len(np.unique(np.asarray(w.qvalue, int))) == 16
    with tiny.for_tpu():
        assert_array_equal(dense(w, jnp.float32), wanted)
        assert "gather" not in str(jax.make_jaxpr(lambda w: dense(w, jnp.float32))(w))


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_reads_codes_of_8_bits_without_a_matrix_in_float32(rows):
    """Oracle: products with the dequantised matrices, and the bytes that XLA allocates."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, rows, 256)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((3, 256, 96)), jnp.float32)
    stack = lf.quantise(w, "int8", tiled_axis=-2)
    table = lf.quantise(w[0].T, "int8", tiled_axis=-1, tile=32)

    def products(x, stack, table):
        return lf.matmul(x, stack.at(jnp.int32(1))), unembed(x, table)

    program = jax.jit(products).lower(x[0], per_layer(stack), table).compile()
    assert (program.memory_analysis().temp_size_in_bytes < 4 * 256 * 96) == (rows == 1)
    mapped = jax.vmap(products, in_axes=(0, None, None))(x, per_layer(stack), table)
    plain = dense(stack, jnp.float32)[1], dense(table, jnp.float32).T
    for y, of_both, matrix in zip(
        program(x[0], per_layer(stack), table), mapped, plain, strict=True
    ):
        assert_allclose(y, np.asarray(x[0]) @ matrix, rtol=1e-4, atol=1e-4)
        assert_allclose(
            of_both, np.asarray(x) @ np.asarray(matrix), rtol=1e-4, atol=1e-4
        )


def test_one_row_reads_bfloat16_where_its_stack_lies():
    """Oracle: products of wider numbers, the stack's address, and the bytes that XLA allocates."""
    x = jax.random.normal(jax.random.key(0), (2, 1, 252), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (3, 252, 96), jnp.bfloat16)
    stack = per_layer(w)
    start = w.unsafe_buffer_pointer()
    offsets = [bits.unsafe_buffer_pointer() - start for bits in stack.bits]
    assert offsets == [0, 2 * 252 * 96, 4 * 252 * 96]

    def product(x, matrices, bits):
        return lf.matmul(x, PerLayerWeights(matrices, jnp.int32(1), bits))

    program = jax.jit(product).lower(x[0], stack.matrices, stack.bits).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 252 * 96
    matrix = w[1].astype(float)
    for row in x:
        y = program(row, stack.matrices, stack.bits)
        wanted = row.astype(float) @ matrix
        assert_allclose(y.astype(float), wanted, rtol=0.01, atol=0.1)
    gradient = jax.grad(lambda x: product(x, stack.matrices, stack.bits).sum())(x[0])
    assert_allclose(gradient[0].astype(float), matrix.sum(axis=1), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_whose_weights_are_separate_arrays(dtype):
    """Only plain stacks are taken apart: one of 4 bits stays as it is."""
    model = tiny.t5(dataclasses.replace(tiny.CONFIG, dtype=dtype))
    site = "decoder.ff.wo"
    set_matrices(
        model, {site: lf.quantise(lf.kernels(model)[site], "nf4", tiled_axis=-2)}
    )
    graph, base = nnx.split(model)
    base = jax.tree.map(
        lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, base
    )
    batch = tiny.batch()

    @jax.jit
    def logits(base):
        return nnx.merge(graph, base).label_logits(
            batch.input_ids, batch.input_mask, batch.labels, {}
        )

    apart = per_layer(base)
    taken = {
        name
        for name, kernel in lf.kernels(nnx.merge(graph, apart)).items()
        if isinstance(kernel, PerLayerWeights)
    }
    assert taken == tiny.CONFIG.sites.keys() - {site}
    assert_allclose(
        *(logits(a).astype(jnp.float32) for a in (apart, base)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("site", "shape", "message"),
    [
        ("encoder.self.q", (16, 1), "A of the adapter at encoder.self.q has the shape"),
        ("encoder.self.z", (3, 16, 1), "lacks the site 'encoder.self.z' of an adapter"),
        ("decoder.self_attn.q_proj", (3, 16, 1), "sites are encoder.self.q, "),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(site, shape, message):
    model = tiny.t5()
    adapters = {site: lf.LowRank(jnp.ones(shape), jnp.ones((3, 1, 12)))}
    ids = jnp.ones((1, 2), jnp.int32)
    for use in (
        lambda: model(ids, ids > 0, ids, adapters),
        lambda: lf.merged_base(model, adapters),
        lambda: lf.generate(model, ids, ids > 0, adapters, max_new_tokens=1),
    ):
        with refused(message):
            use()
