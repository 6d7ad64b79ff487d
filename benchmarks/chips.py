"""Fusion steps on several chips in one program against as many steps on one chip, steady state.

    python benchmarks/chips.py [--chips 8] [--json]

The embedded small model and pool in the arrays of examples/chip.yaml, LoRAFusion's own step, one seed. Chips are mapped
one after the other on one device, or shared out over a device for every core (`sharding`).
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _measure
import jax
import jax.numpy as jnp
from _measure import ROOT, case, in_turns, of_turns

from lorafusion_jax import FuseOptions, FusionRecipe
from lorafusion_jax.hardware import load_chips, on_every_chip
from lorafusion_jax.runs import Setup, load_setup
from lorafusion_jax.tasks import batch_orders, train_step_batches
from lorafusion_jax.training import make_mesh, on_mesh, recipe_rates, start, train_seeds

_SMALL = ROOT / "examples" / "small"
_BAR = 0.9


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--chips", type=int, default=8, help="in one program")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cores}"
    )
    _measure.launch()
    pool = str(_SMALL / "adapters")
    task = str(_SMALL / "tasks" / "swapends_prev")
    setup = load_setup(
        FuseOptions(base=str(_SMALL / "base"), pool=pool, task=task)
    ).with_layers(unroll=False)
    runs: dict[str, Callable[[], Any]] = {
        "one": _step(setup, 1, None),
        "mapped": _step(setup, options.chips, None),
    }
    if not options.chips % cores:
        runs["shared out"] = _step(setup, options.chips, f"seed={cores}")
    seconds = in_turns(runs, options.rounds)
    cases = [
        case(
            f"{options.chips} chips {name} / {options.chips} times one",
            of_turns(took, seconds["one"]) / options.chips,
            _BAR,
            one_ms=1e3 * float(min(seconds["one"])),
            all_ms=1e3 * float(min(took)),
            cores=cores,
        )
        for name, took in seconds.items()
        if name != "one"
    ]
    _measure.show(cases, as_json=options.json)


def _step(setup: Setup, count: int, asked: str | None) -> Callable[[], Any]:
    """Return one training step of a seed on every chip, which goes on from its own last state."""
    chips = load_chips(str(Path(ROOT / "examples" / "chip.yaml")))
    keys = jnp.stack([chips.chip_key(number) for number in range(count)])
    first = start(setup.problem, (1,)).params
    recipe = FusionRecipe()
    context = (
        contextlib.nullcontext
        if asked is None
        else partial(jax.set_mesh, make_mesh(asked, count))
    )
    with context():
        on_all = on_every_chip(
            setup, first, chips.rules(), keys, modules=None, norm="ideal"
        )
        assert on_all.split is not None
        orders = batch_orders(
            on_all.split.train,
            batch_size=recipe.batch_size,
            epochs=1,
            seeds=(1,) * count,
        )
        batches = next(
            train_step_batches(setup.train, orders, pad_id=setup.tokenizer.pad_token_id)
        ).batches
        problem = on_all.problem.replace(seed_mode="sequential")
        state = on_mesh(start(problem, (1,) * count), of_seeds=True)
        batches = on_mesh(batches, of_seeds=True)
        rates = on_mesh(recipe_rates(problem.method, recipe, count), of_seeds=True)
    optimisation = recipe.optimisation(orders.shape[1])

    def step() -> None:
        nonlocal state
        with context():
            state, _ = train_seeds(
                state, batches, problem, rates, optimisation=optimisation
            )
            jax.block_until_ready(state)

    return step


if __name__ == "__main__":
    main()
