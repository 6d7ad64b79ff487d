"""LoRAs of a language model that start from a fusion, and from other models: the language part of warm_starts.md.

    python experiments/warm_starts_language.py --tasks FOLDER   # 4 CPU hours; interrupted, it continues

FOLDER holds the function-vector data sets, and `python experiments/language_pool.py --tasks FOLDER --own-seeds` trains
the pool. Tasks, rows, tuning and files are those of pool_value_language.py, which also has the rows of LoRAFusion.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import pool_value_language as language
import tyro
from lab.common import ROOT, write_tables
from lab.pool_rows import Arm, Row
from lab.smollm2 import base
from lab.tuning import best_tried
from warm_starts import (
    MAGNITUDES,
    MEAN,
    SINGLE,
    SINGLE_MODULES,
    WARM,
    WARM_ROTATED,
    best_single,
)

from lorafusion_jax import Fusion, LoRA
from lorafusion_jax.runs import Setup
from lorafusion_jax.training import start
from lorafusion_jax.trials import read_lines

LORA = "LoRA, rank 8"
BARE_WARM = "from the fusion's update alone"
SLOW, SLOW_ROTATED, DORA, SLOW_MAGNITUDES = SLOWER = tuple(
    f"{arm}, a tenth of the rate"
    for arm in (WARM, WARM_ROTATED, "DoRA from the fusion", MAGNITUDES)
)
ROWS = 20
# What each arm starts from, and the share of the steps that train it. A DoRA and its fusion share a rate of magnitudes.
STARTED = {
    WARM: (language.FUSION, 0.5),
    SLOW: (language.FUSION, 0.5),
    SLOW_ROTATED: (language.ROTATED, 0.5),
    WARM_ROTATED: (language.ROTATED, 0.5),
    SINGLE: (SINGLE_MODULES, 0.0),
    MEAN: (SINGLE_MODULES, 0.0),
    SLOW_MAGNITUDES: (language.MAGNITUDES, 0.5),
    BARE_WARM: (language.FUSION, 0.5),
    DORA: (language.FUSION, 0.5),
}
ONE_SEED = (SINGLE, MEAN, SLOW_MAGNITUDES, BARE_WARM, DORA)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      pool: folder of the adapters.
      out: folder of results; cells that are there are not measured again.
    """

    tasks: Path
    pool: Path = language.Options.pool
    out: Path = ROOT / "results" / "warm_starts"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    paths, _ = language.draw(options.tasks, ROOT / "runs" / "pool_value" / "language")
    targets = [task for task in paths if task not in language.TUNING]
    seeds_of = {
        arm: language.SEEDS[:1] if arm in ONE_SEED else language.SEEDS
        for arm in (*STARTED, LORA)
    }
    keys = [
        (arm, ROWS, task, seed)
        for arm, seeds in seeds_of.items()
        for seed in seeds
        for task in targets
    ]
    language.run(StartedLab(base(), options.pool), keys, paths, options.out)
    write_tables(
        options.out, tables(read_lines(options.out / "language.jsonl")), "language_"
    )


def tables(
    rows: Sequence[Row], targets: int = language.TARGETS
) -> dict[str, list[list[str]]]:
    """Return the tables of arms and contrasts, with the rows of LoRAFusion that the value of a pool has."""
    rows = [
        *rows,
        *(
            row
            for row in read_lines(language.RESULTS / "language.jsonl")
            if row["arm"] == language.FUSION
        ),
    ]
    arms = [["arm", "seeds", "test loss", "exact match, %", "rates"]]
    contrasts = [language.CONTRAST]
    complete = {
        arm: language.complete(rows, arm, ROWS, targets)
        for arm in (language.FUSION, LORA, *STARTED)
    }
    for arm, by_seed in complete.items():
        if by_seed:
            loss = np.mean([*language.means(by_seed, "test_loss").values()])
            match = np.mean([*language.means(by_seed, "exact_match").values()])
            first_row = next(
                row for row in rows if row["arm"] == arm and row["rows"] == ROWS
            )
            rates = ", ".join(
                f"{rate} {value:g}" for rate, value in first_row["rates"].items()
            )
            arms.append([arm, str(len(by_seed)), f"{loss:.3f}", f"{match:.1f}", rates])
    for other, arm in itertools.product((language.FUSION, WARM, SLOW), complete):
        seeds = complete[arm].keys() & complete[other].keys()
        if arm != other and seeds:
            first = {seed: complete[arm][seed] for seed in seeds}
            second = {seed: complete[other][seed] for seed in seeds}
            contrasts.append(language.contrast(f"{arm} minus {other}", first, second))
    return {"arms": arms, "contrasts": contrasts}


def _started(name: str) -> Arm:
    """Return an arm, whose tuning starts at the rates that were found for its two parts."""
    tried = read_lines(language.RESULTS / "language_tune.jsonl")
    parts = [best_tried(tried, part, ROWS) for part in (STARTED[name][0], LORA)]
    rates = {
        rate: value
        for part in parts
        if part is not None
        for rate, value in part.rates.items()
    }
    if name in SLOWER:
        rates["lr_lora"] = 0.0005
    return language.ARMS[LORA]._replace(
        method="dora" if name == DORA else "lora", rates=rates
    )


class StartedLab(language.Lab):
    """The lab of the pool's value, with LoRAs that start from another arm."""

    arms = {
        **language.ARMS,
        **{name: _started(name) for name in STARTED},
        SINGLE_MODULES: Arm("coefficients", "real", {"granularity": "global"}),
    }
    tuning_seeds = {ROWS: (1,)}
    untuned = SLOWER

    def trained(
        self,
        name: str,
        setup: Setup,
        rows: int,
        seed: int,
        rates: Mapping[str, float],
    ) -> tuple[Any, int]:
        """Return the parameters of an arm, and the number of steps in all."""
        if name not in STARTED:
            return super().trained(name, setup, rows, seed, rates)
        source, share = STARTED[name]
        other = self.model(
            source, seed if self.arms[source].pool == "rotated" else 0
        ).problem
        params = (
            best_single(other, setup.rows)
            if name == SINGLE
            else start(other, (seed,)).params
        )
        steps = 0
        if share:
            params, steps = self.fitted(
                source, other, setup.rows, (rows, seed), rates, share=share
            )
        if name == BARE_WARM:
            assert isinstance(other.method, Fusion)
            other = other.replace(
                method=dataclasses.replace(other.method, magnitudes=False)
            )
            params = {"coefficients": params["coefficients"]}
        assert isinstance(setup.problem.method, LoRA)
        begin, _ = setup.problem.method.start_at(
            other, params, start(setup.problem, (seed,)).params
        )
        found, more = self.fitted(
            name,
            setup.problem,
            setup.rows,
            (rows, seed),
            rates,
            share=1 - share,
            begin=begin,
        )
        return found, steps + more


if __name__ == "__main__":
    _script.run(main)
