"""Does `lorafusion crossbar explore` predict and name what simulations of every configuration would?

    python experiments/explorations.py              # the tables of the committed results
    python experiments/explorations.py --measure    # measures what is missing: some 40 CPU minutes in all

The design is experiments/explorations.md. OUT gets a line of results.jsonl for each configuration and each bound, and
of rows.jsonl for each measured value. Interrupted, the same command continues.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import _script
import numpy as np
import tyro
from lab.common import ROOT, write_tables
from scipy.stats import spearmanr

from lorafusion_jax.crossbar import (
    CrossbarConfig,
    Device,
    Exploration,
    Independent,
    save_config,
)
from lorafusion_jax.hardware import ExploreOptions, explore
from lorafusion_jax.trials import ResultRows, Row

RESULTS = ROOT / "results" / "explorations"
SMALL = ROOT / "examples" / "small"
VARY = ("cell.bits=2221,322,7", "adc.bits=5,6,7,8", "tile.rows=64,128")
CHIPS = range(3, 13)
LINES = 16 * 18
BOUNDS = ("0.03", "0.05", "0.1")  # nats
LOW = 0.1  # nats of predictions that are ranked


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement.

    Attributes:
      measure: simulate what OUT lacks; otherwise print the tables of OUT alone.
      out: folder of results; rows that are there are not measured again.
    """

    measure: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    out: Path = RESULTS


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    results = ResultRows(options.out / "results.jsonl", lambda row: row["name"])
    if options.measure:
        exploration = explored(options.out)
        results.fill(
            [*exploration.grid, *BOUNDS],
            lambda missing: measured(missing, exploration),
            lambda row: row["name"],
        )
    rows = results.rows()
    simulated = [row for row in rows if "simulated" in row]
    choices = [row for row in rows if "simulated" not in row]
    lines = {"configurations": table(simulated), "summary": summary(simulated, choices)}
    write_tables(options.out, lines)


def explored(out: Path) -> Exploration:
    """Return the comparison of the grid, whose measured values are kept in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.loads(row)["context"]
        for file in sorted(SMALL.glob("tasks/*/train.jsonl"))
        for row in file.read_text().splitlines()
    ]
    text = out / "lines.txt"
    chosen = np.random.default_rng(0).choice(lines, LINES, replace=False)
    text.write_text("\n".join(chosen))
    device = CrossbarConfig(device=Device(programming=Independent(0.02)))
    save_config(device, out / "device.yaml")
    return explore(
        ExploreOptions(
            base=str(SMALL / "base"),
            text=(text,),
            device=str(out / "device.yaml"),
            vary=VARY,
            out=out,
        )
    )


def measured(missing: Sequence[str], exploration: Exploration) -> Iterator[Row]:
    """Yield the simulated losses of each configuration, and the configuration that is named for each bound."""
    for name in missing:
        label = name
        row = {}
        if name in exploration.grid:
            excess = exploration.excess(name, CHIPS, exploration.confirming)
            row["predicted"] = exploration.predicted[name]
            row["simulated"] = excess.mean(axis=1).tolist()
        else:
            label = exploration.choose(float(name)).label
        energy = exploration.costs[label].energy.typical
        yield {"name": name, "label": label, "energy": energy} | row


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each configuration, from the least energy on."""
    lines = [["configuration", "nJ a token", "predicted", "simulated", "± over chips"]]
    for row in sorted(rows, key=lambda row: row["energy"]):
        chips = row["simulated"]
        values = (row["predicted"], np.mean(chips), np.std(chips, ddof=1))
        numbers = [f"{value:.3f}" for value in values]
        lines.append([row["name"], f"{row['energy'] * 1e9:.1f}", *numbers])
    return lines


def summary(rows: Sequence[Row], choices: Sequence[Row]) -> list[list[str]]:
    """Return how well predictions rank and agree, and how much more energy than needed each choice takes."""
    predicted = np.array([row["predicted"] for row in rows])
    means = np.array([np.mean(row["simulated"]) for row in rows])
    energies = np.array([row["energy"] for row in rows])
    low = predicted < LOW
    rank = spearmanr(predicted[low], means[low])[0]
    close = np.abs(predicted - means) <= np.maximum(means / 4, 0.01)
    lines = [
        ["what", "value"],
        [f"rank correlation of {low.sum()} predictions below {LOW}", f"{rank:.3f}"],
        ["predictions within 25 % or 0.01 nats", f"{close.sum()} of {len(rows)}"],
    ]
    for choice in choices:
        cheapest = energies[means <= float(choice["name"])].min(initial=math.inf)
        ratio = f"{choice['energy'] / cheapest:.2f}"
        lines.append([f"energy over the cheapest, {choice['name']} nats", ratio])
    return lines


if __name__ == "__main__":
    _script.run(main)
