"""`lorafusion fuse`: train a fusion, and evaluate it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .._fuse import fuse
from ..estimates.plan import MachineName, describe_run
from ..files import one_line
from ..io import processes
from ..runs.options import FuseOptions
from ..runs.run import run_path
from ..training.recipe import PRESETS
from .parsing import parse, peek
from .scores import score_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The recipe that the other options' defaults come from.

    Attributes:
      preset: numbers of fusion and training that options do not give: `reference` has those of the paper's code.
    """

    preset: Literal["default", "reference"] = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseCommand(FuseOptions, Preset):
    """Fuse a pool of LoRA modules for a new task, and evaluate it by generation.

    Examples:
      lorafusion fuse --base google/flan-t5-large --pool pool --task bbh/snarks.json --seeds 1 2 3
      lorafusion fuse --preset reference --base base --pool pool --task task
      lorafusion fuse --base google/flan-t5-large --pool pool --basis 32 --task bbh/snarks.json
      lorafusion fuse --base flan-t5-large --pool pool --task bbh/snarks.json --plan --for h100
      lorafusion fuse --base base --pool pool --task task --crossbar chips/noisy --noise chip --chip 3

    Attributes:
      plan: print what the run needs (FLOPs, memory), and run nothing. The base may be the name of a shape, such as
        flan-t5-large, whose weights are not needed.
      plan_for: plan for this machine instead of the one that the command runs on.
    """

    plan: bool = False
    plan_for: Annotated[MachineName | None, tyro.conf.arg(name="for")] = None


GROUPS = {
    "data and base": (
        "base", "pool", "task", "prompt", "chat", "train_rows", "test_rows", "dtype", "load_in",
    ),
    "fusion": (
        "method", "modules", "choose", "adapters", "composition", "basis", "granularity", "start", "control",
        "core", "differentiate_norm",
    ),
    "training": (
        "epochs", "batch_size", "lr_coefficients", "lr_magnitudes", "lr_core", "schedule", "warmup", "l2", "l1", "clip",
        "prune", "stop_early", "protocol", "start_from",
    ),
    "baseline": (
        "lora_rank", "lora_targets", "vera_rank", "lr_lora", "lr_vera", "lr_full", "shots", "merge", "density",
        "evaluations", "generations", "population",
    ),
    "hardware": ("crossbar", "noise", "chip", "chip_key", "digital", "age", "norm"),
    "run": (
        "seeds", "out", "name", "plan", "plan_for", "resume", "eval_batch", "max_new_tokens", "log", "save_seconds",
        "path", "mesh", "distributed", "coordinator", "processes", "process", "profile",
    ),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Fuse, and print the results; with `--plan`, print only the estimated cost."""
    recipe = PRESETS[peek(Preset, arguments).preset]
    command = parse(FuseCommand, arguments, "fuse", groups=GROUPS, defaults=vars(recipe))
    options = FuseOptions(**{field.name: getattr(command, field.name) for field in dataclasses.fields(FuseOptions)})
    if command.plan:
        print(describe_run(options, command.plan_for))
        return
    if command.plan_for is not None:
        raise ValueError(f"--for {command.plan_for} names the machine of a plan: add --plan, or leave it out")
    results = fuse(options)
    if processes.first():
        print(report(results, run_path(options)))


def report(results: Mapping[str, Any], folder: Path) -> str:
    """Return the results of a run: a line for each seed, then mean and spread."""
    head = (
        f"{results['task']}, {results['method']}, {results['trainable']:,} trainable numbers, "
        f"{results['test_rows']:,} test rows"
    )
    return f"{one_line(head)}\n{score_table(results['seeds'])}\nwritten to {one_line(str(folder))}"
