"""What a step costs the host, with a call for each step and with one for an epoch.

    python benchmarks/dispatch.py [--shape small-pool] [--steps 10] [--json]

The host's time is CPU time of the main thread in the training loop, with programs in place of the step and of the
validation that take the same arrays and compute nothing, as a device of no time would.
"""

import time
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
from lorafusion_jax.parts import Epoch, fit, start
from lorafusion_jax.tasks import Encoded, Split, TrainingRows
from lorafusion_jax.training import fit as fit_lib

_EPOCHS = 30
_METRICS = ("loss", "cross_entropy", "l1", "nonfinite_gradients", "gradient_norm", "floored_columns")


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--shape", choices=CHOICES, default="small-pool", help="of the base model")
    parser.add_argument("--steps", type=int, default=10, help="of an epoch")
    options = parser.parse_args()
    config = config_of(options.shape)
    step = Step(config, frozen(config, "float32", MODULES), "sum")
    where = f"{options.shape}, sum, one seed, epochs of {options.steps} steps:"
    ms = {whole: 1e3 * _host_seconds(step, options.steps, whole=whole) for whole in (False, True)}
    name = f"{where} the host's time a step, a call an epoch / a call a step"
    found = case(name, ms[True] / ms[False], None, ms_of_epochs=ms[True], ms_of_steps=ms[False])
    _measure.show([found], as_json=options.json)


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


if __name__ == "__main__":
    main()
