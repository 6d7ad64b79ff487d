"""Share of real tokens in packed and padded batches, and the number of shapes to compile.

    python benchmarks/padding.py [--tasks bbh/*.json] [--shape flan-t5-large] [--tokenizer google/flan-t5-large]

Training of one seed, and of five in turn or batched (95 rows, batches of 10, 20 epochs), and evaluation of every test
row (batches of 64); each is one program for each shape. The bar is meant for BIG-Bench Hard, whose files --tasks takes,
or a folder of JSON files; the embedded tasks are the default. Widths depend on --shape. Without a tokenizer lengths are
estimated from characters. --time trains the five most padded tasks for an epoch in either form, in turns, on one core,
with random weights.

--fit measures what the plans assume of a step's time: seconds = constant + products / rate + weight of scores x scores
/ rate + other work on a token x tokens / rate, by least squares of relative errors over ten shapes. Products and scores
are those of `step_operations`; a token's other work is a share of its own products, mean of source and target. Seconds
are CPU seconds.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import ROOT, case, in_turns, of_turns
from _model import CHOICES, MODULES, Step, batch_of, config_of, frozen, graph_of

from lorafusion_jax import PRESETS, Fusion, Problem, load_tokenizer
from lorafusion_jax.parts import (
    CHARACTERS_PER_TOKEN,
    default_seed_mode,
    recipe_rates,
    start,
    step_operations,
    train_seeds,
)
from lorafusion_jax.tasks import (
    IGNORED,
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
from lorafusion_jax.tasks.packing import MOST_SHAPES

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
_TIMED = 5
# Rows, and widths of source and target.
_SHAPES = (
    *((2, source, 16) for source in (64, 128, 256, 512)),
    (3, 256, 48),
    *((5, source, target) for source, target in ((64, 16), (128, 8), (128, 32))),
    *((10, source, 16) for source in (64, 128)),
)


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--shape", choices=CHOICES, default="flan-t5-large", help="model whose steps are counted")
    parser.add_argument("--tokenizer", help="folder, hub id or GGUF file of a base model")
    parser.add_argument("--time", action="store_true", help="time epochs instead of counting tokens")
    parser.add_argument("--fit", action="store_true", help="fit the time of steps instead")
    parser.add_argument("--rounds", type=int, default=3, help="of --time and --fit")
    options = parser.parse_args()
    if options.time or options.fit:
        _measure.launch(cores=1)
    if options.fit:
        _measure.show([_fit(options)], as_json=options.json)
        return
    tasks, tokenizer = tasks_of(options)
    config = config_of(options.shape)
    packing = Packing(config.causal, partial(step_operations, config))
    lengths = "tokenised" if tokenizer else "estimated from characters"
    if options.time:
        _measure.show([_epochs(options, tasks, tokenizer, packing)], as_json=options.json)
        return
    cases = []

    for what in (*_TRAININGS, "evaluation"):
        parts = 1 if what == "evaluation" else 2  # generation reads no targets
        found = {task.name: _count(_batches(what, task, tokenizer, packing), parts) for task in tasks}
        real, computed, exact = (sum(count[i] for count in found.values()) for i in (0, 1, 3))
        shapes = {name: count[2] for name, count in found.items()}
        worst = min(found, key=lambda name: found[name][0] / found[name][1])
        where = f"{len(tasks)} tasks, {what}:"
        cases.append(
            case(
                f"{where} real tokens / computed ones",
                real / computed,
                _REQUIRED if what != "training, 5 seeds batched" and "padded" not in what else None,
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


def tasks_of(options: Any) -> tuple[list[Task], Any]:
    """Return the tasks that --tasks names, or the embedded ones, and the tokenizer; None estimates lengths."""
    sources, source = options.tasks, options.tokenizer
    if not sources:
        sources, source = sorted((_SMALL / "tasks").iterdir()), source or _SMALL / "base"
    tasks = [load_task(path) for source in sources for path in (sorted(source.rglob("*.json")) or [source])]
    return tasks, load_tokenizer(source) if source else None


def _batches(what: str, task: Task, tokenizer: Any, packing: Packing) -> Iterable[Batch]:
    if what == "evaluation":
        return (batch for _, batch in eval_batches(encoded(task.test, tokenizer), _EVAL_BATCH, pad_id=0))
    count, batched, packed = _TRAININGS[what]
    orders = _orders(task, range(1, count + 1))
    how: Any = {"packing": packing if packed else None, "alike": batched}
    return _cut(train_step_batches(encoded(task.train, tokenizer), orders, pad_id=0, **how))


def _epochs(options: Any, tasks: Sequence[Task], tokenizer: Any, packing: Packing) -> dict[str, Any]:
    """Return the case of an epoch of the tasks with the most padding."""
    config = config_of(options.shape)
    counted = {task.name: _count(_batches("padded training, 1 seed", task, tokenizer, packing)) for task in tasks}
    padded = sorted(tasks, key=lambda task: counted[task.name][0] / counted[task.name][1])[:_TIMED]
    recipe = PRESETS["default"]
    weights = jax.block_until_ready(frozen(config, "float32", MODULES))
    index = jnp.arange(MODULES)[None]
    problem = Problem(
        graph=graph_of(config), method=Fusion(), frozen=weights, index=index, seed_mode=default_seed_mode()
    ).unstacked()
    rates = recipe_rates(problem.method, recipe, 1)

    def epoch(task: Task, form: Packing | None) -> None:
        orders = _orders(task, (1,))
        steps = orders.shape[1] // recipe.epochs
        state = start(problem, (1,))
        for batches, _, _ in islice(
            train_step_batches(encoded(task.train, tokenizer), orders, pad_id=0, packing=form), steps
        ):
            state, _ = train_seeds(state, batches, problem, rates, optimisation=recipe.optimisation(orders.shape[1]))
        jax.block_until_ready(state)

    seconds = dict.fromkeys(("packed", "padded"), 0.0)
    ratios = {}
    for task in padded:
        took = in_turns({"packed": partial(epoch, task, packing), "padded": partial(epoch, task, None)}, options.rounds)
        ratios[task.name] = of_turns(took["packed"], took["padded"])
        seconds = {form: total + float(np.median(took[form])) for form, total in seconds.items()}
        print(task.name, took, file=sys.stderr)
    return case(
        f"{options.shape}, 1 core, epochs of the {_TIMED} most padded tasks: packed / padded",
        seconds["packed"] / seconds["padded"],
        0.78,
        seconds=seconds["packed"],
        padded_seconds=seconds["padded"],
        **ratios,
    )


def _fit(options: Any) -> dict[str, Any]:
    """Return the case of the fitted time."""
    config = config_of(options.shape)
    step = Step(config, frozen(config, "float32", MODULES), "sum")

    def call(batches: Any) -> None:
        step.state, _ = train_seeds(step.state, batches, step.problem, step.rates, optimisation=step.optimisation)
        jax.block_until_ready(step.state)

    runs: dict[str, Callable[[], Any]] = {
        str(shape): partial(call, jax.tree.map(lambda a: a[:, None], batch_of(config, shape))) for shape in _SHAPES
    }
    seconds = np.array([np.median(took) for took in in_turns(runs, options.rounds, time.process_time).values()])
    operations = partial(step_operations, config)
    products = np.array([operations(rows * s, rows * t, []) for rows, s, t in _SHAPES])
    scores = np.array([operations(0, 0, [shape]) for shape in _SHAPES])
    tokens = np.array([rows * (s + t) for rows, s, t in _SHAPES]) * operations(1, 1, []) / 2
    terms = np.stack([products, scores, tokens, np.ones_like(products)], axis=1)
    weights, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds))
    of_products, of_scores, of_tokens, constant = (float(weight) for weight in weights)
    where = f"{options.shape}, sum, 1 core, fit to {len(_SHAPES)} shapes:"
    return case(
        f"{where} time of an operation on scores / that assumed",
        of_scores / of_products,
        None,
        other_work_on_a_token=of_tokens / of_products,
        constant_ms=1e3 * constant,
        products_gflops=1e-9 / of_products,
        largest_relative_error=float(np.max(np.abs(terms @ weights / seconds - 1))),
    )


def _orders(task: Task, seeds: Sequence[int]) -> Any:
    rows, recipe = split(len(task.train), seeds).train, PRESETS["default"]
    return batch_orders(rows, batch_size=recipe.batch_size, epochs=recipe.epochs, seeds=seeds)


def _cut(steps: Iterable[StepBatch]) -> Iterator[Batch]:
    """Yield the batches of steps, those of each seed alone if their shapes differ."""
    for batches, shapes, shape_of in steps:
        if shape_of is None:
            yield batches
            continue
        for seed, number in enumerate(shape_of[:, 0]):
            yield jax.tree.map(lambda leaf, seed=seed: leaf[seed], batches).cut(*shapes[number])


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
        for ids, is_real in ((batch.input_ids, batch.input_mask), (batch.labels, batch.labels != IGNORED))[:parts]:
            lengths = np.sum(is_real, axis=-1)
            real += int(np.sum(lengths))
            computed += ids.size
            exact += int(np.max(lengths)) * lengths.size
        shapes.add((shape, batch.labels.shape[-1], *(group.shape[-2:] for group in jax.tree.leaves(batch.rows))))
    return real, computed, len(shapes), exact


if __name__ == "__main__":
    main()
