"""Scores of seeds as the cells of a table, which several subcommands print."""

from collections.abc import Mapping, Sequence
from typing import Any


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the heading and a line for each seed (see `runs.evaluate.seed_rows`)."""
    head = ["seed", "exact match %", "loss"]
    return [head, *([str(row["seed"]), f"{row['exact_match']:.1f}", loss(row["loss"])] for row in rows)]


def loss(value: float | None) -> str:
    """Return a loss in nats per token as text, or a dash if no model was evaluated."""
    return "-" if value is None else f"{value:.4f}"
