"""The plan of a matrix of runs, compared with XLA's analysis of the programs that run; nothing is computed."""

import dataclasses
import functools
import os
import re
from contextlib import nullcontext
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.estimates import plan
from lorafusion_jax.estimates.estimate import estimate
from lorafusion_jax.estimates.flops import forward_flops
from lorafusion_jax.estimates.machines import Pace, pace, spent
from lorafusion_jax.estimates.params import size
from lorafusion_jax.estimates.plan import plan_table
from lorafusion_jax.methods import METHODS
from lorafusion_jax.methods.fused import BasisUpdate
from lorafusion_jax.methods.vera import SharedUpdate
from lorafusion_jax.models.decoder.config import Rope
from lorafusion_jax.models.qwen3_5.config import Delta, Qwen35Config
from lorafusion_jax.models.t5.config import SHAPES
from lorafusion_jax.tasks import Batch, Example, Rows, Task

_S = jax.ShapeDtypeStruct
# XLA counts the body of a loop once: layers are unrolled, and no more than `compose` computes in one go.
_SMALL = lf.models.T5Config(
    vocab_size=512,
    d_model=128,
    d_kv=32,
    d_ff=320,
    num_heads=4,
    num_layers=2,
    num_decoder_layers=1,
    unroll=True,
)
_SCANNED = lf.models.T5Config(
    vocab_size=512,
    d_model=128,
    d_kv=32,
    d_ff=320,
    num_heads=4,
    num_layers=9,
    num_decoder_layers=7,
)
_HEADS = {
    "d_head": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "query_scale": 32**-0.5,
    "rope": Rope(width=32),
}
_SIZES = {
    "vocab_size": 512,
    "d_model": 128,
    "d_ff": 320,
    "num_layers": 2,
    "context": 128,
}
_DECODER = lf.models.DecoderConfig(
    model_type="llama", **_SIZES, **_HEADS, eps=1e-6, unroll=True
)
_SCANNED_DECODER = dataclasses.replace(_DECODER, num_layers=9, unroll=False)
_DELTA = Delta(key_heads=4, value_heads=4, d_key=32, d_value=32, kernel=4)
_HYBRID = Qwen35Config(
    model_type="qwen3_5_text",
    **_SIZES,
    **_HEADS,
    eps=1e-6,
    unroll=True,
    attention_gate=True,
    group=2,
    delta=_DELTA,
)
_SCANNED_HYBRID = dataclasses.replace(_HYBRID, num_layers=8, group=4, unroll=False)
_UNROLLED = {"unroll": True}
_BFLOAT16 = {"dtype": "bfloat16"}
_SHAPE = lf.estimates.Shape(4, 32, 8)
_PACKED = lf.estimates.Shape(1, 96, 24, ((2, 32, 8), (2, 16, 8)))
_TASK = str(one_block.SMALL / "tasks" / "double_digit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers(lf.FusionRecipe):
    """Numbers for plans of all methods, each of which has a part of them."""

    lora_rank: int = 16
    vera_rank: int = 128
    lora_targets: tuple[str, ...] | None = None
    lr_lora: float = 2e-3
    lr_full: float = 2e-4


_RECIPE = _Numbers(modules=5, lora_rank=8, vera_rank=24)
_SETTINGS = lf.estimates.Settings(recipe=_RECIPE, rank=8, pool=7)
_IN_BASIS = dataclasses.replace(
    _SETTINGS, recipe=dataclasses.replace(_RECIPE, basis=12)
)
_QUICK = {
    "xla_backend_optimization_level": "0"
}  # of LLVM: what XLA computes and holds stays the same


def _method(name: str, config: lf.Architecture) -> lf.Method:
    adapted = tuple(lf.models.targeted(config, None).items())
    alone = {
        "zero-shot": lf.ZeroShot(),
        "full": lf.methods.FullFineTuning(),
        "lora": lf.LoRA(sites=adapted, rank=8),
    }
    return alone.get(name) or lf.Fusion(
        composition="mix" if name.endswith("mix") else "sum"
    )


def _planned(
    name: str, settings: lf.estimates.Settings
) -> tuple[str, lf.estimates.Settings]:
    """Return the name of a method in the registry, and its settings."""
    if name != "fusion-mix":
        return name, settings
    return "fusion", dataclasses.replace(
        settings, recipe=dataclasses.replace(settings.recipe, composition="mix")
    )


@cache
def _frozen(
    name: str, config: lf.Architecture, settings: lf.estimates.Settings
) -> tuple[nnx.GraphDef, lf.Frozen]:
    """Return the model's structure and its frozen arrays, all zeros."""
    graph, base = nnx.split(lf.models.abstract_model(config))
    base = jax.tree.map(lambda a: jnp.zeros(a.shape, config.dtype), base)
    pool = None
    modules = settings.pool or settings.recipe.modules
    r = settings.rank
    k = settings.recipe.basis
    shapes = {
        n: (s.layers, modules, s.d_in, s.d_out)
        for n, s in lf.models.targeted(config, None).items()
    }
    rank = {n: jnp.full((L, N), r) for n, (L, N, *_) in shapes.items()}
    names = tuple(map(str, range(modules)))
    if name.startswith("fusion") and k is None:
        A = {n: jnp.zeros((L, N, d_in, r)) for n, (L, N, d_in, _) in shapes.items()}
        B = {n: jnp.zeros((L, N, r, d_out)) for n, (L, N, _, d_out) in shapes.items()}
        pool = lf.LoraPool(A=A, B=B, rank=rank, names=names)
    elif name.startswith("fusion"):
        U = {n: jnp.zeros((L, d_in, k)) for n, (L, _, d_in, _) in shapes.items()}
        V = {n: jnp.zeros((L, k, d_out)) for n, (L, *_, d_out) in shapes.items()}
        S = {n: jnp.zeros((L, N, k, k)) for n, (L, N, *_) in shapes.items()}
        energy = {n: jnp.zeros((L, N)) for n, (L, N, *_) in shapes.items()}
        pool = lf.SharedBasis(
            U=U, V=V, S=S, energy=energy, rank=rank, names=names, sites=tuple(shapes)
        )

    def precompute() -> list[jax.Array]:
        precomputed = _method(name, config).precompute(
            lf.Frozen(base, pool), lf.kernels(nnx.merge(graph, base))
        )
        trees.append(jax.tree.structure(precomputed))
        return jax.tree.leaves(precomputed)

    trees = []
    with tiny.for_tpu() if settings.device == "accelerator" else nullcontext():
        leaves = jax.eval_shape(precompute)
    precomputed = trees[0].unflatten([jnp.zeros(a.shape, a.dtype) for a in leaves])
    return graph, dataclasses.replace(precomputed, base=base, pool=pool)


def _held_in(load_in: str, graph: nnx.GraphDef, frozen: lf.Frozen) -> lf.Frozen:
    """Return frozen arrays with base and pool in few bits."""
    if load_in == "full":
        return frozen
    model = nnx.merge(graph, frozen.base)
    lf.models.set_matrices(
        model,
        {
            n: lf.quantise(w, load_in, tiled_axis=-2)
            for n, w in lf.models.matrices(model).items()
        },
    )
    pool = None if frozen.pool is None else frozen.pool.quantised(load_in)
    return dataclasses.replace(frozen, base=nnx.split(model)[1], pool=pool)


def _batch(shape: lf.estimates.Shape, *lead: int) -> Batch:
    source = (*lead, shape.rows, shape.source)
    target = (*lead, shape.rows, shape.target)
    batch = Batch(
        _S(source, jnp.int32),
        _S(source, bool),
        _S(target, jnp.int32),
        _S(source[:-1], bool),
    )
    if not shape.groups:
        return batch
    pieces = (
        tuple(_S((group[0], group[part]), jnp.int32) for group in shape.groups)
        for part in (1, 2)
    )
    return batch._replace(
        row_mask=_S((sum(group[0] for group in shape.groups),), bool),
        rows=Rows(*pieces, batch.labels),
    )


def _state(
    name: str, config: lf.Architecture, settings: lf.estimates.Settings, seeds: int
):
    graph, frozen = _frozen(name, config, settings)
    index = _S((seeds, settings.recipe.modules), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds))

    def start(index, key):
        return lf.init_state(
            lf.Problem(
                graph=graph, method=_method(name, config), frozen=frozen, index=index
            ),
            key,
        )

    return jax.eval_shape(jax.vmap(start), index, keys), index


def _problem(
    name: str,
    config: lf.Architecture,
    settings: lf.estimates.Settings,
    seed_mode: str = "batched",
):
    """Return the problem of some weights and modules."""
    graph, _ = _frozen(name, config, settings)
    method = _method(name, config)
    return lambda frozen, index: lf.Problem(
        graph=graph, method=method, frozen=frozen, index=index, seed_mode=seed_mode
    )


def _rates(name: str, config: lf.Architecture, seeds: int):
    return jax.eval_shape(
        lambda: lf.training.recipe_rates(_method(name, config), _RECIPE, seeds)
    )


def _of_one(tree):
    return jax.tree.map(lambda a: _S(a.shape[1:], a.dtype), tree)


def _compiled(fn, first, *rest, donate: bool = False):
    """Return the compiled program of `fn(first, *rest)`, whose arrays pass as leaves: types are checked of tracers."""
    leaves, tree = jax.tree.flatten(first)
    others, rest_tree = jax.tree.flatten(rest)

    def flat(leaves, others):
        return jax.tree.leaves(fn(tree.unflatten(leaves), *rest_tree.unflatten(others)))

    return (
        jax.jit(flat, donate_argnums=0 if donate else ())
        .lower(leaves, others)
        .compile(compiler_options=_QUICK)
    )


def _flops(compiled) -> float:
    return compiled.cost_analysis()["flops"]


def _bytes(compiled) -> int:
    found = compiled.memory_analysis()
    returned = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + returned


def _step(
    name: str,
    config: lf.Architecture,
    settings: lf.estimates.Settings,
    shape: lf.estimates.Shape = _SHAPE,
):
    """Return the real step of one seed, compiled."""
    _, frozen = _frozen(name, config, settings)
    state, index = map(_of_one, _state(name, config, settings, 1))
    problem = _problem(name, config, settings)
    optimisation = lf.Optimisation(steps=9, clip=1.0)

    def step(state, batch, index, frozen, rates):
        return lf.fusion_step(
            state, batch, problem(frozen, index), rates, optimisation=optimisation
        )

    return _compiled(
        step, state, _batch(shape), index, frozen, _of_one(_rates(name, config, 1))
    )


_LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "config", "changes", "tolerance"),
    [
        pytest.param("full", _DECODER, {}, 0.1, marks=_LONG),
        pytest.param("full", _HYBRID, {}, 0.02, marks=_LONG),
        ("fusion", _SMALL, {"recipe": dataclasses.replace(_RECIPE, basis=32)}, 0.02),
        # A sum that is formed as a matrix, which multiplies all tokens, or those of the source.
        ("fusion", _SMALL, {"rank": 32}, 0.1),
        ("fusion", _SMALL, {"rank": 16}, 0.05),
        # Norms from pair terms, as accelerators compute them.
        ("fusion", _SMALL, {"device": "accelerator"}, 0.03),
        pytest.param(
            "fusion", _SMALL, {"device": "accelerator", "rank": 32}, 0.1, marks=_LONG
        ),
    ],
)
def test_flops_of_a_step(name, config, changes, tolerance):
    settings = dataclasses.replace(_SETTINGS, **changes)
    method, chosen = _planned(name, settings)
    update = lf.estimates.update_of(config, method, chosen)
    trainable = lf.estimates.trained_numbers(config, method, chosen)
    found = lf.estimates.step_flops(config, _SHAPE, update, trainable=trainable)
    np.testing.assert_allclose(
        found, _flops(_step(name, config, settings)), rtol=tolerance
    )
    if "recipe" in changes:
        assert (
            isinstance(update, BasisUpdate)
            and update.width(config.sites["encoder.self.q"], 1) == 32
        )
    elif "rank" in changes:
        sites = lf.models.targeted(config, ("q", "v"))
        assert all(
            update.is_dense(site) == (changes["rank"] == 32) for site in sites.values()
        )
        widths = {update.width(site, 128) for site in sites.values()}
        assert widths == {0} and update.width(sites["decoder.self.q"], 32) == (
            0 if changes["rank"] == 32 else 80
        )
    if "device" in changes:
        _, frozen = _frozen(name, config, settings)
        arrays = jax.tree.leaves((frozen.pool.A, frozen.pool.B, frozen.gram))
        assert lf.estimates.pool_bytes(config, update) == sum(a.nbytes for a in arrays)


@pytest.mark.parametrize("config", [_SMALL, pytest.param(_DECODER, marks=_LONG)])
def test_flops_of_a_packed_step(config):
    """Attention within each row alone makes the difference: the whole line has three times as many scores."""
    method, chosen = _planned("fusion", _SETTINGS)
    flops = functools.partial(
        lf.estimates.step_flops,
        update=lf.estimates.update_of(config, method, chosen),
        trainable=lf.estimates.trained_numbers(config, method, chosen),
    )
    found = flops(config, _PACKED)
    in_one = flops(config, _PACKED._replace(groups=()))
    counted = _flops(_step("fusion", config, _SETTINGS, _PACKED))
    np.testing.assert_allclose(found, counted, rtol=0.1)
    assert in_one > 1.05 * found


def test_pair_terms_are_planned_where_a_run_prepares_them():
    settings = dataclasses.replace(_SETTINGS, device="accelerator")
    by_rank = dataclasses.replace(
        settings, recipe=dataclasses.replace(_RECIPE, granularity="rank")
    )
    assert (
        lf.estimates.update_of(_SMALL, "fusion", settings).pair_terms == 7 * 8 // 2 + 7
    )
    assert (
        lf.estimates.update_of(_SMALL, "mean-fusion", settings).pair_terms
        == 7 * 8 // 2 + 7
    )
    assert (
        lf.estimates.update_of(
            _SMALL, "fusion", dataclasses.replace(settings, pool=13)
        ).pair_terms
        == 13 * 8
    )
    for name, others in (
        ("fusion", _SETTINGS),
        _planned("fusion-mix", settings),
        ("coefficients", settings),
        ("fusion", dataclasses.replace(settings, pool=14)),
        ("mean-fusion", by_rank),
        ("mean-fusion", dataclasses.replace(_IN_BASIS, device="accelerator")),
    ):
        assert (
            getattr(lf.estimates.update_of(_SMALL, name, others), "pair_terms", 0) == 0
        ), name


def test_flops_by_hand():
    # One layer each of 2 x 2 matrices, one row of 3 source and 1 target tokens.
    config = lf.models.T5Config(
        vocab_size=5,
        d_model=2,
        d_kv=2,
        d_ff=2,
        num_heads=1,
        num_layers=1,
        num_decoder_layers=1,
    )
    shape = lf.estimates.Shape(1, 3, 1)
    # Encoder: q k v o and three of the feed-forward for 3 tokens; decoder: 9 for 1, cross k and v for 3; the head.
    base = 8 * (7 * 3 + 9 * 1 + 2 * 3) + 2 * 2 * 5
    attention = 2 * 2 * 2 * (3 * 3 + 1 * 1 + 1 * 3)
    assert forward_flops(config, shape, lf.Update()) == base + attention
    # q and v: of 3 tokens in the encoder, of 1, 1 and 1 in the decoder, cross v of 3.
    met = 3 + 3 + 1 + 1 + 1 + 3
    vera = SharedUpdate(rank=7)
    assert forward_flops(config, shape, vera) == base + attention + 2 * met * 7 * (
        2 + 2
    )
    backward = base + 2.5 * attention
    # Six matrices of a basis of 2: 5 cores are mixed and multiplied by V, and the norm is formed as a matrix.
    basis = BasisUpdate(rank=2, modules=5, magnitudes=True)
    made = 6 * 2 * (5 * 4 + 4 * 2 + 2 * 4)
    assert forward_flops(
        config, shape, basis
    ) == base + attention + made + 2 * met * 2 * (2 + 2)
    of_core = 2 * met * 2 * 2 + 6 * 2 * (4 * 2 + 5 * 4)
    wanted = 2 * base + 3.5 * attention + made + 2 * 2 * met * 2 * 4 + of_core
    assert lf.estimates.step_flops(config, shape, basis, trainable=0) == wanted
    # In arrays every token is multiplied by the core, forward and backward, and its gradient is that of the core.
    in_arrays = dataclasses.replace(basis, in_arrays=True)
    wanted += 2 * 2 * met * 4 + 2 * met * 4 + 6 * 2 * 5 * 4 - of_core
    assert lf.estimates.step_flops(config, shape, in_arrays, trainable=0) == wanted
    assert (
        lf.estimates.step_flops(config, shape, lf.Update(), trainable=0)
        == base + attention + backward
    )
    assert (
        lf.estimates.step_flops(config, shape, vera, trainable=0)
        == base + attention + backward + 2 * 2 * met * 7 * 4
    )
    assert (
        lf.estimates.step_flops(config, shape, lf.Update(trains_base=True), trainable=1)
        == 2 * base + attention + backward + 18
    )


def test_flops_of_a_decoder_by_hand():
    # Two heads of queries share one of keys and values; 3 tokens of a prompt and 2 of an answer, one row.
    config = dataclasses.replace(
        _DECODER,
        vocab_size=5,
        d_model=4,
        d_head=2,
        d_ff=3,
        num_heads=2,
        num_kv_heads=1,
        num_layers=1,
    )
    products = 2 * 5 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3) + 2 * 2 * 4 * 5
    none = lf.Update()
    shape = lf.estimates.Shape(1, 3, 2)
    assert forward_flops(config, shape, none) == products + 4 * 2 * 2 * 5 * 5
    assert lf.estimates.generation_flops(
        config, shape, none
    ) == products + 4 * 2 * 2 * (3 * 3 + 2 * 5)


@pytest.mark.parametrize(
    ("name", "config", "counted_as", "rank"),
    [
        ("fusion", _SMALL, _SMALL, 8),
        # A sum that is formed as a matrix, which multiplies the prompts alone.
        pytest.param("fusion", _SMALL, _SMALL, 16, marks=_LONG),
        # Its layers are a loop: unrolled, XLA drops most of the last one's pass over the prompt.
        ("zero-shot", _SCANNED_DECODER, dataclasses.replace(_DECODER, num_layers=1), 8),
    ],
)
def test_flops_of_generation(name, config, counted_as, rank):
    settings = dataclasses.replace(_SETTINGS, rank=rank)
    graph, frozen = _frozen(name, config, settings)
    state, index = map(_of_one, _state(name, config, settings, 1))

    def run(params, batch, index, frozen):
        adapters, _ = _method(name, config).adapters(params, frozen, index)
        model = nnx.merge(graph, frozen.base)
        return lf.generate(
            model, batch.input_ids, batch.input_mask, adapters, max_new_tokens=6
        )

    # Counted once by XLA: the source, and the body of the loop over tokens.
    update = lf.estimates.update_of(config, name, settings)
    source = lf.estimates.generation_flops(
        counted_as, lf.estimates.Shape(4, 32, 0), update
    )
    whole = lf.estimates.generation_flops(
        counted_as, lf.estimates.Shape(4, 32, 6), update
    )
    counted = _flops(_compiled(run, state.params, _batch(_SHAPE), index, frozen))
    np.testing.assert_allclose(source + (whole - source) / 6, counted, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "seed_mode", "config", "load_in", "structure"),
    [
        ("fusion", "sequential", _SCANNED_DECODER, "nf4", {}),
        pytest.param(
            "fusion-mix",
            "batched",
            _SCANNED,
            "full",
            _BFLOAT16,
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "lora",
            "sequential",
            _SCANNED,
            "full",
            _UNROLLED | _BFLOAT16,
            marks=pytest.mark.nightly,
        ),
        *(
            pytest.param(*case, marks=_LONG)
            for case in (
                ("fusion", "sequential", _SCANNED, "full", {}),
                ("fusion-formed", "sequential", _SCANNED, "full", {}),
                ("fusion-mix", "sequential", _SCANNED, "nf4", {}),
                ("fusion-basis", "sequential", _SCANNED, "full", {}),
                ("fusion-basis", "sequential", _SCANNED, "int8", {}),
                ("full", "sequential", _SCANNED, "full", {}),
                ("fusion", "sequential", _SCANNED_DECODER, "full", {}),
                ("fusion", "sequential", _SCANNED_HYBRID, "full", {}),
                ("lora", "batched", _SCANNED_DECODER, "int8", _BFLOAT16),
                ("lora", "sequential", _SCANNED_DECODER, "full", _UNROLLED),
            )
        ),
    ],
)
def test_memory_of_a_step(name, seed_mode, config, load_in, structure):
    config = dataclasses.replace(config, **structure)
    shape = lf.estimates.Shape(8, 64, 8)
    seeds = 2
    settings = _SETTINGS
    if name == "fusion-basis":
        name = "fusion"
        settings = lf.estimates.Settings(
            recipe=dataclasses.replace(_RECIPE, basis=48, modules=20), pool=60
        )
    elif name == "fusion-formed":
        name = "fusion"
        settings = dataclasses.replace(_SETTINGS, rank=16)
    graph, frozen = _frozen(name, config, settings)
    frozen = _held_in(load_in, graph, frozen)
    if name != "full":
        frozen = frozen.unstacked()
    state, index = _state(name, config, settings, seeds)
    problem = _problem(name, config, settings, seed_mode)
    optimisation = lf.Optimisation(steps=9, clip=1.0)

    def step(state, batch, index, frozen, rates):
        batches = jax.tree.map(lambda rows: rows[:, None], batch)  # of one step
        return lf.training.train_seeds(
            state, batches, problem(frozen, index), rates, optimisation=optimisation
        )

    rates = _rates(name, config, seeds)
    compiled = _compiled(
        step, state, _batch(shape, seeds), index, frozen, rates, donate=True
    )
    method, chosen = _planned(name, settings)
    update = lf.estimates.update_of(config, method, chosen)
    trainable = lf.estimates.trained_numbers(config, method, chosen)
    held = lf.estimates.pool_bytes(
        config, update, load_in
    ) + seeds * lf.estimates.state_bytes(trainable)
    # Nothing reads the base where all of it is trained, and XLA does not count it.
    held += 0 if name == "full" else lf.estimates.weights_bytes(config, load_in)
    np.testing.assert_allclose(
        held
        + lf.estimates.step_bytes(
            config,
            shape,
            update,
            trainable=trainable,
            seeds=seeds,
            seed_mode=seed_mode,
            device="cpu",
            load_in=load_in,
        ),
        _bytes(compiled),
        rtol=0.25,
    )


@pytest.mark.usefixtures("fusion_emitters")
@pytest.mark.parametrize(
    ("config", "dtype", "load_in", "rows"),
    [
        (_SCANNED_DECODER, "float32", "nf4", 32),
        pytest.param(_SCANNED_DECODER, "bfloat16", "full", 32, marks=_LONG),
        # Mostly weights, so that a second copy of them would be noticed.
        pytest.param(_SCANNED_DECODER, "bfloat16", "full", 1, marks=_LONG),
        pytest.param(_SCANNED, "float32", "full", 32, marks=_LONG),
        pytest.param(_SCANNED, "bfloat16", "int8", 32, marks=_LONG),
        pytest.param(_SCANNED_DECODER, "float32", "full", 32, marks=_LONG),
        pytest.param(_SCANNED_HYBRID, "float32", "full", 32, marks=_LONG),
    ],
)
def test_memory_of_generation(config, dtype, load_in, rows):
    config = dataclasses.replace(config, dtype=dtype)
    shape = lf.estimates.Shape(rows, 96, 8)
    seeds = 2
    tokens = 8
    graph, frozen = _frozen("lora", config, _SETTINGS)
    frozen = _held_in(load_in, graph, frozen).unstacked()
    state, index = _state("lora", config, _SETTINGS, seeds)
    problem = _problem("lora", config, _SETTINGS)
    numbers = _S((seeds,), jnp.int32)
    trees = []

    def begun(params, index, frozen, numbers, batch):
        rows = (
            batch.input_ids,
            batch.input_mask,
            batch.row_mask,
            jnp.full(shape.rows, tokens),
            None,
        )
        return lf.runs.begin_rows(
            lf.runs.SeedModels(params, problem(frozen, index), numbers),
            *rows,
            max_new_tokens=tokens,
            sampling=lf.models.GREEDY,
        )

    def leaves(*arguments):
        found, of_parts = zip(*map(jax.tree.flatten, begun(*arguments)), strict=True)
        trees.extend(of_parts)
        return found

    def advanced(generation, adapters, params, index, frozen, numbers):
        generation = trees[0].unflatten(generation)
        adapters = trees[1].unflatten(adapters)
        limits = (jnp.int32(shape.rows), jnp.int32(tokens))
        models = lf.runs.SeedModels(params, problem(frozen, index), numbers)
        return lf.runs.advance_rows(
            models, generation, adapters, limits, sampling=lf.models.GREEDY
        )[0]

    arguments = (state.params, index, frozen, numbers)
    pieces = jax.eval_shape(leaves, *arguments, _batch(shape))
    compiled = [
        _compiled(begun, *arguments, _batch(shape)),
        _compiled(advanced, *pieces, *arguments, donate=True),
    ]
    update = lf.estimates.update_of(config, "lora", _SETTINGS)
    trainable = lf.estimates.trained_numbers(config, "lora", _SETTINGS)
    needed = lf.estimates.evaluation_bytes(
        config,
        shape,
        tokens,
        update,
        seeds=seeds,
        seed_mode="batched",
        device="cpu",
        load_in=load_in,
    )
    held = lf.estimates.weights_bytes(config, load_in) + seeds * trainable * 4
    np.testing.assert_allclose(held + needed, max(map(_bytes, compiled)), rtol=0.25)


_SAME = tuple(Example("a b c", "d e") for _ in range(20))


def test_a_workload_has_the_batches_of_training_and_evaluation():
    rows = [Example("x" * (4 * n + 2), "yes" if n % 2 else "no") for n in range(40)]
    recipe = lf.FewShotRecipe(epochs=3, batch_size=8, shots=4)
    found = lf.estimates.workload(
        Task("t", tuple(rows), tuple(rows[:30]), "-"), recipe, eval_batch=16
    )
    # 2 of 40 rows validate; 5 batches hold 38; a row of n tokens and its end is at most 40 wide.
    assert (
        len(found.steps) == 15 and len(found.search) == 5 and found.validation.rows == 2
    )
    assert all(step.rows == 8 and 4 <= step.source <= 48 for step in found.steps)
    assert [shape.rows for shape in found.test.rows] == [15, 15] and found.test.rows[
        -1
    ].source == 31
    # Each test row is asked with both labels.
    assert sum(shape.rows for shape in found.test.options) == 60
    assert found.few_shot is not None and found.few_shot.rows[0].source > 32
    assert found.lengths == "estimated from characters" and found.new_tokens == 4

    def tokenizer(texts, **_):
        return {"input_ids": [[1] * (10 * len(text.split())) for text in texts]}

    found = lf.estimates.workload(
        Task("t", _SAME, _SAME[:2], "-"),
        lf.FewShotRecipe(shots=50),
        tokenizer=tokenizer,
    )
    assert (
        found.steps[0] == lf.estimates.Shape(10, 32, 20)
        and found.lengths == "tokenised"
        and found.few_shot is None
    )
    with pytest.raises(
        ValueError,
        match="too few training rows for 50 examples in a prompt: lower shots",
    ):
        estimate(
            _SMALL,
            "few-shot",
            found,
            lf.estimates.Settings(recipe=lf.FewShotRecipe(shots=50)),
        )


def _work():
    row = Example("x" * 116, "x" * 8)
    return lf.estimates.workload(Task("t", (row,) * 40, (row,) * 50, "-"), _RECIPE)


def test_a_plan_adds_up():
    work = _work()
    rows = {
        row.method: row
        for row in plan(_SMALL, [*METHODS], {"a": work, "b": work}, _SETTINGS)
    }
    alone = estimate(_SMALL, "fusion", work, _SETTINGS)
    fusion = rows["fusion"]
    # Two encoder layers with q and v, a decoder layer with two attentions, rank 8, five modules.
    for granularity, columns in {
        "global": 1,
        "block": 3,
        "site": 8,
        "rank": 8 * 8,
    }.items():
        settings = dataclasses.replace(
            _SETTINGS, recipe=dataclasses.replace(_RECIPE, granularity=granularity)
        )
        assert (
            lf.estimates.trained_numbers(_SMALL, "coefficients", settings)
            == 5 * columns
        )
    assert (
        fusion.runs == 10
        and rows["zero-shot"].runs == 2
        and rows["constant"].cost.peak_bytes == 0
    )
    assert fusion.cost.training_flops == pytest.approx(10 * alone.training_flops)
    assert fusion.cost.evaluation_flops == pytest.approx(10 * alone.evaluation_flops)
    cost = fusion.cost
    held = (
        cost.weights_bytes,
        cost.pool_bytes,
        cost.state_bytes,
        cost.activation_bytes,
    )
    assert cost.peak_bytes == sum(held) and cost.weights_bytes == 4 * size(_SMALL)
    # 40 evaluations of LoraHub, one for each of 5 modules of the best single one.
    searched = rows["lorahub"].cost
    assert searched.training_flops / searched.forward_flops == pytest.approx(
        10 * 40 * len(work.search)
    )
    passes = rows["single"].cost.training_flops / rows["single"].cost.forward_flops
    assert passes == pytest.approx(10 * 5 * len(work.search))


def test_ranking_is_one_pass_over_all_modules_in_memory():
    work = _work()
    recipe = dataclasses.replace(_RECIPE, basis=12)

    def cost(**changes):
        settings = dataclasses.replace(
            _SETTINGS, pool=60, recipe=dataclasses.replace(recipe, **changes)
        )
        return estimate(_SMALL, "fusion", work, settings)

    drawn = cost()
    whole = cost(choose="gradient")
    inside = cost(choose="basis-gradient")
    for ranked, (kind, rank) in (
        (whole, (lf.methods.SumUpdate, 8)),
        (inside, (BasisUpdate, 12)),
    ):
        update = kind(rank=rank, modules=60, pool=60, magnitudes=True)
        once = sum(
            lf.estimates.step_flops(_SMALL, shape, update, trainable=0)
            for shape in work.search
        )
        assert ranked.training_flops == pytest.approx(drawn.training_flops + once)
        assert (ranked.trainable, ranked.pool_bytes) == (
            drawn.trainable,
            drawn.pool_bytes,
        )
    modules = lf.estimates.pool_bytes(_SMALL, lf.methods.SumUpdate(rank=8, pool=60))
    assert (
        whole.activation_bytes
        > drawn.activation_bytes + modules
        > inside.activation_bytes
        > 0
    )


def test_a_plan_describes_its_runs_and_costs():
    large = (
        SHAPES["flan-t5-large"],
        {"snarks": _work()},
        lf.estimates.Settings(recipe=lf.Recipe()),
    )
    out = lf.estimates.describe(
        plan(large[0], ["zero-shot", "fusion"], *large[1:]), *large
    )
    assert (
        "2 methods and 1 tasks, looped; 5 seeds as one program, one after the other."
        in out
    )
    assert "lengths estimated from characters, padded" in out and "2.92 GiB" in out
    assert "| fusion    |    5 |   148,416 |" in out
    table = plan_table(plan(_SMALL, ["lora"], {"a": _work()}, _SETTINGS)).splitlines()
    assert len({len(line) for line in table}) == 1 and table[-1].startswith("| all ")


def test_a_plan_names_what_its_machine_cannot_hold(monkeypatch):
    options = lf.FuseOptions(
        base="flan-t5-large", task=_TASK, seeds=(1, 2), method="full"
    )

    def planned(name: str | None, **changes) -> str:
        asked = lf.estimates.PlanOptions(plan=True, plan_for=name)
        return lf.estimates.describe_run(dataclasses.replace(options, **changes), asked)

    h100 = planned("h100")
    assert "batched" in h100 and "float32 on an accelerator" in h100
    assert "The machine has 74.51 GiB. All rows fit." in h100
    assert "The machine has 14.90 GiB. More than that need: full." in planned("v5e")
    mac = planned("mac-64gb")
    assert "one after the other" in mac and "float32 on a CPU" in mac
    assert "The machine has 64.00 GiB. All rows fit." in mac
    assert "JAX's Metal backend is not tested." in mac and "Time: not known" in mac
    assert "The machine has 8.00 GiB. More than that need: full." in planned("mac-8gb")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    for name in ("cpu", None):
        assert "The machine has 4.00 GiB. More than that need: full." in planned(name)
    pages["SC_PHYS_PAGES"] = 2**24
    assert "The machine has 64.00 GiB. All rows fit." in planned("cpu")


@pytest.mark.parametrize(
    ("dtype", "load_in", "warned"),
    [
        ("float32", "nf4", True),
        ("bfloat16", "nf4", False),
        ("float32", "full", False),
    ],
)
def test_a_plan_in_few_bits_names_the_dtype_of_activations(dtype, load_in, warned):
    options = lf.FuseOptions(
        base="t5-small", task=_TASK, dtype=dtype, load_in=load_in, method="lora"
    )
    out = lf.estimates.describe_run(
        options, lf.estimates.PlanOptions(plan=True, plan_for="h100")
    )
    assert ("Add --dtype bfloat16." in out) == warned


def test_times_and_costs_by_hand():
    options = lf.estimates.PlanOptions(
        plan=True, plan_for="a100", utilisation=0.5, price=2.5, devices=2
    )
    at = pace(options, _SMALL, _SHAPE)
    assert at is not None and at.flops == 78e12  # half of 156 TFLOP/s
    # 1, 2 and 3 hours: the longest on one device, the others on the second.
    out = spent([78e12 * 3600 * hours for hours in (1, 2, 3)], at, options)
    assert out.startswith(
        "Time at 0.5 of the 156 TFLOP/s of a100 in float32 (--utilisation), without "
    )
    assert "compilation: 6.0 h on one device" in out
    assert out.endswith(" on one device, 3.0 h on 2. At 2.5 an hour: 15.00.")
    half = pace(
        dataclasses.replace(options, utilisation=None),
        dataclasses.replace(_SMALL, **_BFLOAT16),
        _SHAPE,
    )
    assert half is not None and half.flops == pytest.approx(0.3 * 312e12)
    (row,) = plan(_SMALL, ["lora"], {"a": _work(), "b": _work()}, _SETTINGS)
    assert row.jobs == ((row.cost.training_flops + row.cost.evaluation_flops) / 2,) * 2
    ends = [
        line.split("|")[-3:-1]
        for line in plan_table([row], Pace(row.jobs[0] / 90, "")).splitlines()
    ]
    assert [[cell.strip() for cell in cells] for cells in ends[2:]] == [
        ["1.5 min", "3.0 min"]
    ] * 2


def test_the_rate_of_a_cpu_is_measured():
    whole = pace(
        lf.estimates.PlanOptions(plan=True, plan_for="cpu", utilisation=1.0),
        _SMALL,
        _SHAPE,
    )
    half = pace(
        lf.estimates.PlanOptions(plan=True, plan_for="cpu", utilisation=0.5),
        _SMALL,
        _SHAPE,
    )
    assert whole is not None and half is not None and whole.flops == 2 * half.flops > 0
    # Four rows of 32 tokens, and the largest matrices.
    assert "GFLOP/s, measured: 128 x 128 by 128 x 320" in whole.source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"utilisation": 0.0},
            "utilisation is 0.0: expected a share of the peak, above 0 and at most 1",
        ),
        ({"utilisation": 1.5}, "utilisation is 1.5"),
        (
            {"price": -1.0},
            "price is -1.0: expected the price of a device's hour, 0 or more",
        ),
        ({"price": float("inf")}, "price is inf"),
        ({"devices": 0}, "devices is 0: expected at least 1"),
        (
            {"plan": False, "price": 2.5},
            "--price 2.5 is an option of a plan: add --plan, or leave it out",
        ),
        (
            {"plan": False, "plan_for": "h100"},
            "--for h100 is an option of a plan: add --plan",
        ),
        (
            {"plan_for": "mac-m3"},
            "no machine 'mac-m3': choose of cpu, a100, .*, or a Mac by its unified memory, such as mac-64gb",
        ),
    ],
)
def test_options_of_a_plan_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lf.estimates.PlanOptions(**{"plan": True} | changes).check_plan()


def test_named_modules_are_those_of_every_seed():
    adapters = one_block.SMALL / "adapters"
    options = lf.FuseOptions(
        base="t5-small", pool=str(adapters), task=_TASK, method="coefficients"
    )
    named = dataclasses.replace(
        options, adapters=tuple(sorted(path.name for path in adapters.iterdir()))[:3]
    )

    def pool(options: lf.FuseOptions, *seeds: int) -> str:
        described = lf.estimates.describe_run(dataclasses.replace(options, seeds=seeds))
        (line,) = re.findall(r"^\| coefficients.*", described, re.MULTILINE)
        return line.split("|")[8].strip()

    drawn = dataclasses.replace(options, recipe=lf.FusionRecipe(modules=3))
    assert pool(named, 1, 2, 3) == pool(drawn, 1) != pool(drawn, 1, 2, 3)


def test_methods_settings_and_rows_that_cannot_be_planned_are_refused():
    of_basis = {k: {"recipe": lf.FusionRecipe(modules=5, basis=k)} for k in (0, 129)}
    for method, changes, message in (
        ("fusion", {"rank": 0}, "rank is 0"),
        ("lora", {"recipe": lf.Recipe(epochs=0)}, "epochs is 0"),
        ("fusion", {"pool": 2}, "a pool of 2 for seeds that draw 5 modules each"),
        (
            "fusion",
            {"targets": ("q", "x")},
            "targets are q x: choose of q k v o wi_0 wi_1 wo",
        ),
        ("mean", of_basis[129], "129 directions, but .* is 128 x 128"),
        ("fusion", of_basis[0], "basis is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(_SMALL, method, _work(), dataclasses.replace(_SETTINGS, **changes))
    for make, message in (
        (
            lambda: lf.estimates.workload(Task("t", _SAME[:1], (), "-"), _RECIPE),
            "t has no test rows: give at least one",
        ),
        (
            lambda: plan(_SMALL, ["lora"], {}, _SETTINGS),
            "a plan of 1 methods for 0 tasks: give at least one of each",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
