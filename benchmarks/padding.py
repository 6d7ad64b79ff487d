"""Share of real tokens in padded batches, and the number of shapes to compile.

    python benchmarks/padding.py [--tasks bbh/*.json] [--tokenizer google/flan-t5-large] [--json]

Training of one seed and of five that share a program (95 rows, batches of 10, 20 epochs), and evaluation of every test
row (batches of 64); each is one program for each shape. The bar is meant for BIG-Bench Hard, whose files --tasks takes;
the embedded tasks are the default. Without a tokenizer lengths are estimated from characters.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import _measure
import numpy as np
from _measure import ROOT, case

from lorafusion_jax.estimates.workload import CHARACTERS_PER_TOKEN
from lorafusion_jax.io.hf import load_tokenizer
from lorafusion_jax.methods.fusion import PRESETS
from lorafusion_jax.tasks import (
    IGNORED,
    Batch,
    Encoded,
    Task,
    batch_orders,
    encode,
    eval_batches,
    load_task,
    split,
    train_batches,
)
from lorafusion_jax.tasks.batches import MOST_SHAPES

_REQUIRED = 0.70
_EVAL_BATCH = 64
_SMALL = ROOT / "examples/small"


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--tokenizer", help="folder, hub id or GGUF file of a base model")
    options = parser.parse_args()
    sources, source = options.tasks, options.tokenizer
    if not sources:
        sources, source = sorted((_SMALL / "tasks").iterdir()), source or _SMALL / "base"
    tokenizer = load_tokenizer(source) if source else None
    tasks = [load_task(path) for path in sources]
    lengths = "tokenised" if tokenizer else "estimated from characters"
    cases = []
    for what in ("training, 1 seed", "training, 5 seeds", "evaluation"):
        found = {task.name: _count(_batches(what, task, tokenizer)) for task in tasks}
        real, computed = (sum(count[i] for count in found.values()) for i in (0, 1))
        shapes = {name: count[2] for name, count in found.items()}
        exact = sum(count[3] for count in found.values())
        worst = min(found, key=lambda name: found[name][0] / found[name][1])
        where = f"{len(tasks)} tasks, {what}:"
        cases.append(
            case(
                f"{where} real tokens / computed ones",
                real / computed,
                _REQUIRED,
                higher_is_better=True,
                real=real,
                computed=computed,
                with_exact_widths=real / exact,
                lengths=lengths,
                worst=f"{worst} {found[worst][0] / found[worst][1]:.2f}",
            )
        )
        cases.append(
            case(f"{where} most shapes of a task", max(shapes.values()), MOST_SHAPES, mean=np.mean([*shapes.values()]))
        )
    _measure.show(cases, as_json=options.json)


def _batches(what: str, task: Task, tokenizer: Any) -> Iterable[Batch]:
    if what == "evaluation":
        return (batch for _, batch in eval_batches(_encode(task.test, tokenizer), _EVAL_BATCH, pad_id=0))
    seeds, recipe = range(1, 6 if what.endswith("seeds") else 2), PRESETS["default"]
    rows = split(len(task.train), seeds).train
    orders = batch_orders(rows, batch_size=recipe.batch_size, epochs=recipe.epochs, seeds=seeds)
    return train_batches(_encode(task.train, tokenizer), orders, pad_id=0)


def _encode(examples: Any, tokenizer: Any) -> Encoded:
    if tokenizer is not None:
        return encode(tokenizer, examples)

    def stand_in(text: str) -> np.ndarray:
        return np.zeros(-(-len(text) // CHARACTERS_PER_TOKEN) + 1, np.int32)

    return Encoded(
        inputs=tuple(stand_in(example.input) for example in examples),
        labels=tuple(stand_in(example.target) for example in examples),
    )


def _count(batches: Iterable[Batch]) -> tuple[int, int, int, int]:
    """Return real tokens, computed ones, how many shapes there are, and tokens if batches were no wider than needed."""
    real = computed = exact = 0
    shapes = set()
    for batch in batches:
        for ids, is_real in ((batch.input_ids, batch.input_mask), (batch.labels, batch.labels != IGNORED)):
            lengths = np.sum(is_real, axis=-1)
            real += int(np.sum(lengths))
            computed += ids.size
            exact += int(np.max(lengths)) * lengths.size
        shapes.add((batch.input_ids.shape, batch.labels.shape))
    return real, computed, len(shapes), exact


if __name__ == "__main__":
    main()
