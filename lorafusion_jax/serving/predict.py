"""Use of several fused runs at once: `lorafusion evaluate --runs`, `lorafusion generate --runs`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ..models.generate import GREEDY, Sampling
from ..runs.evaluate import Evaluation, likeliest_correct, seed_rows, with_options
from ..runs.folder import RunFolder
from ..runs.predict import task_to_evaluate
from ..support.checks import at_least
from ..support.reading import check_regular, utf8
from ..support.reading import decode as decode_json
from ..support.text import shown
from ..tasks import Encoded, Task, answer_options, decode, exact_match
from .service import FusedRun, Service, run_input

_EXAMPLE = '{"run": "a-run", "input": "some text"}'


def generate_rows(
    runs: Sequence[Path],
    *,
    file: Path | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    eval_batch: int = 64,
    sampling: Sampling = GREEDY,
    sampling_seed: int = 0,
) -> list[str]:
    """Return the answers of runs on one base and pool to the rows of a JSONL file, or of standard input.

    A row is {"run": NAME, "input": TEXT}, or has the columns of the run's prompt. NAME is a folder of the runs or its
    last part. The base model answers rows without a run. Other arguments are options of `lorafusion generate`. Raises a
    ValueError for a row of another form or run, and for runs that cannot be served together.
    """
    at_least(1, max_new_tokens=max_new_tokens, eval_batch=eval_batch)
    by_name = _read(runs)
    names = {spelling: name for name in by_name for spelling in (name, str(by_name[name].folder))}
    where = file or "standard input"
    if file is not None and not file.is_fifo():
        check_regular(file)
    with utf8(where):
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8-sig")
        # A text of JSON may hold U+2028 and its like, which end no line here.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_row(line.encode(), f"{where}:{i}", names, by_name) for i, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{where} holds no rows: give a line for each answer, such as {_EXAMPLE}")
    service = Service(list(by_name.values()), capacity=len(by_name))
    for name, run in by_name.items():
        service.add(name, run, seed)
    texts, asked = zip(*rows, strict=True)
    how = {"sampling": sampling, "sampling_seed": sampling_seed}
    return service.generate(texts, asked, max_new_tokens=max_new_tokens, eval_batch=eval_batch, **how)


def _row(
    line: bytes, where: str, names: Mapping[str, str], runs: Mapping[str, FusedRun]
) -> tuple[dict[str, Any], str | None]:
    """Return the columns of a row and the name of the run that answers it."""
    row = decode_json(line, dict[str, Any], where, own=False, fix=f"give a row such as {_EXAMPLE}")
    run = row.pop("run", None)
    if run is not None and run not in [*names]:  # JSON of any type
        known = ", ".join(dict.fromkeys(names.values()))
        raise ValueError(f"{where} names the run {shown(run)}: expected one of {known}")
    name = None if run is None else names[run]
    run_input(row, where, None if name is None else runs[name])  # raises ValueError before anything is loaded
    return row, name


class _TestRows(NamedTuple):
    """The test rows of a run, for every seed one after the other."""

    run: FusedRun
    numbers: list[int]  # of each seed's task in the bank
    task: Task
    test: Encoded
    options: Sequence[Sequence[str]] | None  # None for an open task


def evaluate_runs(
    runs: Sequence[Path],
    *,
    task: str | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    eval_batch: int = 64,
) -> list[dict[str, Any]]:
    """Return the scores of every seed of every run (see `seed_rows`), with the names of the run and the task.

    Runs are evaluated on their own tasks by default; arguments are options of `lorafusion evaluate`. Raises a
    ValueError for runs that cannot be served together, and for a task that cannot be used.
    """
    at_least(1, test_rows=test_rows, eval_batch=eval_batch)
    by_name = _read(runs)
    of_runs = {
        name: task_to_evaluate(run.options, run.folder, RunFolder(run.folder).config(), task, train_rows)
        for name, run in by_name.items()
    }
    service = Service(list(by_name.values()), capacity=sum(len(run.options.seeds) for run in by_name.values()))
    asked = {}
    for name, run in by_name.items():
        of_seeds = {f"{name}, seed {seed}": seed for seed in run.options.seeds}
        for title, seed in of_seeds.items():
            service.add(title, run, seed)
        of = of_runs[name]
        test = service.encode(of.test[: test_rows or run.options.test_rows], run, run.max_new_tokens)
        closed = answer_options(of)
        numbers = [service.tasks[title].number for title in of_seeds]
        asked[name] = _TestRows(run, numbers, of, test, closed and closed[: len(test)])
    evaluations = _evaluated(service, list(asked.values()), eval_batch)
    return [
        {"run": name, "task": one.task.name, **row}
        for (name, one), evaluation in zip(asked.items(), evaluations, strict=True)
        for row in seed_rows(one.run.options.seeds, evaluation)
    ]


def _evaluated(service: Service, asked: Sequence[_TestRows], eval_batch: int) -> list[Evaluation]:
    """Return the evaluation of every run: its rows and seeds share their batches with all others."""
    blocks = [(one.test, one.numbers) for one in asked]
    rows, numbers = _for_seeds(blocks)
    limits = [one.run.max_new_tokens for one in asked for _ in range(len(one.test) * len(one.numbers))]
    said = decode(service.tokenizer, service.tokens(rows, numbers, limits, eval_batch=eval_batch), service.text_format)
    likelihoods = service.log_likelihoods(rows, numbers, eval_batch=eval_batch)
    closed = [
        (with_options(service.tokenizer, one.task, one.test, one.options, service.format_of(one.run)), one.numbers)
        for one in asked
        if one.options is not None
    ]
    of_options = service.log_likelihoods(*_for_seeds(closed), eval_batch=eval_batch)
    scores = iter(_apart(of_options, closed))
    texts, of_rows = _apart(np.array(said, object), blocks), _apart(likelihoods, blocks)
    evaluations = []
    for one, predictions, likelihood in zip(asked, [t.tolist() for t in texts], of_rows, strict=True):
        targets = [example.target for example in one.task.test[: len(one.test)]]
        evaluations.append(
            Evaluation(
                predictions=predictions,
                correct=exact_match(predictions, targets),
                loss=-likelihood.sum(axis=1) / sum(map(len, one.test.labels)),
                option_correct=likeliest_correct(next(scores), one.options, one.task) if one.options else None,
            )
        )
    return evaluations


_Block = tuple[Encoded, list[int]]


def _for_seeds(blocks: Sequence[_Block]) -> tuple[Encoded, Int[np.ndarray, " rows"]]:
    """Return the rows of all blocks, each once for every number, and the numbers of all rows."""
    inputs = [row for rows, numbers in blocks for _ in numbers for row in rows.inputs]
    labels = [row for rows, numbers in blocks for _ in numbers for row in rows.labels]
    of_rows = [number for rows, numbers in blocks for number in numbers for _ in rows.inputs]
    return Encoded(tuple(inputs), tuple(labels)), np.array(of_rows, np.int32)


def _apart(values: np.ndarray, blocks: Sequence[_Block]) -> list[np.ndarray]:
    """Return what belongs to the rows of each block: [seeds, rows, ...]."""
    ends = np.cumsum([len(rows) * len(numbers) for rows, numbers in blocks])
    parts = zip(np.split(values, ends), blocks, strict=False)  # the last part, behind all blocks, is empty
    return [part.reshape(len(n), len(rows), *part.shape[1:]) for part, (rows, n) in parts]


def _read(folders: Sequence[Path]) -> dict[str, FusedRun]:
    """Return the runs by name: the last part of the folder, or all of it where two runs have the same last part."""
    last = [folder.absolute().name for folder in folders]
    names = [str(folder) if last.count(name) > 1 else name for folder, name in zip(folders, last, strict=True)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is given twice in {', '.join(map(str, folders))}: name each one once")
    return {name: FusedRun.read(folder) for name, folder in zip(names, folders, strict=True)}
