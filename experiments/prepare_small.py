"""Preparing before cells are written: scores of fusions of the embedded pool and of SmolLM2's, and of a CNN on digits.

    python experiments/prepare_small.py                            # tables of the committed rows
    python experiments/prepare_small.py --parts fusions digits     # measures those that are missing
    python experiments/prepare_small.py --parts language --texts FOLDER --tasks FOLDER    # SmolLM2's fusions

The design is in the additions of experiments/prepare.md. OUT gets a line of small.jsonl for each task or seed and arm,
and a table of each part. The CNN needs scikit-learn, which `make test` installs. `language` needs the texts that
experiments/lab/genres.py names, and the tasks of experiments/language.py.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from lab.common import ROOT, SMALL, options_of_small, with_interval, write_tables
from lab.genres import fitted_text
from lab.methods import ARMS
from lab.smollm2 import base
from restore import Options as Fusing, Setting, fused

from lorafusion_jax import fuse
from lorafusion_jax.crossbar import Device, flax, load_config, save_config
from lorafusion_jax.hardware import (
    EvaluateOnChipsOptions,
    PrepareOptions,
    RestoreOptions,
    evaluate_on_chips,
    prepare,
    restore_chips,
)
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import ResultRows, Row

CHIPS = {"fusions": 4, "language": 3, "digits": 10}
SEEDS = (0, 1, 2, 3, 4)
ARRAYS = ("today", "prepared")
SCALES = ", then scales"
PERFECT = "perfect cells"
TASKS = (
    "swapends_prev",
    "pairswap_numvow",
    "sort_next2",
)  # those of docs/results/chips.md
# Those of docs/results/restore.md, which no shipped adapter was trained on.
LANGUAGE = (
    "sentiment",
    "person-sport",
    "prev_item",
    "word_length",
    "country-currency",
    "english-spanish",
)
# Tasks whose prompts show which inputs matter, and train scales: 47 of each.
_PROMPTS = (
    "double_digit",
    "last3_starvow",
    "odd_dash",
    "reverse_mirror",
    "reverse_starcon",
    "rotr_next",
)
_STEPS = 400
_BATCH = 128


class Job(NamedTuple):
    """A row that is to be measured: an arm of a task or of the seed of a CNN."""

    part: str
    subject: str | int
    arm: str


PARTS = {
    **{
        part: [
            Job(part, task, arm)
            for arm in (*ARRAYS, "prepared" + SCALES)
            for task in tasks
        ]
        for part, tasks in (("fusions", TASKS), ("language", LANGUAGE))
    },
    "digits": [
        Job("digits", seed, arm) for seed in SEEDS for arm in (*ARRAYS, PERFECT)
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      parts: parts to measure; none for the tables of OUT alone.
      texts: folder of the texts, for `language`.
      tasks: folder of the function-vector data sets, for `language`.
      runs: folder of fusions, preparations and scales.
      out: folder of results; rows that are there are not measured again.
    """

    parts: tuple[str, ...] = ()
    texts: Path | None = None
    tasks: Path | None = None
    runs: Path = ROOT / "runs" / "prepare_small"
    out: Path = ROOT / "results" / "prepare"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if unknown := set(options.parts) - PARTS.keys():
        raise ValueError(
            f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}"
        )
    cells = ResultRows(options.out / "small.jsonl", job_of)
    wanted = [job for part in options.parts for job in PARTS[part]]
    cells.fill(
        wanted,
        lambda missing: map(Bench(options).row, missing),
        lambda row: str(job_of(row)),
    )
    if rows := cells.rows():
        write_tables(options.out, tables(rows))


def job_of(row: Row) -> Job:
    """Return what a row was measured of."""
    return Job(row["part"], row["subject"], row["arm"])


class CNN(nnx.Module):
    """Two convolutions and two linear layers for images of 8 x 8."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(512, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Bench:
    """What rows share: fusions, preparations and scales in a folder, and the last CNN."""

    def __init__(self, options: Options):
        self.options = options
        self.seed = None

    def row(self, job: Job) -> Row:
        """Return the row of a job: scores of the digital model and of each chip."""
        digital, chips = self.cnn(job) if job.part == "digits" else self.fusion(job)
        return {**job._asdict(), "digital": digital, "chips": chips}

    def fusion(self, job: Job) -> tuple[Row, list[Row]]:
        """Return exact match and loss of a task's fusion."""
        task = str(job.subject)
        numbers = range(CHIPS[job.part])
        options = self.options
        runs = self.options.runs
        if job.part == "language":
            if options.texts is None or options.tasks is None:
                raise ValueError(
                    "`language` needs --texts and --tasks: give the folders of the texts and of the tasks"
                )
            runs = runs / "language"
            model = base()
            text = fitted_text(options.texts)
            runs.mkdir(parents=True, exist_ok=True)
            save_config(Setting().config(), crossbar := runs / "chip.yaml")
            fused(Fusing(tasks=options.tasks, runs=runs), [task])
        else:
            model = SMALL / "base"
            crossbar = SMALL.parent / "chip.yaml"
            text = _prompts()
            if not (runs / task).exists():
                fuse(
                    options_of_small(
                        task, ARMS["LoRAFusion"], seeds=(1,), out=runs, name=task
                    )
                )
        results = json.loads((runs / task / "results.json").read_text())
        digital = results.seeds[0]
        (prompts := runs / "prompts.txt").write_text(text)
        prepared = runs / "prepared"
        scales = runs / "scales-prepared"
        if job.arm != "today":
            if not prepared.exists():
                prepare(
                    PrepareOptions(
                        base=str(model),
                        text=(prompts,),
                        crossbar=str(crossbar),
                        out=prepared,
                    )
                )
            crossbar = prepared
        restored = None
        if job.arm.endswith(SCALES):
            how = RestoreOptions(
                base=str(model),
                text=(prompts,),
                crossbar=str(crossbar),
                chip=(*numbers,),
                out=scales,
            )
            training = {"epochs": 1} if job.part == "language" else {"rate": 0.01}
            restore_chips(dataclasses.replace(how, **training))
            restored = str(scales)
        on_chips = EvaluateOnChipsOptions(
            run=runs / task,
            crossbar=str(crossbar),
            chips=len(numbers),
            restore=restored,
        )
        scored = evaluate_on_chips(on_chips)["rows"]
        return _scores(digital), [_scores(row) for row in scored]

    def cnn(self, job: Job) -> tuple[Row, list[Row]]:
        """Return the accuracy of a CNN."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = map(np.asarray, load_digits(return_X_y=True))
        images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
        train, test, labels, answers = map(
            np.asarray, train_test_split(images, labels, random_state=0)
        )
        if self.seed != job.subject:
            self.seed = job.subject
            self.model = trained(train, labels, int(job.subject))
        config = load_config("neurram")
        changed = (
            {"factors": True, "transform": "hadamard", "clip": "optimal"}
            if job.arm == "prepared"
            else {}
        )
        mapping = dataclasses.replace(config.mapping, scale="column", **changed)
        device = Device() if job.arm == PERFECT else config.device
        rules = {"*": dataclasses.replace(config, mapping=mapping, device=device)}
        few = [jnp.asarray(train[:_BATCH])]
        preparations = flax.prepare(self.model, rules, few)
        predicted = nnx.jit(lambda model, x: model(x).argmax(axis=1))

        def accuracy(model: CNN) -> Row:
            return {
                "accuracy": 100
                * float(np.mean(np.asarray(predicted(model, test)) == answers))
            }

        keys = [
            jax.random.fold_in(jax.random.key(int(job.subject)), chip)
            for chip in range(CHIPS["digits"])
        ]
        keys = keys[:1] if job.arm == PERFECT else keys
        on_chips = (
            flax.calibrate(flax.convert(self.model, rules, key, preparations), few)
            for key in keys
        )
        return accuracy(self.model), [accuracy(model) for model in on_chips]


def trained(images: np.ndarray, labels: np.ndarray, seed: int) -> CNN:
    """Return a CNN that is trained digitally."""
    model = CNN(nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: CNN, optimizer: Any, x: Any, y: Any) -> None:
        def loss(model: CNN) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(_STEPS):
        drawn = generator.integers(0, len(images), _BATCH)
        step(model, optimizer, images[drawn], labels[drawn])
    return model


def _prompts() -> str:
    """Return prompts of training rows, without their answers."""
    rows = (load_task(SMALL / "tasks" / task).train[:47] for task in _PROMPTS)
    return "".join(f"{example.input}\n" for of_task in rows for example in of_task)


def _scores(row: Row) -> Row:
    return {name: row[name] for name in ("exact_match", "loss")}


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return a table of each part; means over chips, and over tasks or seeds."""
    found: dict[str, list[list[str]]] = {}
    for part in PARTS:
        of_part = [row for row in rows if row["part"] == part]
        for score in of_part[0]["digital"] if of_part else ():
            today = statistics.fmean(_lost(of_part, "today", score))
            digital = statistics.fmean(row["digital"][score] for row in of_part)
            for arm in dict.fromkeys(row["arm"] for row in of_part):
                lost = _lost(of_part, arm, score)
                mean = statistics.fmean(lost)
                numbers = [
                    f"{digital - mean:.3f}",
                    *with_interval(lost, 3),
                    f"{100 * (1 - mean / today):.0f}",
                ]
                found.setdefault(part, [_HEAD]).append(
                    [arm, score, str(len(lost)), f"{digital:.3f}", *numbers]
                )
    return found


_HEAD = [
    "arm",
    "score",
    "tasks or seeds",
    "digital",
    "on chips",
    "lost",
    "interval",
    "of today's loss that is back, %",
]


def _lost(rows: Sequence[Row], arm: str, score: str) -> list[float]:
    """Return what each task or seed loses on chips, on average; of losses, minus what they gain."""
    of_arm = [row for row in rows if row["arm"] == arm]
    return [
        row["digital"][score] - statistics.fmean(chip[score] for chip in row["chips"])
        for row in of_arm
    ]


if __name__ == "__main__":
    _script.run(main)
