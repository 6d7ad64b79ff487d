"""Does `lorafusion crossbar explore` predict and name what simulations of every configuration would?

    python experiments/explorations.py              # the table of the committed results
    python experiments/explorations.py --out OUT    # measures what OUT lacks: some 40 CPU minutes

The design is experiments/explorations.md. Interrupted, the same command continues.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import _script
import numpy as np
import tyro
from lab.common import ROOT, write_tables
from scipy.stats import spearmanr

from lorafusion_jax.crossbar import (
    CrossbarConfig,
    Device,
    Independent,
    save_config,
)
from lorafusion_jax.hardware import ExploreOptions, explore
from lorafusion_jax.report import write_text

RESULTS = ROOT / "results" / "explorations"
SMALL = ROOT / "examples" / "small"
VARY = ("cell.bits=2221,322,7", "adc.bits=5,6,7,8", "tile.rows=64,128")
CHIPS = range(3, 13)
LINES = 16 * 18
BOUNDS = (0.03, 0.05, 0.1)
LOW = 0.1  # nats of predictions that are ranked


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare predictions with simulations of all configurations of a grid, for the small T5.

    Attributes:
      out: folder of measured values and tables.
    """

    out: Path = RESULTS


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    rows = options.out / "rows.json"
    if not rows.exists():
        measure(options.out)
    content = json.loads(rows.read_text())
    write_tables(
        options.out,
        {"configurations": table(content), "summary": summary(content)},
    )


def measure(out: Path) -> None:
    """Simulate every configuration on ten chips, let `explore` choose for each bound, and write both."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.loads(row)["context"]
        for file in sorted(SMALL.glob("tasks/*/train.jsonl"))
        for row in file.read_text().splitlines()
    ]
    chosen = np.random.default_rng(0).choice(lines, LINES, replace=False)
    text = out / "lines.txt"
    text.write_text("\n".join(chosen))
    device = CrossbarConfig(device=Device(programming=Independent(0.02)))
    save_config(device, out / "device.yaml")
    exploration = explore(
        ExploreOptions(
            base=str(SMALL / "base"),
            text=(text,),
            device=str(out / "device.yaml"),
            vary=VARY,
            out=out,
        )
    )
    configurations = {}
    for label in exploration.grid:
        excess = exploration.excess(label, CHIPS, exploration.confirming)
        configurations[label] = {
            "predicted": exploration.predicted[label],
            "simulated": excess.mean(axis=1).tolist(),
            "energy": exploration.costs[label].energy.typical,
        }
    named = {bound: exploration.choose(bound)._asdict() for bound in BOUNDS}
    content = {"configurations": configurations, "named": named}
    write_text(out / "rows.json", json.dumps(content, indent=1) + "\n")


def table(content: dict) -> list[list[str]]:
    """Return a line for each configuration, from the least energy on."""
    lines = [["configuration", "nJ a token", "predicted", "simulated", "± over chips"]]
    rows = content["configurations"].items()
    for label, row in sorted(rows, key=lambda item: item[1]["energy"]):
        chips = np.asarray(row["simulated"])
        lines.append(
            [
                label,
                f"{row['energy'] * 1e9:.1f}",
                f"{row['predicted']:.3f}",
                f"{chips.mean():.3f}",
                f"{chips.std(ddof=1):.3f}",
            ]
        )
    return lines


def summary(content: dict) -> list[list[str]]:
    """Return the rank correlation of low predictions, and how much more energy than needed each choice costs."""
    rows = content["configurations"]
    means = {label: np.mean(row["simulated"]) for label, row in rows.items()}
    low = [label for label, row in rows.items() if row["predicted"] < LOW]
    rank = spearmanr(
        [rows[label]["predicted"] for label in low], [means[label] for label in low]
    )[0]
    lines = [["what", "value"]]
    lines.append(
        [f"rank correlation of {len(low)} predictions below {LOW} nats", f"{rank:.3f}"]
    )
    for bound, choice in content["named"].items():
        cheapest = min(
            (
                row["energy"]
                for label, row in rows.items()
                if means[label] <= float(bound)
            ),
            default=math.nan,
        )
        ratio = rows[choice["label"]]["energy"] / cheapest
        lines.append(
            [
                f"at most {bound} nats: {choice['label']}",
                f"energy {ratio:.2f} of the cheapest",
            ]
        )
    return lines


if __name__ == "__main__":
    _script.run(main)
