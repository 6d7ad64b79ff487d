"""A base model and the modules that are fused onto it, loaded without a task, and digests of what was loaded."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int32

from .. import tasks
from ..adapters.basis import (
    Pool,
    directions,
    in_directions,
    random_directions,
)
from ..adapters.pool import (
    LoraPool,
    positions,
    random_pool,
    rotated_pool,
    shuffled_pool,
)
from ..io.digests import Digests, PoolDigests, pool_digests
from ..io.hf import Base, open_base
from ..io.pool import AdapterFolders, ConvertedPool, open_pool
from ..methods.entry import Built, basis_of, modules_of
from ..methods.fusion import choice_of
from ..models.architecture import (
    Architecture,
    Model,
    kernels,
    rough_operations,
)
from ..support.platform import for_cpu
from ..tasks.batches import step_widths
from ..tasks.packing import SHALLOW, step_shape, unrolling_pays
from ..training import mesh as sharding
from ..training.mesh import SeedMode, default_seed_mode, on_mesh
from ..training.method import Frozen, Method
from ..training.problem import Problem
from .spec import LoadOptions

AnyLoaded = TypeVar("AnyLoaded", bound="LoadedModel")

_CONTROL_KEY = 0
_CONTROLS: dict[str, Callable[[LoraPool, Array], LoraPool]] = {
    "random-factors": random_pool,
    "shuffled": shuffled_pool,
    "rotated": rotated_pool,
}


class Texts(NamedTuple):
    """Tokenizer of a base model, and its format of prompts and answers."""

    tokenizer: Any
    text_format: tasks.TextFormat


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and the modules that are fused onto it, without a task."""

    problem: (
        Problem  # problem of all seeds; its pool holds all modules that any seed draws
    )
    modules: tuple[tuple[str, ...], ...]  # names of the modules of each seed
    tokenizer: Any
    text_format: tasks.TextFormat  # format of its prompts and answers
    pool_digests: PoolDigests  # digests of the pool as it was read
    base: Base

    def with_problem(self: AnyLoaded, **changes: Any) -> AnyLoaded:
        """Return the same with changed fields of the problem."""
        return dataclasses.replace(self, problem=self.problem.replace(**changes))

    def with_layers(self: AnyLoaded, *, unroll: bool) -> AnyLoaded:
        """Return the same with layers one after the other, or as a loop, in which reads of arrays compile faster."""
        model = nnx.merge(self.problem.graph, self.problem.frozen.base)
        model.config = dataclasses.replace(model.config, unroll=unroll)
        return self.with_problem(graph=nnx.split(model)[0])

    @property
    def config(self) -> Architecture:
        """Structure of the model."""
        return self.problem.config


def packing_of(config: Architecture, *, on_cpu: bool) -> tasks.Packing:
    """Return the rule for packed batches of a model."""
    packing = tasks.Packing(config.causal, functools.partial(rough_operations, config))
    return packing if on_cpu else packing.on_accelerator()


def evaluation_compile_cost(config: Architecture) -> float:
    """Return the number of tokens that one more shape of an evaluation must save on this platform."""
    return packing_of(config, on_cpu=for_cpu()).evaluation_compile_cost()


def load_texts(base: Base, *, chat: bool) -> Texts:
    """Load the tokenizer of a base model; ValueError if it has no template for a chat."""
    config = base.config
    tokenizer = base.tokenizer
    if chat and (not config.causal or tokenizer.chat_template is None):
        raise ValueError(
            f"{base.source} has no chat template: leave out --chat, and describe the task with --prompt"
        )
    if not config.causal:
        return Texts(tokenizer, tasks.TextFormat(vocabulary=config.vocab_size))
    ends = sorted(config.end_ids, key=lambda token: token != tokenizer.eos_token_id)
    # Padding is masked by its place, so any token of the model works. Some tokenizers have one that the model lacks.
    pad_id: Any = tokenizer.pad_token_id
    if pad_id is None or pad_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    text_format = tasks.TextFormat(
        ends=tuple(ends),
        chat=chat,
        context=config.longest_row,
        vocabulary=config.vocab_size,
    )
    return Texts(tokenizer, text_format)


def pays_unrolled(
    config: Architecture,
    encoded: tasks.Encoded,
    orders: Int32[np.ndarray, "seeds steps B"],
    packing: tasks.Packing | None,
) -> bool:
    """Return whether unrolled layers save more in all steps of a training on a CPU than they take to compile.

    Arguments other than the structure are those of `train_step_batches`, for seeds in turn.
    """
    step_sizes = step_widths(encoded, orders, packing, alike=False)
    programs, times = np.unique(
        step_sizes.reshape(-1, step_sizes.shape[-1]), axis=0, return_counts=True
    )
    shape = step_shape(orders.shape[2], *programs.T)
    operations = rough_operations(config, *shape)
    return unrolling_pays(operations, times, layers=config.layers, width=config.d_model)


def load_model(
    options: LoadOptions,
    seed_mode: SeedMode | None = None,
    base: Base | None = None,
    *,
    like: LoadedModel | None = None,
) -> LoadedModel:
    """Load the model and the modules of the options.

    Args:
      options: the base, the pool and the method.
      seed_mode: mode of the seeds of a run that is resumed; by default the options' own.
      base: the base model of the options, if it is open already.
      like: a model of the same base and dtype, whose weights are shared instead of loaded.
    """
    base = base or (open_base(options.base) if like is None else like.base)
    texts = load_texts(base, chat=options.chat)
    stored = None
    if options.pool and options.entry.pool:
        stored = open_pool(options.pool, base)
        k = basis_of(options.recipe)
        if k is not None and options.control == "none":
            stored.check_basis(k)
    names, modules = _draw(options, () if stored is None else stored.names)
    if like is None:
        sharding.check_model(base.config)
        quantise = None if options.load_in == "full" else options.load_in
        with sharding.loading():
            model = base.load(dtype=options.dtype, quantise=quantise, hashed=True)
        model.config = dataclasses.replace(
            model.config, unroll=model.config.layers <= SHALLOW
        )
        graph, weights = nnx.split(model)
        weights = on_mesh(weights, model.config)
        nnx.update(model, weights)
    else:
        graph = like.problem.graph
        weights = like.problem.frozen.base
        model = nnx.merge(graph, weights)
    method, frozen, digests_of_pool = _frozen(
        model, weights, options, stored, names, modules
    )
    problem = Problem(
        graph=graph,
        method=method,
        frozen=frozen,
        index=_index(modules, {name: i for i, name in enumerate(names)}),
        seed_mode=seed_mode
        or (default_seed_mode() if options.seed_mode == "auto" else options.seed_mode),
    )
    return LoadedModel(
        problem, modules, texts.tokenizer, texts.text_format, digests_of_pool, base
    )


def _frozen(
    model: Model,
    base: nnx.State,
    options: LoadOptions,
    stored: ConvertedPool | AdapterFolders | None,
    names: Sequence[str],
    modules: Sequence[Sequence[str]],
) -> tuple[Method, Frozen, PoolDigests]:
    """Return the method, its frozen base and modules, and the digests of the modules."""
    pool = None
    digests = PoolDigests({}, None)
    if stored is not None:
        with sharding.loading():
            pool, digests = _load_pool(stored, names, options)
        pool = on_mesh(pool, model.config)
    built = Built(
        config=model.config, recipe=options.recipe, pool=pool, modules=len(modules[0])
    )
    method = options.entry.build(built)
    return (
        method,
        on_mesh(
            method.precompute(
                Frozen(base, pool), kernels(model, pool.sites if pool else ())
            ),
            model.config,
        ),
        digests,
    )


def with_whole_modules(loaded: AnyLoaded, options: LoadOptions) -> AnyLoaded:
    """Return a model with whole modules instead of the same modules in a basis, to rank them."""
    assert options.pool is not None
    stored = open_pool(options.pool, loaded.base)
    names = loaded.modules[0]
    recipe: Any = options.recipe
    recipe = dataclasses.replace(recipe, basis=None)
    whole_modules = dataclasses.replace(
        options, recipe=recipe, control="none"
    )  # controls differ only in directions
    model = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base)
    method, frozen, _ = _frozen(
        model, loaded.problem.frozen.base, whole_modules, stored, names, loaded.modules
    )
    return loaded.with_problem(method=method, frozen=frozen)


def with_modules(
    loaded: AnyLoaded, options: LoadOptions, seed_modules: Sequence[Sequence[str]]
) -> AnyLoaded:
    """Return the loaded model with the modules that the run fused; ValueError if the pool or the draws differ."""
    modules = tuple(map(tuple, seed_modules))
    if choice_of(options.recipe) == "draw" and loaded.modules != modules:
        raise ValueError(
            f"{options.pool} is not the pool of the run, whose seeds drew other modules: give that pool"
        )
    if loaded.modules == modules:
        return loaded
    position = {name: i for i, name in enumerate(loaded.modules[0])}
    if missing := sorted(
        {name for names in modules for name in names} - position.keys()
    ):
        raise ValueError(
            f"{options.pool} is not the pool of the run: it lacks {', '.join(missing)}; give that pool"
        )
    return dataclasses.replace(
        loaded.with_problem(index=_index(modules, position)), modules=modules
    )


def _index(
    modules: tuple[tuple[str, ...], ...], position: dict[str, int]
) -> Int[Array, "seeds N"]:
    places = np.array(
        [[position[name] for name in names] for names in modules], np.int32
    )
    return on_mesh(jax.device_put(places), of_seeds=True)


def _draw(
    options: LoadOptions, pool_names: Sequence[str]
) -> tuple[list[str], tuple[tuple[str, ...], ...]]:
    """Return the names of all modules that are needed, in the order of the pool, and those of each seed."""
    if not pool_names:
        return [], tuple(() for _ in options.seeds)
    if options.adapters:
        draws = (named_modules(options.adapters, pool_names),) * len(options.seeds)
    elif choice_of(options.recipe) != "draw":
        if not 1 <= (count := modules_of(options.recipe)) <= len(pool_names):
            raise ValueError(
                f"{count} modules to be chosen from a pool of {len(pool_names)}: give 1 to {len(pool_names)}"
            )
        draws = tuple(tuple(pool_names) for _ in options.seeds)
    else:
        count = min(modules_of(options.recipe), len(pool_names))
        draws = tuple(
            tasks.draw_modules(pool_names, count, seed) for seed in options.seeds
        )
    used = {name for names in draws for name in names}
    return [name for name in pool_names if name in used], draws


def named_modules(
    adapters: Sequence[str], pool_names: Sequence[str]
) -> tuple[str, ...]:
    """Return the names of modules given by name or index; ValueError for one that is not there."""
    names = [int(a) if a.isdecimal() and a not in pool_names else a for a in adapters]
    return tuple(pool_names[i] for i in positions(pool_names, names))


def _load_pool(
    stored: ConvertedPool | AdapterFolders,
    names: Sequence[str],
    options: LoadOptions,
) -> tuple[Pool, PoolDigests]:
    """Return the named modules, or the control that replaces them, whole or in a basis, in full precision or not.

    Digests are those of the modules as read, because the last bits of a control differ between devices.
    """
    k = basis_of(options.recipe)
    if options.control == "none" or k is None:
        pool = stored.load(names) if k is None else stored.basis(k).select(names)
        digests = pool_digests(pool)
    else:
        modules = stored.load()
        digests = pool_digests(modules)
        # Its directions are made of all modules.
        digests = PoolDigests(
            digests.modules,
            hashlib.sha256("".join(digests.modules.values()).encode()).hexdigest(),
        )
        if options.control == "random-factors":
            basis_directions = random_directions(modules, k, _control_key(options))
        else:
            basis_directions = directions(
                _CONTROLS[options.control](modules, _control_key(options)), k
            )
        pool = in_directions(modules.select(names), basis_directions)
    if options.control != "none" and isinstance(pool, LoraPool):
        pool = _CONTROLS[options.control](pool, _control_key(options))
    return (
        pool if options.load_in == "full" else pool.quantised(options.load_in)
    ), digests


def _control_key(options: LoadOptions) -> Array:
    key = jax.random.key(_CONTROL_KEY)
    return (
        jax.random.fold_in(key, options.control_draw) if options.control_draw else key
    )


def digests(loaded: LoadedModel) -> Digests:
    """Return the digests of base, configuration, modules, tokenizer and chat template of a run, as on the disk."""
    modules, basis = loaded.pool_digests
    used = {name for names in loaded.modules for name in names}
    used_digests = {name: digest for name, digest in modules.items() if name in used}
    current: Digests = {
        "base": loaded.base.digest,
        "modules": used_digests,
        "basis": basis,
    }
    current["tokenizer"] = loaded.base.files.tokenizer_sha256()
    current["config"] = _digest(_changed_fields(loaded.base.config))
    if (template := loaded.tokenizer.chat_template) is not None:
        current["chat_template"] = _digest(template)
    return current


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not the defaults, so that later versions may add fields."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            is_nested = dataclasses.is_dataclass(value)
            changed[field.name] = _changed_fields(value) if is_nested else value
    return changed


def check_digests(
    folder: Path, recorded: Digests, current: Digests, options: LoadOptions
) -> None:
    """Raise a ValueError if a run was fused with other tensors or texts than those that were loaded to use it."""
    is_ = _by_kind(current, options)
    for (kind, source), was in _by_kind(recorded, options).items():
        if was is not None and was != (digest := is_.get((kind, source))):
            state = f"has {digest[:12]}" if digest else "was not read"
            raise ValueError(
                f"{folder} was fused with other {kind}: {source} had the SHA-256 {was[:12]} then, and {state} now. "
                f"Restore those {kind}, or fuse the run again with these"
            )


def _by_kind(
    digests: Digests, options: LoadOptions
) -> dict[tuple[str, str], str | None]:
    """Return each digest by the kind of what it is of, and a description."""
    base = f"of {options.base}"
    pool = f"of the pool {options.pool}"
    return {
        ("weights", f"the base {options.base}"): digests["base"],
        ("weights", f"the shared basis {pool}"): digests.get("basis"),
        **{
            ("weights", f"{name} {pool}"): digest
            for name, digest in digests["modules"].items()
        },
        ("texts", f"the tokenizer {base}"): digests.get("tokenizer"),
        ("texts", f"the chat template {base}"): digests.get("chat_template")
        if options.chat
        else None,
        ("settings", f"the configuration {base}"): digests.get("config"),
    }
