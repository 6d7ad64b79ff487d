"""Real tokens per second of our fusion step and of the fairest PyTorch + PEFT, all taking turns on one core.

    python benchmarks/peer.py --tasks bbh [--shape flan-t5-small smollm2-135m]
    python benchmarks/peer.py --shape flan-t5-large --candidates ours eager --batches 1 --rounds 2

Ours: `mix` of 20 modules of rank 16 on q and v, rows packed as runs pack them, with the malloc of commands, layers as
runs compile them. Peer: PEFT's DoRA layers with the coefficients chained by hand, eager or by torch.compile, with that
malloc and the default one. Weights are float32 or bfloat16, or products of float32 are computed in bfloat16 (by torch's
setting `medium`, or by autocast). Rows are in file order or sorted by length within a task, batches as wide as their
longest row. Random weights and tokens; lengths of the training rows of --tasks (JSON files of BIG-Bench Hard), by
default of the embedded tasks; batches of 10.

Each candidate is a process, and measures the same few batches in every round, in seconds of its CPU time. From the
counted operations of those batches and of all batches of all tasks follow its real tokens per second. Losses of all
float32 candidates on the same rows are compared. Each shape's results are kept in OUT, and measured again only if the
options or the processor change. Needs the `peft` extra, and a C++ compiler for torch.compile.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import _measure
import _peer
import jax
import numpy as np
from _measure import (
    MALLOC,
    ROOT,
    case,
    features,
    need_peft,
    of_turns,
    processor,
    product_rates,
)
from _mix import compiled
from _model import MODULES, Dtype, Step, config_of, frozen
from _peer import Peer, lines_of
from padding import encoded, tasks_of

from lorafusion_jax import PRESETS, Architecture, Frozen
from lorafusion_jax.loading import packing_of, pays_unrolled
from lorafusion_jax.models import rough_operations
from lorafusion_jax.report import as_markdown as markdown, write_text
from lorafusion_jax.tasks import Batch, Encoded, batch_orders, split, train_step_batches
from lorafusion_jax.training import start


class _Candidate(NamedTuple):
    """Settings of one process.

    Attributes:
      form: `ours`, or how PyTorch computes.
      keeps: malloc keeps memory, as in commands.
      dtype: dtype of weights and activations.
      precision: torch's setting for float32 products.
      autocast: torch.autocast computes products of float32 weights in bfloat16.
      other: layers unrolled where runs scan them, and the other way round.
    """

    form: str
    keeps: bool = True
    dtype: Dtype = "float32"
    precision: str = "highest"
    autocast: bool = False
    other: bool = False

    def exact(self) -> bool:
        """Return whether products of float32 are computed in float32."""
        return (
            self.dtype == "float32"
            and self.precision == "highest"
            and not self.autocast
        )


_CANDIDATES = {
    "ours": _Candidate("ours"),
    "ours, default malloc": _Candidate("ours", keeps=False),
    "ours, other structure": _Candidate("ours", other=True),
    "ours, bfloat16": _Candidate("ours", dtype="bfloat16"),
    "eager": _Candidate("eager"),
    "eager, default malloc": _Candidate("eager", keeps=False),
    "eager, medium": _Candidate("eager", precision="medium"),
    "eager, bfloat16": _Candidate("eager", dtype="bfloat16"),
    "eager, autocast": _Candidate("eager", autocast=True),
    "compile": _Candidate("default"),
    "compile, default malloc": _Candidate("default", keeps=False),
    "compile, medium": _Candidate("default", precision="medium"),
    "compile, bfloat16": _Candidate("default", dtype="bfloat16"),
    "compile, autocast": _Candidate("default", autocast=True),
    "max-autotune": _Candidate("max-autotune"),
    "max-autotune, default malloc": _Candidate("max-autotune", keeps=False),
}
_COMPILED = ("default", "max-autotune")  # torch.compile's modes
_PACKED = "packed"
_PADDED = "in file order"
_SORTED = "sorted by length"
_RATES = "rates"  # the process that times single products
_AS_RUN = 1.3
_FAIREST = 1.0
_STRUCTURE = 0.97  # of the other structure's speed, less than 1 for noise
_SAME_LOSS = 1e-3  # relative


class _Form(NamedTuple):
    """Batches of one form.

    Attributes:
      batches: those that are measured.
      tokens: real tokens that as many operations take on average in all batches of all tasks.
      share: real tokens / computed tokens in all batches of all tasks.
      unroll: trainings of ours that unroll the layers have most of the real tokens.
    """

    batches: list[Any]
    tokens: float
    share: float
    unroll: bool


# Functions: one begins a training, one takes a step and returns its loss.
_Training = tuple[Callable[[], None], Callable[[Any], float]]
# Seconds and loss of every batch.
_Pass = dict[str, list[float]]


def main() -> None:
    parser = _peer.parser(__doc__)
    parser.add_argument(
        "--candidates", choices=_CANDIDATES, nargs="+", default=[*_CANDIDATES]
    )
    parser.add_argument(
        "--batches", type=int, default=3, help="that are measured of each form"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "peer", help="folder of the results"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.batches, options.rounds) < 1:
        parser.error("--batches and --rounds count from 1")
    need_peft()
    if options.worker is not None:
        _work(options)
        return
    cases = []
    rates = {}
    tables = []
    for shape in options.shape:
        found = _group(options, shape)
        where = f"{shape}, 1 core"
        rates |= found["rates"]
        cases += _cases(where, found)
        tables.append(_table(where, found))
    _measure.show(cases, as_json=options.json, rates=rates)
    if not options.json:
        print("", *tables, sep="\n")


def _group(options: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Return the results of one shape: the rounds that are kept, and those that are measured now."""
    asked = {
        "candidates": options.candidates,
        "batches": options.batches,
        "processor": processor(),
    }
    asked |= {
        "tasks": [path.name for path in options.tasks or ()],
        "features": features(),
    }
    file = options.out / f"{shape}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    found = kept if kept.items() >= asked.items() else asked | {"turns": []}
    missing = options.rounds - len(found["turns"])
    if missing <= 0:
        return found
    left_out = {}
    names = options.candidates
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        left_out = {
            name: "not run: no compiler"
            for name in names
            if _CANDIDATES[name].form in _COMPILED
        }
        names = [name for name in names if name not in left_out]
    workers = dict[str, subprocess.Popen[str]]()
    first = dict[str, Any]()
    try:
        # The first passes, which compile, run on all cores at once; the timed ones run alone.
        cores = sorted(os.sched_getaffinity(0))
        for begin in range(0, len(names) + 1, len(cores)):
            together = [_RATES, *names][begin : begin + len(cores)]
            workers |= {
                name: _start(name, shape, core)
                for name, core in zip(together, cores, strict=False)
            }
            first |= {name: _answer(workers[name]) for name in together}
        left_out |= {name: "failed" for name in names if first[name] is None}
        names = [name for name in names if name not in left_out]
        forms = {
            form: {"tokens": of.tokens, "share": of.share}
            for form, of in _forms(options, config_of(shape)).items()
        }
        found |= {"rates": first[_RATES], "forms": forms, "left_out": left_out}
        for _ in range(missing):
            turn = {}
            for name in names:
                turn[name] = _next_pass(name, workers[name])
            _same_losses(turn)
            found |= {
                "turns": [*found["turns"], turn],
                "date": datetime.date.today().isoformat(),
            }
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(found, indent=1) + "\n")
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found


def _start(name: str, shape: str, core: int) -> subprocess.Popen[str]:
    """Start the process of one candidate, which has one core from the beginning, so that libraries start one thread."""
    keeps = name == _RATES or _CANDIDATES[name].keeps
    # Two processes that compile the same code in one folder would wait for each other, at most ten minutes.
    folder = f"inductor{'' if keeps else '-default-malloc'}"
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / folder)}
    command = [sys.executable, *sys.argv, "--shape", shape, "--worker", name]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(
            command,
            env=os.environ | kept | (MALLOC if keeps else dict.fromkeys(MALLOC, "")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        os.sched_setaffinity(0, allowed)


def _answer(worker: subprocess.Popen[str]) -> Any:
    """Return the next line of a process, or None if it has ended."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    return json.loads(line) if line else None


def _next_pass(name: str, worker: subprocess.Popen[str]) -> Any:
    try:
        print(file=worker.stdin, flush=True)
        found = _answer(worker)
    except BrokenPipeError:
        found = None
    if found is None:
        sys.exit(
            f"the process of {name!r} ended with status {worker.wait()} (-9 if memory ran out): measure fewer "
            "--candidates at once; rounds that were finished are kept"
        )
    return found


def _work(options: argparse.Namespace) -> None:
    """Print the passes over all batches of a candidate, one at once and another one for each line of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    if options.worker == _RATES:
        print(
            json.dumps(product_rates(["float32", "bfloat16"])), file=answers, flush=True
        )
        return
    candidate = _CANDIDATES[options.worker]
    (shape,) = options.shape
    config = config_of(shape, candidate.dtype)
    forms = _forms(options, config)
    unroll = forms[_PACKED].unroll and candidate.dtype == "float32"
    config = dataclasses.replace(config, unroll=unroll != candidate.other)
    weights = jax.block_until_ready(frozen(config, candidate.dtype, MODULES))
    reset, step = (_ours if candidate.form == "ours" else _theirs)(
        config, weights, candidate
    )
    # A compiled function gains nothing from the file's order.
    used = {"ours": [_PACKED], "eager": [_PADDED, _SORTED]}.get(
        candidate.form, [_SORTED]
    )
    del weights
    while True:
        passes = {form: _timed(reset, step, forms[form].batches) for form in used}
        print(json.dumps(passes), file=answers, flush=True)
        if not sys.stdin.readline():
            return


def _timed(
    reset: Callable[[], None], step: Callable[[Any], float], batches: Sequence[Any]
) -> _Pass:
    found: _Pass = {"seconds": [], "losses": []}
    reset()
    for batch in batches:
        began = time.process_time()
        found["losses"].append(step(batch))
        found["seconds"].append(time.process_time() - began)
    return found


def _ours(config: Architecture, weights: Frozen, candidate: _Candidate) -> _Training:
    step = Step(config, weights, "mix")

    def reset() -> None:
        step.state = start(step.problem, (0,))

    def take(batch: Batch) -> float:
        step.batches = batch
        step()
        return step.losses[-1]

    return reset, take


def _theirs(config: Architecture, weights: Frozen, candidate: _Candidate) -> _Training:
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(candidate.precision)
    peer = Peer(config, weights, candidate.dtype)
    if candidate.form in _COMPILED:
        peer.model = compiled(peer.model, candidate.form)

    def take(lines: Mapping[str, np.ndarray]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=candidate.autocast):
            return peer(peer.inputs(lines))

    return peer.reset, take


def _forms(options: argparse.Namespace, config: Architecture) -> dict[str, _Form]:
    """Return the batches of one seed's epoch of all tasks in each form, those of a packed and a padded one alike."""
    tasks, tokenizer = tasks_of(options.tasks)
    packing = packing_of(config, on_cpu=True)
    recipe = PRESETS["default"]
    draw = partial(
        np.random.default_rng(0).integers, 2, config.vocab_size, dtype=np.int32
    )
    batches: dict[str, list[Any]] = {_PACKED: [], _PADDED: [], _SORTED: []}
    real = unrolled = 0
    for task in tasks:
        rows = np.sort(split(len(task.train), (1,)).train)
        texts = encoded(task.train, tokenizer)
        inputs = tuple(draw(size=len(row)) for row in texts.inputs)
        labels = tuple(draw(size=len(row)) for row in texts.labels)
        lengths = np.array(
            [
                len(source) + len(target)
                for source, target in zip(inputs, labels, strict=True)
            ]
        )
        tokens = Encoded(inputs, labels)
        real += int(lengths[rows].sum())
        in_order = partial(batch_orders, batch_size=recipe.batch_size)
        ordered = in_order(rows)
        by_length = in_order(rows[:, np.argsort(lengths[rows[0]], kind="stable")])
        # Lanes are chosen for a whole run, whose later epochs are shuffled.
        later = in_order(rows, epochs=recipe.epochs, seeds=(1,))[:, ordered.shape[1] :]
        run = np.concatenate([ordered, later], axis=1)
        unrolled += int(lengths[rows].sum()) * pays_unrolled(
            config, tokens, run, packing
        )
        steps = train_step_batches(tokens, run, pad_id=0, packing=packing)
        batches[_PACKED] += [step.batches for step in islice(steps, ordered.shape[1])]
        for form, order in ((_PADDED, ordered), (_SORTED, by_length)):
            steps = train_step_batches(tokens, order, pad_id=0)
            batches[form] += [
                lines_of(config, jax.tree.map(lambda a: a[0, 0], step.batches))
                for step in steps
            ]

    def size(batch: Any) -> tuple[int, float]:
        """Return the computed tokens and operations of a batch."""
        if isinstance(batch, Batch):
            lines, source = batch.input_ids.shape[2:]
            target = batch.labels.shape[-1]
            groups = batch.rows.groups() if batch.rows else [(lines, source, target)]
        else:
            lines, source = batch["input_ids"].shape
            target = batch["labels"].shape[1]
            source = (
                0 if config.causal else source
            )  # one text, whose tokens all have logits
            groups = [(lines, source, target)]
        operations = rough_operations(config, lines * source, lines * target, groups)
        return lines * (source + target), float(operations)

    sizes = {
        form: np.array([size(batch) for batch in of_form])
        for form, of_form in batches.items()
    }

    def chosen(form: str) -> Any:
        """Return the numbers of whole batches that are evenly spaced in the order of their sizes."""
        whole = np.flatnonzero(
            [len(batch["labels"]) == recipe.batch_size for batch in batches[form]]
        )
        places = (
            np.arange(0.5, options.batches) * len(whole) / options.batches
        ).astype(int)
        return whole[np.argsort(sizes[form][whole, 0], kind="stable")[places]]

    made = {}
    for form, like in ((_PACKED, _PADDED), (_PADDED, _PADDED), (_SORTED, _SORTED)):
        numbers = chosen(like)
        computed, operations = sizes[form].sum(axis=0)
        tokens = real * sizes[form][numbers, 1].sum() / operations
        made[form] = _Form(
            [batches[form][n] for n in numbers],
            tokens,
            real / computed,
            2 * unrolled > real,
        )
    return made


def _same_losses(turn: Mapping[str, Mapping[str, _Pass]]) -> None:
    """Check that all float32 candidates train alike on the same rows."""
    for rows in ((_PACKED, _PADDED), (_SORTED,)):
        exact = {
            name: passes for name, passes in turn.items() if _CANDIDATES[name].exact()
        }
        losses = {
            name: passes[form]["losses"]
            for name, passes in exact.items()
            for form in rows
            if form in passes
        }
        for name, found in losses.items():
            np.testing.assert_allclose(
                found, next(iter(losses.values())), rtol=_SAME_LOSS, err_msg=name
            )


def _runs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the candidates and forms with their real tokens per second in each round."""
    runs = []
    turns = found["turns"]
    for name, passes in turns[0].items():
        for form in passes if all(name in turn for turn in turns) else ():
            seconds = np.array([sum(turn[name][form]["seconds"]) for turn in turns])
            runs.append(
                {
                    "candidate": name,
                    "form": form,
                    "speeds": found["forms"][form]["tokens"] / seconds,
                }
            )
    return runs


def _cases(where: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    runs = _runs(found)

    def ours(name: str) -> dict[str, Any] | None:
        return next((run for run in runs if run["candidate"] == name), None)

    def best(kept: Callable[[_Candidate, str], bool]) -> dict[str, Any] | None:
        of = _CANDIDATES
        peers = [
            r
            for r in runs
            if of[r["candidate"]].form != "ours" and kept(of[r["candidate"]], r["form"])
        ]
        return max(peers, key=lambda run: np.median(run["speeds"]), default=None)

    compared = (
        ("float32: ours / PEFT with its defaults", ours("ours"),
         best(lambda of, form: of.exact() and of.form == "eager" and form == _PADDED), _AS_RUN),
        ("float32: ours / fairest peer", ours("ours"), best(lambda of, form: of.exact()), _FAIREST),
        ("products in bfloat16: ours / fairest peer", ours("ours, bfloat16"),
         best(lambda of, form: not of.exact()), _FAIREST),
        ("ours in float32 / fairest peer of any precision", ours("ours"), best(lambda of, form: True), None),
        ("layers as runs compile them / the other structure", ours("ours"), ours("ours, other structure"), _STRUCTURE),
        ("malloc of commands / default malloc", ours("ours"), ours("ours, default malloc"), None),
    )  # fmt: skip
    return [
        case(
            f"{where}, {what}",
            of_turns(run["speeds"], other["speeds"]),
            required,
            higher_is_better=True,
            tokens_per_second=float(np.median(run["speeds"])),
            other=f"{other['candidate']}, {other['form']}",
            other_tokens_per_second=float(np.median(other["speeds"])),
            rounds=len(run["speeds"]),
        )
        for what, run, other, required in compared
        if run and other
    ]


def _table(where: str, found: Mapping[str, Any]) -> str:
    lines = [
        [
            f"{where}, {found['date']}",
            "rows",
            "real / computed tokens",
            "real tokens per second",
        ]
    ]
    for run in _runs(found):
        share = f"{100 * found['forms'][run['form']]['share']:.0f} %"
        lines.append(
            [run["candidate"], run["form"], share, f"{np.median(run['speeds']):.0f}"]
        )
    lines += [[name, why, "", ""] for name, why in found["left_out"].items()]
    return markdown(lines, left=(0, 1))


if __name__ == "__main__":
    main()
