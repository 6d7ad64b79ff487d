"""A fusion whose weights are in arrays: base kernels, head and modules (A and B, or U and V of a shared basis).

Embeddings, norms, softmax, coefficients, magnitudes and S of a basis stay digital, and so does a tied head.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from ..adapters.norms import PairTerms, gram, norms
from ..adapters.pool import LoraPool
from ..crossbar import (
    Correction,
    Preparation,
    Rules,
    chips_in,
    program_tree,
    with_chips,
    with_corrections,
)
from ..models.architecture import kernels, matrices, set_matrices
from ..models.weights import dense
from ..support.reading import error_context
from ..training.mesh import axis_size
from ..training.method import Frozen

# Weights that the magnitudes' norms are computed from: those on the chip, which have to be read back, or their targets.
Norms = Literal["programmed", "ideal"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Restored:
    """Digital corrections of one chip, and its converters' ranges, by the names of its weights (`crossbar.place`)."""

    corrections: dict[str, Correction]
    ranges: dict[str, dict[str, Array]]
    folder: str = dataclasses.field(
        default="the corrections", metadata={"static": True}
    )

    def on(self, weights: Any) -> Any:
        """Return a tree of weights with these corrections and ranges on its chips; other chips keep theirs.

        Raises a ValueError that names the folder of corrections that do not fit the chips.
        """
        with error_context(self.folder):
            for chip in chips_in(weights):
                for part, values in self.ranges.get(chip.name, {}).items():
                    lead = chip.shape[:-2]
                    if values.shape[: len(lead)] != lead or values.ndim != len(lead) + (
                        3 if part == "limits" else 0
                    ):
                        raise ValueError(
                            f"{part} of {chip.name!r} in the corrections has the shape {values.shape}, not that of "
                            f"{math.prod(lead)} matrices: run `lorafusion restore` again"
                        )
            weights = with_corrections(weights, self.corrections)
        ranged = [
            dataclasses.replace(chip, **self.ranges.get(chip.name, {}))
            for chip in chips_in(weights)
        ]
        return with_chips(weights, ranged)


def program(
    graph: nnx.GraphDef,
    frozen: Frozen,
    rules: Rules,
    key: Array,
    *,
    modules: Int[Array, " P"] | None = None,
    norm: Norms = "programmed",
    restored: Restored | None = None,
) -> Frozen:
    """Write the weights that rules name into arrays.

    Paths: the name of a site, `head`, `pool.A.SITE` and `pool.B.SITE`, or `pool.U.SITE` and `pool.V.SITE`.

    Args:
      graph: structure of the model.
      frozen: digital weights, quantised or not.
      rules: path pattern -> configuration, or None for digital (see `crossbar.program_tree`).
      key: key of the chip, which determines it; may be vmapped over.
      modules: numbers of the pool's modules on a chip with more modules.
      norm: weights that the magnitudes' norms are computed from.
      restored: digital corrections of the base's chips.

    Raises:
      ValueError: a pattern matches nothing, a weight cannot be programmed, or all weights are digital although there
        are arrays.
    """
    check_no_split(axis_size("model"))
    # A copy of the state: merged models share its variables, and the digital one must stay as it is.
    model = nnx.merge(graph, jax.tree.map(lambda weight: weight, frozen.base))
    pool = frozen.pool
    base = {
        name: dense(weight, jnp.float32) for name, weight in matrices(model).items()
    }
    factors = {} if pool is None else pool.factors
    factors = {
        factor: {s: dense(w, jnp.float32) for s, w in by_site.items()}
        for factor, by_site in factors.items()
    }
    if pool is None:  # chips may be for fusions too
        rules = {
            pattern: config
            for pattern, config in rules.items()
            if not pattern.startswith("pool.")
        }
    indices = None
    # The arrays of a module are those of its number on the chip, in every layer.
    if modules is not None and isinstance(pool, LoraPool):
        indices = {
            f"pool.{factor}.{site}": (jnp.arange(len(w)), modules)
            for factor, sites in factors.items()
            for site, w in sites.items()
        }
    preparations = _with_pool(frozen.preparations or {}, factors)
    write = functools.partial(
        program_tree, rules=rules, key=key, indices=indices, preparations=preparations
    )
    weights_to_write = base | ({"pool": factors} if factors else {})

    if restored is None:
        placed = write(weights_to_write)
    else:  # what does not fit is refused before anything is written
        jax.eval_shape(
            lambda weights: len(restored.on(write(weights))), weights_to_write
        )
        placed = restored.on(write(weights_to_write))
    if any(config is not None for config in rules.values()) and not chips_in(placed):
        raise ValueError(
            f"the digital weights {', '.join(map(repr, rules))} leave none for arrays: name fewer"
        )
    factors = placed.pop("pool", None)
    set_matrices(model, placed)
    _, state = nnx.split(model)
    programmed = dataclasses.replace(frozen, base=state, preparations=None)
    if frozen.norms is not None and norm == "programmed":
        adapted = {
            site: kernel
            for site, kernel in kernels(model, frozen.norms).items()
            if site in frozen.norms
        }
        programmed = dataclasses.replace(programmed, norms=jax.jit(norms)(adapted))
    if pool is None or factors is None:
        return programmed
    in_arrays = dataclasses.replace(pool, **factors)
    programmed = dataclasses.replace(programmed, pool=in_arrays)
    if norm == "ideal":
        terms = frozen.gram
        if isinstance(terms, PairTerms):
            terms = jax.jit(gram)(
                pool, kernels(nnx.merge(graph, frozen.base), pool.sites)
            )
        return dataclasses.replace(
            programmed, gram=terms and dataclasses.replace(terms, modules=pool)
        )
    return dataclasses.replace(
        programmed, gram=jax.jit(gram)(in_arrays, kernels(model, pool.sites))
    )


def check_no_split(devices: int) -> None:
    """Raise a ValueError if so many devices would share out each matrix, which is whole on a chip."""
    if devices > 1:
        raise ValueError(
            f"--mesh model={devices} would split matrices over devices, but chips are whole: give seed alone"
        )


def _with_pool(
    preparations: Mapping[str, Preparation], factors: Mapping[str, Mapping[str, Array]]
) -> dict[str, Preparation]:
    """Return the preparations of the base and of a pool: A and U meet the inputs of their sites, B and V others."""
    all_preparations = dict(preparations)
    for factor, sites in factors.items() if preparations else ():
        for site, weights in sites.items():
            preparation = Preparation()
            if factor in ("A", "U") and site in preparations:
                site_preparation = preparations[site]
                shape = (weights.shape[0], *[1] * (weights.ndim - 3), weights.shape[-2])
                wide = site_preparation.factors
                if wide is not None:
                    wide = jnp.broadcast_to(wide.reshape(shape), weights.shape[:-1])
                preparation = dataclasses.replace(
                    site_preparation, factors=wide, ranges=None
                )
            all_preparations[f"pool.{factor}.{site}"] = preparation
    return all_preparations
