"""`--plan`: what a matrix of methods, tasks and seeds needs, as a table, without running or loading weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..models.t5 import T5Config
from .cost import Shape
from .estimate import Cost, Settings, estimate, seeds_of
from .workload import Workload


class Row(NamedTuple):
    """One method of a matrix.

    Attributes:
      method: its name.
      runs: tasks times seeds.
      cost: FLOPs of training and evaluation are those of all its runs, the rest that of its largest task.
    """

    method: str
    runs: int
    cost: Cost


def plan(
    config: T5Config, methods: Sequence[str], tasks: Mapping[str, Workload], settings: Settings = Settings()
) -> list[Row]:
    """Return what every method needs for all tasks and seeds.

    Args:
      config: the base model.
      methods: of `estimate.METHODS`.
      tasks: name -> workload.
      settings: of all runs.

    Raises:
      ValueError: there is nothing to plan; and as `estimate` does.
    """
    if not tasks or not methods:
        raise ValueError(f"a plan of {len(methods)} methods for {len(tasks)} tasks: give at least one of each")
    rows = []
    for method in methods:
        costs = [estimate(config, method, work, settings) for work in tasks.values()]
        seeds = seeds_of(method, settings)
        all_runs = {
            "training_flops": seeds * sum(cost.training_flops for cost in costs),
            "evaluation_flops": seeds * sum(cost.evaluation_flops for cost in costs),
        }
        largest = max(costs, key=lambda cost: cost.peak_bytes)
        rows.append(Row(method, seeds * len(costs), largest._replace(**all_runs)))
    return rows


def plan_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows, and of their sum."""
    head = "method,runs,trainable,forward,training,evaluation,weights,pool,state,activations,peak".split(",")
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for method, runs, cost in rows:
        flops = (cost.forward_flops, cost.training_flops, cost.evaluation_flops)
        lines.append([method, f"{runs:,}", f"{cost.trainable:,}", *map(_flops, flops), *map(_bytes, cost[4:])])
    training = sum(row.cost.training_flops for row in rows)
    evaluation = sum(row.cost.evaluation_flops for row in rows)
    peak = max(row.cost.peak_bytes for row in rows)
    total = ["all", f"{sum(row.runs for row in rows):,}", "", "", _flops(training), _flops(evaluation)]
    lines.append([*total, *[""] * 4, _bytes(peak)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "| "
        + " | ".join(_cell(text, width, i) for i, (text, width) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )


def print_plan(
    config: T5Config, methods: Sequence[str], tasks: Mapping[str, Workload], settings: Settings = Settings()
) -> None:
    """Print how a matrix runs and what it needs; the arguments and errors are those of `plan`."""
    table = plan_table(plan(config, methods, tasks, settings))
    how = "batched (vmap)" if settings.path == "vmap" else "one after the other (lax.map)"
    print(f"{len(methods)} methods x {len(tasks)} tasks, in turn; {settings.seeds} seeds: one program, {how}.")
    for name, work in tasks.items():
        print(
            f"{name}: {_batches(work.steps)} a seed, {_batches(work.test)} to evaluate, {work.new_tokens} new tokens;"
        )
        print(f"  lengths {work.lengths}, padded.")
    print(f"\n{table}\n")
    print(
        f"{config.dtype} on {'a CPU' if settings.device == 'cpu' else 'an accelerator'}. FLOPs: forward of one batch; "
        "training and evaluation of all\nruns of a method, generation to its last token. Bytes: of one program with all "
        "its seeds, at its largest batch."
    )


def _batches(shapes: Sequence[Shape]) -> str:
    """Return how many batches there are, and from which to which size."""
    if not shapes:
        return "no batches"
    low, high = (tuple(pick(column) for column in zip(*shapes, strict=True)) for pick in (min, max))
    sizes = [str(a) if a == b else f"{a}-{b}" for a, b in zip(low, high, strict=True)]
    return f"{len(shapes):,} batches of {sizes[0]} rows, {sizes[1]} source and {sizes[2]} target tokens"


def _cell(text: str, width: int, column: int) -> str:
    if text.startswith("---"):
        return "-" * width if column == 0 else "-" * (width - 1) + ":"
    return text.ljust(width) if column == 0 else text.rjust(width)


def _flops(count: float) -> str:
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def _bytes(count: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f}"
