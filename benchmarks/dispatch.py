"""What a step costs the host, with a call for each step and with one for an epoch, and what both cost a CPU.

    python benchmarks/dispatch.py [--shape small-pool] [--steps 10] [--json]

The host's time is CPU time of the main thread in the training loop, with programs in place of the step and of the
validation that take the same arrays and compute nothing, as a device of no time would. An epoch on a CPU is compared in
CPU time with as many calls of one step, bit for bit, and its compilation with that of one step.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case
from _model import BATCH, CHOICES, MODULES, SOURCE, TARGET, Step, config_of, frozen

from lorafusion_jax import FusionRecipe
from lorafusion_jax.parts import Epoch, fit, start, train_seeds
from lorafusion_jax.tasks import Encoded, Split, TrainingRows
from lorafusion_jax.training import fit as fit_lib

_EPOCHS = 30
_METRICS = ("loss", "cross_entropy", "l1", "nonfinite_gradients", "gradient_norm", "floored_columns")


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--shape", choices=CHOICES, default="small-pool", help="of the base model")
    parser.add_argument("--steps", type=int, default=10, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = config_of(options.shape)
    step = Step(config, frozen(config, "float32", MODULES), "sum")
    where = f"{options.shape}, sum, one seed, epochs of {options.steps} steps:"
    _measure.show([*_host(where, step, options.steps), *_cpu(where, step, options)], as_json=options.json)


def _host(where: str, step: Step, steps: int) -> list[dict[str, Any]]:
    ms = {whole: 1e3 * _host_seconds(step, steps, whole=whole) for whole in (False, True)}
    name = f"{where} the host's time a step, a call an epoch / a call a step"
    return [case(name, ms[True] / ms[False], None, ms_of_epochs=ms[True], ms_of_steps=ms[False])]


@partial(jax.jit, static_argnames=("optimisation", "shapes"), donate_argnames=("state",), keep_unused=True)
def _nothing(
    state: Any, batches: Any, problem: Any, rates: Any, shape_of: Any = None, *, optimisation: Any, shapes: Any = ()
) -> Any:
    return state, {name: jnp.zeros(batches.row_mask.shape[1::-1]) + i for i, name in enumerate(_METRICS)}


def _host_seconds(step: Step, steps: int, *, whole: bool) -> float:
    """Return the median of a step's share of an epoch, once all is compiled."""
    count, at = BATCH * steps, []
    row = (np.full(SOURCE, 2, np.int32),) * (count + 1), (np.full(TARGET, 2, np.int32),) * (count + 1)
    split = Split(np.arange(count, dtype=np.int32)[None], np.full((1, 1), count, np.int32))
    rows, recipe = TrainingRows(Encoded(*row), split, pad_id=0), FusionRecipe(epochs=_EPOCHS, batch_size=BATCH)

    def after(epoch: Epoch) -> None:
        at.append(time.thread_time())

    with (
        mock.patch.object(fit_lib, "for_cpu", lambda: not whole),
        mock.patch.object(fit_lib, "train_seeds", _nothing),
        mock.patch.object(fit_lib, "seed_entropies", lambda *_: jnp.zeros(1)),
    ):
        fit(step.problem, rows, start(step.problem, (0,)), recipe, (0,), after_epoch=after)
    return float(np.median(np.diff(at)[2:])) / steps


def _cpu(where: str, step: Step, options: Any) -> list[dict[str, Any]]:
    begin, ends, seconds = jax.tree.map(jnp.copy, step.state), {}, {1: [], options.steps: []}
    batches = {n: jax.tree.map(partial(jnp.repeat, repeats=n, axis=1), step.batches) for n in seconds}
    arguments = (step.problem, step.rates)

    def run(together: int) -> None:
        state = jax.tree.map(jnp.copy, begin)
        for _ in range(options.steps // together):
            state, _ = train_seeds(state, batches[together], *arguments, optimisation=step.optimisation)
        ends[together] = jax.block_until_ready(state)

    def compiled(together: int) -> None:
        train_seeds.lower(begin, batches[together], *arguments, optimisation=step.optimisation).compile()

    compiling = {together: _cpu_seconds(partial(compiled, together)) for together in seconds}
    for together in seconds:
        run(together)
    for _ in range(options.rounds):
        for together, of in seconds.items():
            of.append(_cpu_seconds(partial(run, together)))
    one, many = (1e3 * np.array(of) / options.steps for of in seconds.values())
    pairs = zip(*map(jax.tree.leaves, ends.values()), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    return [
        case(
            f"{where} CPU time of a step, a call an epoch / a call a step",
            float(np.median(many / one)),
            None,
            ms_of_epochs=float(np.median(many)),
            ms_of_steps=float(np.median(one)),
            same_bits=same,
        ),
        case(
            f"{where} compilation, a call an epoch / a call a step",
            compiling[options.steps] / compiling[1],
            None,
            s_of_epochs=compiling[options.steps],
            s_of_steps=compiling[1],
        ),
    ]


def _cpu_seconds(call: Callable[[], None]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
