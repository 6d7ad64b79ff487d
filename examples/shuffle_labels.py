"""Write a task whose rows have the answers of other rows: adapters trained on it are a control of a pool.

    python examples/shuffle_labels.py --task examples/small/tasks/pairswap_numvow/train.jsonl --out shuffled.jsonl

A pool of such adapters, trained by the recipe of the real ones, has seen the same inputs and the same set of answers.
Whatever it is worth in a fusion is not due to what the tasks taught.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lorafusion_jax.report import write_text

ANSWERS = ("completion", "target", "output", "answer")


def main(task: Path, out: Path, answer: str | None = None, seed: int = 0) -> None:
    """Write the rows with permuted answers to a new file.

    Args:
      task: JSONL file of rows.
      out: file to write; it must not exist.
      answer: column of the answers; by default completion, target, output or answer.
      seed: seed of the permutation.
    """
    if out.exists():
        raise SystemExit(
            f"{out} exists: give --out a new file, or remove this one first"
        )
    rows = [json.loads(line) for line in task.read_text().splitlines() if line.strip()]
    columns = (
        [name for name in ANSWERS if rows and name in rows[0]]
        if answer is None
        else [answer]
    )
    if len(columns) != 1 or any(columns[0] not in row for row in rows):
        there = ", ".join(rows[0]) if rows else "no rows"
        raise SystemExit(
            f"{task}: expected one column of answers in every row, got {there}: name it with --answer"
        )
    write_text(
        out,
        "".join(
            json.dumps(row) + "\n" for row in shuffle_labels(rows, columns[0], seed)
        ),
    )
    print(f"wrote {len(rows)} rows to {out}")


def shuffle_labels(
    rows: Sequence[dict[str, Any]], answer: str, seed: int | tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the rows in their order, with the answers in a random order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [
        row | {answer: rows[other][answer]}
        for row, other in zip(rows, order, strict=True)
    ]


if __name__ == "__main__":
    tyro.cli(main)
