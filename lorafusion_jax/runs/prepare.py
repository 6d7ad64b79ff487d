"""Preparation of a run from its options: the base model, the pool, the task's tokens, and each seed's draws."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from .. import tasks
from ..adapters.basis import Pool, base_directions, directions, in_directions, random_directions
from ..adapters.pool import LoraPool, positions, random_pool, rotated_pool, shuffled_pool
from ..io.arrays import check_signature, signature
from ..io.digests import Digests, PoolDigests, pool_digests
from ..io.hf import base_digest, load_base, load_fast_tokenizer, open_base, read_config
from ..io.pool import AdapterFolders, ConvertedPool, open_pool
from ..methods import find
from ..methods.entry import Built
from ..methods.fusion import GIVE_BASIS, choice_of
from ..methods.recipes import basis_of, modules_of
from ..methods.untrained import FewShotRecipe
from ..models.architecture import Architecture, Model, kernels, step_operations
from ..models.weights import Weight
from ..support.checks import at_least, check_uint32, one_of
from ..support.platform import for_cpu
from ..training import mesh as sharding
from ..training.frozen import Frozen
from ..training.mesh import on_mesh
from ..training.method import Method, Params
from ..training.problem import Problem
from ..training.seeds import SeedMode, default_seed_mode
from .folder import RunConfig, note
from .options import Control, FuseOptions, OnArrays, check_digital, row_format

AnyLoaded = TypeVar("AnyLoaded", bound="LoadedModel")

_CONTROL_KEY = 0
_CONTROLS: dict[str, Callable[[LoraPool, Array], LoraPool]] = {
    "random-factors": random_pool,
    "shuffled": shuffled_pool,
    "rotated": rotated_pool,
    "rotated-together": functools.partial(rotated_pool, together=True),
}
# A model of so few layers runs a quarter faster without a loop over them, and its activations need no saving.
_SHALLOW = 8
_UNCUT = 2**30  # tokens
# By the compiler's cycles for a TPU v5e (docs/results/accelerators.md): operations of an accelerator for one of a core,
# 5e13 a second; and the time of a packed step over that of a padded one.
_ACCELERATED = 500
_MOVING = 1.5


class Texts(NamedTuple):
    """Tokenizer of a base model, and its format of prompts and answers."""

    tokenizer: Any
    text_format: tasks.TextFormat


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and the modules that are fused onto it, without a task."""

    problem: Problem  # problem of all seeds; its pool holds all modules that any seed draws
    modules: tuple[tuple[str, ...], ...]  # names of the modules of each seed
    tokenizer: Any
    text_format: tasks.TextFormat  # format of its prompts and answers
    pool_digests: PoolDigests  # digests of the pool as it was read

    def with_problem(self: AnyLoaded, **changes: Any) -> AnyLoaded:
        """Return the same with changed fields of the problem."""
        return dataclasses.replace(self, problem=self.problem.replace(**changes))

    @property
    def config(self) -> Architecture:
        """Structure of the model."""
        return self.problem.config


@dataclasses.dataclass(frozen=True)
class Setup(LoadedModel):
    """All inputs of a run's computation."""

    task: tasks.Task  # texts
    train: tasks.Encoded  # tokens of the task's training rows
    test: tasks.Encoded  # tokens of the rows to evaluate on
    split: tasks.Split | None  # training and validation rows of each seed; None if nothing is trained
    max_new_tokens: int  # limit of generated tokens

    @property
    def rows(self) -> tasks.TrainingRows:
        """Rows that the seeds use in training."""
        assert self.split is not None
        packing = packing_of(self.config, on_cpu=for_cpu())
        return tasks.TrainingRows(self.train, self.split, self.tokenizer.pad_token_id, packing)


def packing_of(config: Architecture, *, on_cpu: bool) -> tasks.Packing:
    """Return the rule for packed batches of a model."""
    packing = tasks.Packing(config.causal, functools.partial(step_operations, config))
    return packing if on_cpu else packing._replace(compiling=_ACCELERATED * packing.compiling, moving=_MOVING)


def evaluation_worth(config: Architecture) -> float:
    """Return the number of tokens that one more shape of an evaluation must save on this platform."""
    return packing_of(config, on_cpu=for_cpu()).evaluation_worth()


def check(options: FuseOptions) -> None:
    """Raise ValueError for options that contradict each other, before anything is loaded."""
    name, method, recipe = options.method, find(options.method), options.recipe
    if not options.seeds:
        raise ValueError("no seeds: give at least one, for example --seeds 1 2 3")
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"a seed is given twice in {list(options.seeds)}: equal seeds are equal runs")
    for seed in options.seeds:
        check_uint32(seed=seed)
    check_uint32(control_draw=options.control_draw)
    one_of(get_args(Control), control=options.control)
    at_least(0, train_rows=options.train_rows)
    at_least(1, test_rows=options.test_rows, eval_batch=options.eval_batch, processes=options.processes)
    recipe.check()
    for number, value in (vars(options) | vars(recipe)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{number} is {value}: give a finite number, because config.json cannot hold others")
    chosen, in_arrays = choice_of(recipe) != "draw", options.arrays.crossbar is not None
    quantised, controlled, mesh = options.load_in != "full", options.control != "none", options.mesh is not None
    by_hand = (options.coordinator, options.processes, options.process)
    for wrong, message in (
        (
            options.name is not None and Path(options.name).name in ("", ".."),
            f"--name {options.name!r} is not the name of a folder: give one such as snarks-fusion",
        ),
        (method.pool and options.pool is None, f"the method {name} fuses a pool: give one with --pool"),
        (controlled and quantised, f"the {options.control} control is drawn in full precision: leave out --load-in"),
        (controlled and not method.pool, f"the method {name} has no pool to replace: leave out --control"),
        (options.adapters and not method.pool, f"the method {name} fuses no modules: leave out --adapters"),
        ("base" in method.groups and quantised, f"{name} trains weights, not 4 or 8 bits of them: leave out --load-in"),
        (
            options.control_draw != 0 and options.control in ("none", "svd"),
            "--control-draw numbers the draws of a random control: leave it out, or choose another --control",
        ),
        (options.control == "svd" and basis_of(recipe) is None, f"--control svd needs a shared basis: {GIVE_BASIS}"),
        (
            chosen and "coefficients" not in method.groups,
            f"the method {name} has no coefficients of single modules, whose gradient would choose them: leave out "
            "--choose, or use the method fusion or coefficients",
        ),
        (chosen and options.adapters, "--adapters names the modules already: leave it out, or --choose"),
        (options.profile and method.learns != "trained", f"the method {name} takes no steps: leave out --profile"),
        (options.start_from and method.learns != "trained", f"the method {name} starts from no run: leave out --from"),
        (mesh and method.learns == "untrained", f"{name} trains no seeds to share out over devices: leave out --mesh"),
        (mesh and in_arrays, "a run on simulated arrays is not shared out: leave out --mesh, or --crossbar"),
        (options.distributed and not mesh, "--distributed shares a run out over devices: give a layout with --mesh"),
        (
            by_hand != (None, None, None) and (None in by_hand or not options.distributed),
            "--coordinator, --processes and --process start processes by hand: give all three, with --distributed",
        ),
        (
            options.processes and options.process not in range(options.processes),
            f"--process {options.process} of --processes {options.processes}: give 0 to {(options.processes or 1) - 1}",
        ),
        (
            recipe.optimisation(1).prune and not {"coefficients", "magnitudes"} <= set(method.groups),
            f"the method {name} does not prune: only a fusion with magnitudes does. Leave out --prune",
        ),
    ):
        if wrong:
            raise ValueError(message)
    if not in_arrays:
        check_digital(options.arrays, OnArrays.__dataclass_fields__)


def prepare(
    options: FuseOptions, seed_mode: SeedMode | None = None, *, to_train: bool = True, task: tasks.Task | None = None
) -> Setup:
    """Load the base, pool and task of the options, and make each seed's draws.

    `seed_mode` is that of a run that is resumed; by default the options' own. With `to_train` the task must have
    training rows for a method that trains. `task` is the task of the options, if it has been read.
    """
    check(options)
    recipe, method = options.recipe, find(options.method)
    if options.prompt is None and not options.chat and tasks.is_bbh(options.task):
        note(
            f"note: {options.task} is a file of BIG-Bench Hard, whose inputs are used as they are. The paper's "
            "protocol has other rows, and the task's description and 'Q: ... A:' around each input: see "
            "experiments/bbh.py"
        )
    needs_training_rows = (to_train and method.learns != "untrained") or method.answers != "model"
    task = task or tasks.load_task(
        options.task,
        **row_format(options),
        train_rows=options.train_rows,
        need=("train", "test") if needs_training_rows else ("test",),
    )
    there = min(len(task.train), options.train_rows)
    if isinstance(recipe, FewShotRecipe) and recipe.shots > there:
        raise ValueError(f"prompts of {recipe.shots} examples, but {there} training rows of {task.name}: lower --shots")
    rows = None
    if method.learns != "untrained" and (to_train or there > 0):
        rows = tasks.split(len(task.train), options.seeds, protocol=recipe.protocol, limit=options.train_rows)
        steps = tasks.batch_orders(rows.train, batch_size=recipe.batch_size, epochs=recipe.epochs).shape[1]
        if to_train and recipe.warmup > steps:
            raise ValueError(f"a warm-up of {recipe.warmup} steps, but training has {steps}: lower --warmup")
    texts = load_texts(options)
    train = tasks.encode(texts.tokenizer, task.train, texts.text_format)
    longest = max((len(row) for row in train.labels), default=128)
    new_tokens = recipe.max_new_tokens or tasks.most_new_tokens(longest)
    test = tasks.encode(texts.tokenizer, task.test[: options.test_rows], texts.text_format, new_tokens=new_tokens)
    if method.answers == "examples" and texts.text_format.context is not None:
        for shown in shown_to_seeds(task, options):  # raises ValueError for a prompt that is too long
            encode_shown(texts, shown, len(test), new_tokens)
    fused = load_model(options, seed_mode, texts)
    return Setup(**vars(fused), task=task, train=train, test=test, split=rows, max_new_tokens=new_tokens)


def load_texts(options: FuseOptions) -> Texts:
    """Load the tokenizer of the options' base model; ValueError if it lacks the chat template of the options."""
    config, tokenizer = read_config(options.base), load_fast_tokenizer(options.base)
    if options.chat and (not config.causal or tokenizer.chat_template is None):
        raise ValueError(f"{options.base} has no chat template: leave out --chat, and describe the task with --prompt")
    if not config.causal:
        return Texts(tokenizer, tasks.TextFormat(vocabulary=config.vocab_size))
    ends = sorted(config.end_ids, key=lambda token: token != tokenizer.eos_token_id)
    # Padding is masked by its place, so any token of the model works. Some tokenizers have one that the model lacks.
    pad_id: Any = tokenizer.pad_token_id
    if pad_id is None or pad_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    text_format = tasks.TextFormat(
        ends=tuple(ends), chat=options.chat, context=config.longest_row, vocabulary=config.vocab_size
    )
    return Texts(tokenizer, text_format)


def tasks_of_seeds(task: tasks.Task, options: FuseOptions) -> list[tasks.Task]:
    """Return the task of each seed, with the training rows that the seed would use."""
    rows = tasks.split(len(task.train), options.seeds, protocol=options.recipe.protocol, limit=options.train_rows)
    chosen = [np.unique(np.concatenate([*of_seed])) for of_seed in zip(rows.train, rows.validation, strict=True)]
    return [dataclasses.replace(task, train=tuple(task.train[i] for i in of_seed)) for of_seed in chosen]


def shown_to_seeds(task: tasks.Task, options: FuseOptions) -> list[tasks.Task]:
    """Return the task of each seed, with examples in the prompts that are drawn from the rows of the seed."""
    of_seeds = zip(options.seeds, tasks_of_seeds(task, options), strict=True)
    assert isinstance(options.recipe, FewShotRecipe)
    return [tasks.few_shot(own, options.recipe.shots, seed) for seed, own in of_seeds]


def encode_shown(texts: Texts, shown: tasks.Task, rows: int, new_tokens: int) -> tasks.Encoded:
    """Tokenise the first test rows of a task with examples in its prompts (see `few_shot`).

    A prompt that is cut loses its first examples, not the question at its end.
    """
    tokenizer, text_format = texts
    found = tasks.encode(tokenizer, shown.test[:rows], text_format, max_length=_UNCUT, new_tokens=new_tokens)
    return (
        found if text_format.ends else tasks.Encoded(tuple(ids[-tasks.LONGEST :] for ids in found.inputs), found.labels)
    )


def shallow_unrolled(config: Architecture) -> Architecture:
    """Return the structure as runs compile it: few layers one after the other, others in a loop."""
    return dataclasses.replace(config, unroll=True, remat="none") if config.layers <= _SHALLOW else config


def load_model(options: FuseOptions, seed_mode: SeedMode | None = None, texts: Texts | None = None) -> LoadedModel:
    """Load the model and the modules of the options, without the task; further arguments as in `prepare`.

    `texts` is the result of `load_texts`, if it has been called.
    """
    sharding.check_model(read_config(options.base))
    texts = texts or load_texts(options)
    stored = open_pool(options.pool, options.base) if options.pool and find(options.method).pool else None
    names, modules = _draw(options, () if stored is None else module_names(stored, options))
    quantise = None if options.load_in == "full" else options.load_in
    with sharding.loading():
        model = load_base(options.base, dtype=options.dtype, quantise=quantise)
    model.config = shallow_unrolled(model.config)
    graph, base = nnx.split(model)
    base = on_mesh(base, model.config)
    nnx.update(model, base)
    method, frozen, found = _frozen(model, base, options, stored, names, modules)
    problem = Problem(
        graph=graph,
        method=method,
        frozen=frozen,
        index=_index(modules, {name: i for i, name in enumerate(names)}),
        seed_mode=seed_mode or (default_seed_mode() if options.seed_mode == "auto" else options.seed_mode),
    )
    return LoadedModel(problem, modules, texts.tokenizer, texts.text_format, found)


def _frozen(
    model: Model,
    base: nnx.State,
    options: FuseOptions,
    stored: ConvertedPool | AdapterFolders | None,
    names: Sequence[str],
    modules: Sequence[Sequence[str]],
) -> tuple[Method, Frozen, PoolDigests]:
    """Return the method, its prepared base and modules, and the digests of the modules."""
    pool, found = None, PoolDigests({}, None)
    if stored is not None:
        with sharding.loading():
            pool, found = _load_pool(stored, names, options, kernels(model))
        pool = on_mesh(pool, model.config)
    built = Built(config=model.config, recipe=options.recipe, pool=pool, modules=len(modules[0]))
    method = find(options.method).build(built)
    return method, on_mesh(method.prepare(Frozen(base, pool), kernels(model)), model.config), found


def with_whole_modules(loaded: AnyLoaded, options: FuseOptions) -> AnyLoaded:
    """Return a model with whole modules instead of the same modules in a basis, to rank them."""
    assert options.pool is not None
    stored, names = open_pool(options.pool, options.base), loaded.modules[0]
    if missing := sorted(set(names) - set(stored.names)):
        raise ValueError(f"{options.pool} has no whole module {missing[0]}: rank by --choose basis-gradient")
    recipe: Any = options.recipe
    recipe = dataclasses.replace(recipe, basis=None, train_core=False)
    whole = dataclasses.replace(options, recipe=recipe, control="none")  # controls differ only in directions
    model = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base)
    method, frozen, _ = _frozen(model, loaded.problem.frozen.base, whole, stored, names, loaded.modules)
    return loaded.with_problem(method=method, frozen=frozen)


def with_modules(loaded: AnyLoaded, options: FuseOptions, of_seeds: Sequence[Sequence[str]]) -> AnyLoaded:
    """Return the loaded model with the modules that the run fused; ValueError if the pool or the draws differ."""
    wanted = tuple(map(tuple, of_seeds))
    if choice_of(options.recipe) == "draw" and loaded.modules != wanted:
        raise ValueError(f"{options.pool} is not the pool that the run fused: its seeds draw other modules from it")
    if loaded.modules == wanted:
        return loaded
    position = {name: i for i, name in enumerate(loaded.modules[0])}
    if missing := sorted({name for names in wanted for name in names} - position.keys()):
        raise ValueError(f"{options.pool} is not the pool that the run fused: it has no {', '.join(missing)}")
    return dataclasses.replace(loaded.with_problem(index=_index(wanted, position)), modules=wanted)


def digests(loaded: LoadedModel, options: FuseOptions) -> Digests:
    """Return the digests of base, modules, tokenizer and chat template of a run, as they are on the disk."""
    modules, basis = loaded.pool_digests
    used = {name for names in loaded.modules for name in names}
    of_used = {name: digest for name, digest in modules.items() if name in used}
    found: Digests = {"base": base_digest(options.base), "modules": of_used, "basis": basis}
    found["tokenizer"] = open_base(options.base).tokenizer_sha256()
    if (template := loaded.tokenizer.chat_template) is not None:
        found["chat_template"] = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return found


def check_digests(folder: Path, recorded: Digests, now: Digests, options: FuseOptions) -> None:
    """Raise a ValueError if a run was fused with other tensors or texts than those that were loaded to use it."""
    of_pool = f"the pool {options.pool}"
    pairs: list[tuple[str, str, str | None]] = [(f"the base {options.base}", recorded["base"], now["base"])]
    if basis := recorded.get("basis"):
        pairs.append((f"the shared basis of {of_pool}", basis, now.get("basis")))
    for name, digest in recorded["modules"].items():
        pairs.append((f"{name} of {of_pool}", digest, now["modules"].get(name)))
    texts: list[tuple[str, str, str | None]] = []
    if "tokenizer" in recorded:
        texts.append((f"the tokenizer of {options.base}", recorded["tokenizer"], now.get("tokenizer")))
    if options.chat and "chat_template" in recorded:
        texts.append((f"the chat template of {options.base}", recorded["chat_template"], now.get("chat_template")))
    for kind, of_kind in (("weights", pairs), ("texts", texts)):
        for what, was, is_ in of_kind:
            if was != is_:
                here = f"has {is_[:12]}" if is_ else "was not read"
                raise ValueError(
                    f"{folder} was fused with other {kind}: {what} had the SHA-256 {was[:12]} then, and {here} now. "
                    f"Restore those {kind}, or fuse the run again with these"
                )


def of_run(loaded: AnyLoaded, options: FuseOptions, folder: Path, config: RunConfig, params: Params) -> AnyLoaded:
    """Return the loaded model with the modules of a run, whose trained parameters of one seed are given.

    Raises a ValueError if base or pool are not those of the run, or the numbers have other shapes than its method's.
    """
    found = with_modules(loaded, options, config["modules"])
    check_digests(folder, config["digests"], digests(found, options), options)
    problem = found.problem.replace(index=found.problem.index[0])
    expected = signature(jax.eval_shape(problem.init, jax.random.key(0)))
    check_signature(folder / "final", signature(params), expected, fix="restore it from a copy, or train again")
    return found


def own_task(options: FuseOptions, folder: Path, config: RunConfig) -> tasks.Task:
    """Return the task of a run; ValueError if it has other rows than the run was fused on."""
    task = tasks.load_task(options.task, **row_format(options), train_rows=options.train_rows, need=())
    if task.sha256 != config["task_sha256"]:
        raise ValueError(
            f"{options.task} has other rows than {folder} was fused on: restore them, fuse the run again, or evaluate "
            "it on other rows with --task, which leaves out those that it was trained on"
        )
    return task


def _index(modules: tuple[tuple[str, ...], ...], position: dict[str, int]) -> Int[Array, "seeds N"]:
    return on_mesh(jnp.array([[position[name] for name in names] for names in modules], jnp.int32), of_seeds=True)


def trainable_count(setup: Setup) -> dict[str, int]:
    """Return the count of parameters that the first seed trains, by group."""
    of_first = setup.problem.replace(index=setup.problem.index[0])
    acting = of_first.trainable(of_first.init(jax.random.key(0)))
    return {group: sum(int(jnp.sum(a)) for a in jax.tree.leaves(tree)) for group, tree in acting.items()}


def _draw(options: FuseOptions, there: Sequence[str]) -> tuple[list[str], tuple[tuple[str, ...], ...]]:
    """Return the names of all modules that are needed, in the order of the pool, and those of each seed."""
    if not there:
        return [], tuple(() for _ in options.seeds)
    if options.adapters:
        drawn = (named_modules(options, there),) * len(options.seeds)
    elif choice_of(options.recipe) != "draw":
        if not 1 <= (count := modules_of(options.recipe)) <= len(there):
            raise ValueError(f"{count} modules to be chosen from a pool of {len(there)}: give 1 to {len(there)}")
        drawn = tuple(tuple(there) for _ in options.seeds)
    else:
        count = min(modules_of(options.recipe), len(there))
        drawn = tuple(tasks.draw_modules(there, count, seed) for seed in options.seeds)
    used = {name for names in drawn for name in names}
    return [name for name in there if name in used], drawn


def named_modules(options: FuseOptions, there: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules that `adapters` names; ValueError for one that is not there."""
    names = [int(a) if a.isdecimal() and a not in there else a for a in options.adapters]
    return tuple(there[i] for i in positions(there, names))


def module_names(stored: ConvertedPool | AdapterFolders, options: FuseOptions) -> tuple[str, ...]:
    """Return the names of the modules that seeds can draw: the pool's, or those in its basis."""
    k = basis_of(options.recipe)
    return stored.names if k is None or options.control != "none" else tuple(stored.basis_modules(k))


def _load_pool(
    stored: ConvertedPool | AdapterFolders, names: Sequence[str], options: FuseOptions, kernels: Mapping[str, Weight]
) -> tuple[Pool, PoolDigests]:
    """Return the named modules, or the control that replaces them, whole or in a basis, in full precision or not.

    Digests are those of the modules as read, because the last bits of a control differ between devices.
    """
    k, key = basis_of(options.recipe), jax.random.key(_CONTROL_KEY)
    if options.control_draw:
        key = jax.random.fold_in(key, options.control_draw)
    if k is not None and options.control != "none":
        whole = stored.load()
        found = pool_digests(whole)
        # Its directions are made of all modules.
        found = PoolDigests(found.modules, hashlib.sha256("".join(found.modules.values()).encode()).hexdigest())
        if options.control == "random-factors":
            of = random_directions(whole, k, key)
        elif options.control in _CONTROLS:
            of = directions(_CONTROLS[options.control](whole, key), k)
        else:
            of = base_directions(whole, kernels, k)
        pool = in_directions(whole.select(names), of)
    else:
        pool = stored.load(names) if k is None else stored.basis(k).select(names)
        found = pool_digests(pool)
        if options.control != "none" and isinstance(pool, LoraPool):
            pool = _CONTROLS[options.control](pool, key)
    return (pool if options.load_in == "full" else pool.quantised(options.load_in)), found
