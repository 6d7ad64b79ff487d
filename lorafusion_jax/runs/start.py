"""What a run starts from: an earlier stage, another run, weights of modules, or an adapter of PEFT; and its modules.

Modules are ranked by the gradient of the loss in their coefficients at zero, where a fusion is the base model. The
gradient shows how much a little of each module would help, before anything is trained.

Axis letters: N modules of a fusion.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..io.digests import Digests, pool_digests
from ..io.hf import Base, open_base
from ..io.pool import open_pool
from ..loading.model import check_digests, load_model, with_modules, with_whole_modules
from ..methods import find
from ..methods.entry import TargetedRecipe, basis_of, modules_of, recipe_of
from ..methods.fusion import Fusion, choice_of
from ..methods.lora import LoRA, LoRARecipe, is_warm
from ..models.architecture import kernels
from ..support.text import some
from ..tasks import IGNORED, Batch
from ..training.fit import start
from ..training.loss import objective
from ..training.mesh import on_mesh, to_host
from ..training.method import SEARCH, Frozen, Params
from ..training.problem import Problem, per_seed
from ..training.recipe import Recipe
from .folder import RunConfig, load_run, note, run_path
from .options import FuseOptions
from .setup import Setup, of_run
from .weight_list import Weights, coefficients_of, listed_params, read_weights


def with_targets(options: FuseOptions, base: Base | None = None) -> FuseOptions:
    """Return the options as a run records them, with the targets of the model's family, or of the pool, by default."""
    recipe = options.recipe
    if not isinstance(recipe, TargetedRecipe) or recipe.lora_targets is not None:
        return options
    base = base or open_base(options.base)
    targets = base.config.targets
    if options.pool and is_warm(recipe):
        pool = open_pool(options.pool, base)
        targets = pool.targets
        if recipe.warm_start == "single":
            recipe = dataclasses.replace(recipe, lora_rank=pool.largest_rank)
    recipe = dataclasses.replace(recipe, lora_targets=targets)
    return dataclasses.replace(options, recipe=recipe)


def stages(options: FuseOptions) -> tuple[FuseOptions, ...]:
    """Return the runs that make up a run: itself, or with a warm start one of the pool in its folder, then a LoRA."""
    recipe = options.recipe
    if not is_warm(recipe):
        return (options,)
    folder = run_path(options)
    method = recipe.warm_start
    first_epochs = recipe.epochs // 2 if method == "fusion" else 0
    shared = {
        field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)
    }
    first_recipe = recipe_of(
        find(method).recipe, shared | {"epochs": max(first_epochs, 1)}
    )
    lora = dataclasses.replace(
        recipe, epochs=recipe.epochs - first_epochs, warm_start="none"
    )
    first = dataclasses.replace(
        options, method=method, recipe=first_recipe, out=folder, name=method
    )
    return first, dataclasses.replace(options, recipe=lora, start_from=folder / method)


def check_targets(options: FuseOptions, base: Base) -> None:
    """Raise ValueError, before its first stage, if a LoRA with a warm start does not adapt all that the pool does."""
    assert isinstance(options.recipe, LoRARecipe) and options.pool is not None
    missing = {*open_pool(options.pool, base).targets} - {
        *(options.recipe.lora_targets or ())
    }
    if missing:
        raise ValueError(
            f"{options.pool} adapts {some(sorted(missing))}, which --lora-targets leaves out: add them"
        )


def start_params(
    setup: Setup, options: FuseOptions, current_digests: Digests
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the parameters to start from, and for the results of each seed what a LoRA's rank leaves out of them.

    Raises:
      ValueError: the parameters do not fit this run, whose digests are given.
    """
    nothing: list[dict[str, Any]] = [{}] * len(options.seeds)
    if options.start_from is None:
        return None, nothing
    source = options.start_from
    is_lora = isinstance(setup.problem.method, LoRA)
    listed = read_weights(source)
    if is_lora and (listed or (source / "adapter_config.json").is_file()):
        pool = str(options.pool) if listed else str(source.parent)
        weights, recorded = listed or ({source.name: 1.0}, None)
        return _lora_start(
            setup, options, *_weighted_sum(setup, options, pool, weights, recorded)
        )
    if listed is not None:
        return listed_params(setup, options, current_digests, *listed), nothing
    source_options, params, config = load_run(source)
    if is_lora and source_options.method != options.method:
        if source_options.seeds != options.seeds:
            raise ValueError(
                f"{source} has the seeds {list(source_options.seeds)}, here {list(options.seeds)}: give the same"
            )
        first = jax.tree.map(lambda p: p[0], params)
        loaded = load_model(source_options, like=setup)
        loaded = of_run(loaded, source_options, source, config, first)
        return _lora_start(setup, options, loaded.problem, params)
    modules = [list(seed_modules) for seed_modules in setup.modules]
    if source_options.seeds != options.seeds or config["modules"] != modules:
        raise ValueError(
            f"{source} fused other modules or seeds (seeds {list(source_options.seeds)}, here {list(options.seeds)}): "
            "give the same --seeds, --pool, --modules"
        )
    check_digests(source, config["digests"], current_digests, options)
    fresh = start(setup.problem, options.seeds).params
    if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"{source} was trained with the method {source_options.method} and other shapes "
            f"({', '.join(params)}): give the same --method and --granularity"
        )
    return params, nothing


def _weighted_sum(
    setup: Setup,
    options: FuseOptions,
    folder: str,
    weights: Weights,
    recorded: Digests | None,
) -> tuple[Problem, Params]:
    """Return the problem of a weighted sum of modules on the base of a run, and its parameters, for all seeds."""
    base = setup.problem.frozen.base
    pool = open_pool(folder, setup.base).load(list(weights))
    if recorded is not None:
        current: Digests = {
            "base": setup.base.digest,
            "modules": pool_digests(pool).modules,
        }
        assert options.start_from is not None
        check_digests(options.start_from, recorded, current, options)
    coefficients = coefficients_of(weights, pool)
    if options.load_in != "full":
        pool = pool.quantised(options.load_in)
    pool = on_mesh(pool, setup.config)
    fusion = Fusion(magnitudes=False)
    model = nnx.merge(setup.problem.graph, base)
    frozen = fusion.precompute(Frozen(base, pool), kernels(model, pool.sites))
    seeds = len(options.seeds)
    problem = setup.problem.replace(
        method=fusion,
        frozen=on_mesh(frozen, setup.config),
        index=jnp.broadcast_to(jnp.arange(len(pool)), (seeds, len(pool))),
    )
    return problem, {
        "coefficients": jnp.broadcast_to(coefficients, (seeds, *coefficients.shape))
    }


def _lora_start(
    setup: Setup, options: FuseOptions, source: Problem, params: Params
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a LoRA's parameters that give the source's model as far as its rank allows, and what that leaves out."""
    method = setup.problem.method
    fresh = start(setup.problem, options.seeds).params
    assert isinstance(method, LoRA)
    try:
        begin, left_out = method.start_at(source, params, fresh)
    except ValueError as error:
        raise ValueError(f"--from {options.start_from}: {error}") from error
    shares = [100 * share for seed_shares in left_out for share in seed_shares.values()]
    note(
        f"starts from {options.start_from} at rank {method.rank}, which leaves out {min(shares):.1f} to "
        f"{max(shares):.1f} % of the squared norm of a site's update"
    )
    return begin, [{"left_out": seed_shares} for seed_shares in left_out]


def with_ranked_modules(
    setup: Setup, options: FuseOptions, recorded: RunConfig | None
) -> Setup:
    """Return the setup with the modules of the resumed run, or with those that lower the loss fastest at c = 0."""
    if recorded is not None:
        return with_modules(setup, options, recorded["modules"])
    recipe = options.recipe
    ranked = setup
    if basis_of(recipe) is not None and choice_of(recipe) == "gradient":
        ranked = with_whole_modules(setup, options)
    batches = list(ranked.rows.once(recipe.batch_size))
    gradient = gradient_at_zero(ranked.problem, options.seeds, batches)
    gradient = np.sum(gradient, axis=tuple(range(2, gradient.ndim)))  # over columns
    first = np.argsort(gradient, axis=1, kind="stable")[:, : modules_of(recipe)]
    seed_modules = [
        [modules[i] for i in chosen]
        for modules, chosen in zip(ranked.modules, first.tolist(), strict=True)
    ]
    return with_modules(setup, options, seed_modules)


def gradient_at_zero(
    problem: Problem, seeds: tuple[int, ...], batches: Sequence[Batch]
) -> Float[np.ndarray, "seeds N *columns"]:
    """Return the gradient of the loss on some rows, in nats per answer token, in the coefficients at c = 0.

    Leaves of the batches have a leading axis of seeds. All tokens count alike, whatever batches their rows are in.
    """
    params = start(problem, seeds).params
    params = params | {"coefficients": jnp.zeros_like(params["coefficients"])}
    gradients = []
    for number, batch in enumerate(batches):
        read = problem.read(SEARCH, number)
        gradients.append(
            to_host(coefficient_gradients(params, on_mesh(batch, of_seeds=True), read))
        )
    tokens = np.stack(
        [np.sum(np.asarray(batch.labels) != IGNORED, axis=(1, 2)) for batch in batches]
    )
    return np.einsum(
        "bs,bs...->s...", tokens / np.sum(tokens, axis=0), np.stack(gradients)
    )


@per_seed
def coefficient_gradients(
    params: Params, batch: Batch, problem: Problem
) -> Float[Array, "N *columns"]:
    """Return the gradient of a batch's cross-entropy, in nats per token, in the coefficients."""

    def loss(coefficients: Array) -> Array:
        moved = params | {"coefficients": coefficients}
        return objective(moved, batch, problem)[1]["cross_entropy"]

    return jax.grad(loss)(params["coefficients"])
