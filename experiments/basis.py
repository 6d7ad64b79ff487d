"""A shared basis on the embedded pool: accuracy against reads, what choosing modules does, and controls.

    python experiments/basis.py                          # runs what is missing, then writes the tables and the plot
    python experiments/basis.py --groups choice start    # some groups only
    python experiments/basis.py --shots 5                # five examples

    choice     whole modules: all 28, and the best 10 by gradient
    k32, k16, k8, k24, k48    20 drawn modules, all, and the best 10, in the first k directions of the pool's basis
    start      all modules in 32 directions, from 2 / N instead of 1 / N
    controls   all modules in 32 random directions, and in those of shuffled layers

LoRAFusion and LoRA are the rows of the main table. Results are rows of OUT/results.jsonl; interrupted, the same command
continues. Written to OUT, for each number of shots: table.csv, the same rows by task in tasks.csv, what the directions
keep in kept.csv, and reads.png.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import _script
import tyro
from lab.common import DIRECTIONS, ROOT, small_pool_in_basis, write_csv
from lab.matrix import Arm, print_matrix_plan, run_matrix
from lab.methods import ALL, ARMS, BEST, IN_BASIS
from lab.scores import Scores, main_tables, scores
from small_pool import SmallPoolOptions

from lorafusion_jax import SharedBasis, load_basis
from lorafusion_jax.report import colour, plot
from lorafusion_jax.trials import merge, read_rows

Group = Literal["choice", "k32", "k16", "k8", "k24", "k48", "start", "controls"]

_FUSION = "LoRAFusion"
_BEST = "best 10"
# Rows of whole modules, and how they are chosen: a draw, all, the best.
CHOICES: dict[str, dict[str, Any]] = {_FUSION: {}, "all modules": ALL, _BEST: BEST}
SIZES = (8, 16, 24, 32, DIRECTIONS)
_RANK = 16  # of the pool's modules
_CONTROLS: dict[Literal["random-factors", "shuffled"], str] = {
    "random-factors": "random",
    "shuffled": "shuffled layers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisOptions(SmallPoolOptions):
    """Options of the experiment.

    Attributes:
      groups: rows to run; all by default.
      out: folder of results.jsonl, the runs and what is made of them; what is there already is not run again.
    """

    groups: tuple[Group, ...] = get_args(Group)
    out: Path = ROOT / "runs" / "basis"


def entries_of(groups: Sequence[Group]) -> dict[str, Arm]:
    """Return the rows of groups by name."""
    inside = IN_BASIS["basis"]
    twice = dataclasses.replace(inside, recipe=inside.recipe | {"start": "twice"})
    found: dict[str, dict[str, Arm]] = {
        "choice": {
            name: dataclasses.replace(ARMS[_FUSION], recipe=of)
            for name, of in CHOICES.items()
            if of
        },
        "start": {"k = 32, all modules, from 2/N": twice},
        "controls": {
            f"k = 32, {text}": dataclasses.replace(inside, control=control)
            for control, text in _CONTROLS.items()
        },
    }
    for k in SIZES:
        found[f"k{k}"] = {
            in_basis(k, whole): dataclasses.replace(inside, recipe=of | {"basis": k})
            for whole, of in CHOICES.items()
        }
    return {name: entry for group in groups for name, entry in found[group].items()}


def in_basis(k: int, whole: str) -> str:
    """Return the name of the row that fuses the modules of a row of whole ones in k directions."""
    return f"k = {k}, {'drawn' if whole == _FUSION else whole}"


def tables(
    results: Scores, basis: SharedBasis, sizes: Sequence[int] = SIZES
) -> dict[str, list[list[str]]]:
    """Return every row with its reads and its differences, the rows by task, and what the directions keep, by name.

    A matrix reads N r columns of A, or k of U.
    """
    at_most = reads(results, _FUSION)
    width = next(iter(basis.U.values())).shape[1]
    head = [
        "",
        "read of a matrix",
        f"/ {at_most}",
        "trained",
        "exact match, %",
        "95 % interval",
    ]
    lines = [
        [*head, f"minus {_FUSION}", f"minus {_BEST}", "minus the same modules, whole"]
    ]
    for name in _in_order(results):
        found = results.summaries[name]
        columns = reads(results, name)
        assert found is not None
        lines.append(
            [
                name,
                f"{columns}",
                f"{columns / at_most:.2f}",
                f"{max(row['trainable'] for row in results.of(name)):,}",
                f"{found.mean:.1f}",
                f"{found.low:.1f} to {found.high:.1f}",
                _difference(results, name, _FUSION),
                _difference(results, name, _BEST),
                _difference(results, name, _in_whole(results, name)),
            ]
        )
    kept = [["k", "k / d", "kept of the modules' squared norms, by site, %"]]
    for k in sizes:
        shares = [100 * norms.mean() for norms in basis.first(k).kept().values()]
        kept.append(
            [f"{k}", f"{k / width:.2f}", f"{min(shares):.0f} to {max(shares):.0f}"]
        )
    ordered = Scores(
        results.shots, [row for name in _in_order(results) for row in results.of(name)]
    )
    return {"table": lines, "tasks": main_tables(ordered)[0].texts, "kept": kept}


def reads(results: Scores, name: str) -> int:
    """Return the columns that a row reads of every matrix: k, the N r of whole modules, or LoRA's r."""
    recipe = _recipe(results, name)
    if name == "LoRA":
        return recipe["lora_rank"]
    return recipe.get("basis") or recipe["modules"] * _RANK


def _in_order(results: Scores) -> list[str]:
    """Return the rows that have all tasks, in the order of the groups; rows of earlier versions come last."""
    every = ("LoRA", _FUSION, *entries_of(get_args(Group)), *results.methods)
    return [name for name in dict.fromkeys(every) if results.summaries.get(name)]


def _in_whole(results: Scores, name: str) -> str | None:
    """Return the row of whole modules that a row in a basis fuses, if it is there."""

    def chosen(row: str) -> tuple[int, str]:
        recipe = _recipe(results, row)
        return recipe["modules"], recipe.get("choose", "draw")

    if _recipe(results, name).get("basis") is None:
        return None
    return next(
        (
            row
            for row in CHOICES
            if row in results.methods and chosen(row) == chosen(name)
        ),
        None,
    )


def _recipe(results: Scores, name: str) -> dict[str, Any]:
    return results.of(name)[0]["config"]["recipe"]


def _difference(results: Scores, name: str, other: str | None) -> str:
    found = (
        None
        if other in (None, name) or other not in results.methods
        else results.paired(name, other)
    )
    return (
        ""
        if found is None
        else f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
    )


def draw(results: Scores, path: Path) -> None:
    """Draw accuracy against the columns that are read of every matrix."""
    at_most = reads(results, _FUSION)
    there = _in_order(results)

    def on(figure: Any) -> None:
        axes = figure.subplots()

        def points(
            names: Sequence[str], label: str, beside: float = 1.0, **style: Any
        ) -> None:
            names = [name for name in names if name in there]
            found = [of for name in names if (of := results.summaries[name])]
            if found:
                x = [beside * reads(results, name) for name in names]
                means = [of.mean for of in found]
                around = [
                    [of.mean - of.low for of in found],
                    [of.high - of.mean for of in found],
                ]
                axes.errorbar(x, means, around, label=label, elinewidth=1, **style)

        for i, whole in enumerate(CHOICES, start=2):
            text = "20 drawn modules" if whole == _FUSION else whole
            of_basis = [in_basis(k, whole) for k in SIZES]
            points(
                of_basis,
                f"{text}, in the basis",
                1.03 ** (i - 3),
                fmt="o-",
                color=colour(i),
            )
            points(
                [whole],
                f"{text}, whole",
                fmt="s",
                color=colour(i),
                markersize=8,
                markerfacecolor="white",
            )
        for i, text in enumerate(_CONTROLS.values(), start=5):
            points(
                [f"k = 32, {text}"],
                f"{text}, all modules",
                1.03 ** (i - 3),
                fmt="x",
                color=colour(i),
            )
        points(
            ["LoRA"],
            "LoRA, written for the task",
            fmt="*",
            color=colour(0),
            markersize=11,
        )
        axes.set_xscale("log")
        ticks = sorted({reads(results, name) for name in there})
        axes.set_xticks(ticks, [f"{x}\n{x / at_most:.2f}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"columns read of each matrix, and as a share of {at_most}")
        axes.set_ylabel("exact match, %, with 95 % interval")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)

    plot(path, (8.0, 5.5), on)


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(BasisOptions, args=list(arguments), description=__doc__)
    entries = entries_of(options.groups)
    options = dataclasses.replace(options, pool=str(small_pool_in_basis()))
    if options.plan:
        print_matrix_plan(options, entries)
        return
    own = read_rows(run_matrix(options, entries, root=ROOT))
    # On the tasks and seeds that were run, so that all means are over the same ones.
    there = {(row["task"], row["seed"], row["shots"]) for row in own}
    compared = [
        row
        for row in merge(
            [
                ROOT / "results" / of / "results.jsonl"
                for of in ("small_pool", "small_pool_5")
            ]
        )
        if row["method"] in ("LoRA", _FUSION)
        and (row["task"], row["seed"], row["shots"]) in there
    ]
    if not any(row["method"] == _FUSION for row in compared):
        raise ValueError(
            "the main table has none of these tasks, seeds and shots: run experiments/small_pool.py first"
        )
    basis = load_basis(Path(options.pool))
    for results in scores([*compared, *own]):
        suffix = "" if results.shots == "95+5" else f"_{results.shots}"
        for name, lines in tables(results, basis).items():
            write_csv(options.out / f"{name}{suffix}.csv", lines)
        draw(results, options.out / f"reads{suffix}.png")


if __name__ == "__main__":
    _script.run(main)
