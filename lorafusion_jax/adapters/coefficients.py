"""Fusion coefficients: their granularity, their initial values, and those that affect the model.

Columns of `block` are the blocks of one stack after the other. Columns of `site` go block by block and, within a
block, in the order of computation.

Axis letters: L layer, N adapters, r rank.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..models.architecture import stack_of
from .basis import Pool, SharedBasis

Granularity = Literal["global", "block", "site", "rank"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)  # from coarse to fine
Start = Literal["xavier", "uniform", "twice", "zeros"]


def shape(pool: Pool, modules: int, granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of the coefficients of `modules` adapters of a pool.

    `global` [N], `block` [N, blocks], `site` [N, sites x layers], `rank` [N, sites x layers, r]; the last one raises a
    ValueError in a shared basis, which mixes the ranks.
    """
    columns = () if granularity == "global" else (len(column_names(pool, granularity)),)
    ranks = (
        (max(_rank(pool, site) for site in pool.rank),) if granularity == "rank" else ()
    )
    return (modules, *columns, *ranks)


def initial(shape: tuple[int, ...], start: Start, key: Array) -> Float[Array, "..."]:
    """Return the initial coefficients.

    `xavier` is uniform within sqrt(6 / (N + columns)) as in the paper's code; `uniform` 1 / N each; `twice` 2 / N each;
    `zeros` is for `sum` only (`mix` has no gradient there).
    """
    if start == "xavier":
        bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return jnp.full(
        shape, {"uniform": 1, "twice": 2, "zeros": 0}[start] / shape[0], jnp.float32
    )


def expand(
    values: Float[Array, "..."], pool: Pool, granularity: Granularity
) -> dict[str, Float[Array, "_L N _k"]]:
    """Return every site's coefficients, per layer and module (k = 1) or, for `rank`, also per rank (k = r)."""
    columns = _columns(pool, granularity)
    expanded = {}
    for site, rank in pool.rank.items():
        if granularity == "global":
            spread = jnp.broadcast_to(values[None, :], (rank.shape[0], values.shape[0]))
        else:
            spread = jnp.swapaxes(values[:, columns[site]], 0, 1)
        if granularity == "rank":
            expanded[site] = spread[:, :, : _rank(pool, site)]
        else:
            expanded[site] = spread[:, :, None]
    return expanded


def refined(
    coefficients: Float[Array, "..."],
    pool: Pool,
    granularity: Granularity,
    to: Granularity,
    into: Pool | None = None,
) -> Float[Array, "..."]:
    """Return the coefficients of a pool in another granularity `to`, as fine or finer (see `GRANULARITIES`).

    `into` is the pool that gives the result its shape, by default the same. Sites that it lacks are left out, and those
    that only it has get zeros.
    """
    into = pool if into is None else into
    if granularity == to and (into is pool or to == "global"):
        return coefficients
    finer = jnp.zeros(shape(into, coefficients.shape[0], to), coefficients.dtype)
    columns = _columns(into, to)
    for site, spread in expand(coefficients, pool, granularity).items():
        if site not in columns:
            continue
        by_column = jnp.swapaxes(spread, 0, 1)
        if granularity == "rank":  # padding may be of another width
            ranks = min(by_column.shape[2], finer.shape[2])
            finer = finer.at[:, columns[site], :ranks].set(by_column[:, :, :ranks])
        else:
            finer = finer.at[:, columns[site]].set(
                by_column if to == "rank" else by_column[:, :, 0]
            )
    return finer


def present(
    pool: Pool, index: Int[Array, " N"], granularity: Granularity
) -> Bool[Array, "..."]:
    """Return which coefficients affect the model; the others are neither counted nor penalised."""
    shape_ = shape(pool, index.shape[0], granularity)
    columns = _columns(pool, granularity)
    acting = jnp.zeros(shape_, bool)
    for site, rank in pool.rank.items():
        ranks = rank[:, index].T
        if granularity == "global":
            acting = acting | jnp.any(ranks > 0, axis=1)
        elif granularity == "rank":
            real = jnp.arange(shape_[2])[None, None, :] < ranks[:, :, None]
            acting = acting.at[:, columns[site]].max(real)
        else:
            acting = acting.at[:, columns[site]].max(ranks > 0)
    return acting


def column_names(pool: Pool, granularity: Granularity) -> list[str]:
    """Return a label for each column, for plots and tables."""
    sites = [site for site in pool.sites if site in pool.rank]
    depths = {stack_of(site): pool.rank[site].shape[0] for site in sites}
    blocks = [
        (stack, layer) for stack, depth in depths.items() for layer in range(depth)
    ]
    every = [
        _label(site, layer, granularity)
        for stack, layer in blocks
        for site in sites
        if stack_of(site) == stack
    ]
    return [*dict.fromkeys(every)]


def _label(site: str, layer: int, granularity: Granularity) -> str:
    stack, _, name = site.partition(".")
    return {"global": "all", "block": f"{stack}.{layer}"}.get(
        granularity, f"{stack}.{layer}.{name}"
    )


def _columns(pool: Pool, granularity: Granularity) -> dict[str, np.ndarray]:
    """Return the column of each layer, by site."""
    place = {name: i for i, name in enumerate(column_names(pool, granularity))}
    return {
        site: np.array(
            [place[_label(site, layer, granularity)] for layer in range(rank.shape[0])]
        )
        for site, rank in pool.rank.items()
    }


def _rank(pool: Pool, site: str) -> int:
    if isinstance(pool, SharedBasis):
        raise ValueError(
            "a shared basis mixes the modules' ranks: use the granularity global, block or site"
        )
    return jax.tree.leaves(pool.B[site])[0].shape[2]
