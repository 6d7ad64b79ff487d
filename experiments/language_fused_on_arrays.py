"""Fused tasks of SmolLM2 on simulated arrays: trained digitally, on the very chip, or on another chip of its kind.

    python experiments/language_fused_on_arrays.py --tasks FOLDER --errors 0 0.01 0.03
    python experiments/language_fused_on_arrays.py --tasks FOLDER --bits 8 6 5 --errors 0       # ADCs, perfect cells
    python experiments/language_fused_on_arrays.py --tasks FOLDER --errors 0.03 \\
        --trained digitally "on another chip" "on the chip"

LoRAFusion of all 24 adapters, as in `experiments/language.py`. The seven projections of every layer and all modules are
written onto one chip of examples/smollm2/chip.yaml, whose ADC ranges are calibrated on training rows. Written to the
folder: table.csv and rows.csv of what was asked for, every row and the runs; interrupted, the same command continues.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import _script
import jax
import tyro
from lab.common import ROOT, slug, write_csv
from lab.hardware import Row, Store, as_lines
from lab.language import MAIN, options_of
from lab.smollm2 import EXAMPLES
from language import link_tasks, linked_base, make_pools, pool_of, unseen_tasks
from language_on_arrays import DIGITAL, Bits, Setting, config_of

from lorafusion_jax import fuse
from lorafusion_jax.crossbar import save_config
from lorafusion_jax.parts import (
    EvaluateOnChipsOptions,
    OnArrays,
    evaluate_on_chips,
    markdown,
)

ADAPTERS = EXAMPLES / "adapters"
Case = Literal["digitally", "on another chip", "on the chip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      unseen: names of the tasks to fuse for.
      bits: of the ADC; `ideal` converts exactly.
      errors: standard deviations of the programming error, as shares of Gmax.
      trained: where fusions are trained, in as many steps; another chip is the control of `on the chip`.
      seeds: of the fusions, in one program.
      test_rows: evaluate on the first rows of the test set only.
      calibration_rows: training rows that the ADCs are calibrated on, for numbers that are trained digitally; a run
        that trains on the chip takes 64.
      out: folder of results; what has rows there is not run again.
    """

    tasks: Path
    unseen: tuple[str, ...] = ("sentiment", "person-sport")
    bits: tuple[Bits, ...] = ("ideal",)
    errors: tuple[float, ...] = (0.0, 0.01, 0.03, 0.05, 0.1)
    trained: tuple[Case, ...] = ("digitally",)
    seeds: tuple[int, ...] = (1, 2, 3)
    test_rows: int = 100
    calibration_rows: int = 16
    out: Path = ROOT / "runs" / "language_fused_on_arrays"


def main(arguments: Sequence[str] = ()) -> None:
    """Run what is missing, and write the table of what was asked for."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    settings = [
        Setting(bits, error) for bits in options.bits for error in options.errors
    ]
    paths = unseen_tasks(options.unseen, link_tasks(options.tasks), ADAPTERS)
    make_pools(ADAPTERS)
    store = Store(
        options.out,
        {
            name: getattr(options, name)
            for name in ("seeds", "test_rows", "calibration_rows")
        },
    )
    asked: list[tuple[Setting, Case]] = [
        (DIGITAL, "digitally"),
        *itertools.product(settings, options.trained),
    ]
    rows = []
    for task, path in paths.items():
        for setting, case in asked:
            name = f"{task}-{name_of(setting)}-{slug(case)}"
            found = store.rows(
                name, partial(scores, task, path, setting, case, options)
            )
            rows += [
                {
                    "task": task,
                    "bits": setting.bits,
                    "error": setting.error,
                    "trained": case,
                    **r,
                }
                for r in found
            ]
            jax.clear_caches()  # other settings are other programs
    lines = table(rows, asked, options)
    write_csv(options.out / "table.csv", lines)
    write_csv(options.out / "rows.csv", as_lines(rows))
    print(f"{markdown(lines)}\nwritten to {options.out}")


def name_of(setting: Setting) -> str:
    """Return a setting as a part of names."""
    return "digital" if setting.error is None else f"{setting.bits}-{setting.error:g}"


def scores(
    task: str, path: Path, setting: Setting, case: Case, options: Options
) -> list[Row]:
    """Return the seed, exact match (percent) and loss of each seed."""
    digital = options_of(
        MAIN["LoRAFusion"],
        path,
        base=linked_base(),
        pool=pool_of(ADAPTERS),
        seeds=options.seeds,
        out=options.out / "runs",
        name=task,
    )
    rows: dict[str, Any] = {
        "test_rows": options.test_rows,
        "eval_batch": options.test_rows,
    }
    trained = dataclasses.replace(digital, **rows)
    if setting == DIGITAL:
        found = fuse(trained)["seeds"]
    else:
        crossbar = str(_config_file(setting, options))
        calibration = options.calibration_rows
        if case != "digitally":
            other = (
                case == "on another chip"
            )  # rows are of chip 0; results of a run on chip 1 are not read
            arrays = OnArrays(crossbar=crossbar, train_chip="chip", chip=int(other))
            name = f"{task}-{name_of(setting)}{'-other' if other else ''}"
            trained = dataclasses.replace(
                trained,
                name=name,
                arrays=arrays,
                test_rows=1 if other else options.test_rows,
            )
        results = fuse(trained)
        if case == "on the chip":
            found = results["seeds"]
        else:
            run = options.out / "runs" / str(trained.name)
            on_chips = EvaluateOnChipsOptions(
                run=run, crossbar=crossbar, calibration_rows=calibration, **rows
            )
            found = evaluate_on_chips(on_chips)["rows"]
    return [
        {name: row[name] for name in ("seed", "exact_match", "loss")} for row in found
    ]


def table(
    rows: Sequence[Row], asked: Sequence[tuple[Setting, Case]], options: Options
) -> list[list[str]]:
    """Return exact match in percent by setting and task: the mean over seeds, and every seed's."""
    lines = [
        ["ADC", "programming error, % of Gmax", "trained", *options.unseen, "mean"]
    ]
    for setting, case in asked:
        cells = []
        means = []
        for task in options.unseen:
            here = [
                r
                for r in rows
                if (r["task"], r["bits"], r["error"], r["trained"])
                == (task, *setting, case)
            ]
            of_seeds = [row["exact_match"] for row in here]
            means.append(statistics.fmean(of_seeds))
            cells.append(
                f"{means[-1]:.1f} ({', '.join(f'{match:.1f}' for match in of_seeds)})"
            )
        where = ["none: digital", "-"]
        if setting.error is not None:
            where = [
                "ideal" if setting.bits == "ideal" else f"{setting.bits} bits",
                f"{100 * setting.error:g}",
            ]
        lines.append([*where, case, *cells, f"{statistics.fmean(means):.1f}"])
    return lines


def _config_file(setting: Setting, options: Options) -> Path:
    file = options.out / "configs" / f"{name_of(setting)}.yaml"
    save_config(config_of(setting), file)
    return file


if __name__ == "__main__":
    _script.run(main)
