"""Fused runs that answer together: a bank of tasks with names and texts.

Axis letters: B rows of a batch.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from ..adapters.basis import Pool, SharedBasis
from ..adapters.coefficients import GRANULARITIES
from ..adapters.pool import LoraPool, joined
from ..io.digests import Digests
from ..io.pool import open_pool
from ..loading.identity import check_digests, digests
from ..loading.model import evaluation_worth, load_model, module_names
from ..methods.entry import Built
from ..methods.fusion import PLAIN_SUM, CoefficientsRecipe, Fusion
from ..methods.lora import LoRA, as_pool
from ..methods.recipes import basis_of, recipe_of
from ..models.architecture import Architecture, kernels
from ..models.generate import GREEDY, Sampling
from ..models.weights import read_at_random
from ..runs.options import FuseOptions
from ..runs.rows import Rows, draw_keys, room_for
from ..runs.run import load_run, seed_place
from ..runs.setup import check_params
from ..support.checks import at_least, check_uint32
from ..tasks import Encoded, Example, as_input, decode, encode, eval_batches
from ..training.frozen import Frozen
from ..training.method import Method, Params
from .bank import TaskBank, TaskModels

# What all runs of one bank have in common.
_SHARED = ("base", "pool", "control", "control_draw", "dtype", "load_in")


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
            coefficients, magnitudes and cores, or one LoRA.
        """
        options, params, config = load_run(folder)
        groups = {*options.entry.groups} or params.keys()
        if not params or (groups - {"coefficients", "magnitudes", "core"} and groups != {"lora"}):
            raise ValueError(
                f"{folder} is of the method {options.method}, which no bank holds: give runs of a fusion, with "
                "magnitudes or without, of magnitudes alone, or of a LoRA"
            )
        modules = tuple(map(tuple, config["modules"]))
        run = cls(Path(folder), options, params, modules, config["max_new_tokens"], config["digests"])
        if not run.is_lora:
            return run
        return run._replace(modules=tuple((f"{Path(folder).absolute()}, seed {seed}",) for seed in options.seeds))

    @property
    def is_lora(self) -> bool:
        """Whether the run trained one LoRA instead of fusing modules."""
        return self.options.entry.groups == ("lora",)

    def loras(self, config: Architecture) -> LoraPool:
        """Return the LoRAs of a LoRA run's seeds as a pool."""
        method = self.options.entry.build(Built(config, self.options.recipe, None, 0))
        assert isinstance(method, LoRA)
        return as_pool(method, self.params, [name for (name,) in self.modules])

    def check_params(self, graph: nnx.GraphDef, frozen: Frozen, sites: Collection[str]) -> None:
        """Raise a FileError for parameters of other shapes or dtypes than the method's; `sites` are the modules'."""
        of_seed, names, own = jax.tree.map(lambda p: p[0], self.params), self.modules[0], None
        if (pool := frozen.pool) is not None and names:
            if isinstance(pool, LoraPool):
                rank = {site: rank for site, rank in pool.rank.items() if site in sites}
                pool = dataclasses.replace(pool, A={}, B={}, rank=rank)
            own = pool.select(names)

        def begin() -> Params:
            model, pool = nnx.merge(graph, frozen.base), own
            if isinstance(pool, LoraPool):  # padding may be of another width in the bank
                width, size = (jnp.shape(of_seed.get("coefficients")) or (0,))[-1], (len(names),)
                shapes = {name: site for name, site in model.config.sites.items() if name in pool.rank}
                A = {name: jnp.zeros((s.layers, *size, s.d_in, width)) for name, s in shapes.items()}
                B = {name: jnp.zeros((s.layers, *size, width, s.d_out)) for name, s in shapes.items()}
                pool = dataclasses.replace(pool, A=A, B=B)
            method = self.options.entry.build(Built(model.config, self.options.recipe, pool, len(names)))
            ready = method.precompute(Frozen(frozen.base, pool), kernels(model))
            return method.init(ready, jnp.arange(len(names)), jax.random.key(0))

        check_params(self.folder, of_seed, begin)

    def method(self, config: Architecture, pool: Pool | None) -> Method:
        """Return the run's method on a pool that holds its modules; that of a LoRA run takes the LoRA as it is."""
        if self.is_lora:
            return PLAIN_SUM
        if pool is not None and self.modules[0]:
            pool = pool if isinstance(pool, SharedBasis) else dataclasses.replace(pool, A={}, B={})
            pool = pool.select(self.modules[0])  # the ranks of other modules do not matter
        return self.options.entry.build(Built(config, self.options.recipe, pool, len(self.modules[0])))


class Task(NamedTuple):
    """A task of a service: its number in the bank, and the run that it is from, None for a module alone."""

    number: int
    run: FusedRun | None


class Service:
    """Runs on one base and pool, which is loaded once, and their answers in batches of mixed tasks.

    Attributes:
      bank: the runs' numbers, base and pool.
      tasks: the added tasks, by name.
      tokenizer: tokenizer of the base model.
      text_format: layout of its prompts and answers; those of a run may also be a chat.
    """

    def __init__(self, runs: Sequence[FusedRun], *, capacity: int, modules: Sequence[str] = ()):
        """Load the base, and the modules of some runs, without adding the runs.

        Args:
          runs: the bank has all their modules and sites with magnitudes, and their finest granularity.
          capacity: number of tasks that there is room for.
          modules: names of further modules of the pool, for runs that are added later.

        Raises:
          ValueError: there is no run; runs differ in base, pool, control or precision; the pool lacks a module; base or
            modules have other weights than a run was fused with.
        """
        if not runs:
            raise ValueError("no runs: give at least one, whose base and pool are loaded")
        # Magnitudes alone need no pool.
        self._first = next((run for run in runs if run.options.entry.pool), runs[0])
        for run in runs:
            self._check_shares(run)
        options = dataclasses.replace(self._first.options, seeds=(0,))
        loras = [run for run in runs if run.is_lora]
        if loras and (basis_of(options.recipe) is not None or options.load_in != "full"):
            raise ValueError(
                f"{loras[0].folder} is of a LoRA, which joins whole modules in full precision: serve it apart from "
                "runs in a basis or with --load-in"
            )
        if options.entry.pool:
            assert options.pool is not None
            fused_runs = [run for run in runs if not run.is_lora]
            used = {*modules, *(name for run in fused_runs for of_seed in run.modules for name in of_seed)}
            there = module_names(open_pool(options.pool), options)
            if missing := ", ".join(sorted(used - set(there))):
                raise ValueError(f"{options.pool} is not the pool of the runs: it lacks {missing}; give that pool")
            names = tuple(name for name in there if name in used)
            # Modules that no run mixes with each other may differ in rank.
            recipe = recipe_of(CoefficientsRecipe, vars(options.recipe) | {"composition": "sum", "train_core": False})
            options = dataclasses.replace(options, method="coefficients", recipe=recipe, adapters=names)
        fused = load_model(options)
        self._digests = digests(fused)
        for run in runs:
            check_digests(run.folder, run.digests, self._digests, run.options)
        self.tokenizer, self.text_format, self.tasks = fused.tokenizer, fused.text_format, dict[str, Task]()
        frozen, self._config = fused.problem.frozen, fused.config
        if frozen.pool is not None:  # runs record the names of the modules that a control replaces
            frozen = dataclasses.replace(frozen, pool=dataclasses.replace(frozen.pool, names=fused.modules[0]))
        for run in loras:
            run.check_params(fused.problem.graph, Frozen(frozen.base), ())
        if loras:
            pools = [run.loras(self._config) for run in loras]
            pools += [frozen.pool] if isinstance(frozen.pool, LoraPool) else []
            layers = {name: site.layers for name, site in self._config.sites.items()}
            frozen = dataclasses.replace(frozen, gram=None, pool=joined(pools, layers))
        pool = frozen.pool
        methods = [run.method(self._config, pool) for run in runs]
        granularities = [GRANULARITIES.index(m.granularity) for m in methods if isinstance(m, Fusion)]
        scaled = {site for run in runs for site in run.params.get("magnitudes", {})}
        if pool is not None and pool.magnitude is not None:
            scaled |= pool.magnitude.keys()
        self.bank = TaskBank.empty(
            fused.problem.graph,
            frozen,
            capacity,
            granularity=GRANULARITIES[max(granularities, default=0)],
            scaled=sorted(scaled),
            cores=any("core" in run.params for run in runs),
        )

    def add(self, name: str, run: FusedRun, seed: int | None = None) -> None:
        """Add one seed of a run (by default its first) as a task, which replaces an earlier task of this name.

        Raises:
          ValueError: the bank is full; the run lacks the seed, has another base, pool or precision, modules that were
            not loaded, or numbers that the bank cannot hold (see `TaskBank.with_task`); or base or modules have other
            weights than the run was fused with.
        """
        self._check_shares(run)
        place, pool = seed_place(run.folder, run.options.seeds, seed), self.bank.frozen.pool
        number = self._number(name)
        modules = run.modules[place]
        if missing := ", ".join(sorted(set(modules) - set(pool.names if pool else ()))):
            raise ValueError(
                f"{run.folder} fuses {missing}, which the bank lacks: give these modules, or the run, when the service "
                "is made"
            )
        check_digests(run.folder, run.digests, self._digests, run.options)
        of_seed = jax.tree.map(lambda p: p[place], run.params)
        sites = None
        if isinstance(pool, LoraPool) and "magnitudes" not in of_seed:
            # The run was trained with the modules of all its seeds.
            of_run = pool.indices(sorted({name for of_each in run.modules for name in of_each} & {*pool.names}))
            sites = [site for site, rank in pool.rank.items() if np.any(np.asarray(rank)[:, of_run])]
        if run.is_lora:
            of_seed = {"coefficients": np.ones(1, np.float32)}
        else:
            own = of_seed.get("magnitudes", ()) if sites is None else sites
            run.check_params(self.bank.graph, self.bank.frozen, own)
        self.bank = self.bank.with_task(number, run.method(self._config, pool), of_seed, modules, sites=sites)
        self.tasks[name] = Task(number, run)

    def add_module(self, name: str, module: str) -> None:
        """Add one module of the pool alone, as it was trained, which replaces an earlier task of this name.

        Its prompts are texts as they are.

        Raises:
          ValueError: the bank is full, or the module was not loaded.
        """
        number, one = self._number(name), {"coefficients": np.ones(1, np.float32)}
        self.bank = self.bank.with_task(number, PLAIN_SUM, one, [module])
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

        Args:
          texts: inputs, which a run's prompt or chat template is put around, or rows with the columns of the prompt.
          names: name of the task that answers each of them; None for the plain base, which gets the text as it is.
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
            raise ValueError(f"{len(texts)} texts and {len(names)} names of tasks: give one for each text, or None")
        runs = {name: None if name is None else self._task(name).run for name in dict.fromkeys(names)}
        longest = max((task.run.max_new_tokens for task in self.tasks.values() if task.run), default=128)
        limits = {name: max_new_tokens or (run.max_new_tokens if run else longest) for name, run in runs.items()}
        inputs: dict[int, Int[np.ndarray, " _"]] = {}
        for name, run in runs.items():
            rows = [row for row, of_row in enumerate(names) if of_row == name]
            examples = [Example(run_input(texts[row], f"text {row + 1}", run), "") for row in rows]
            text_format = dataclasses.replace(self.text_format, chat=run is not None and run.options.chat)
            tokens = encode(self.tokenizer, examples, text_format, new_tokens=limits[name])
            inputs |= zip(rows, tokens.inputs, strict=True)
        encoded = Encoded(tuple(inputs[row] for row in range(len(texts))), (np.zeros(0, np.int32),) * len(texts))
        numbers = np.array([-1 if name is None else self.tasks[name].number for name in names], np.int32)
        worth = evaluation_worth(self._config)
        batches = list(eval_batches(encoded, eval_batch, pad_id=self.tokenizer.pad_token_id, worth=worth))
        answers: list[list[int]] = [[]] * len(encoded)
        bank = dataclasses.replace(self.bank, frozen=self.bank.frozen.unstacked())
        most, longest = [limits[name] for name in names], max(limits.values(), default=1)
        keys = partial(draw_keys, sampling, sampling_seed)
        how: dict[str, Any] = {"room": room_for(longest, eval_batch, worth), "sampling": sampling}

        def models(prompts: Int[np.ndarray, "1 B"]) -> TaskModels:
            return TaskModels(bank, np.where(prompts < 0, -1, numbers[prompts]).astype(np.int32))

        # The noise of a token depends on the rows next to it.
        alone = read_at_random(bank.frozen)
        for of_turn in [[batch] for batch in batches] if alone else filter(None, [batches]):
            rows = Rows(models, 1, self._config, of_turn, np.array(most), keys, **how)
            for _, row, tokens in rows.ended(False, None, longest):
                answers[row] = tokens[: most[row]].tolist()
        return decode(self.tokenizer, answers, self.text_format)

    def _number(self, name: str) -> int:
        """Return the number of a task, or a free one for a new task."""
        if name in self.tasks:
            return self.tasks[name].number
        free = set(range(self.bank.capacity)) - {task.number for task in self.tasks.values()}
        if not free:
            raise ValueError(
                f"no room for {name}: the bank holds {len(self.tasks)} tasks, its capacity. Remove one, or give a "
                "larger capacity"
            )
        return min(free)

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise ValueError(f"no task {name!r}: there are {', '.join(self.tasks) or 'none'}; add it")
        return self.tasks[name]

    def _check_shares(self, run: FusedRun) -> None:
        first = self._first
        if run.options.entry.pool and basis_of(run.options.recipe) != basis_of(first.options.recipe):
            k, other = (basis_of(of.options.recipe) for of in (run, first))
            here, there = (f"modules in a basis of {n} directions" if n else "whole modules" for n in (k, other))
            raise ValueError(f"{run.folder} fuses {here}, and {first.folder} {there}: serve them apart, or fuse again")
        for field in _SHARED:
            if field in ("pool", "control", "control_draw") and not run.options.entry.pool:
                continue
            here, there = (_resolved(getattr(of.options, field)) for of in (run, first))
            if here != there:
                raise ValueError(
                    f"{run.folder} has the {field} {here}, and {first.folder} has {there}: one bank has one {field}. "
                    "Serve them apart, or fuse one of them again with the other's"
                )


def run_input(row: str | Mapping[str, Any], where: str, run: FusedRun | None) -> str:
    """Return the model's input for a text or row of a run, None for the plain base (see `tasks.as_input`)."""
    prompt, input = (run.options.prompt, run.options.input) if run else (None, None)
    return as_input(row, where, prompt, input=input)


def _resolved(value: str | int | None) -> str | int | None:
    """Return a folder's absolute path; other values, such as hub ids, unchanged."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
