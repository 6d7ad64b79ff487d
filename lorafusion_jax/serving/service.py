"""Fused runs and typed mixtures that answer together: a bank of tasks with names and texts.

Axis letters: B rows of a batch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from ..adapters.basis import Pool, SharedBasis
from ..adapters.coefficients import GRANULARITIES
from ..adapters.pool import LoraPool
from ..io.digests import Digests
from ..io.pool import open_pool
from ..loading.model import check_digests, digests, load_model
from ..loading.spec import LoadOptions
from ..methods.entry import Built, basis_of, recipe_of
from ..methods.fusion import CoefficientsRecipe, Fusion
from ..models.architecture import Architecture
from ..models.generate import GREEDY, Sampling
from ..runs.folder import load_run, seed_place
from ..runs.generation import draw_keys, generate_rows
from ..runs.options import FuseOptions
from ..runs.weight_list import Weights, coefficients_of
from ..support.checks import at_least, check_uint32
from ..support.text import some
from ..tasks import Encoded, Example, as_input, decode, encode
from ..training.method import Method, Params
from .bank import TaskBank, nameless

# What all runs of one bank have in common.
_SHARED_BASE = ("base", "dtype", "load_in")
_SHARED = (*_SHARED_BASE, "pool", "basis", "control", "control_draw")
_MIXTURE = Fusion(granularity="block", magnitudes=False)


class FusedRun(NamedTuple):
    """A run that a bank can hold.

    Attributes:
      folder: its folder.
      options: its options.
      params: its trained parameters, leaves with a leading axis of seeds.
      modules: names of the modules that each seed fused.
      max_new_tokens: most tokens of an answer.
      digests: digests of its base and modules.
    """

    folder: Path
    options: FuseOptions
    params: Params
    modules: tuple[tuple[str, ...], ...]
    max_new_tokens: int
    digests: Digests

    @classmethod
    def read(cls, folder: str | Path) -> "FusedRun":
        """Read a run's options and numbers.

        Raises:
          ValueError: the folder is not a run whose training has ended, or its method has other numbers than
            coefficients and magnitudes.
        """
        options, params, config = load_run(folder)
        groups = {*options.entry.groups} or params.keys()
        if not params or groups - {"coefficients", "magnitudes"}:
            raise ValueError(
                f"{folder} is of the method {options.method}, which no bank holds: give runs of a fusion, with "
                "magnitudes or without, or of magnitudes alone. A LoRA can be exported, and converted into the pool"
            )
        return cls(
            Path(folder),
            options,
            params,
            tuple(map(tuple, config["modules"])),
            config["max_new_tokens"],
            config["digests"],
        )

    def method(self, config: Architecture, pool: Pool | None) -> Method:
        """Return the run's method on a pool that holds its modules."""
        if pool is not None and self.modules[0]:
            if not isinstance(pool, SharedBasis):
                pool = dataclasses.replace(pool, A={}, B={})
            # The ranks of other modules do not matter.
            pool = pool.select(self.modules[0])
        return self.options.entry.build(
            Built(config, self.options.recipe, pool, len(self.modules[0]))
        )


class Task(NamedTuple):
    """A task of a service: its number in the bank, and the run that it is from, None for a mixture of modules."""

    number: int
    run: FusedRun | None


class Service:
    """Runs and mixtures on one base and pool, which is loaded once, and their answers in batches of mixed tasks.

    Attributes:
      bank: the tasks' numbers, base and pool.
      tasks: the added tasks, by name.
      tokenizer: tokenizer of the base model.
      text_format: layout of its prompts and answers; those of a run may also be a chat.
    """

    def __init__(
        self,
        runs: Sequence[FusedRun],
        *,
        capacity: int,
        modules: Sequence[str] = (),
        options: LoadOptions | None = None,
        prompt: str | None = None,
    ):
        """Load the base, and the modules of some runs, without adding the runs.

        Args:
          runs: the bank has all their modules and sites with magnitudes, and their finest granularity from `block` on.
          capacity: number of tasks that there is room for.
          modules: names of further modules of the pool, for mixtures, and for runs that are added later.
          options: base, pool and chat template without runs; by default those of a run, and texts as they are.
          prompt: template of the inputs of mixtures, modules and the plain base.

        Raises:
          ValueError: there is no run; runs differ in base, pool, control or precision; the pool lacks a module; base or
            modules have other weights than a run was fused with.
        """
        if not runs and options is None:
            raise ValueError(
                "no runs: give at least one, whose base and pool are loaded, or use Service.open"
            )
        self.prompt = prompt
        self.chat = options is not None and options.chat
        self._source = "the service"
        if options is None:  # magnitudes alone need no pool
            self._source, options, *_ = next(
                (run for run in runs if run.options.entry.pool), runs[0]
            )
        self._options = options = dataclasses.replace(options, seeds=(0,))
        for run in runs:
            self._check_shares(run)
        if options.entry.pool:
            assert options.pool is not None
            used = {*modules}.union(*(names for run in runs for names in run.modules))
            pool_names = open_pool(options.pool).names
            if missing := ", ".join(sorted(used - set(pool_names))):
                raise ValueError(
                    f"{options.pool} lacks {missing}: give the pool of the runs, or correct the names"
                )
            names = tuple(name for name in pool_names if name in used)
            # Modules that no run mixes with each other may differ in rank.
            recipe = recipe_of(
                CoefficientsRecipe,
                vars(options.recipe) | {"composition": "sum"},
            )
            options = dataclasses.replace(
                options, method="coefficients", recipe=recipe, adapters=names
            )
        fused = load_model(options)
        self._digests = digests(fused)
        for run in runs:
            check_digests(run.folder, run.digests, self._digests, run.options)
        self.tokenizer = fused.tokenizer
        self.text_format = fused.text_format
        self.tasks = dict[str, Task]()
        frozen = fused.problem.frozen
        self._config = fused.config
        if (
            frozen.pool is not None
        ):  # runs record the names of the modules that a control replaces
            frozen = dataclasses.replace(
                frozen, pool=dataclasses.replace(frozen.pool, names=fused.modules[0])
            )
        pool = frozen.pool
        methods = [run.method(self._config, pool) for run in runs]
        granularities = [m.granularity for m in methods if isinstance(m, Fusion)]
        scaled = {site for run in runs for site in run.params.get("magnitudes", {})}
        if pool is not None and pool.magnitude is not None:
            scaled |= pool.magnitude.keys()
        self.bank = TaskBank.empty(
            fused.problem.graph,
            frozen,
            capacity,
            granularity=max(["block", *granularities], key=GRANULARITIES.index),
            scaled=sorted(scaled),
        )

    @classmethod
    def open(
        cls,
        base: str,
        pool: str,
        *,
        modules: Sequence[str] | None = None,
        capacity: int = 8,
        prompt: str | None = None,
        chat: bool = False,
    ) -> "Service":
        """Load a base and modules of a pool without any run.

        Args:
          base: the base model, as in `LoadOptions`.
          pool: a converted pool, or a folder of PEFT adapter folders.
          modules: names of the modules; by default all.
          capacity: number of tasks that there is room for.
          prompt: template of inputs, with {input} or other columns.
          chat: put inputs into the base model's chat template.

        Raises:
          ValueError: the pool lacks a module, or the base has no chat template.
        """
        options = LoadOptions(base=base, pool=pool, method="coefficients", chat=chat)
        names = open_pool(pool).names if modules is None else modules
        return cls((), capacity=capacity, modules=names, options=options, prompt=prompt)

    def add(self, name: str, run: FusedRun, seed: int | None = None) -> None:
        """Add one seed of a run (by default its first) as a task, which replaces an earlier task of this name.

        Raises:
          ValueError: the bank is full; the run lacks the seed, has another base, pool or precision, modules that were
            not loaded, or numbers that the bank cannot hold (see `TaskBank.with_task`); or base or modules have other
            weights than the run was fused with.
        """
        self._check_shares(run)
        place = seed_place(run.folder, run.options.seeds, seed)
        pool = self.bank.frozen.pool
        number = self._number(name)
        modules = run.modules[place]
        if missing := ", ".join(sorted(set(modules) - set(pool.names if pool else ()))):
            raise ValueError(
                f"{run.folder} fuses {missing}, which the bank lacks: give these modules, or the run, when the service "
                "is made"
            )
        check_digests(run.folder, run.digests, self._digests, run.options)
        params = jax.tree.map(lambda p: p[place], run.params)
        sites = None
        if isinstance(pool, LoraPool) and "magnitudes" not in params:
            # The run was trained with the modules of all its seeds.
            run_modules = pool.indices(
                sorted(
                    {name for seed_modules in run.modules for name in seed_modules}
                    & {*pool.names}
                )
            )
            sites = [
                site
                for site, rank in pool.rank.items()
                if np.any(np.asarray(rank)[:, run_modules])
            ]
        self.bank = self.bank.with_task(
            number, run.method(self._config, pool), params, modules, sites=sites
        )
        self.tasks[name] = Task(number, run)

    def add_mixture(self, name: str, weights: Weights) -> None:
        """Add a weighted sum of loaded modules, which replaces an earlier mixture of this name without compiling.

        The weights, by module or by module and block, are those of `lorafusion merge`. They are not normalised.

        Raises:
          ValueError: the bank is full, a run has this name, there is no weight, a module was not loaded, a block is
            unknown, or a weight is not a finite number.
        """
        pool = self.bank.frozen.pool
        if pool is None:
            raise ValueError(
                "the service has no pool, so it has no modules to mix: open it with a pool"
            )
        if name in self.tasks and self.tasks[name].run is not None:
            raise ValueError(
                f"{name!r} is the name of a run: give the mixture another name"
            )
        if not weights:
            raise ValueError("an empty mixture: give the weight of at least one module")
        if missing := sorted(weights.keys() - {*pool.names}):
            raise ValueError(
                f"the module {some(missing)} is not loaded: choose of {some(pool.names)}, or "
                "give it when the service is made"
            )
        # Of all modules, so that other modules are the same program.
        coefficients = coefficients_of(weights, pool)
        number = self._number(name)
        self.bank = self.bank.with_task(
            number, _MIXTURE, {"coefficients": coefficients}, range(len(pool))
        )
        self.tasks[name] = Task(number, None)

    def remove(self, name: str) -> None:
        """Remove a task; raises a ValueError for an unknown one."""
        self.bank = self.bank.without_task(self._task(name).number)
        del self.tasks[name]

    def generate(
        self,
        texts: Sequence[str | Mapping[str, Any]],
        names: Sequence[str | None],
        *,
        max_new_tokens: int | None = None,
        eval_batch: int = 64,
        sampling: Sampling = GREEDY,
        sampling_seed: int = 0,
    ) -> list[str]:
        """Return an answer to each text.

        Tasks that use 1, 2, 4, ... of the modules have a program each.

        Args:
          texts: inputs, which a run's or the service's prompt or chat template is put around, or rows with the columns
            of the prompt.
          names: name of the task that answers each of them; None for the plain base.
          max_new_tokens: most tokens of an answer; by default as in the run, for the plain base the most of all tasks.
          eval_batch: most rows in a batch.
          sampling: choice of the next token.
          sampling_seed: seed of the draws; each text's draws also depend on its place.

        Raises:
          ValueError: there is no such task, there are not as many names as texts, a text cannot be encoded, a number is
            below 1, or the seed is not of 32 bits.
        """
        at_least(1, max_new_tokens=max_new_tokens, eval_batch=eval_batch)
        check_uint32(sampling_seed=sampling_seed)
        if len(texts) != len(names):
            raise ValueError(
                f"{len(texts)} texts and {len(names)} names of tasks: give one for each text, or None"
            )
        runs = {
            name: None if name is None else self._task(name).run
            for name in dict.fromkeys(names)
        }
        longest = max(
            (task.run.max_new_tokens for task in self.tasks.values() if task.run),
            default=128,
        )
        limits = {
            name: max_new_tokens or (run.max_new_tokens if run else longest)
            for name, run in runs.items()
        }
        inputs: dict[int, Int[np.ndarray, " _"]] = {}
        for name, run in runs.items():
            rows = [row for row, task_name in enumerate(names) if task_name == name]
            examples = [
                Example(run_input(texts[row], f"text {row + 1}", run, self.prompt), "")
                for row in rows
            ]
            text_format = dataclasses.replace(
                self.text_format, chat=run.options.chat if run else self.chat
            )
            tokens = encode(
                self.tokenizer, examples, text_format, new_tokens=limits[name]
            )
            inputs |= zip(rows, tokens.inputs, strict=True)
        encoded = Encoded(
            tuple(inputs[row] for row in range(len(texts))),
            (np.zeros(0, np.int32),) * len(texts),
        )
        numbers = np.array(
            [-1 if name is None else self.tasks[name].number for name in names],
            np.int32,
        )
        bank = self.bank.with_modules_of(numbers)
        problem = dataclasses.replace(bank, frozen=nameless(bank.frozen)).problem
        problem = problem.replace(index=problem.index[None])

        def tasks_of(rows: Int[np.ndarray, " B"]) -> Params:
            return {"tasks": np.where(rows < 0, -1, numbers[rows])[None]}

        tokens = generate_rows(
            {},
            lambda number: problem,
            encoded,
            batch_size=eval_batch,
            max_new_tokens=max(limits.values(), default=1),
            pad_id=self.tokenizer.pad_token_id,
            row_params=tasks_of,
            limits=np.array([limits[name] for name in names]),
            sampling=sampling,
            keys=partial(draw_keys, sampling, sampling_seed),
        )
        return decode(self.tokenizer, tokens[0], self.text_format)

    def _number(self, name: str) -> int:
        """Return the number of a task, or a free one for a new task."""
        if name in self.tasks:
            return self.tasks[name].number
        free = set(range(self.bank.capacity)) - {
            task.number for task in self.tasks.values()
        }
        if not free:
            raise ValueError(
                f"no room for {name}: the bank holds {len(self.tasks)} tasks, its capacity. Remove one, or give a "
                "larger capacity"
            )
        return min(free)

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise ValueError(
                f"no task {name!r}: there are {', '.join(self.tasks) or 'none'}; add it"
            )
        return self.tasks[name]

    def _check_shares(self, run: FusedRun) -> None:
        for field in _SHARED if run.options.entry.pool else _SHARED_BASE:
            run_value = _shared(run.options, field)
            bank_value = _shared(self._options, field)
            if run_value != bank_value:
                raise ValueError(
                    f"{run.folder} has the {field} {run_value}, and {self._source} has {bank_value}: one bank has one "
                    f"{field}. Serve them apart, or fuse one of them again with the other's"
                )


def run_input(
    row: str | Mapping[str, Any], where: str, run: FusedRun | None, prompt: str | None
) -> str:
    """Return the model's input for a text or row of a run, or of none with a prompt (see `tasks.as_input`)."""
    prompt, input = (run.options.prompt, run.options.input) if run else (prompt, None)
    return as_input(row, where, prompt, input=input)


def _shared(options: LoadOptions, field: str) -> str | int | None:
    """Return an option, with a folder's absolute path."""
    if field == "basis":
        return basis_of(options.recipe)
    value = getattr(options, field)
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value
