"""Check what the page on real language rests on: leaked test pairs, and the random pool.

    python experiments/language_checks.py --tasks FOLDER
    python experiments/language_checks.py --tasks FOLDER --rows results/language/main.jsonl --out runs/clean

Printed: the pairs of each task that something was trained on, and the updates of the pool's modules next to those of
random ones. With --rows, the report of `experiments/results_page.py` without these pairs is written to OUT.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from lab.common import ROOT
from lab.language import EVALUATED_ROWS, MOST_SHARED, TRAIN_ROWS, UNSEEN, find, pair, shares, trained_pairs
from language import LanguageOptions, make_pools, pool_of
from results_page import report

from lorafusion_jax import LoraPool, random_pool
from lorafusion_jax.parts import dense, markdown, open_pool
from lorafusion_jax.report import Row
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import merge

# Tasks of earlier rows that a source has too many pairs of.
_SEEN = ("lowercase_last_letter", "alphabetically_first_3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the checks.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      train_rows: rows that the tasks were learned from.
      rows: files of result rows.
      out: folder of the report on rows without leaked pairs.
    """

    tasks: Path
    train_rows: int = TRAIN_ROWS
    rows: tuple[Path, ...] = ()
    out: Path = ROOT / "runs" / "language_checks"


class Leaks(NamedTuple):
    """Share of a task's test pairs that the source with most was trained on, and which evaluated ones something was."""

    share: float
    source: str
    evaluated: list[bool]


def main(arguments: Sequence[str] = ()) -> None:
    """Print the checks."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    adapters = LanguageOptions.adapters
    trained = trained_pairs(sorted(path.name for path in adapters.iterdir() if path.is_dir()), options.tasks)
    names = [*(name for tasks in UNSEEN.values() for name in tasks), *_SEEN]
    found = {name: leaks(find(name, options.tasks), trained, options.train_rows) for name in names}
    head = ["task", "most of a source, %", "source", f"of the first {EVALUATED_ROWS}"]
    lines = [[name, f"{100 * of.share:.1f}", of.source, str(sum(of.evaluated))] for name, of in found.items()]
    print(f"Test pairs that are training pairs too, ignoring case\n\n{markdown([head, *lines])}")
    make_pools(adapters)
    print(updates(open_pool(pool_of(adapters)).load()))
    if options.rows:
        clean = [
            without(row, found[row["task"]].evaluated)
            for row in merge(options.rows)
            if row["task"] in found and found[row["task"]].share <= MOST_SHARED
        ]
        report(clean, options.out, "Without leaked pairs", "LoRAFusion")


def leaks(path: Path, trained: dict[str, set[tuple[str, str]]], train_rows: int) -> Leaks:
    """Return which test pairs of a task are training pairs too, its own or a source's."""
    task = load_task(path, train_rows=train_rows)
    of_sources = shares(task, trained)
    source = max(of_sources, key=lambda name: of_sources[name])
    known = set(map(pair, task.train)).union(*trained.values())
    return Leaks(of_sources[source], source, [pair(example) in known for example in task.test[:EVALUATED_ROWS]])


def without(row: Row, leaked: Sequence[bool]) -> Row:
    """Return a row without the test rows that leaked; its loss, which is of all of them, is left out too."""
    correct = "".join(mark for mark, of in zip(row["correct"], leaked, strict=True) if not of)
    clean: Row = {**row, "correct": correct, "exact_match": 100 * correct.count("1") / len(correct)}
    return {**clean, "option_correct": None, "option_accuracy": None, "loss": None if any(leaked) else row["loss"]}


def updates(pool: LoraPool) -> str:
    """Return norms and stable ranks of the modules' updates, and of random modules with the same norms of A and B."""
    lines = [["mean over modules and matrices", "trained", "random", "ratio"]]
    both = [singular_values(of) for of in (pool, random_pool(pool, jax.random.key(0)))]
    norms = [np.sqrt(np.sum(values**2, axis=-1)) for values in both]
    ranks = [norm**2 / values[..., 0] ** 2 for norm, values in zip(norms, both, strict=True)]
    for name, (trained, drawn) in (("norm of the update", norms), ("stable rank of the update", ranks)):
        cells = [np.mean(trained), np.mean(drawn), np.mean(trained / drawn)]
        lines.append([name, *(f"{cell:.2f}" for cell in cells)])
    return markdown(lines)


def singular_values(pool: LoraPool) -> np.ndarray:
    """Return those of every update [layers * modules * sites, r], from the largest on."""
    found = []
    for site in pool.A:
        A, B = (np.asarray(dense(of[site], jnp.float32)) for of in (pool.A, pool.B))
        found.append(np.linalg.svd(np.linalg.qr(A).R @ B, compute_uv=False))
    return np.concatenate([values.reshape(-1, values.shape[-1]) for values in found])


if __name__ == "__main__":
    _script.run(main)
