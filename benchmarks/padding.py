"""Share of real tokens in packed and padded batches, and the number of shapes to compile.

    python benchmarks/padding.py [--tasks bbh/*.json] [--shape flan-t5-large] [--tokenizer google/flan-t5-large]

Training of one seed, and of five in turn or batched (95 rows, batches of 10, 20 epochs), and evaluation of every test
row (batches of 64); each is one program for each shape. The bar is meant for BIG-Bench Hard, whose files --tasks takes,
or a folder of JSON files; the embedded tasks are the default. Widths depend on --shape. Without a tokenizer lengths are
estimated from characters.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _measure
import jax
import numpy as np
from _measure import ROOT, case
from _model import config_of, shape_parser

from lorafusion_jax import PRESETS, load_tokenizer
from lorafusion_jax.estimates import CHARACTERS_PER_TOKEN
from lorafusion_jax.models import rough_operations
from lorafusion_jax.tasks import (
    IGNORED,
    MOST_SHAPES,
    Batch,
    Encoded,
    Packing,
    StepBatch,
    Task,
    batch_orders,
    encode,
    eval_batches,
    load_task,
    split,
    train_step_batches,
)

_REQUIRED = 0.92
# Name -> seeds, whether they are batched, and whether rows are packed.
_TRAININGS = {
    "training, 1 seed": (1, False, True),
    "training, 5 seeds in turn": (5, False, True),
    "training, 5 seeds batched": (5, True, True),
    "padded training, 1 seed": (1, False, False),
    "padded training, 5 seeds": (5, False, False),
}
_EVAL_BATCH = 64
# Real tokens, computed ones, shapes, tokens of batches that are no wider than needed.
Counts = tuple[int, int, int, int]
_SMALL = ROOT / "examples/small"


def main() -> None:
    parser = shape_parser(__doc__, "flan-t5-large")
    parser.add_argument("--tasks", nargs="+", type=Path, help="files or folders")
    parser.add_argument(
        "--tokenizer", help="folder, hub id or GGUF file of a base model"
    )
    options = parser.parse_args()
    tasks, tokenizer = tasks_of(options.tasks, options.tokenizer)
    config = config_of(options.shape)
    packing = Packing(config.causal, partial(rough_operations, config))
    lengths = "tokenised" if tokenizer else "estimated from characters"
    cases = []
    for what in (*_TRAININGS, "evaluation"):
        parts = 1 if what == "evaluation" else 2  # generation reads no targets
        found = {
            task.name: _count(_batches(what, task, tokenizer, packing), parts)
            for task in tasks
        }
        real = sum(count[0] for count in found.values())
        computed = sum(count[1] for count in found.values())
        exact = sum(count[3] for count in found.values())
        shapes = {name: count[2] for name, count in found.items()}
        worst = min(found, key=lambda name: found[name][0] / found[name][1])
        where = f"{len(tasks)} tasks, {what}:"
        cases.append(
            case(
                f"{where} real tokens / computed ones",
                real / computed,
                _REQUIRED
                if what != "training, 5 seeds batched" and "padded" not in what
                else None,
                higher_is_better=True,
                real=real,
                computed=computed,
                with_exact_widths=real / exact,
                lengths=lengths,
                worst=f"{worst} {found[worst][0] / found[worst][1]:.2f}",
            )
        )
        cases.append(
            case(
                f"{where} most shapes of a task",
                max(shapes.values()),
                MOST_SHAPES,
                mean=np.mean([*shapes.values()]),
            )
        )
    _measure.show(cases, as_json=options.json)


def tasks_of(sources: Sequence[Path], source: Any = None) -> tuple[list[Task], Any]:
    """Return the tasks that --tasks names, or the embedded ones, and the tokenizer; None estimates lengths."""
    if not sources:
        sources = sorted((_SMALL / "tasks").iterdir())
        source = source or _SMALL / "base"
    tasks = [
        load_task(path)
        for source in sources
        for path in (sorted(source.rglob("*.json")) or [source])
    ]
    return tasks, load_tokenizer(source) if source else None


def _batches(
    what: str, task: Task, tokenizer: Any, packing: Packing
) -> Iterable[Batch]:
    if what == "evaluation":
        return (
            batch
            for _, batch in eval_batches(
                encoded(task.test, tokenizer), _EVAL_BATCH, pad_id=0
            )
        )
    count, batched, packed = _TRAININGS[what]
    orders = _orders(task, range(1, count + 1))
    how: Any = {"packing": packing if packed else None, "alike": batched}
    return _cut(
        train_step_batches(encoded(task.train, tokenizer), orders, pad_id=0, **how)
    )


def _orders(task: Task, seeds: Sequence[int]) -> Any:
    rows = split(len(task.train), seeds).train
    recipe = PRESETS["default"]
    return batch_orders(
        rows, batch_size=recipe.batch_size, epochs=recipe.epochs, seeds=seeds
    )


def _cut(steps: Iterable[StepBatch]) -> Iterator[Batch]:
    """Yield the batches of steps, those of each seed alone if their shapes differ."""
    for batches, shapes, shape_of in steps:
        if shape_of is None:
            yield batches
            continue
        for seed, number in enumerate(shape_of[:, 0]):
            yield jax.tree.map(lambda leaf, seed=seed: leaf[seed], batches).cut(
                *shapes[number]
            )


def encoded(examples: Any, tokenizer: Any) -> Encoded:
    """Return the tokens of examples; without a tokenizer zeros, as many as are estimated."""
    if tokenizer is not None:
        return encode(tokenizer, examples)

    def stand_in(text: str) -> np.ndarray:
        return np.zeros(-(-len(text) // CHARACTERS_PER_TOKEN) + 1, np.int32)

    return Encoded(
        inputs=tuple(stand_in(example.input) for example in examples),
        labels=tuple(stand_in(example.target) for example in examples),
    )


def _count(batches: Iterable[Batch], parts: int = 2) -> Counts:
    """Count batches; with one of two `parts` only tokens of sources count."""
    real = computed = exact = 0
    shapes = set()
    for batch in batches:
        shape = batch.input_ids.shape[-2:]
        for ids, is_real in (
            (batch.input_ids, batch.input_mask),
            (batch.labels, batch.labels != IGNORED),
        )[:parts]:
            lengths = np.sum(is_real, axis=-1)
            real += int(np.sum(lengths))
            computed += ids.size
            exact += int(np.max(lengths)) * lengths.size
        shapes.add(
            (
                shape,
                batch.labels.shape[-1],
                *(group.shape[-2:] for group in jax.tree.leaves(batch.rows)),
            )
        )
    return real, computed, len(shapes), exact


if __name__ == "__main__":
    main()
