"""Fused runs and typed mixtures that answer together: a bank of tasks with names and texts.

Axis letters: B rows of a batch.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from ..loading.model import load_model
from ..loading.spec import LoadOptions
from ..methods.entry import Built
from ..methods.fusion import PLAIN_SUM, CoefficientsRecipe, Fusion
from ..methods.lora import LoRA, as_pool
from ..methods.recipes import basis_of, recipe_of
from ..models.architecture import Architecture, kernels
from ..models.generate import GREEDY, Sampling
from ..runs.folder import load_run, note, seed_place
from ..runs.generation import draw_keys, generate_rows
from ..runs.options import FuseOptions
from ..runs.setup import check_params
from ..runs.weight_list import Weights, check_modules, coefficients_of
from ..support.checks import at_least, check_uint32
from ..support.options import LoadIn
from ..support.text import some
from ..tasks import Encoded, Example, as_input, decode, encode
from ..training.frozen import Frozen
from ..training.method import Method, Params
from ..training.recipe import Recipe
from .bank import TaskBank, nameless

# What all runs of one bank have in common.
_SHARED = ("base", "pool", "control", "control_draw", "dtype", "load_in")
_MIXTURE = Fusion(granularity="block", magnitudes=False)
_FREE = "\0"  # name of a place without a module


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
            coefficients and magnitudes, or one LoRA.
        """
        options, params, config = load_run(folder)
        groups = {*options.entry.groups} or params.keys()
        if not params or (
            groups - {"coefficients", "magnitudes"} and groups != {"lora"}
        ):
            raise ValueError(
                f"{folder} is of the method {options.method}, which no bank holds: give runs of a fusion, with "
                "magnitudes or without, of magnitudes alone, or of a LoRA"
            )
        modules = tuple(map(tuple, config["modules"]))
        run = cls(
            Path(folder),
            options,
            params,
            modules,
            config["max_new_tokens"],
            config["digests"],
        )
        if not run.is_lora:
            return run
        return run._replace(
            modules=tuple(
                (f"{Path(folder).absolute()}, seed {seed}",) for seed in options.seeds
            )
        )

    @property
    def is_lora(self) -> bool:
        """Whether the run trained one LoRA instead of fusing modules."""
        return self.options.entry.groups == ("lora",)

    def loras(self, config: Architecture) -> LoraPool:
        """Return the LoRAs of a LoRA run's seeds as a pool."""
        method = self.options.entry.build(Built(config, self.options.recipe, None, 0))
        assert isinstance(method, LoRA)
        return as_pool(method, self.params, [name for (name,) in self.modules])

    def check_params(
        self, graph: nnx.GraphDef, frozen: Frozen, sites: Collection[str]
    ) -> None:
        """Raise a FileError for parameters of other shapes or dtypes than the method's; `sites` are the modules'."""
        params = jax.tree.map(lambda p: p[0], self.params)
        names = self.modules[0]
        run_pool = None
        if (pool := frozen.pool) is not None and names:
            if isinstance(pool, LoraPool):
                rank = {site: rank for site, rank in pool.rank.items() if site in sites}
                pool = dataclasses.replace(pool, A={}, B={}, rank=rank)
            run_pool = pool.select(names)

        def begin() -> Params:
            model = nnx.merge(graph, frozen.base)
            pool = run_pool
            if isinstance(
                pool, LoraPool
            ):  # padding may be of another width in the bank
                width = (jnp.shape(params.get("coefficients")) or (0,))[-1]
                size = (len(names),)
                shapes = {
                    name: site
                    for name, site in model.config.sites.items()
                    if name in pool.rank
                }
                A = {
                    name: jnp.zeros((s.layers, *size, s.d_in, width))
                    for name, s in shapes.items()
                }
                B = {
                    name: jnp.zeros((s.layers, *size, width, s.d_out))
                    for name, s in shapes.items()
                }
                pool = dataclasses.replace(pool, A=A, B=B)
            method = self.options.entry.build(
                Built(model.config, self.options.recipe, pool, len(names))
            )
            ready = method.precompute(Frozen(frozen.base, pool), kernels(model))
            return method.init(ready, jnp.arange(len(names)), jax.random.key(0))

        check_params(self.folder, params, begin)

    def method(self, config: Architecture, pool: Pool | None) -> Method:
        """Return the run's method on a pool that holds its modules; that of a LoRA run takes the LoRA as it is."""
        if self.is_lora:
            return PLAIN_SUM
        if pool is not None and self.modules[0]:
            if not isinstance(pool, SharedBasis):
                pool = dataclasses.replace(pool, A={}, B={})
            pool = pool.select(
                self.modules[0]
            )  # the ranks of other modules do not matter
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
        self._rooms = set[
            int
        ]()  # numbers of modules, fewer than the bank's, of earlier batches
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
        loras = [run for run in runs if run.is_lora]
        if loras and (
            basis_of(options.recipe) is not None or options.load_in != "full"
        ):
            raise ValueError(
                f"{loras[0].folder} is of a LoRA, which joins whole modules in full precision: serve it apart from "
                "runs in a basis or with --load-in"
            )
        if options.entry.pool:
            assert options.pool is not None
            fused_runs = [run for run in runs if not run.is_lora]
            used = {
                *modules,
                *(
                    name
                    for run in fused_runs
                    for seed_modules in run.modules
                    for name in seed_modules
                ),
            }
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
        self._loaded = fused.with_problem(frozen=Frozen(fused.problem.frozen.base))
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
        for run in loras:
            run.check_params(fused.problem.graph, Frozen(frozen.base), ())
        if loras:
            pools = [run.loras(self._config) for run in loras]
            pools += [frozen.pool] if isinstance(frozen.pool, LoraPool) else []
            layers = {name: site.layers for name, site in self._config.sites.items()}
            frozen = dataclasses.replace(frozen, gram=None, pool=joined(pools, layers))
        pool = frozen.pool
        methods = [run.method(self._config, pool) for run in runs]
        granularities = [
            GRANULARITIES.index(m.granularity) for m in methods if isinstance(m, Fusion)
        ]
        scaled = {site for run in runs for site in run.params.get("magnitudes", {})}
        if pool is not None and pool.magnitude is not None:
            scaled |= pool.magnitude.keys()
        self.bank = TaskBank.empty(
            fused.problem.graph,
            frozen,
            capacity,
            granularity=GRANULARITIES[
                max([*granularities, GRANULARITIES.index("block")])
            ],
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
        dtype: Literal["float32", "bfloat16"] = "float32",
        load_in: LoadIn = "full",
    ) -> "Service":
        """Load a base and modules of a pool without any run.

        Args:
          base: the base model, as in `LoadOptions`.
          pool: a converted pool, or a folder of PEFT adapter folders.
          modules: names of the modules; by default all.
          capacity: number of tasks that there is room for.
          prompt: template of inputs, with {input} or other columns.
          chat: put inputs into the base model's chat template.
          dtype: dtype of weights and activations.
          load_in: hold base and pool in 4 or 8 bits.

        Raises:
          ValueError: the pool lacks a module, or the base has no chat template.
        """
        options = LoadOptions(
            base=base,
            pool=pool,
            method="coefficients",
            chat=chat,
            dtype=dtype,
            load_in=load_in,
        )
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
        if run.is_lora:
            params = {"coefficients": np.ones(1, np.float32)}
        else:
            adapted_sites = params.get("magnitudes", ()) if sites is None else sites
            run.check_params(self.bank.graph, self.bank.frozen, adapted_sites)
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
        loaded = [module for module in pool.names if module != _FREE]
        if missing := sorted(weights.keys() - {*loaded}):
            raise ValueError(
                f"the module {some(missing)} is not loaded: choose of {some(loaded)}, or load it"
            )
        # Of all modules, so that other modules are the same program.
        coefficients = coefficients_of(weights, pool)
        number = self._number(name)
        self.bank = self.bank.with_task(
            number, _MIXTURE, {"coefficients": coefficients}, range(len(pool))
        )
        self.tasks[name] = Task(number, None)

    def load_modules(self, names: Sequence[str]) -> None:
        """Load further whole modules of the pool, for tasks that are added later.

        Room for modules grows to powers of two. Only then does the next batch compile again, after a note on stderr.

        Raises:
          ValueError: the pool lacks a module, one is loaded already, or modules are in 4 or 8 bits or in a basis.
        """
        pool = self.bank.frozen.pool
        source = self._options.pool
        if (
            not isinstance(pool, LoraPool)
            or self._options.load_in != "full"
            or source is None
        ):
            raise ValueError(
                "only whole modules in full precision join a running service: open it with these modules"
            )
        check_modules(names, open_pool(source).names, source)
        if loaded := sorted({*names} & {*pool.names}):
            raise ValueError(f"{some(loaded)} is loaded already: leave it out")
        options = dataclasses.replace(
            self._options, method="coefficients", recipe=Recipe(), adapters=tuple(names)
        )
        new = load_model(options, like=self._loaded)
        added = new.problem.frozen.pool
        assert isinstance(added, LoraPool)
        in_order = dataclasses.replace(
            added.select(new.problem.index[0].tolist()), names=new.modules[0]
        )
        pools = [pool.select([name for name in pool.names if name != _FREE]), in_order]
        count = len(pools[0]) + len(pools[1])
        if count > len(pool):
            pools.append(_nothing(2 ** (count - 1).bit_length() - count))
            note(
                f"note: the service has room for {sum(map(len, pools))} modules now, and compiles again"
            )
        else:
            pools.append(_nothing(len(pool) - count))
        layers = {site: shape.layers for site, shape in self._config.sites.items()}
        self.bank = self.bank.with_pool(joined(pools, layers))
        self._digests["modules"] |= digests(new)["modules"]

    def add_module(self, name: str, module: str) -> None:
        """Add one module of the pool alone, as it was trained: a mixture of it with the weight 1.

        It replaces an earlier task of this name.

        Raises:
          ValueError: the bank is full, or the module was not loaded.
        """
        number = self._number(name)
        coefficients = {"coefficients": np.ones(1, np.float32)}
        self.bank = self.bank.with_task(number, PLAIN_SUM, coefficients, [module])
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

        Tasks that use 1, 2, 4, ... of the modules have a program each, which compiles after a note on stderr.

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
        if (
            bank is not self.bank
            and (room := len(bank.frozen.pool or ())) not in self._rooms
        ):
            self._rooms.add(room)
            pool_size = len(self.bank.frozen.pool or ())
            note(
                f"note: the tasks of these texts use at most {room} of {pool_size} modules, and their first batch "
                "compiles"
            )
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
        first = self._options
        if run.options.entry.pool and basis_of(run.options.recipe) != basis_of(
            first.recipe
        ):
            k = basis_of(run.options.recipe)
            bank_basis = basis_of(first.recipe)
            here = f"modules in a basis of {k} directions" if k else "whole modules"
            if bank_basis:
                there = f"modules in a basis of {bank_basis} directions"
            else:
                there = "whole modules"
            raise ValueError(
                f"{run.folder} fuses {here}, and {self._source} {there}: serve them apart, or fuse again"
            )
        for field in _SHARED:
            if (
                field in ("pool", "control", "control_draw")
                and not run.options.entry.pool
            ):
                continue
            here = _resolved(getattr(run.options, field))
            there = _resolved(getattr(first, field))
            if here != there:
                raise ValueError(
                    f"{run.folder} has the {field} {here}, and {self._source} has {there}: one bank has one {field}. "
                    "Serve them apart, or fuse one of them again with the other's"
                )


def run_input(
    row: str | Mapping[str, Any], where: str, run: FusedRun | None, prompt: str | None
) -> str:
    """Return the model's input for a text or row of a run, or of none with a prompt (see `tasks.as_input`)."""
    prompt, input = (run.options.prompt, run.options.input) if run else (prompt, None)
    return as_input(row, where, prompt, input=input)


def _nothing(modules: int) -> LoraPool:
    """Return places for modules that are loaded later."""
    return LoraPool(A={}, B={}, rank={}, names=(_FREE,) * modules)


def _resolved(value: str | int | None) -> str | int | None:
    """Return a folder's absolute path; other values, such as hub ids, unchanged."""
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value
