"""Setup of a run from its options: the base model, the pool, the task's tokens, and each seed's draws."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from .. import tasks
from ..io.hf import Base, open_base
from ..io.store import check_signature, signature
from ..loading.model import (
    AnyLoaded,
    LoadedModel,
    Texts,
    check_digests,
    digests,
    load_model,
    load_texts,
    packing_of,
    pays_unrolled,
    with_modules,
)
from ..loading.spec import LoadOptions
from ..methods.base_alone import FewShotRecipe
from ..support.platform import for_cpu
from ..training.fit import orders_of
from ..training.mesh import SeedMode, on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from .folder import RunConfig
from .options import FuseOptions, read_task

_UNCUT = 2**30  # tokens


@dataclasses.dataclass(frozen=True)
class Setup(LoadedModel):
    """All inputs of a run's computation."""

    task: tasks.Task  # texts
    train: tasks.Encoded  # tokens of the task's training rows
    test: tasks.Encoded  # tokens of the rows to evaluate on
    split: (
        tasks.Split | None
    )  # training and validation rows of each seed; None if nothing is trained
    max_new_tokens: int  # limit of generated tokens

    @property
    def rows(self) -> tasks.TrainingRows:
        """Rows that the seeds use in training."""
        assert self.split is not None
        packing = packing_of(self.config, on_cpu=for_cpu())
        return tasks.TrainingRows(
            self.train, self.split, self.tokenizer.pad_token_id, packing
        )


def load_setup(
    options: FuseOptions,
    seed_mode: SeedMode | None = None,
    *,
    to_train: bool = True,
    task: tasks.Task | None = None,
    base: Base | None = None,
    like: Setup | None = None,
) -> Setup:
    """Load the base, pool and task of the options, and make each seed's draws.

    `seed_mode` is that of a run that is resumed; by default the options' own. With `to_train` the task must have
    training rows for a method that trains. `task` and `base` are those of the options, if they have been read. `like`
    is a setup of another task, whose model is shared.
    """
    recipe = options.recipe
    method = options.entry
    needs_training_rows = (
        to_train and method.learns != "untrained"
    ) or method.answers != "model"
    need: list[Literal["train", "test"]] = []
    if needs_training_rows:
        need.append("train")
    if options.test_rows != 0:
        need.append("test")
    task = task or read_task(options, need)
    available_rows = min(len(task.train), options.train_rows)
    if isinstance(recipe, FewShotRecipe) and recipe.shots > available_rows:
        raise ValueError(
            f"prompts of {recipe.shots} examples, but {available_rows} training rows of {task.name}: lower --shots"
        )
    rows = None
    if method.learns != "untrained" and (to_train or available_rows > 0):
        rows = tasks.split(
            len(task.train),
            options.seeds,
            protocol=recipe.protocol,
            limit=options.train_rows,
        )
        steps = tasks.batch_orders(
            rows.train, batch_size=recipe.batch_size, epochs=recipe.epochs
        ).shape[1]
        if to_train and recipe.warmup > steps:
            raise ValueError(
                f"a warm-up of {recipe.warmup} steps, but training has {steps}: lower --warmup"
            )
    base = base or open_base(options.base)
    texts = load_texts(base, chat=options.chat)
    train = tasks.encode(texts.tokenizer, task.train, texts.text_format)
    longest = max((len(row) for row in train.labels), default=128)
    new_tokens = recipe.max_new_tokens or tasks.most_new_tokens(longest)
    test = tasks.encode(
        texts.tokenizer,
        task.test[: options.test_rows],
        texts.text_format,
        new_tokens=new_tokens,
    )
    if method.answers == "examples" and texts.text_format.context is not None:
        for shown in shown_to_seeds(
            task, options
        ):  # raises ValueError for a prompt that is too long
            encode_shown(texts, shown, len(test), new_tokens)
    fused = like or load_model(options, seed_mode, base)
    return Setup(
        **{name: getattr(fused, name) for name in LoadedModel.__dataclass_fields__},
        task=task,
        train=train,
        test=test,
        split=rows,
        max_new_tokens=new_tokens,
    )


def of_all_tasks(setups: Sequence[Setup]) -> Setup:
    """Return the setup of one program that trains several tasks: its seeds are those of one task after another."""
    first, *others = setups
    if not others:
        return first
    rows = first.rows.followed_by([setup.rows for setup in others])
    index = np.concatenate([to_host(setup.problem.index) for setup in setups])
    index = on_mesh(jax.device_put(index), of_seeds=True)
    return dataclasses.replace(
        first.with_problem(index=index), train=rows.tokens, split=rows.split
    )


def unrolls(setup: Setup, options: FuseOptions) -> bool:
    """Return whether a training unrolls the layers: if that pays, or as in the loaded model where it was not measured.

    It was measured with frozen float32 weights and seeds in turn, on a CPU without a mesh.
    """
    entry = options.entry
    recipe = options.recipe
    single = jax.sharding.get_abstract_mesh().empty and for_cpu()
    plain = (
        options.dtype == "float32"
        and options.load_in == "full"
        and setup.problem.seed_mode == "sequential"
    )
    if entry.learns != "trained" or "base" in entry.groups or not (single and plain):
        return setup.config.unroll
    orders = orders_of(setup.rows, recipe, options.seeds)
    return pays_unrolled(
        setup.config, setup.train, orders, setup.rows.packing if recipe.pack else None
    )


def tasks_of_seeds(task: tasks.Task, options: FuseOptions) -> list[tasks.Task]:
    """Return the task of each seed, with the training rows that the seed would use."""
    rows = tasks.split(
        len(task.train),
        options.seeds,
        protocol=options.recipe.protocol,
        limit=options.train_rows,
    )
    chosen = [
        np.unique(np.concatenate([*seed_rows]))
        for seed_rows in zip(rows.train, rows.validation, strict=True)
    ]
    return [
        dataclasses.replace(task, train=tuple(task.train[i] for i in seed_rows))
        for seed_rows in chosen
    ]


def shown_to_seeds(task: tasks.Task, options: FuseOptions) -> list[tasks.Task]:
    """Return the task of each seed, with examples in the prompts that are drawn from the rows of the seed."""
    seed_tasks = zip(options.seeds, tasks_of_seeds(task, options), strict=True)
    assert isinstance(options.recipe, FewShotRecipe)
    return [
        tasks.few_shot(task_of_seed, options.recipe.shots, seed)
        for seed, task_of_seed in seed_tasks
    ]


def encode_shown(
    texts: Texts, shown: tasks.Task, rows: int, new_tokens: int
) -> tasks.Encoded:
    """Tokenise the first test rows of a task with examples in its prompts (see `few_shot`).

    A prompt that is cut loses its first examples, not the question at its end.
    """
    tokenizer, text_format = texts
    encoded = tasks.encode(
        tokenizer,
        shown.test[:rows],
        text_format,
        max_length=_UNCUT,
        new_tokens=new_tokens,
    )
    return (
        encoded
        if text_format.ends
        else tasks.Encoded(
            tuple(ids[-tasks.LONGEST :] for ids in encoded.inputs), encoded.labels
        )
    )


def of_run(
    loaded: AnyLoaded,
    options: LoadOptions,
    folder: Path,
    config: RunConfig,
    params: Params,
) -> AnyLoaded:
    """Return the loaded model with the modules of a run, whose trained parameters of one seed are given.

    Raises a ValueError if base or pool are not those of the run, or the parameters have other shapes than its method's.
    """
    placed = with_modules(loaded, options, config["modules"])
    check_digests(folder, config["digests"], digests(placed), options)
    first_seed = placed.problem.replace(index=placed.problem.index[0])
    expected = jax.eval_shape(lambda: first_seed.init(jax.random.key(0)))
    check_signature(
        folder / "final",
        signature(params),
        signature(expected),
        fix="restore it from a copy, or train again",
    )
    return placed


def own_task(options: FuseOptions, folder: Path, config: RunConfig) -> tasks.Task:
    """Return the task of a run; ValueError if it has other rows than the run was fused on."""
    task = read_task(options, need=())
    if task.sha256 != config["task_sha256"]:
        raise ValueError(
            f"{options.task} has other rows than {folder} was fused on: restore them, fuse the run again, or evaluate "
            "it on other rows with --task, which leaves out those that it was trained on"
        )
    return task


def trainable_count(setup: Setup) -> dict[str, int]:
    """Return the count of parameters that the first seed trains, by group."""
    return {
        group: sum(map(int, jax.tree.leaves(tree)))
        for group, tree in _acting(setup.problem).items()
    }


@jax.jit
def _acting(problem: Problem) -> Params:
    first_problem = problem.replace(index=problem.index[0])
    return jax.tree.map(
        jnp.sum, first_problem.trainable(first_problem.init(jax.random.key(0)))
    )
