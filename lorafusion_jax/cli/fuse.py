"""`lorafusion fuse`: train a fusion, and evaluate it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..estimates.machines import PlanOptions
from ..estimates.plan import describe_run
from ..hardware.on_arrays import fuse
from ..methods import METHODS, fields_of, find, having, not_an_option
from ..methods.entry import MethodEntry, recipe_of
from ..methods.fusion import PRESETS
from ..runs.folder import RunResults, run_path
from ..runs.options import FuseOptions, options_with, plain
from ..runs.run import check_together
from ..runs.start import stages
from ..runs.weight_list import with_listed_modules
from ..support import processes
from ..support.platform import suggest_bfloat16
from ..support.reading import show
from ..support.text import one_line
from ..support.text_tables import plain as plain_table
from ..training.recipe import Recipe
from .parsing import GROUPS, given, parse, peek
from .scores import score_lines, score_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The recipe that the other options' defaults come from.

    Attributes:
      preset: numbers of fusion and training that options do not give: `reference` has those of the paper's code.
    """

    preset: Literal["default", "reference"] = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseCommand(FuseOptions, Preset, PlanOptions):
    """Fuse a pool of LoRA modules for a new task, and evaluate it by generation.

    Several tasks are trained by one program, which is compiled once. Each has a run, as if it were the only task.

    Shown are the options of the method fusion, or of another one: `lorafusion fuse --method lora --help`.

    Examples:
      lorafusion fuse --base google/flan-t5-large --pool pool --task bbh/snarks.json --seeds 1 2 3
      lorafusion fuse --preset reference --base base --pool pool --task task
      lorafusion fuse --base google/flan-t5-large --pool pool --basis 32 --task bbh/snarks.json
      lorafusion fuse --base flan-t5-large --pool pool --task bbh/snarks.json --plan --for h100 --price 2.5
      lorafusion fuse --base google/flan-t5-large --pool pool --task bbh/snarks.json bbh/hyperbaton.json
      lorafusion fuse --base base --pool pool --task task --crossbar noisy_chips.json --train-chip chip --chip 3

    Attributes:
      task: one or more tasks: each a JSONL file or a folder of them, a JSON list, a BIG-Bench Hard file, a `datasets`
        folder or hub id.
    """

    task: tuple[str, ...]  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked(Preset):
    """What the other options depend on."""

    method: str = FuseOptions.method


def fuse_command(arguments: Sequence[str]) -> None:
    """Fuse, and print the results; with `--plan`, print only the estimated cost."""
    asked = peek(_Asked, arguments)
    entry = find(asked.method)
    for option in given(arguments):
        if having(option) and option not in fields_of(entry):
            raise ValueError(
                f"--{option.replace('_', '-')} is {not_an_option(option, entry.name)}"
            )
    if {"adapters", "modules"} <= {*given(arguments)}:
        raise ValueError(
            "--adapters names the modules: leave it out, or --modules, which draws that many"
        )
    recipe = recipe_of(entry.recipe, vars(PRESETS[asked.preset]))
    command = parse(
        _command(entry),
        arguments,
        "fuse",
        groups=groups_of(entry),
        defaults=vars(recipe),
    )
    command.check_plan()
    options = plain(dataclasses.replace(command, task=""))
    options = with_listed_modules(options)
    tasks = [dataclasses.replace(options, task=task) for task in command.task]
    # The note is on this machine, and asks JAX for its platform, for which processes have to have joined.
    if command.plan_for is None and not options.distributed:
        suggest_bfloat16(options.dtype)
    if command.plan:
        check_together(tasks)
        for task_options in tasks:
            for stage in stages(task_options):
                show(describe_run(stage, command))
        if options.arrays.crossbar is not None:
            show(
                f"counted digitally: simulated arrays ({options.arrays.crossbar}) take more time and memory"
            )
        return
    results = fuse(options, command.task)
    if processes.first():
        show(report(results, [run_path(task_options) for task_options in tasks]))


def _command(entry: MethodEntry) -> type[FuseCommand]:
    """Return the command's options for one method: its own, and the names of all that are registered by now."""
    names = "; ".join(f"{name}: {each.help}" for name, each in METHODS.items())
    method = Annotated[
        Literal[tuple(METHODS)],
        tyro.conf.arg(help=f"method that learns the task. {names}"),
    ]
    named: Any = ("method", method, dataclasses.field(default=entry.name))
    bases = (FuseCommand, options_with(entry.recipe))
    doc = {"__doc__": FuseCommand.__doc__}
    return dataclasses.make_dataclass(
        "FuseCommand", [named], bases=bases, namespace=doc, frozen=True, kw_only=True
    )


def groups_of(entry: MethodEntry) -> dict[str, Sequence[str]]:
    """Return the options by the title that the help text shows them under: those of a method have its name."""
    common = [field.name for field in dataclasses.fields(Recipe)]
    of_method = [name for name in fields_of(entry) if name not in common]
    groups: dict[str, Sequence[str]] = {}
    for title, names in GROUPS.items():
        groups[title] = [name for name in names if name not in of_method]
        if title == "method":
            groups[f"method {entry.name}"] = of_method
    others = [name for name in common if name != "max_new_tokens"]
    return groups | {"training": (*others, "start_from")}


def report(results: Sequence[RunResults], folders: Sequence[Path]) -> str:
    """Return the results of runs: a line for each seed, and for a single run then mean and spread."""
    first = results[0]
    sizes = f"{first.method}, {first.trainable:,} trainable parameters"
    if len(results) == 1:
        head = f"{first.task}, {sizes}, {first.test_rows:,} test rows"
        return f"{one_line(head)}\n{score_table(first.seeds)}\nwritten to {one_line(str(folders[0]))}"
    rows = [
        {"run": one_line(str(folder)), "task": one_line(result.task)} | seed
        for result, folder in zip(results, folders, strict=True)
        for seed in result.seeds
    ]
    table = plain_table(score_lines(rows, "run", "task", "seed"), left=(0, 1, 2, 4))
    return f"{len(results)} tasks, {sizes}\n{table}"
