"""A bank of tasks: fused runs as arrays, in a model that computes batches whose rows belong to different tasks.

With A and B all modules of the bank side by side, row b of task t has at every adapted site

    sum:  y_b = s_t * (x_b W + ((x_b A) * c_t) B)
    mix:  the same, but x_b A_n c_n is summed over the modules n, and the sum times c_n is what B_n multiplies

where s = m / ||W + dW|| is computed once, when the task is added. All rows share two products with the modules, so the
cost does not depend on the number of tasks. Modules in arrays are read one by one.

In a shared basis a row has the core C_t = sum_n c_tn S_n [k, k]:
y_b = s_t * (x_b W + ((x_b U) C_t) V). The cores are mixed from the table S_n once for a batch.

Axis letters: C tasks of the bank, B rows of a batch, L layer, N modules of the bank, r rank, k directions, T target,
V vocabulary.
"""

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ..adapters import coefficients as coefficients_lib
from ..adapters.basis import Pool, SharedBasis
from ..adapters.coefficients import GRANULARITIES, Granularity
from ..adapters.norms import Gram, gram
from ..adapters.pool import LoraPool
from ..adapters.updates import side_by_side
from ..methods.base_alone import Magnitudes, with_norms
from ..methods.fusion import Fusion
from ..models.architecture import kernels
from ..models.generate import GREEDY, Sampling, generate
from ..models.weights import Weight, is_in_arrays
from ..support.checks import at_least
from ..tasks import Batch
from ..training.loss import batch_logits, log_likelihood
from ..training.method import Adapted, Frozen, Index, Method, Params
from ..training.problem import Problem
from .rows import RowAdapter, RowCores, RowModules


class Tasks(NamedTuple):
    """Numbers of all tasks. The last entry is the plain base, and so is that of a number without a task.

    Attributes:
      coefficients: [C + 1, N, ...] in the bank's granularity; None without a pool.
      mixes: [C + 1], whether the composition is `mix`.
      scales: site -> [C + 1, L, d_out], of the sites whose columns any task rescales.
    """

    coefficients: Float[Array, "_C N ..."] | None
    mixes: Bool[Array, " _C"]
    scales: dict[str, Float[Array, "_C _L _d_out"]]


@dataclasses.dataclass(frozen=True)
class RowTasks(Method):
    """The adapters of rows that belong to different tasks of a bank, whose `Tasks` are precomputed.

    Group `tasks`: [B], the number of each row's task; -1 for the plain base.

    Attributes:
      granularity: granularity of the stored coefficients.
    """

    granularity: Granularity

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        return {"tasks": jnp.full(1, -1)}

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        tasks: Tasks = frozen.precomputed
        pool = frozen.pool
        row_tasks = jax.tree.map(lambda leaf: leaf[params["tasks"]], tasks)
        scale = {
            site: jnp.swapaxes(scales, 0, 1)
            for site, scales in row_tasks.scales.items()
        }
        modules: dict[str, RowModules | RowCores] = {}
        coefficients = {}
        if pool is not None:
            expand = partial(
                coefficients_lib.expand, pool=pool, granularity=self.granularity
            )
            coefficients = jax.vmap(expand, out_axes=1)(row_tasks.coefficients)
        if isinstance(pool, SharedBasis):
            for site, c in coefficients.items():
                core = jnp.einsum(
                    "lbn,lnij->lbij", c[..., 0], pool.S[site], precision="highest"
                )
                modules[site] = RowCores(pool.U[site], pool.V[site], core)
        elif pool is not None:
            in_arrays = is_in_arrays((pool.A, pool.B))
            for site, c in coefficients.items():
                A = pool.A[site]
                B = pool.B[site]
                if in_arrays:  # ranks that a module lacks have no cells: padding must not add their noise
                    real = jnp.arange(A.shape[-1])[None, None, None] < jnp.expand_dims(
                        pool.rank[site], (1, 3)
                    )
                    c = jnp.where(real, c, jnp.zeros_like(c))
                else:
                    A, B = side_by_side(A, B)
                mixes = jnp.broadcast_to(row_tasks.mixes, (c.shape[0], c.shape[1]))
                modules[site] = RowModules(A, B, c, mixes, in_arrays)
        return {
            site: RowAdapter(modules.get(site), scale.get(site))
            for site in {**modules, **scale}
        }, {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskBank:
    """A model, a pool, and the tasks that share them: a pytree, so it is an argument of compiled programs.

    Tasks are numbered from 0. Replacing a task compiles nothing. `Service` gives tasks names.

    Attributes:
      graph: structure of the model, of `nnx.split(model)`.
      frozen: base and pool with the modules of all tasks; either may be quantised or on a chip.
      tasks: numbers of the tasks.
      granularity: granularity of the stored coefficients. Coarser ones of a task are repeated.
    """

    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    frozen: Frozen
    tasks: Tasks
    granularity: Granularity = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        graph: nnx.GraphDef,
        frozen: Frozen,
        capacity: int,
        *,
        granularity: Granularity = "block",
        scaled: Collection[str] = (),
    ) -> "TaskBank":
        """Return a bank without tasks.

        Args:
          graph: structure of the model.
          frozen: base and pool; missing Gram terms of the pool are computed if any columns are scaled.
          capacity: number of tasks that there is room for.
          granularity: the finest that a task's coefficients may have.
          scaled: sites whose columns tasks may rescale; none for coefficients alone.

        Raises:
          ValueError: there is no room for a task.
        """
        at_least(1, capacity=capacity)
        model = nnx.merge(graph, frozen.base)
        sites = model.config.adaptable
        coefficients = None
        pool = frozen.pool
        if not scaled:
            frozen = dataclasses.replace(frozen, gram=None, norms=None)
        elif pool is not None and not isinstance(frozen.gram, Gram):
            frozen = dataclasses.replace(
                frozen, gram=jax.jit(gram)(pool, kernels(model, pool.sites))
            )
        if pool is not None:
            shape = coefficients_lib.shape(pool, len(pool), granularity)
            coefficients = jnp.zeros((capacity + 1, *shape), jnp.float32)
        scales = {
            site: jnp.ones((capacity + 1, sites[site].layers, sites[site].d_out))
            for site in scaled
        }
        tasks = Tasks(coefficients, jnp.zeros(capacity + 1, bool), scales)
        return cls(graph=graph, frozen=frozen, tasks=tasks, granularity=granularity)

    @property
    def capacity(self) -> int:
        """Number of tasks that there is room for."""
        return self.tasks.mixes.shape[0] - 1

    def with_task(
        self,
        number: int,
        method: Method,
        params: Params,
        modules: Sequence[str | int] = (),
        *,
        sites: Collection[str] | None = None,
    ) -> "TaskBank":
        """Return the bank with a task of this number, which replaces an earlier one.

        Args:
          number: number of the task.
          method: a `Fusion`, or `Magnitudes`.
          params: its trained parameters, of one seed.
          modules: modules that a fusion mixes, in the order of its coefficients: names in the bank's pool, or places.
          sites: sites of the whole modules that a fusion was trained with; by default those of its magnitudes, else the
            bank's.

        Raises:
          ValueError: no such number; a method, modules, a granularity or magnitudes that the bank cannot hold.
        """
        self._check_number(number)
        if type(method) not in (
            Fusion,
            Magnitudes,
        ):  # a method that extends them may read its numbers otherwise
            raise ValueError(
                f"a bank holds fusions, and magnitudes alone, not {type(method).__name__}: merge that one"
            )
        index = jnp.zeros(0, jnp.int32)
        task_pool = self.frozen.pool
        if isinstance(method, Fusion):
            index, task_pool = self._placed(method, params, modules, sites)
        if extra := params.get("magnitudes", {}).keys() - self.tasks.scales.keys():
            raise ValueError(
                f"the task has magnitudes at {', '.join(sorted(extra))}, and the bank rescales "
                f"{', '.join(sorted(self.tasks.scales)) or 'no site'}: make the bank with these sites as `scaled`"
            )
        frozen = self.frozen
        if (
            isinstance(method, Magnitudes)
            and params["magnitudes"].keys() - (frozen.norms or {}).keys()
        ):
            frozen = with_norms(
                frozen,
                kernels(nnx.merge(self.graph, frozen.base), params["magnitudes"]),
                params["magnitudes"],
            )
        entry = _entry(
            self.tasks,
            nameless(frozen),
            params,
            index,
            _unnamed(task_pool),
            method=method,
            granularity=self.granularity,
        )
        return dataclasses.replace(self, tasks=_replaced(self.tasks, number, entry))

    def without_task(self, number: int) -> "TaskBank":
        """Return the bank without a task: the plain base serves its number."""
        self._check_number(number)
        return dataclasses.replace(
            self, tasks=_replaced(self.tasks, number, _plain(self.tasks))
        )

    def with_modules_of(self, numbers: Int[np.ndarray, "..."]) -> "TaskBank":
        """Return the bank with only the modules that the tasks of these numbers use, up to the next power of two.

        A shared basis, and modules in arrays, stay whole.
        """
        pool = self.frozen.pool
        c = self.tasks.coefficients
        if (
            not isinstance(pool, LoraPool)
            or c is None
            or is_in_arrays((pool.A, pool.B))
        ):
            return self
        used = np.any(np.asarray(c)[numbers] != 0, axis=(0, *range(2, c.ndim)))
        room = 1 << max(int(np.sum(used)) - 1, 0).bit_length()
        if room >= len(pool):
            return self
        index = np.sort(
            np.argsort(~used, kind="stable")[:room]
        )  # modules beyond the used ones have zeros
        frozen = dataclasses.replace(
            self.frozen, pool=_unnamed(pool.select(index.tolist())), gram=None
        )
        return dataclasses.replace(
            self, frozen=frozen, tasks=self.tasks._replace(coefficients=c[:, index])
        )

    @property
    def problem(self) -> Problem:
        """Return the bank as a problem whose parameters are the group `tasks`, the numbers of the rows' tasks."""
        return Problem(
            graph=self.graph,
            method=RowTasks(self.granularity),
            frozen=dataclasses.replace(self.frozen, precomputed=self.tasks),
            index=jnp.zeros(0, jnp.int32),
            seed_mode="sequential",
        )

    @jax.jit
    def logits(self, batch: Batch, numbers: Int[Array, " B"]) -> Float[Array, "B T V"]:
        """Return the logits that predict each label; the arguments are those of `generate`."""
        return batch_logits({"tasks": numbers}, batch, self.problem)[0]

    @jax.jit
    def log_likelihoods(
        self, batch: Batch, numbers: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        """Return the log-probability of every row's labels, in nats; the arguments are those of `generate`."""
        return log_likelihood(self.logits(batch, numbers), jnp.asarray(batch.labels))

    def generate(
        self,
        batch: Batch,
        numbers: Int[Array | np.ndarray, " B"],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        row_keys: Key[Array, " B"] | None = None,
    ) -> Int[Array, "B _T"]:
        """Return at most so many next tokens of each row (see `models.generate`).

        The number of the plain base is -1. Rows draw with their keys.
        """
        bank = dataclasses.replace(self, frozen=self.frozen.per_layer())
        return _generate(
            bank,
            batch,
            numbers,
            row_keys,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.capacity:
            raise ValueError(
                f"no task {number} in a bank of capacity {self.capacity}: give 0 to {self.capacity - 1}"
            )

    def _placed(
        self,
        method: Fusion,
        params: Params,
        modules: Sequence[str | int],
        sites: Collection[str] | None,
    ) -> tuple[Int[Array, " N"], Pool]:
        """Return the places of a fusion's modules in the pool, and a pool that gives its coefficients their shape.

        That is the bank's, or one of other sites or ranks. Raises the errors of `with_task`.
        """
        pool = self.frozen.pool
        if pool is None:
            raise ValueError(
                "the bank has no pool, so it holds magnitudes alone: make it from a Frozen with a pool"
            )
        index = jnp.array(pool.indices(modules), jnp.int32)
        if GRANULARITIES.index(method.granularity) > GRANULARITIES.index(
            self.granularity
        ):
            raise ValueError(
                f"coefficients of the granularity {method.granularity} do not fit into a bank of the granularity "
                f"{self.granularity}: make the bank with granularity={method.granularity!r}"
            )
        task_pool = pool
        chosen = pool
        got = jnp.shape(params["coefficients"])
        if isinstance(pool, LoraPool):
            # Modules of other tasks may differ from these in rank.
            chosen = dataclasses.replace(pool, A={}, B={}).select(modules)
            adapted_sites = set(
                params.get("magnitudes", pool.rank) if sites is None else sites
            )
            padded = method.granularity == "rank" and len(got) == 3
            if adapted_sites != pool.rank.keys() or (
                padded and got != coefficients_lib.shape(pool, got[0], "rank")
            ):
                config = nnx.merge(self.graph, self.frozen.base).config
                layers = {
                    name: site.layers
                    for name, site in config.adaptable.items()
                    if name in adapted_sites
                }
                width = got[2] if padded else 0
                nothing: dict[str, Weight] = {
                    site: jnp.zeros((depth, 0, width, 0))
                    for site, depth in layers.items()
                }
                rank = {
                    site: jnp.zeros((depth, 0), jnp.int32)
                    for site, depth in layers.items()
                }
                task_pool = LoraPool(A=nothing, B=nothing, rank=rank, names=())
        method.check(chosen)
        if lacks := sorted(
            {site for site, rank in chosen.rank.items() if np.any(rank)}
            - task_pool.rank.keys()
        ):
            raise ValueError(
                f"the fusion has no numbers for {', '.join(lacks)}, which modules adapt: give all sites"
            )
        needed = coefficients_lib.shape(task_pool, len(modules), method.granularity)
        if got != needed:
            raise ValueError(
                f"expected coefficients of shape {needed}, of one seed, got {got}"
            )
        if method.granularity == "rank" and got[2] < (
            most := max(int(np.max(r)) for r in chosen.rank.values())
        ):
            raise ValueError(
                f"coefficients for {got[2]} ranks of modules of rank {most}: give one for each"
            )
        if (
            pool.magnitude is not None
            and not pool.rank.keys() <= self.tasks.scales.keys()
        ):
            raise ValueError(
                "the pool has a DoRA adapter's magnitudes: make the bank with its sites as `scaled`"
            )
        return index, task_pool


def nameless(frozen: Frozen) -> Frozen:
    """Return the weights with the same names for all modules, because names are part of a compiled program's key."""
    return dataclasses.replace(frozen, pool=_unnamed(frozen.pool))


def _unnamed(pool: Pool | None) -> Pool | None:
    return pool and dataclasses.replace(pool, names=("",) * len(pool))


@partial(jax.jit, static_argnames=("max_new_tokens", "sampling"))
def _generate(
    bank: TaskBank,
    batch: Batch,
    numbers: Int[Array, " B"],
    row_keys: Key[Array, " B"] | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Int[Array, "B _T"]:
    model, adapters, _ = bank.problem.adapted_model({"tasks": numbers})
    return generate(
        model,
        batch.input_ids,
        batch.input_mask,
        adapters,
        max_new_tokens=max_new_tokens,
        row_mask=batch.row_mask,
        sampling=sampling,
        row_keys=row_keys,
    )


@partial(jax.jit, static_argnames=("method", "granularity"))
def _entry(
    tasks: Tasks,
    frozen: Frozen,
    params: Params,
    index: Int[Array, " N"],
    task_pool: Pool | None,
    *,
    method: Fusion | Magnitudes,
    granularity: Granularity,
) -> Tasks:
    """Return a task's numbers as a bank stores them; its coefficients have the shape that `task_pool` gives."""
    entry = _plain(tasks)
    pool = frozen.pool
    if isinstance(method, Fusion):
        assert (
            pool is not None
            and task_pool is not None
            and entry.coefficients is not None
        )
        both = pool
        if isinstance(pool, LoraPool) and task_pool.rank.keys() != pool.rank.keys():
            # Elsewhere no module of the task acts, and magnitudes are the base's own norms.
            sites = tuple(
                site
                for site in pool.sites
                if site in pool.rank and site in task_pool.rank
            )
            both = dataclasses.replace(
                pool,
                A={site: pool.A[site] for site in sites},
                B={site: pool.B[site] for site in sites},
                rank={site: pool.rank[site] for site in sites},
                scaling=None,
                sites=sites,
            )
            if "magnitudes" in params:
                magnitudes = {site: params["magnitudes"][site] for site in sites}
                params = params | {"magnitudes": magnitudes}
            frozen = dataclasses.replace(frozen, pool=both)
        c = coefficients_lib.refined(
            params["coefficients"],
            task_pool,
            method.granularity,
            method.granularity,
            both,
        )
        params = params | {"coefficients": c}
        c = coefficients_lib.refined(c, both, method.granularity, granularity, pool)
        entry = entry._replace(
            coefficients=entry.coefficients.at[index].set(c),
            mixes=jnp.array(method.composition == "mix"),
        )
    if "magnitudes" in params or (
        isinstance(method, Fusion) and pool is not None and pool.magnitude is not None
    ):
        adapters, _ = method.adapters(params, frozen, index)
        entry = entry._replace(
            scales=entry.scales
            | {site: adapter.scale for site, adapter in adapters.items()}
        )
    return entry


def _plain(tasks: Tasks) -> Tasks:
    """Return the entry of the plain base."""
    return jax.tree.map(lambda leaf: leaf[-1], tasks)


@jax.jit
def _replaced(tasks: Tasks, number: int | Array, entry: Tasks) -> Tasks:
    return jax.tree.map(lambda leaf, new: leaf.at[number].set(new), tasks, entry)
