"""What the plans of packed batches assume of a step's time: a fit to steps of many shapes, on one core.

    python benchmarks/packing_cost.py [--shape flan-t5-small] [--composition sum] [--json]

Seconds = constant + products / rate + weight of scores x scores / rate + other work on a token x tokens / rate, by
least squares of relative errors. Products and scores are those of `step_operations`; a token's other work is a share of
its own products, mean of source and target. Seconds are CPU seconds.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import _measure
import jax
import numpy as np
from _measure import case, in_turns
from _model import CHOICES, MODULES, Step, batch_of, config_of, frozen

from lorafusion_jax.parts import step_operations, train_seeds

# Rows, and widths of source and target.
_SHAPES = (
    *((2, source, 16) for source in (64, 128, 256, 512)),
    (3, 256, 48),
    *((5, source, target) for source, target in ((64, 16), (128, 8), (128, 32))),
    *((10, source, 16) for source in (64, 128)),
)


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--shape", choices=CHOICES, default="flan-t5-small", help="of the base model")
    parser.add_argument("--composition", choices=("sum", "mix"), default="sum")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _measure.launch(1)
    config = config_of(options.shape)
    step = Step(config, frozen(config, "float32", MODULES), options.composition)

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
    where = f"{options.shape}, {options.composition}, 1 core, fit to {len(_SHAPES)} shapes:"
    found = case(
        f"{where} time of an operation on scores / that assumed",
        of_scores / of_products,
        None,
        other_work_on_a_token=of_tokens / of_products,
        constant_ms=1e3 * constant,
        products_gflops=1e-9 / of_products,
        largest_relative_error=float(np.max(np.abs(terms @ weights / seconds - 1))),
    )
    _measure.show([found], as_json=options.json)


if __name__ == "__main__":
    main()
