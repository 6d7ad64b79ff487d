"""Answers of several fused runs and typed mixtures at once: `lorafusion generate --runs`, or with `--pool`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.pool import open_pool
from ..models.generate import GREEDY, Sampling
from ..runs.predict import read_lines
from ..runs.weight_list import Weights, check_modules
from ..support.checks import at_least
from ..support.reading import decode as decode_json, decode_as, error_context
from .service import FusedRun, Service, run_input

_EXAMPLE = '{"run": "a-run", "input": "some text"}'


def generate_rows(
    runs: Sequence[Path] = (),
    *,
    base: str | None = None,
    pool: str | None = None,
    prompt: str | None = None,
    chat: bool = False,
    file: Path | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    eval_batch: int = 64,
    sampling: Sampling = GREEDY,
    sampling_seed: int = 0,
) -> list[str]:
    """Return the answers of runs or mixtures on one base and pool to the rows of a JSONL file, or of standard input.

    A row is {"run": NAME, "input": TEXT}, or has the columns of the run's prompt. NAME is a folder of the runs or its
    last part. Instead of "run", a row may have "mixture": {MODULE: WEIGHT} (see `Service.add_mixture`). The base model
    answers other rows. Without runs, give `base` and `pool`. Other arguments are options of `lorafusion generate`.
    Raises a ValueError for a row of another form, run or mixture, and for runs that cannot be served together.
    """
    at_least(1, max_new_tokens=max_new_tokens, eval_batch=eval_batch)
    if runs and (base, pool, prompt, chat) != (None, None, None, False):
        raise ValueError(
            "runs have their base, pool, prompt and chat template: leave out these options, or --runs"
        )
    if not runs and None in (base, pool):
        raise ValueError(
            "mixtures need a base and a pool: give both, --base and --pool"
        )
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise ValueError(
            f"a run is given twice in {', '.join(map(str, runs))}: name each one once"
        )
    # Runs whose folders have the same last part are named by all of it.
    last_parts = [folder.absolute().name for folder in runs]
    by_name = {
        str(folder) if last_parts.count(name) > 1 else name: FusedRun.read(folder)
        for folder, name in zip(runs, last_parts, strict=True)
    }
    names = {
        spelling: name
        for name in by_name
        for spelling in (name, str(by_name[name].folder))
    }
    where = file or "standard input"
    lines = {
        f"{where}:{number}": line.encode()
        for number, line in enumerate(read_lines(file), start=1)
        if line.strip()
    }
    rows = [
        _row(line, number, names, by_name, prompt) for number, line in lines.items()
    ]
    mixtures: dict[str, tuple[str, Weights]] = {}
    for where, (_, name, mixture) in zip(lines, rows, strict=True):
        if name and mixture:
            mixtures.setdefault(name, (where, mixture))
    source = pool or next(
        (run.options.pool for run in by_name.values() if run.options.entry.pool), None
    )
    pool_names = open_pool(source).names if mixtures and source else ()
    for where, mixture in mixtures.values():
        with error_context(where):
            check_modules(mixture, pool_names, source)
    modules = sorted({module for _, mixture in mixtures.values() for module in mixture})
    capacity = max(1, len(by_name) + len(mixtures))
    if base is not None and pool is not None:
        service = Service.open(
            base,
            pool,
            modules=modules or None,
            capacity=capacity,
            prompt=prompt,
            chat=chat,
        )
    else:
        service = Service([*by_name.values()], modules=modules, capacity=capacity)
    for name, run in by_name.items():
        service.add(name, run, seed)
    for name, (where, mixture) in mixtures.items():
        with error_context(where):
            service.add_mixture(name, mixture)
    texts, requests, _ = zip(*rows, strict=True)
    return service.generate(
        texts,
        requests,
        max_new_tokens=max_new_tokens,
        eval_batch=eval_batch,
        sampling=sampling,
        sampling_seed=sampling_seed,
    )


def _row(
    line: bytes,
    where: str,
    names: Mapping[str, str],
    runs: Mapping[str, FusedRun],
    prompt: str | None,
) -> tuple[dict[str, Any], str | None, Weights | None]:
    """Return the columns of a row, the name of the task that answers it, and its weights if that is a mixture."""
    row = decode_json(
        line,
        dict[str, Any],
        where,
        allow_unknown=True,
        fix=f"give a row such as {_EXAMPLE}",
    )
    run = row.pop("run", None)
    mixture = row.pop("mixture", None)
    if run is not None and run not in [*names]:  # JSON of any type
        run_names = ", ".join(dict.fromkeys(names.values())) or "none without --runs"
        raise ValueError(f"{where} names the run {run!r}: expected one of {run_names}")
    if run is not None and mixture is not None:
        raise ValueError(f"{where} has a run and a mixture: leave one of them out")
    if mixture is not None:
        mixture = decode_as(
            mixture,
            Weights,
            f"{where}, mixture",
            allow_unknown=True,
            fix='give weights such as {"name": 0.7}',
        )
        if not mixture:
            raise ValueError(
                f"{where} has an empty mixture: give the weight of at least one module"
            )
    name = None if run is None else names[run]
    run_input(
        row, where, None if name is None else runs[name], prompt
    )  # raises ValueError before anything is loaded
    return (
        row,
        name if mixture is None else json.dumps(mixture, sort_keys=True),
        mixture,
    )
