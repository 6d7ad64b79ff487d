"""Add a method of your own, and compare it: python examples/your_own_method.py

The method here trains one factor per matrix: y = g x W. A method is a frozen dataclass that makes its numbers and turns
them into adapters, and an entry that names it. Registered, it is in runs, counts, plans and bills.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import lorafusion_jax as lf
from lorafusion_jax.adapters.updates import Rescaled
from lorafusion_jax.methods.method import MethodEntry, Update
from lorafusion_jax.training.problem import Method

SMALL = Path(__file__).parent / "small"


@dataclasses.dataclass(frozen=True)
class Gains(Method):
    """One factor for each matrix; `sites` has name, number of layers and outputs of the adapted linear maps."""

    sites: tuple[tuple[str, int, int], ...]

    def learning_rates(self, recipe):  # one for each group of numbers
        return {"gains": 0.02}

    def init(self, frozen, index, key):  # the numbers that are trained, in groups; they start at the base
        return {"gains": {name: jnp.ones(layers) for name, layers, _ in self.sites}}

    def adapters(self, params, frozen, index):  # what the model reads next to its kernels, and metrics
        gains = params["gains"]
        return {name: Rescaled(jnp.tile(gains[name][:, None], (1, d_out))) for name, _, d_out in self.sites}, {}


GAINS = MethodEntry(
    name="gains",
    help="train one factor for each matrix",
    title="gains",  # of its row in `lorafusion params`
    build=lambda built: Gains(tuple((name, site.layers, site.d_out) for name, site in built.sites)),
    update=lambda recipe, modules: Update(kind="magnitudes", targets=recipe.lora_targets),  # its arithmetic, for plans
    groups=("gains",),
)


def main(out: Path, **changes: Any) -> dict[str, float]:
    lf.register(GAINS)
    scores = {}
    for method in ("zero-shot", "gains", "magnitudes"):
        task = str(SMALL / "tasks" / "sort_next2")
        options = lf.FuseOptions(base=str(SMALL / "base"), task=task, method=method, out=out, name=method)
        results = lf.fuse(dataclasses.replace(options, **changes))
        scores[method] = results["exact_match"]
        print(f"{method:10} {results['trainable']:6,} numbers, {scores[method]:5.1f} % exact match")
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
