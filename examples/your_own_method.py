"""Add a method of your own, and compare it: python examples/your_own_method.py

The method here trains one factor per matrix: y = g x W. A method is a frozen dataclass that makes its numbers and turns
them into adapters, a recipe with its own options, and an entry that names both. In the process that registers it, it is
in runs, in `lorafusion_jax.cli.main(["fuse", "--method", "gains", "--help"])`, in counts, plans and costs.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import lorafusion_jax as lf

SMALL = Path(__file__).parent / "small"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GainsRecipe(lf.TargetedRecipe):
    """The numbers that a user may choose: those of every method, of one that adapts some maps, and its own.

    Attributes:
      lr_gains: learning rate of the factors.
      first_gain: value that all factors start from.
    """

    lr_gains: float = 0.02
    first_gain: float = 1.0


@dataclasses.dataclass(frozen=True)
class Gains(lf.Method):
    """One factor for each matrix; `sites` has name, number of layers and outputs of the adapted linear maps."""

    sites: tuple[tuple[str, int, int], ...]
    first: float = 1.0

    def init(
        self, frozen, index, key
    ):  # groups of numbers; each has the learning rate `lr_GROUP` of the recipe
        return {
            "gains": {
                name: jnp.full(layers, self.first) for name, layers, _ in self.sites
            }
        }

    def adapters(
        self, params, frozen, index
    ):  # what the model reads next to its kernels, and metrics
        gains = params["gains"]
        return {
            name: lf.Rescaled(jnp.tile(gains[name][:, None], (1, d_out)))
            for name, _, d_out in self.sites
        }, {}


def build(built):
    return Gains(
        tuple((name, site.layers, site.d_out) for name, site in built.sites),
        built.recipe.first_gain,
    )


GAINS = lf.MethodEntry(
    name="gains",
    help="train one factor for each matrix",
    title="gains from {first_gain:g}",  # of its row in `lorafusion params`
    build=build,
    recipe=GainsRecipe,
    groups=("gains",),
    cost_layouts=lambda recipe, rank: {
        "gains": lf.CostLayout()
    },  # its row in costs: nothing in arrays
)


def main(out: Path, **changes: Any) -> dict[str, float]:
    lf.register(GAINS)
    scores = {}
    for method in ("zero-shot", "gains", "magnitudes"):
        task = str(SMALL / "tasks" / "sort_next2")
        options = lf.FuseOptions(
            base=str(SMALL / "base"), task=task, method=method, out=out, name=method
        )
        results = lf.fuse(dataclasses.replace(options, **changes))
        scores[method] = results.exact_match
        print(
            f"{method:10} {results.trainable:6,} numbers, {scores[method]:5.1f} % exact match"
        )
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
