"""Random models of known shapes with a pool of LoRA modules, batches, and the steps that are measured.

Axis letters: B batch, S source, T target, L layer, P modules of the pool.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal
from unittest import mock

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from _measure import ROOT
from flax import nnx

from lorafusion_jax import (
    PRESETS,
    Architecture,
    Frozen,
    FullRecipe,
    Fusion,
    LoRA,
    LoraPool,
    LoRARecipe,
    Method,
    Problem,
    TrainState,
    gram,
    init_state,
    kernels,
    quantise,
    read_config,
    shared_basis,
)
from lorafusion_jax.loading import LoadIn
from lorafusion_jax.methods import FullFineTuning
from lorafusion_jax.models import (
    DecoderConfig,
    PerLayerWeights,
    T5Config,
    abstract_model,
    dense,
    family_of,
    known_shapes,
    matrices,
    set_matrices,
    targeted,
)
from lorafusion_jax.runs import generate_rows
from lorafusion_jax.tasks import Batch, Encoded, Rows
from lorafusion_jax.training import (
    Params,
    SeedMode,
    cross_entropy,
    default_seed_mode,
    recipe_rates,
    start,
    train_seeds,
)

BATCH = 5
SOURCE = 128
TARGET = 8
MODULES = 20
RANK = 16
_RECIPE = PRESETS["default"]
# Of methods that are no fusion.
_RECIPES = {LoRA: LoRARecipe(), FullFineTuning: FullRecipe()}
CHOICES = (
    "small-pool",
    "flan-t5-small",
    "flan-t5-base",
    "flan-t5-large",
    "smollm2-135m",
)

# What weights and activations are: `nf4` weights are multiplied in float32.
Dtype = Literal["float32", "bfloat16", "nf4"]
Composition = Literal["mix", "sum"]


def shape_parser(
    doc: str | None, default: str, *, several: bool = False
) -> argparse.ArgumentParser:
    """Return a script's parser that knows --json, and --shape of one or several base models."""
    parser = _measure.parser(doc)
    parser.add_argument(
        "--shape",
        choices=CHOICES,
        nargs="+" if several else None,
        default=[default] if several else default,
        help="of the base model",
    )
    return parser


def held_in(dtype: Dtype) -> LoadIn:
    """Return what base and pool are held in, as plans call it."""
    return "nf4" if dtype == "nf4" else "full"


def config_of(shape: str, dtype: Dtype = "float32") -> Architecture:
    """Return the structure of a shape; of the embedded small base too only the sizes count here."""
    activations = "bfloat16" if dtype == "bfloat16" else "float32"
    config = (
        read_config(ROOT / "examples/small/base")
        if shape == "small-pool"
        else known_shapes()[shape]
    )
    return dataclasses.replace(config, dtype=activations)


def hf_config(config: Architecture) -> dict[str, Any]:
    """Return what transformers calls the structure of a T5 or a Llama."""
    if isinstance(config, DecoderConfig):
        assert config.model_type == "llama", config.model_type
        return {
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.d_head,
            "max_position_embeddings": config.context,
            "rms_norm_eps": config.eps,
            "rope_parameters": {
                "rope_type": config.rope.scaling,
                "rope_theta": config.rope.theta,
            },
            "tie_word_embeddings": config.tied,
            "pad_token_id": config.pad_id,
            "eos_token_id": list(config.end_ids),
        }
    assert isinstance(config, T5Config)
    sizes = (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_layers",
        "num_decoder_layers",
    )
    return (
        {name: getattr(config, name) for name in sizes}
        | {
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu" if config.gated else "relu",
            "decoder_start_token_id": config.start_id,
            "pad_token_id": config.pad_id,
            "tie_word_embeddings": config.scale_logits,  # transformers 5 takes it for that, and ties every head
            "eos_token_id": config.eos_id,
        }
    )


def unrolled(config: Architecture) -> Architecture:
    """Return the structure with its layers compiled one after the other."""
    return dataclasses.replace(config, unroll=True)


@cache
def graph_of(config: Architecture) -> nnx.GraphDef:
    """Return the structure of a model."""
    return nnx.split(abstract_model(config))[0]


def frozen(config: Architecture, dtype: Dtype, modules: int) -> Frozen:
    """Return a random base and pool of `modules` modules; jitted, it would hold all of that several times."""
    model = family_of(config).model(config, rngs=nnx.Rngs(0))
    adapted = targeted(config, None)

    def draw(
        purpose: int, scale: dict[str, float], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(purpose), len(shapes))
        return {
            name: scale[name] * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    # dW of about a third of W.
    pool = LoraPool(
        A=draw(1, {n: s.d_in**-0.5 for n, s in adapted.items()},
               {n: (s.layers, modules, s.d_in, RANK) for n, s in adapted.items()}),
        B=draw(2, dict.fromkeys(adapted, 0.02), {n: (s.layers, modules, RANK, s.d_out) for n, s in adapted.items()}),
        rank={n: jnp.full((s.layers, modules), RANK) for n, s in adapted.items()},
        names=tuple(map(str, range(modules))),
    )  # fmt: skip
    if dtype == "nf4":
        set_matrices(
            model,
            {
                n: quantise(dense(w, jnp.float32), "nf4", tiled_axis=-2)
                for n, w in matrices(model).items()
            },
        )
        pool = pool.quantised("nf4")
    base = nnx.split(model)[1]
    if dtype == "bfloat16":
        base = jax.tree.map(lambda a: a.astype(jnp.bfloat16), base)
        model = nnx.merge(graph_of(config), base)
    used = {site: kernel for site, kernel in kernels(model).items() if site in adapted}
    return Frozen(base, pool, gram(pool, used))


def in_basis(config: Architecture, weights: Frozen, k: int) -> Frozen:
    """Return the weights with their pool in a shared basis of k directions."""
    assert isinstance(weights.pool, LoraPool)
    return precomputed(
        config, Fusion(basis=k), Frozen(weights.base, shared_basis(weights.pool, k))
    )


def precomputed(config: Architecture, method: Method, weights: Frozen) -> Frozen:
    """Return base and pool with what a run computes once from them, on the platform that is traced for."""
    return method.precompute(
        Frozen(weights.base, weights.pool),
        kernels(nnx.merge(graph_of(config), weights.base)),
    )


def shapes_of(config: Architecture, dtype: Dtype, modules: int = MODULES) -> Frozen:
    """Return the shapes of a base and a pool, for what is compiled and not run."""
    return jax.eval_shape(partial(frozen, config, dtype, modules))


def apart(weights: Frozen) -> Frozen:
    """Return shapes with layers in separate arrays, as loops on a CPU read them (`Frozen.per_layer`)."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, qwix.QArray) or len(leaf.shape) != 3:
            return leaf
        return PerLayerWeights(
            (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),) * leaf.shape[0]
        )

    base = jax.tree.map(
        of_leaf, weights.base, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray)
    )
    return dataclasses.replace(weights, base=base)


def answers(
    params: Params, batch: Batch, problem: Problem, new_tokens: int
) -> np.ndarray:
    """Return the ids that every seed generates for the rows of a batch, as runs generate them."""
    ids = np.asarray(batch.input_ids)
    mask = np.asarray(batch.input_mask)
    prompts = tuple(row[real] for row, real in zip(ids, mask, strict=True))
    how: Any = {
        "batch_size": len(prompts),
        "max_new_tokens": new_tokens,
        "pad_id": problem.config.pad_id,
    }
    return generate_rows(
        params, lambda number: problem, Encoded(prompts, prompts), **how
    )


def arguments(
    config: Architecture,
    weights: Frozen,
    method: Method,
    size: tuple[int, int] = (BATCH, SOURCE),
    *,
    seeds: int = 1,
    seed_mode: SeedMode = "sequential",
    groups: Sequence[tuple[int, int, int]] = (),
) -> tuple[TrainState, Batch, Problem, dict[str, jax.Array]]:
    """Return the arguments of the step of some seeds as shapes.

    `size` is that of input ids; a packed batch has `groups` of rows (`tasks.Rows.groups`).
    """
    (count, source), target = (
        size,
        sum(rows * target for rows, _, target in groups) or TARGET,
    )

    def drawn(
        weights: Frozen,
    ) -> tuple[TrainState, Batch, Problem, dict[str, jax.Array]]:
        problem = Problem(
            graph=graph_of(config),
            method=method,
            frozen=weights,
            index=jnp.zeros((seeds, MODULES), jnp.int32),
            seed_mode=seed_mode,
        )
        batch = Batch(
            input_ids=jnp.zeros((seeds, count, source), jnp.int32),
            input_mask=jnp.zeros((seeds, count, source), bool),
            labels=jnp.zeros((seeds, count, target), jnp.int32),
            row_mask=jnp.zeros(
                (seeds, sum(rows for rows, *_ in groups) or count), bool
            ),
        )
        if groups:
            sources = tuple(
                jnp.zeros((seeds, group[0], group[1]), jnp.int32) for group in groups
            )
            targets = tuple(
                jnp.zeros((seeds, group[0], group[2]), jnp.int32) for group in groups
            )
            batch = batch._replace(rows=Rows(sources, targets, batch.labels))
        of_seed = jax.vmap(
            lambda index, key: init_state(problem.replace(index=index), key)
        )
        state = of_seed(problem.index, jax.random.split(jax.random.key(0), seeds))
        return (
            state,
            batch,
            problem,
            recipe_rates(method, _RECIPES.get(type(method), _RECIPE), seeds),
        )

    return jax.eval_shape(drawn, weights)


def lowered(
    config: Architecture,
    weights: Frozen,
    method: Method,
    count: int = BATCH,
    *,
    seeds: int = 1,
) -> Any:
    """Return the step of some seeds in turn, traced from shapes, to be compiled."""
    return step_of(arguments(config, weights, method, (count, SOURCE), seeds=seeds))


def step_of(
    arguments: tuple[TrainState, Batch, Problem, dict[str, jax.Array]], steps: int = 1
) -> Any:
    """Return the program of some steps of all seeds, traced from shapes, to be compiled where their shardings say."""
    state, batch, problem, rates = arguments
    batches = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (a.shape[0], steps, *a.shape[1:]), a.dtype, sharding=a.sharding
        ),
        batch,
    )
    return train_seeds.lower(
        state, batches, problem, rates, optimisation=_RECIPE.optimisation(steps=10)
    )


def batch_of(
    config: Architecture,
    shape: tuple[int, int, int] = (BATCH, SOURCE, TARGET),
    *,
    seeds: int = 1,
) -> Batch:
    """Return random tokens, [seeds, B, S] and [seeds, B, T], no padding among them."""
    count, source, target = shape
    rng = np.random.default_rng(0)
    return Batch(
        input_ids=jnp.asarray(
            rng.integers(2, config.vocab_size, (seeds, count, source)), jnp.int32
        ),
        input_mask=jnp.ones((seeds, count, source), bool),
        labels=jnp.asarray(
            rng.integers(2, config.vocab_size, (seeds, count, target)), jnp.int32
        ),
        row_mask=jnp.ones((seeds, count), bool),
    )


class Step:
    """The fusion step of the reference protocol, as runs call it: one program for all seeds, state carried along."""

    def __init__(
        self,
        config: Architecture,
        weights: Frozen,
        composition: Composition,
        *,
        seeds: int = 1,
    ):
        assert weights.pool is not None
        recipe = dataclasses.replace(PRESETS["reference"], composition=composition)
        self.problem = Problem(
            graph=graph_of(config),
            method=Fusion(composition=composition, start="uniform"),
            frozen=weights,
            index=jnp.tile(jnp.arange(MODULES), (seeds, 1)),
            seed_mode=default_seed_mode(),
        ).per_layer()
        self.batches = jax.tree.map(
            lambda a: a[:, None], batch_of(config, seeds=seeds)
        )  # of one step
        self.optimisation = recipe.optimisation(steps=1000)
        self.rates = recipe_rates(self.problem.method, recipe, seeds)
        self.state: TrainState = start(self.problem, tuple(range(seeds)))
        self.losses: list[float] = []  # of the first seed

    def __call__(self) -> None:
        """Take one step, and wait for it."""
        self.state, metrics = train_seeds(
            self.state,
            self.batches,
            self.problem,
            self.rates,
            optimisation=self.optimisation,
        )
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"][0, 0]))


class Floor:
    """Forward and backward to activations only: the base alone, no adapter and no fusion.

    Attributes:
      temporaries: bytes that a call allocates in addition to its result.
    """

    def __init__(self, config: Architecture, weights: Frozen):
        batch = jax.tree.map(lambda a: a[0], batch_of(config))
        graph = graph_of(config)
        kind: Any = family_of(config).model
        embed = kind._embed

        def loss(
            shifts: dict[int, jax.Array], base: nnx.State, batch: Batch
        ) -> jax.Array:
            def shifted(model: Any, ids: jax.Array) -> jax.Array:
                return embed(model, ids) + shifts[ids.shape[1]]

            with mock.patch.object(kind, "_embed", shifted):
                logits = nnx.merge(graph, base).label_logits(
                    batch.input_ids, batch.input_mask, batch.labels, {}
                )
            return cross_entropy(logits, batch.labels) / BATCH

        # Gradients with respect to what is added to the embedded tokens are those of the first activations.
        widths = (SOURCE + TARGET - 1,) if config.causal else (SOURCE, TARGET)
        shifts = {
            width: jnp.zeros((BATCH, width, config.d_model), config.dtype)
            for width in widths
        }
        self._leaves, tree = jax.tree.flatten((shifts, weights.per_layer().base, batch))
        gradient = jax.value_and_grad(loss)
        self._program = (
            jax.jit(lambda leaves: gradient(*tree.unflatten(leaves)))
            .lower(self._leaves)
            .compile()
        )
        memory = self._program.memory_analysis()
        assert memory is not None
        self.temporaries = memory.temp_size_in_bytes

    def __call__(self) -> Any:
        """Return the loss and its gradient, once they are computed."""
        return jax.block_until_ready(self._program(self._leaves))
