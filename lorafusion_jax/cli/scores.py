"""Scores of seeds as the cells of a table, which several subcommands print."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..support.text_tables import plain


def score_lines(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[str]]:
    """Return a heading, and a line for each row: its values of these names, and its scores."""
    scored = [[percent(row["exact_match"]), loss(row["loss"])] for row in rows]
    labels = [[str(row[name]) for name in names] for row in rows]
    return [[*names, "exact match %", "loss"], *map(list.__add__, labels, scored)]


def score_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each seed (see `runs.evaluate.seed_rows`), then mean and spread of several."""
    lines = score_lines(rows, "seed")
    scores = [row["exact_match"] for row in rows if row["exact_match"] is not None]
    if len(scores) > 1:
        lines.append(
            [
                "mean",
                f"{statistics.fmean(scores):.1f}",
                f"± {statistics.stdev(scores):.1f}",
            ]
        )
    return plain(lines, left=(0, 2))


def percent(value: float | None) -> str:
    """Return a percentage as text, or a dash if there were no test rows."""
    return "-" if value is None else f"{value:.1f}"


def loss(value: float | None) -> str:
    """Return a loss in nats per token as text, or a dash if no model was evaluated."""
    return "-" if value is None else f"{value:.4f}"
