"""Restoring SmolLM2 on simulated arrays: the loss that digital corrections take away, by kind, number and text.

    python experiments/restore.py --plan               # rows that are missing, and their time
    python experiments/restore.py                      # the main rows: error 3 %, chips 1 to 5, all kinds
    python experiments/restore.py --rows text chips    # calibration text; other chips
    python experiments/restore.py --rows tune          # rates, on chip 0 and on calibration text alone

The design is experiments/restore.md. Written to OUT: a line of rows.jsonl for each row, main.csv, text.csv, chips.csv,
tune.csv and restore.png. Interrupted, the same command continues with the next row.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import _script
import jax
import numpy as np
import tyro
from lab.common import ROOT, append_line, read_lines, write_csv
from lab.smollm2 import EXAMPLES, base

from lorafusion_jax import FuseOptions
from lorafusion_jax.crossbar import (
    PCM_DRIFT,
    Correction,
    CrossbarConfig,
    Independent,
    ReadNoise,
    calibrate_tree,
    chips_in,
    config_hash,
    load_config,
    with_corrections,
)
from lorafusion_jax.hardware.program import program
from lorafusion_jax.hardware.restore import Restoring, distil, divergence, restore
from lorafusion_jax.hardware.restored import digital_matrices, logits_of_base, sampled, windows
from lorafusion_jax.report.plots import colour, plot
from lorafusion_jax.report.statistics import over_tasks
from lorafusion_jax.runs.prepare import LoadedModel, load_model
from lorafusion_jax.runs.run import environment
from lorafusion_jax.tasks import Batch
from lorafusion_jax.text_tables import markdown
from lorafusion_jax.training.loss import log_likelihood

WINDOW, HELD_OUT, CALIBRATION, ADC_CALIBRATION = 128, 1024, 3072, 256
# Adam's rates, chosen on chip 0 and on calibration text alone (docs/results/restore/tune.csv).
RATE, RATE_LOW_RANK, RATE_LORA = 1e-2, 1e-3, 3e-3
EPOCHS = 5
# CPU seconds of a row, by its training: closed form or distilled.
COST = {"none": 20, "closed": 150, "distilled": 500}

Row = dict[str, Any]
Part = Literal["main", "text", "chips", "tune"]
Kind = Literal["real", "sampled"]


class Arm(NamedTuple):
    """Kind of the corrections: method, digital numbers as a share of the weights in arrays, and epochs."""

    method: Literal["none", "scales", "offsets", "low-rank", "lora"]
    share: float | None = None
    epochs: int = 0
    rate: float = RATE
    rate_low_rank: float = RATE_LOW_RANK

    def __str__(self) -> str:
        named = {"offsets": "scales and biases", "low-rank": "scales and low rank", "lora": "low rank"}
        of_share = "" if self.share is None else f" {100 * self.share:g} %"
        how = "" if self.method == "none" else ", distilled" if self.epochs else ", closed form"
        return f"{named.get(self.method, self.method)}{of_share}{how}"


class Setting(NamedTuple):
    """What the model is on: programming error, bits of the ADC, read noise, age, compensation."""

    error: float = 0.03
    bits: int | None = None
    read_noise: float = 0.0
    drift: float | None = None
    compensate: bool = False

    def config(self) -> CrossbarConfig:
        config = load_config(EXAMPLES / "chip.yaml")
        assert config.adc is not None
        adc = None if self.bits is None else dataclasses.replace(config.adc, bits=self.bits)
        device = dataclasses.replace(
            config.device,
            programming=Independent(self.error) if self.error else None,
            read_noise=ReadNoise(self.read_noise) if self.read_noise else None,
            drift=None if self.drift is None else PCM_DRIFT,
            time=self.drift,
            compensate=self.compensate,
        )
        return dataclasses.replace(config, adc=adc, device=device)


class Job(NamedTuple):
    """A row that is to be measured."""

    part: Part
    setting: Setting
    chip: int
    arm: Arm
    text: Kind = "real"
    tokens: int = CALIBRATION


SHARES = (0.005, 0.01, 0.05)
NONE = Arm("none")
# Each closed form comes before the distillation that starts from it.
MAIN = (
    NONE,
    Arm("offsets"),
    Arm("scales"),
    Arm("scales", epochs=EPOCHS),
    *(Arm("low-rank", share, epochs) for share in SHARES for epochs in (0, EPOCHS)),
    *(Arm("lora", share, EPOCHS, RATE, RATE_LORA) for share in SHARES),
)
TUNED = (
    *(Arm("scales", None, EPOCHS, rate) for rate in (RATE, 3e-2)),
    *(Arm("low-rank", 0.01, EPOCHS, RATE, rate) for rate in (RATE_LOW_RANK, 3e-3)),
    *(Arm("lora", 0.01, EPOCHS, RATE, rate) for rate in (1e-3, RATE_LORA)),
)
LEFT_OUT = 3  # windows of the calibration text that rates are compared on
# The two best arms of the main rows, and the best closed form.
BEST, SECOND, BEST_CLOSED = Arm("low-rank", 0.05, EPOCHS), Arm("low-rank", 0.01, EPOCHS), Arm("low-rank", 0.05)
_MONTH, _YEAR = 30 * 86_400.0, 365 * 86_400.0
OTHER_CHIPS = (
    Setting(error=0.01),
    Setting(error=0.05),
    Setting(error=0.0, bits=5),
    Setting(error=0.0, bits=6),
    Setting(error=0.03, bits=6),
    Setting(error=0.0, read_noise=0.01),
    *(Setting(0.0, None, 0.0, age, on) for age in (_MONTH, _YEAR, 10 * _YEAR) for on in (False, True)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      rows: parts to measure.
      chips: numbers of the chips of the main rows.
      out: folder of results; rows that are there are not measured again.
      plan: print what is missing and its time, and measure nothing.
    """

    rows: tuple[Part, ...] = ("main",)
    chips: tuple[int, ...] = (1, 2, 3, 4, 5)
    out: Path = ROOT / "docs" / "results" / "restore"
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


class Texts(NamedTuple):
    """Held-out text, real text to calibrate on, and a sample of the digital model, as tokens."""

    held_out: list[Batch]
    real: list[int]
    adc: list[int]


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    file = options.out / "rows.jsonl"
    rows = read_lines(file)
    have = {job_of(row) for row in rows}
    missing = [job for job in jobs(options) if job not in have]
    if options.plan:
        for job in missing:
            print(f"{job.part:5} chip {job.chip}  {job.setting} {job.arm}, {job.tokens} {job.text} tokens")
        kinds = ["none" if j.arm == NONE else "distilled" if j.arm.epochs else "closed" for j in missing]
        print(f"{len(missing)} rows: {sum(COST[kind] for kind in kinds) / 60:.0f} CPU minutes")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(measured(missing), start=1):
        rows.append(row | environment())
        append_line(file, rows[-1])
        above = row["loss"] - row["digital"]
        print(
            f"[{number}/{len(missing)}] {job_of(row).arm}: {above:.4f} nats above digital", file=sys.stderr, flush=True
        )
    for part, lines in tables(rows).items():
        write_csv(options.out / f"{part}.csv", lines)
        print(markdown(lines))
    if main_rows := [row for row in rows if row["part"] == "main"]:
        draw(main_rows, options.out / "restore.png")


def jobs(options: Options) -> Iterator[Job]:
    """Yield the rows of the design, one chip after the other."""
    if "tune" in options.rows:
        yield from (Job("tune", Setting(), 0, arm) for arm in TUNED)
    if "main" in options.rows:
        for chip in options.chips:
            yield from (Job("main", Setting(), chip, arm) for arm in MAIN)
    if "text" in options.rows:
        of_text: dict[Kind, tuple[int, ...]] = {"real": (128, 512, 2048), "sampled": (512, 2048, 8192)}
        for text, sizes in of_text.items():
            yield from (Job("text", Setting(), 1, arm, text, size) for arm in (BEST, SECOND) for size in sizes)
    if "chips" in options.rows:
        for setting in OTHER_CHIPS:
            yield from (Job("chips", setting, 1, arm) for arm in (NONE, BEST_CLOSED, SECOND))


def job_of(row: Row) -> Job:
    """Return what a row was measured of."""
    arm, setting = Arm(**row["arm"]), Setting(**row["setting"])
    return Job(row["part"], setting, row["chip"], arm, row["text"], row["calibration_tokens"])


def measured(missing: Sequence[Job]) -> Iterator[Row]:
    """Yield a row for each job."""
    if not missing:
        return
    loaded = load_model(FuseOptions(base=str(base()), task="", method="zero-shot"))
    graph, frozen = loaded.problem.graph, loaded.problem.frozen
    run = logits_of_base(graph)
    texts = read_texts(loaded)
    digital_logits = jax.jit(run)

    @jax.jit
    def losses(weights: Any, batch: Batch) -> Any:
        return -log_likelihood(run(weights, batch), batch.labels)

    @jax.jit
    def divergences(weights: Any, batch: Batch, target: Any) -> Any:
        return divergence(run(weights, batch), target)

    def held_out_loss(weights: Any) -> list[float]:
        return [float(losses(weights, batch)[0]) / (WINDOW - 1) for batch in texts.held_out]

    digital = held_out_loss(frozen.base)
    programmed, at = frozen.base, None
    starts: dict[Any, dict[str, Correction]] = {}
    for job in missing:
        began = time.process_time()
        if (job.setting, job.chip) != at:
            programmed = frozen.base  # so that the last chip is freed before the next one takes its place
            config = job.setting.config()
            key = jax.random.fold_in(jax.random.key(0), job.chip)
            programmed = program(graph, frozen, {"*": config}, key).base
            programmed = calibrate_tree(run, programmed, windows(texts.adc, WINDOW))
            at, starts = (job.setting, job.chip), {}
        weights: Any = programmed
        held, numbers = digital_matrices(loaded, weights), 0
        batches: list[Batch] = []
        tuned: Row = {}
        if job.arm != NONE:
            ids = texts.real if job.text == "real" else sampled(loaded, job.tokens, seed=job.chip)
            if len(ids) < job.tokens:
                raise ValueError(f"the text has {len(ids)} tokens, fewer than {job.tokens}")
            batches = windows(ids[: job.tokens], WINDOW)
            targets = [digital_logits(frozen.base, batch) for batch in batches]
            pairs = list(zip(batches, targets, strict=True))
            if job.part == "tune":
                batches, targets = batches[:-LEFT_OUT], targets[:-LEFT_OUT]
            arm = how(job.arm, held)
            # The closed form is the start of the distillation, and is fitted once for both.
            start = (job.text, job.tokens, job.arm._replace(epochs=0, rate=RATE, rate_low_rank=RATE_LOW_RANK))
            if job.arm.method != "lora" and start not in starts:
                starts = {start: restore(run, weights, held, batches, targets, dataclasses.replace(arm, epochs=0))}
            if job.arm.method == "lora":
                corrections = restore(run, weights, held, batches, targets, arm)
            elif job.arm.epochs:
                corrections = distil(run, weights, starts[start], batches, targets, arm)
            else:
                corrections = starts[start]
            numbers = sum(correction.numbers() for correction in corrections.values())
            weights = with_corrections(weights, corrections)
            if job.part == "tune":
                of_parts = {"trained": pairs[:LEFT_OUT], "left_out": pairs[-LEFT_OUT:]}
                for name, of_part in of_parts.items():
                    found_there = [float(divergences(weights, batch, target)) for batch, target in of_part]
                    tuned[name] = float(np.mean(found_there))
            del targets, pairs
        found = held_out_loss(weights)
        yield {
            "part": job.part,
            "setting": job.setting._asdict(),
            "chip": job.chip,
            "arm": job.arm._asdict(),
            "text": job.text,
            "calibration_tokens": job.tokens,
            "numbers": numbers,
            "share": numbers / sum(matrix.size for matrix in held),
            "loss": float(np.mean(found)),
            "digital": float(np.mean(digital)),
            **tuned,
            "window_losses": found,
            "digital_window_losses": digital,
            "config_sha256": config_hash(job.setting.config()),
            "paths": sorted({chip.plan.path for chip in chips_in(weights)}),
            "cpu_seconds": time.process_time() - began,
        }


def how(arm: Arm, held: Sequence[Any]) -> Restoring:
    """Return the training of an arm; scales count towards the numbers of its share."""
    numbers = 0
    if arm.share is not None:
        scales = sum(matrix.size // matrix.shape[-2] for matrix in held)
        numbers = int(arm.share * sum(matrix.size for matrix in held)) - (scales if arm.method == "low-rank" else 0)
    assert arm.method != "none"
    of_arm = {"rate": arm.rate, "rate_low_rank": arm.rate_low_rank}
    return dataclasses.replace(Restoring(method=arm.method, numbers=numbers, epochs=arm.epochs), **of_arm)


def read_texts(loaded: LoadedModel) -> Texts:
    """Return the shipped text: its first tokens are held out, the others are for calibration."""
    files = {file.name: file.read_text() for file in sorted((EXAMPLES / "text").glob("*.txt"))}
    last = files.pop("calibration.txt")
    ids = loaded.tokenizer("\n".join(files.values()), add_special_tokens=False)["input_ids"]
    more = loaded.tokenizer("\n" + last, add_special_tokens=False)["input_ids"]
    return Texts(windows(ids[:HELD_OUT], WINDOW), ids[HELD_OUT:] + more, more[:ADC_CALIBRATION])


def tables(rows: Sequence[Row]) -> dict[Part, list[list[str]]]:
    """Return the tables of the rows by part; losses are in nats per token above the digital model's."""
    of_part = {part: [row for row in rows if row["part"] == part] for part in ("main", "text", "chips")}
    found: dict[Part, list[list[str]]] = {}
    if main_rows := of_part["main"]:
        lines = [["corrections", "numbers", "% of the weights", "chips", "nats above digital", "95 % interval"]]
        for arm in dict.fromkeys(job_of(row).arm for row in main_rows):
            own = [row for row in main_rows if job_of(row).arm == arm]
            above = [row["loss"] - row["digital"] for row in own]
            ends = over_tasks(above)
            numbers, share = (float(np.mean([row[name] for row in own])) for name in ("numbers", "share"))
            between = "-" if ends is None else f"{ends.low:.3f} to {ends.high:.3f}"
            of_arm = [f"{numbers:,.0f}", f"{100 * share:.2f}", str(len(own)), f"{np.mean(above):.3f}", between]
            lines.append([str(arm), *of_arm])
        found["main"] = lines
    for part in ("text", "chips"):
        lines = [["setting", "corrections", "text", "tokens", "nats above digital"]]
        for row in of_part[part]:
            job = job_of(row)
            setting = ", ".join(f"{name} {value:g}" for name, value in job.setting._asdict().items() if value)
            lines.append([setting, str(job.arm), job.text, str(job.tokens), f"{row['loss'] - row['digital']:.3f}"])
        if of_part[part]:
            found[part] = lines
    lines = [["corrections", "rate", "rate of low rank", "KL on trained text", "KL on text left out"]]
    for row in rows:
        if row["part"] == "tune":
            arm = job_of(row).arm
            rates = f"{arm.rate:g}", "-" if arm.share is None else f"{arm.rate_low_rank:g}"
            lines.append([str(arm), *rates, f"{row['trained']:.3f}", f"{row['left_out']:.3f}"])
    if len(lines) > 1:
        found["tune"] = lines
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss above digital against the digital numbers, a line for each kind of corrections."""
    kinds: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        arm = job_of(row).arm
        if arm != NONE:
            name = str(arm._replace(share=None))
            kinds.setdefault(name, {}).setdefault(row["share"], []).append(row["loss"] - row["digital"])
    none = np.mean([row["loss"] - row["digital"] for row in rows if job_of(row).arm == NONE])

    def on(figure: Any) -> None:
        panel = figure.subplots()
        for number, (name, of_share) in enumerate(kinds.items()):
            shares = sorted(of_share)
            heights = [np.mean(of_share[share]) for share in shares]
            panel.plot([100 * share for share in shares], heights, "o-", color=colour(number + 1), label=name)
        panel.axhline(none, linestyle=":", color="black", label="none")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.minorticks_off()
        panel.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        panel.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        panel.set_xlabel("digital numbers, % of the weights in arrays")
        panel.set_ylabel("loss above the digital model, nats per token")
        panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))

    plot(path, (8.0, 4.0), on)


if __name__ == "__main__":
    _script.run(main)
