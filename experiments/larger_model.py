"""Do larger language models learn tasks of BIG-Bench Hard? The pilots of larger_model.md.

    python experiments/larger_model.py                                             # the tables of the rows in OUT
    python experiments/larger_model.py --model 0.5B --base FILE --bbh FOLDER       # measures what is missing
    python experiments/larger_model.py --model 1.5B --base FILE --bbh FOLDER       # five tasks, after 0.5B

FOLDER holds BIG-Bench Hard's JSON files. Each result is a line of OUT/pilot.jsonl, or of OUT/pilot_1.5B.jsonl;
interrupted, the same command continues with the next one.
"""

import dataclasses
import functools
import hashlib
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import _script
import numpy as np
import tyro
from lab.common import ROOT, write_tables
from lab.tasks import prompt_overlap

from lorafusion_jax import LoadOptions, LoRARecipe, TrainState
from lorafusion_jax.loading import LoadedModel, Texts, load_model, packing_of
from lorafusion_jax.runs import encode_shown, environment, score_rows
from lorafusion_jax.tasks import (
    Encoded,
    Example,
    Split,
    Task,
    TrainingRows,
    answer_options,
    constant_answer,
    encode,
    few_shot,
    load_task,
    split,
    write_lorahub_split,
)
from lorafusion_jax.training import (
    LOSS,
    Epoch,
    Params,
    fit,
    make_room,
    start,
)
from lorafusion_jax.trials import ResultRows, Row, read_lines

TUNING = ("boolean_expressions", "object_counting", "hyperbaton")
# In the order in which they are measured, mostly the shortest rows first.
TASKS = (
    *TUNING,
    "sports_understanding",
    "word_sorting",
    "dyck_languages",
    "navigate",
    "tracking_shuffled_objects_three_objects",
    "logical_deduction_three_objects",
)
RATES = (0.0003, 0.001)
FIVE = TASKS[:5]  # of the 1.5B model
SHOTS = 3
EVALUATED = 25  # rows in a batch of the test
ANSWERS = "answers of the training rows"
EXAMPLES = f"{SHOTS} examples in the prompt"
LORA = "LoRA"
SHUFFLED = "LoRA, shuffled labels"
_MODELS = (EXAMPLES, SHUFFLED, LORA)
# Linear maps of Qwen's and Llama's blocks.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALLER = {
    "SmolLM2-135M-Instruct": ROOT / "results" / "bbh_leave_one_out",
    "Gemma-3-270M": ROOT / "results" / "bbh_leave_one_out" / "gemma",
}
SMALLER_RATE = 0.001


class Cell(NamedTuple):
    """What a row is of; a control that is not trained has the rate 0."""

    task: str
    arm: str
    rate: float
    seed: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      model: the larger model whose file is given.
      base: the file, to measure what is missing.
      bbh: folder of BIG-Bench Hard's JSON files.
      dtype: dtype of weights and activations of the pilot.
      out: folder of results; rows that it has are not measured again.
    """

    model: Literal["0.5B", "1.5B"] = "0.5B"
    base: Path | None = None
    bbh: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    out: Path = ROOT / "results" / "larger_model"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing if there is a base, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    file = options.out / "pilot.jsonl"
    file_of_five = options.out / "pilot_1.5B.jsonl"
    if options.base is not None:
        if options.bbh is None:
            raise ValueError("give the folder of BIG-Bench Hard's JSON files: --bbh")
        lab = Lab(options.base, load_tasks(options.bbh))
        if options.model == "0.5B":
            results = ResultRows(file, cell_of, lab.settings)
            lab.fill(results, tuning_cells(options.dtype))
            rate = best_rate(results.rows())
            assert rate is not None
            lab.fill(results, pilot_cells(options.dtype, rate))
        else:
            rate = best_rate(read_lines(file))
            if rate is None:
                raise ValueError(
                    f"{file} has no rate yet: measure --model 0.5B first, which chooses it"
                )
            results = ResultRows(file_of_five, cell_of, lab.settings)
            lab.fill(results, cells_of_five(options.dtype, rate))
    rows = read_lines(file)
    rate = best_rate(rows)
    by_task = by_task_and_arm(rows, rate)
    by_task_of_five = by_task_and_arm(read_lines(file_of_five), rate)
    tables = {
        "pilot": table(by_task),
        "pilot_1.5B": table(by_task_of_five),
        "learned": both_rules(by_task, by_task_of_five),
    }
    write_tables(options.out, tables)


def load_tasks(bbh: Path) -> dict[str, Task]:
    """Return LoraHub's split of the tasks, without test rows whose prompts are also training rows."""
    tasks = {}
    for folder in write_lorahub_split(bbh, ROOT / "runs" / "data_bbh", TASKS):
        task = load_task(folder)
        dropped = prompt_overlap(task)
        test = [row for number, row in enumerate(task.test) if number not in dropped]
        tasks[task.name] = dataclasses.replace(task, test=tuple(test))
    return tasks


def tuning_cells(dtype: str) -> list[Cell]:
    """Return the controls without a model, and the trainings at all rates."""
    answers = [_cell(task, ANSWERS, 0.0, dtype) for task in TASKS]
    trained = [_cell(task, LORA, rate, dtype) for task in TUNING for rate in RATES]
    return answers + trained


def pilot_cells(dtype: str, rate: float) -> list[Cell]:
    """Return the cells after the choice of the rate, in the order of the design."""
    cells = []
    for task in TASKS:
        cells.append(_cell(task, LORA, rate, dtype))
        cells.append(_cell(task, EXAMPLES, 0.0, dtype))
    return cells + [_cell(task, SHUFFLED, rate, dtype) for task in TASKS]


def cells_of_five(dtype: str, rate: float) -> list[Cell]:
    """Return the cells of the 1.5B model: five tasks, at the rate of the 0.5B model."""
    arms = {ANSWERS: 0.0, LORA: rate, EXAMPLES: 0.0}
    return [_cell(task, arm, arms[arm], dtype) for task in FIVE for arm in arms]


def _cell(task: str, arm: str, rate: float, dtype: str) -> Cell:
    return Cell(task, arm, rate, zlib.crc32(task.encode()), dtype)


def cell_of(row: Row) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


class Lab:
    """The base model and the tasks."""

    def __init__(self, base: Path, tasks: dict[str, Task]):
        self.base = base
        self.tasks = tasks
        digests = "".join(tasks[name].sha256 for name in TASKS)
        with base.open("rb") as file:
            base_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.settings = {
            "base": base.name,
            "base_sha256": base_sha256,
            "rows_sha256": hashlib.sha256(digests.encode()).hexdigest(),
        }

    def fill(self, results: ResultRows[Cell], cells: Sequence[Cell]) -> None:
        """Measure the missing cells, and append each row when it is complete."""
        results.fill(
            cells,
            lambda missing: map(self.row, missing),
            lambda row: (
                f"{row['task']}, {row['arm']}, {row['rate']:g}: {row['cpu_seconds']} CPU s"
            ),
        )

    def row(self, cell: Cell) -> Row:
        """Return the row of a cell."""
        make_room()
        began = time.process_time()
        task = self.tasks[cell.task]
        rows = split(len(task.train), (cell.seed,))
        train = tuple(task.train[number] for number in rows.train[0])
        shown = dataclasses.replace(task, train=train)
        if cell.arm == ANSWERS:
            row = answer_row(shown)
        else:
            model = self.model(cell.dtype)
            texts = Texts(model.tokenizer, model.text_format)
            validation_losses: list[float] = []
            if cell.arm == EXAMPLES:
                shown = few_shot(shown, SHOTS, cell.seed)
                state = start(model.problem, (cell.seed,))  # that of the base
            else:
                state = trained(
                    model,
                    cell,
                    task.train,
                    rows,
                    after_epoch=lambda epoch: validation_losses.append(
                        round(float(epoch.validation_loss[0]), 5)
                    ),
                )
            tokens = encode_shown(texts, shown, len(shown.test), 0)
            row = {
                "steps": int(state.step[0]),
                "validation_loss": validation_losses,
                **scores(model, state.params, tokens),
            }
        seconds = round(time.process_time() - began, 1)
        return cell._asdict() | row | {"cpu_seconds": seconds, **environment()}

    @functools.lru_cache(maxsize=1)  # noqa: B019 (the model lives as long as the lab)
    def model(self, dtype: Literal["float32", "bfloat16"]) -> LoadedModel:
        recipe = LoRARecipe(lora_rank=8, lora_targets=TARGETS)
        return load_model(
            LoadOptions(base=str(self.base), method="lora", recipe=recipe, dtype=dtype)
        )


def trained(
    model: LoadedModel,
    cell: Cell,
    examples: Sequence[Example],
    rows: Split,
    *,
    after_epoch: Callable[[Epoch], None],
) -> TrainState:
    """Return the state after training a LoRA on the examples, or on their shuffled labels."""
    if cell.arm == SHUFFLED:
        order = np.random.default_rng(cell.seed).permutation(len(examples))
        examples = [
            dataclasses.replace(example, target=examples[other].target)
            for example, other in zip(examples, order, strict=True)
        ]
    training = TrainingRows(
        encode(model.tokenizer, examples, model.text_format),
        rows,
        model.tokenizer.pad_token_id,
        packing_of(model.config, on_cpu=True),
    )
    recipe = LoRARecipe(epochs=6, lora_rank=8, lora_targets=TARGETS, lr_lora=cell.rate)
    seeds = (cell.seed,)
    return fit(
        model.problem,
        training,
        start(model.problem, seeds),
        recipe,
        seeds,
        after_epoch=after_epoch,
    )


def scores(model: LoadedModel, params: Params, tokens: Encoded) -> Row:
    """Return the nats of each test answer, whether its tokens are the likeliest, and their number.

    The end of text does not count: a base that is shown examples continues with another one instead.
    """
    answers = Encoded(tokens.inputs, tuple(labels[:-1] for labels in tokens.labels))
    likelihoods, greedy = score_rows(
        params,
        functools.partial(model.problem.read, LOSS),
        answers,
        batch_size=EVALUATED,
        pad_id=model.tokenizer.pad_token_id,
        update=lambda rows: None,
    )
    return {
        "nats": np.round(-likelihoods[0], 4).tolist(),
        "correct": greedy[0].astype(int).tolist(),
        "answer_tokens": [len(labels) for labels in answers.labels],
    }


def answer_row(task: Task) -> Row:
    """Return the controls of answers alone, from the training rows of a task.

    * `nats`: by an answer's frequency, with add-one smoothing and one class for all answers that training lacks.
    * `named`: a member of that class also takes the logarithm of the number of its names: the row's options that
      training lacks or, where a task has no options, as many as there are different training answers.
    * `correct`: whether it is the most frequent answer.
    """
    counts = Counter(example.target for example in task.train)
    smoothed = len(task.train) + len(counts) + 1
    options = answer_options(task) or [()] * len(task.test)
    nats = []
    named = []
    for example, row_options in zip(task.test, options, strict=True):
        nats.append(math.log(smoothed / (counts[example.target] + 1)))
        names = 1
        if example.target not in counts:
            unseen = [option for option in row_options if option not in counts]
            names = len(unseen) or len(counts)
        named.append(nats[-1] + math.log(names))
    most_frequent = constant_answer(task)
    return {
        "nats": np.round(nats, 4).tolist(),
        "named": np.round(named, 4).tolist(),
        "correct": [int(example.target == most_frequent) for example in task.test],
    }


def best_rate(rows: Sequence[Row]) -> float | None:
    """Return the rate of the least mean validation loss, or None until all tuning tasks have both rates."""
    losses: dict[float, list[float]] = {rate: [] for rate in RATES}
    for row in rows:
        if row["arm"] == LORA and row["task"] in TUNING:
            losses[row["rate"]].append(row["validation_loss"][-1])
    if any(len(of_rate) < len(TUNING) for of_rate in losses.values()):
        return None
    return min(RATES, key=lambda rate: fmean(losses[rate]))


def learned(lora: Row, *controls: Sequence[float]) -> bool:
    """Return whether the loss per token is below all controls by more than two standard errors over rows."""
    for control in controls:
        gain = np.subtract(control, lora["nats"]) / lora["answer_tokens"]
        if gain.mean() <= 2 * gain.std(ddof=1) / math.sqrt(len(gain)):
            return False
    return True


def by_task_and_arm(
    rows: Sequence[Row], rate: float | None
) -> dict[str, dict[str, Row]]:
    """Return the rows of each task by arm, those of a LoRA only at this rate."""
    by_task: dict[str, dict[str, Row]] = {task: {} for task in TASKS}
    for row in rows:
        if row["rate"] in (0, rate):
            by_task[row["task"]][row["arm"]] = row
    return by_task


def table(by_task: dict[str, dict[str, Row]]) -> list[list[str]]:
    """Return the loss per answer token and the share of exact answers of each task."""
    lines = [
        [
            "task",
            "frequencies, nats",
            "named frequencies",
            *_MODELS,
            "most frequent answer, %",
            *_MODELS,
        ]
    ]
    for task, arms in by_task.items():
        if LORA not in arms:
            continue
        tokens = arms[LORA]["answer_tokens"]
        nats = [arms[ANSWERS]["nats"], arms[ANSWERS]["named"]]
        nats += [arms[arm]["nats"] if arm in arms else None for arm in _MODELS]
        correct = [
            arms[arm]["correct"] if arm in arms else None for arm in (ANSWERS, *_MODELS)
        ]
        line = [task]
        line += [f"{np.divide(n, tokens).mean():.3f}" if n else "-" for n in nats]
        line += [f"{100 * fmean(c):.1f}" if c else "-" for c in correct]
        lines.append(line)
    return lines


def both_rules(
    by_task: dict[str, dict[str, Row]], by_task_of_five: dict[str, dict[str, Row]]
) -> list[list[str]]:
    """Return which tasks each model learns by the committed rule, and by that with named answers."""
    models = {}
    for size, tasks in (("0.5B", by_task), ("1.5B", by_task_of_five)):
        models[f"Qwen2.5-Coder-{size}-Instruct"] = {
            task: (arms[LORA], arms[EXAMPLES]["nats"])
            for task, arms in tasks.items()
            if {LORA, EXAMPLES} <= arms.keys()
        }
    for name, folder in SMALLER.items():
        models[name] = {
            row["task"]: (row | {"nats": row["adapter"]}, row["examples"])
            for row in read_lines(folder / "adapters.jsonl")
            if row["rate"] == SMALLER_RATE
        }
    lines = [["model", "rule", *TASKS, "learned"]]
    for name, measured in models.items():
        for rule, control in (("committed", "nats"), ("named answers", "named")):
            answers = {
                task: learned(*pair, by_task[task][ANSWERS][control])
                for task, pair in measured.items()
            }
            words = {task: "yes" if answers[task] else "no" for task in answers}
            cells = [words.get(task, "-") for task in TASKS]
            count = f"{sum(answers.values())} of {len(answers)}"
            lines.append([name, rule, *cells, count])
    return lines


if __name__ == "__main__":
    _script.run(main)
