"""Ideas for a fusion in few numbers or from few examples, against LoRAFusion at as many forward passes.

    python experiments/basis_ideas.py    # runs what is missing: 3 tasks x 3 seeds, five examples; then writes the table

    whitened    coefficients around the mean module, in coordinates in which the modules are orthonormal

LoRAFusion, LoRA and a basis of all modules are the rows of the other tables, of the same tasks and seeds. Results are
rows of OUT/results.jsonl; interrupted, the same command goes on. Written to OUT: table_5.md.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from _basis_ideas import ENTRIES
from _common import ROOT, SMALL, League, small_pool_in_basis
from _matrix import MatrixOptions, run_matrix
from _methods import IDEAS
from _planning import print_matrix_plan

from lorafusion_jax import cli
from lorafusion_jax.columns import markdown
from lorafusion_jax.methods import register
from lorafusion_jax.report import Scores, main_tables, merge, read_rows, scores, write_text
from lorafusion_jax.report import markdown as table_markdown

_FUSION = "LoRAFusion"
_BESIDE = (_FUSION, "LoRA", "k = 32, all modules")  # rows of other tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdeasOptions(MatrixOptions):
    """Options of the experiment.

    Attributes:
      others: tables of the rows to compare with.
      out: folder of results.jsonl, the runs and what is made of them; what is there already is not run again.
    """

    base: str = str(SMALL / "base")
    pool: str = ""
    tasks: tuple[str, ...] = tuple(
        str(SMALL / "tasks" / name) for name in ("swapends_prev", "pairswap_numvow", "sort_next2")
    )
    seeds: tuple[int, ...] = (1, 2, 3)
    leagues: tuple[League, ...] = ("5",)
    others: tuple[Path, ...] = tuple(
        ROOT / "docs" / "results" / of / "results.jsonl" for of in ("small_pool_5", "basis")
    )
    out: Path = ROOT / "runs" / "basis_ideas"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(IdeasOptions, args=list(arguments), description=__doc__)
    options = dataclasses.replace(options, pool=str(small_pool_in_basis()))
    register(*ENTRIES)
    if options.plan:
        print_matrix_plan(options, IDEAS)
        return
    own = read_rows(run_matrix(options, IDEAS))
    found = {(row["task"], row["seed"], row["league"]) for row in own}
    there = [row for row in merge(options.others) if (row["task"], row["seed"], row["league"]) in found]
    for league in scores([*(row for row in there if row["method"] in _BESIDE), *own]):
        write_text(options.out / f"table_{league.league}.md", tables(league))


def tables(league: Scores) -> str:
    """Return the ideas with their differences, and all rows by task."""
    lines = [["", "exact match, %", f"minus {_FUSION}"]]
    for name, found in league.summaries.items():
        away = None if name == _FUSION else league.paired(name, _FUSION)
        said = "" if away is None else f"{away.difference:+.1f} ({away.low:+.1f} to {away.high:+.1f})"
        lines.append([name, "" if found is None else f"{found.mean:.1f}", said])
    return f"League {league.league}.\n\n{markdown(lines)}\n{table_markdown(main_tables(league)[0])}"


if __name__ == "__main__":
    cli.run(main)
