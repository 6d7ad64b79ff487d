"""Ideas for a fusion in few numbers or from few examples, against LoRAFusion at as many forward passes.

    python experiments/basis_ideas.py                # runs what is missing: 3 tasks x 3 seeds, then writes the tables
    python experiments/basis_ideas.py --leagues 5    # those for five examples

    best 10, rank gates         a coefficient for every rank of the ten modules of greatest descent, one epoch less
    vectors on 32 directions    VeRA's two vectors at every matrix on the pool's directions, and no modules
    basis and vectors           the same vectors around all modules, mixed in these directions
    whitened                    for five examples: coefficients around the mean module, in coordinates in which the
                                modules are orthonormal

LoRAFusion, LoRA, the best 10 and a basis of all modules are the rows of the other tables, of the same tasks and seeds.
Results are rows of OUT/results.jsonl; interrupted, the same command goes on. Written to OUT, for each league: table.md.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import _script
import tyro
from _basis_ideas import ENTRIES
from _common import ROOT, SMALL, small_pool_in_basis
from _matrix import MatrixOptions, run_matrix
from _methods import IDEAS
from _planning import print_matrix_plan

from lorafusion_jax.columns import markdown
from lorafusion_jax.methods import register
from lorafusion_jax.report import Scores, main_tables, merge, read_rows, scores, write_text
from lorafusion_jax.report import markdown as table_markdown

_FUSION = "LoRAFusion"
# Rows of other tables.
_COMPARED = (_FUSION, "best 10", "k = 32, all modules")
_BESIDE = (*_COMPARED, "LoRA")


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
    others: tuple[Path, ...] = tuple(
        ROOT / "docs" / "results" / of / "results.jsonl" for of in ("small_pool", "small_pool_5", "basis")
    )
    out: Path = ROOT / "runs" / "basis_ideas"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(IdeasOptions, args=list(arguments), description=__doc__)
    options = dataclasses.replace(options, pool=str(small_pool_in_basis()))
    register(*ENTRIES)
    if options.plan:
        print_matrix_plan(options, IDEAS)
        return
    for league in options.leagues:
        entries = {name: entry for name, entry in IDEAS.items() if (entry.few_rates if league == "5" else entry.rates)}
        run_matrix(dataclasses.replace(options, leagues=(league,)), entries)
    own = read_rows(options.out / "results.jsonl")
    found = {(row["task"], row["seed"], row["league"]) for row in own}
    there = [row for row in merge(options.others) if (row["task"], row["seed"], row["league"]) in found]
    for league in scores([*(row for row in there if row["method"] in _BESIDE), *own]):
        write_text(options.out / f"table{'' if league.league == '95+5' else '_5'}.md", tables(league))


def tables(league: Scores) -> str:
    """Return the ideas with their differences, and all rows by task."""
    others = [name for name in _COMPARED if name in league.methods]
    lines = [["", "exact match, %", *(f"minus {other}" for other in others)]]
    for name, found in league.summaries.items():
        differences = [_difference(league, name, other) for other in others]
        lines.append([name, "" if found is None else f"{found.mean:.1f}", *differences])
    return f"League {league.league}.\n\n{markdown(lines)}\n{table_markdown(main_tables(league)[0])}"


def _difference(league: Scores, name: str, other: str) -> str:
    found = None if name == other else league.paired(name, other)
    return "" if found is None else f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


if __name__ == "__main__":
    _script.run(main)
