"""A method on chips: its numbers trained digitally or on every chip, and scored on every chip at any age.

What an experiment has computed lies in a folder: OUT/numbers (trained parameters), OUT/rows.jsonl (scores), OUT/runs
(runs that `lorafusion fuse` could have made). The same command continues where it was interrupted.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorafusion_jax import FuseOptions, Recipe, fuse
from lorafusion_jax.crossbar import CrossbarConfig
from lorafusion_jax.hardware import (
    Chips,
    for_every_chip,
    load_chips,
    module_numbers,
    on_every_chip,
)
from lorafusion_jax.io import load_arrays, save_arrays
from lorafusion_jax.runs import EvaluateOptions, Setup, evaluate, load_to_evaluate
from lorafusion_jax.tasks import split
from lorafusion_jax.training import Params, fit, start
from lorafusion_jax.trials import ResultRows, Row

from .common import ROOT, options_of_small, slug, small_pool_in_basis
from .matrix import Arm, recipe_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipsOptions:
    """Options of measurements on chips.

    Attributes:
      tasks: of the embedded ones.
      seeds: each draws modules, starts and orders of rows.
      chips: how many.
      crossbar: configuration of the arrays; to age them it needs a drift model.
      chip_key: key from which chips are drawn.
      epochs: of training.
      again_epochs: of training again on aged chips.
      test_rows: evaluate on the first rows only.
      out: folder of results; what is there already is not computed again.
    """

    tasks: tuple[str, ...] = ("swapends_prev", "pairswap_numvow", "sort_next2")
    seeds: tuple[int, ...] = (1, 2, 3)
    chips: int = 8
    crossbar: str = str(ROOT / "examples" / "chip.yaml")
    chip_key: int = 0
    epochs: int = 20
    again_epochs: int = 5
    test_rows: int | None = None
    out: Path

    def check(self, **lists: Sequence[Any]) -> None:
        """Raise ValueError for no chips, or for an option without a value, before anything is computed."""
        if self.chips < 1:
            raise ValueError(f"chips is {self.chips}: expected at least 1")
        for name, values in {"tasks": self.tasks, "seeds": self.seeds, **lists}.items():
            if not values:
                raise ValueError(f"no {name}: give at least one with --{name}")

    def store(self, *apart: str) -> "Store":
        """Return the folder of results; raises ValueError for results of other settings than those not `apart`."""
        settings = dataclasses.asdict(self) | {
            "config": load_chips(self.crossbar).sha256
        }
        apart = ("out", "tasks", "crossbar", *apart)
        return Store(
            self.out,
            {name: value for name, value in settings.items() if name not in apart},
        )


class Store:
    """Results of an experiment in a folder; ValueError where it holds results of other settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        settings = json.loads(json.dumps(settings, default=str))
        self.cells = ResultRows(
            folder / "rows.jsonl", lambda row: row["name"], settings
        )
        self.cells.rows()

    def rows(self, name: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return rows by name, computed only once."""
        self.cells.fill(
            [name],
            lambda _: [{"name": name, "rows": compute()}],
            lambda row: row["name"],
        )
        return next(row["rows"] for row in self.cells.rows() if row["name"] == name)

    def numbers(self, name: str, compute: Callable[[], Params]) -> Params:
        """Return trained parameters by name, computed only once."""
        folder = self.folder / "numbers" / name
        if not folder.exists():
            save_arrays(folder, "training result", compute(), {})
        return jax.tree.map(jnp.asarray, load_arrays(folder, "training result")[0])


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method on a task, and its chips.

    Attributes:
      store: of results.
      options: of the digital run.
      setup: digital, with a loop over layers.
      params: trained digitally.
      chips: which weights are in arrays, and the keys.
      keys: [C], of the chips.
    """

    store: Store
    options: FuseOptions
    setup: Setup
    params: Params
    chips: Chips
    keys: Array

    def on_chips(self, config: CrossbarConfig, params: Params) -> Setup:
        """Return the setup of all seeds on all chips, whose converters cover what these numbers bring to them."""
        return self._placed(
            self.setup,
            config,
            params,
            module_numbers(self.setup, self.options, self.chips),
        )

    def train_on_chips(
        self,
        config: CrossbarConfig,
        recipe: Recipe,
        begin: Params | None = None,
        rows: int | None = None,
    ) -> Params:
        """Return numbers of every seed on every chip [C * S], each trained on its chip.

        Args:
          config: of the arrays.
          recipe: of the training.
          begin: numbers to start from, [C * S]; None for a start from the beginning.
          rows: how many of the training rows; None for the run's own.
        """
        seeds = self.options.seeds * len(self.keys)
        first = begin or start(self.setup.problem, self.options.seeds).params
        on_all = self.on_chips(config, first)
        if rows is not None:
            on_all = dataclasses.replace(
                on_all, split=split(len(self.setup.task.train), seeds, limit=rows)
            )
        return fit(
            on_all.problem,
            on_all.rows,
            start(on_all.problem, seeds, begin),
            recipe,
            seeds,
        ).params

    def rows(
        self,
        name: str,
        config: CrossbarConfig | None,
        params: Params,
        **of: Any,
    ) -> Iterator[Row]:
        """Yield a row for every seed on every chip, or read digitally without a configuration, computed only once.

        Args:
          name: under which rows are kept.
          config: of the arrays.
          params: of every seed [S], or of every seed on every chip [C * S].
          of: more columns, the first ones.
        """
        rows = self.store.rows(slug(name), lambda: self._scores(config, params))
        yield from ({**of, **row} for row in rows)

    def _scores(self, config: CrossbarConfig | None, params: Params) -> list[Row]:
        setup = self.setup
        chips = 1
        if config is not None:
            chips = len(self.keys)
            setup = self.on_chips(config, params)
            if len(jax.tree.leaves(params)[0]) < len(setup.problem.index):
                params = for_every_chip(params, chips)
        found = evaluate(setup, params, batch_size=self.options.eval_batch)
        assert found.loss is not None and found.exact_match is not None
        places = itertools.product(range(chips), self.options.seeds)
        columns = zip(
            places, found.exact_match.tolist(), found.loss.tolist(), strict=True
        )
        return [
            {"chip": n, "seed": seed, "exact_match": match, "loss": loss}
            for (n, seed), match, loss in columns
        ]

    def trained(self, name: str, **changes: Any) -> Params:
        """Return the numbers of a run with other options than the digital one, such as `arrays` or `start_from`."""
        options = dataclasses.replace(self.options, name=name, resume=True, **changes)
        fuse(options)
        return load_to_evaluate(EvaluateOptions(run=options.out / name))[2]

    def _placed(
        self,
        setup: Setup,
        config: CrossbarConfig,
        params: Params,
        modules: Array | None = None,
    ) -> Setup:
        first = jax.tree.map(lambda p: p[: len(self.options.seeds)], params)
        return on_every_chip(
            setup,
            first,
            self.chips.rules(config),
            self.keys,
            modules=modules,
            norm="ideal",
        )


def subject(
    store: Store, task: str, method: str, entry: Arm, options: ChipsOptions
) -> Subject:
    """Train a method digitally on 95 + 5 rows of an embedded task, and return it with its chips."""
    fused = options_of_small(
        task,
        entry,
        pool=small_pool_in_basis(),
        seeds=options.seeds,
        out=store.folder / "runs",
        name=f"{task}-{slug(method)}",
        recipe=dataclasses.replace(recipe_of(entry), epochs=options.epochs),
        test_rows=options.test_rows,
        resume=True,
    )
    fuse(fused)
    run = EvaluateOptions(run=fused.out / f"{fused.name}", test_rows=options.test_rows)
    setup, fused, params = load_to_evaluate(run)
    chips = load_chips(options.crossbar, key=options.chip_key)
    keys = jnp.stack([chips.chip_key(number) for number in range(options.chips)])
    return Subject(
        store,
        fused,
        chips.checked(setup).with_layers(unroll=False),
        params,
        chips,
        keys,
    )


def of_tasks(tasks: Sequence[str], rows: Callable[[str], Iterable[Row]]) -> list[Row]:
    """Return the rows of all tasks."""
    found = []
    for task in tasks:
        found += [{"task": task, **row} for row in rows(task)]
        jax.clear_caches()  # other tasks and sizes are other programs, which take gigabytes
    return found


def matches(rows: Sequence[Row], **of: Any) -> np.ndarray:
    """Return exact match of chips [C], means over the rows with these values in columns; digital ones have one."""
    by_chip: dict[int, list[float]] = {}
    for row in rows:
        if all(row[name] == value for name, value in of.items()):
            by_chip.setdefault(row["chip"], []).append(row["exact_match"])
    return np.array([np.mean(by_chip[chip]) for chip in sorted(by_chip)])


def again(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe of training again, at half the rates."""
    halved = {
        name: getattr(recipe, name) / 2
        for name in ("lr_coefficients", "lr_magnitudes")
        if hasattr(recipe, name)
    }
    return dataclasses.replace(recipe, epochs=epochs, **halved)


def as_lines(rows: Sequence[Row]) -> list[list[Any]]:
    """Return rows as the lines of a table, in the columns of the first."""
    return [[*rows[0]], *([row[name] for name in rows[0]] for row in rows)]
