"""Counts of every method's work for one task and for one token: cells, reads of arrays, digital operations.

Base kernels and an untied head sit in arrays, as `hardware.program` puts them there; forward, frozen matrices are read
from arrays. Arrays are not read transposed: backward, and for weights that change (a LoRA in training, full
fine-tuning), products are digital, as many as `estimates.flops` counts. Embeddings, norms and softmax are left out.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ...crossbar import Counts, CrossbarConfig, counts
from ...crossbar.cost.energy import preparing
from ...methods.entry import Matrix, Update, module
from ...methods.recipes import recipe_of
from ...models.architecture import (
    Architecture,
    Site,
    sharing_inputs,
    stack_of,
    targeted,
)
from ...tasks import batch_orders, bucket, split
from ...training.recipe import Recipe
from ..flops import (
    Shape,
    adapted,
    forward_flops,
    head_flops,
    products,
    row_tokens,
    step_flops,
    tokens,
)
from .methods import BilledMethod, base_matrices, methods
from .options import CostOptions

_OPTIMISER_WORDS = (
    7  # Adam reads the gradient, the number and two moments, and writes the last three
)


class Work(NamedTuple):
    """Counts of operations."""

    reads: Counts  # of arrays
    macs: float  # digital multiply-adds
    words: float  # 32-bit words read from memory or written to it, without the operands of matrix products in training


class Standing(NamedTuple):
    """Matrices and tables that exist before any task."""

    counts: Counts  # of the matrices in arrays
    words: int = 0  # words of the tables that training reads
    macs: int = 0  # digital multiply-adds of making them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activity(BilledMethod):
    """A method with the counts of its work."""

    method: str
    written: (
        Counts  # cells of the task's own matrices; a programming pass writes them all
    )
    adapters: Counts  # counts of the arrays that hold the adapters, written for this task or earlier
    # work of the base's forward passes in training, and of its backward passes if there are gradients
    base_training: Work
    update_training: Work  # work that the method adds to that
    source: Work  # work of one source token at inference
    generated: Work  # work of one generated token at inference
    # dependent products of a generated token: chains of matrices that run in parallel -> number of such stages
    stages: Mapping[frozenset[tuple[Matrix, ...]], int]


def activities(
    config: Architecture, crossbar: CrossbarConfig, options: CostOptions
) -> list[Activity]:
    """Return the counts of every method for one task; the shape and arrays in the options are not used."""
    recipe = recipe_of(Recipe, options.numbers)
    row = Shape(1, options.source, options.target)
    rows = split(options.train_rows, (0,), limit=options.train_rows)
    (order,) = batch_orders(rows.train, batch_size=recipe.batch_size)
    padded = Shape(order.shape[1], bucket(options.source), bucket(options.target))
    # Training packs its rows, so it computes real tokens alone.
    work = {
        "steps": Counter(
            [row._replace(rows=int(np.sum(step >= 0))) for step in order]
            * recipe.epochs
        ),
        "validation": Counter(
            {row._replace(rows=rows.validation.shape[1]): recipe.epochs}
        ),
        "search": Counter({padded: len(order)}),
    }
    of_methods = []
    for name, method in methods(config, options, steps=work["steps"].total()).items():
        place = _shared if method.shared else _standing
        sites = adapted(config, method.update)
        adapters = (
            place(sites, method.matrices, crossbar)
            if method.stays_in == "arrays"
            else Counts()
        )
        written = _of_base(config, crossbar) if method.update.trains_base else adapters
        base_training, update_training = _training(method, config, crossbar, work)
        activity = Activity(
            **vars(method),
            method=name,
            written=written if method.passes else Counts(),
            adapters=adapters,
            base_training=base_training,
            update_training=update_training,
            source=_token(method, config, crossbar, row, output=False),
            generated=_token(method, config, crossbar, row, output=True),
            stages=_stages(method, config),
        )
        of_methods.append(activity)
    return of_methods


def installed_once(
    config: Architecture, crossbar: CrossbarConfig, options: CostOptions
) -> dict[str, Standing]:
    """Return the matrices that are written once, before any task, with the tables that are computed from them.

    Tables are the norm's terms: A_n^T W of whole modules, U^T W of a basis, and ||W||^2. A basis has all S_n too, whose
    own computation is left out.
    """
    sites = targeted(config, options.targets)
    P = options.stored
    r = options.rank

    def standing(rank: int, matrices: Counts, cores: int = 0) -> Standing:
        """Return matrices with the terms of the norms of updates of a rank."""
        terms = [
            (site.layers * (rank + 1) * site.d_out, site.d_in)
            for site in sites.values()
        ]
        words = sum(count for count, _ in terms)
        macs = sum(count * d_in for count, d_in in terms)
        return Standing(matrices, words + cores, macs)

    installed = {
        "base": Standing(_of_base(config, crossbar)),
        f"pool of {P}, each module on its own": standing(
            P * r, _standing(sites, module(r), crossbar) * P
        ),
        f"pool of {P}, side by side": standing(
            P * r, _standing(sites, module(P * r), crossbar)
        ),
        "VeRA's random matrices": Standing(
            _shared(sites, module(options.vera_rank), crossbar)
        ),
    }
    cores = sum(site.layers for site in sites.values()) * P
    for k in options.bases:
        installed[f"basis of {k} of {P} modules"] = standing(
            k, _standing(sites, module(k), crossbar), cores * k**2
        )
    return installed


def _training(
    method: BilledMethod,
    config: Architecture,
    crossbar: CrossbarConfig,
    work: dict[str, Counter[Shape]],
) -> tuple[Work, Work]:
    """Return the work of the base's passes and the work that the method adds, until the task is learned."""
    none: Counter[Shape] = Counter()
    if method.evaluations:
        searched = Counter(
            {shape: n * method.evaluations for shape, n in work["search"].items()}
        )
        return _passes(method, config, crossbar, none, searched)
    of_passes = [_passes(method, config, crossbar, work["steps"], work["validation"])]
    if method.ranking is not None:
        of_passes.append(
            _passes(method.ranking, config, crossbar, work["search"], none)
        )
    base = _together([of_base for of_base, _ in of_passes])
    update = _together([of_update for _, of_update in of_passes])
    return base, update


def _together(works: list[Work]) -> Work:
    return Work(
        _sum(work.reads for work in works),
        sum(work.macs for work in works),
        sum(work.words for work in works),
    )


def _passes(
    method: BilledMethod,
    config: Architecture,
    crossbar: CrossbarConfig,
    steps: Counter[Shape],
    forward: Counter[Shape],
) -> tuple[Work, Work]:
    """Return the work of the base, and the work that a method adds, of training steps and of forward passes alone."""
    none = Update()
    update = method.update
    sites = adapted(config, method.update)

    def flops(update: Update, trainable: int) -> float:
        trained = sum(
            n * step_flops(config, shape, update, trainable=trainable)
            for shape, n in steps.items()
        )
        return trained + sum(
            n * forward_flops(config, shape, update) for shape, n in forward.items()
        )

    base_flops = flops(none, 0)
    update_flops = flops(update, method.trainable) - base_flops
    base_reads = update_reads = Counts()
    if not update.trains_base:
        for shape, n in (steps + forward).items():
            base_reads += _read_base(config, crossbar, shape) * n
            base_flops -= n * products(config.sites.values(), shape)
            if not config.tied:
                base_reads += counts(config.head, crossbar) * (
                    n * shape.rows * shape.target
                )
                base_flops -= n * head_flops(config, shape)
            if method.trains_in == "arrays":
                update_reads += _read(sites, method.matrices, crossbar, shape) * n
                in_arrays = _of_tokens(
                    sites, lambda s: update.width(s, 1) * (s.d_in + s.d_out), shape
                )
                update_flops -= 2 * n * in_arrays
    macs = update_flops / 2
    if method.evaluations:  # the arrays' outputs are mixed, where `estimates.flops` counts mixing the weights
        macs = float(
            sum(
                n * _of_tokens(sites, method.macs, shape)
                for shape, n in forward.items()
            )
        )
    tables = sum(site.layers * method.tables(site) for site in sites.values())
    words = (
        _OPTIMISER_WORDS * method.trainable * steps.total()
        + tables * (steps + forward).total()
    )
    return Work(base_reads, base_flops / 2, 0), Work(update_reads, macs, words)


def _token(
    method: BilledMethod,
    config: Architecture,
    crossbar: CrossbarConfig,
    row: Shape,
    *,
    output: bool,
) -> Work:
    """Return the work of one token of a row: one that is generated as output, or one that is read."""
    one = Shape(1, 0, 1) if output else Shape(1, 1, 0)
    sites = adapted(config, method.update)
    reads = _read_base(config, crossbar, one)
    # Scores and the weighted sum of values, for every position that an attention attends to.
    macs = words = sum(
        2
        * stack.layers
        * row_tokens(attention, row)
        * attention.heads
        * attention.d_head
        for stack in config.stacks.values()
        if ("target" if output else "source") in stack.reads
        for attention in stack.attentions
    )
    recurrent = [(stack.layers, stack.recurrence) for stack in config.stacks.values()]
    state = sum(
        layers * recurrence.multiplications(1)
        for layers, recurrence in recurrent
        if recurrence
    )
    macs = macs + state
    words = words + state
    if output and config.tied:
        macs = macs + math.prod(config.head)
        words = words + math.prod(config.head)
    elif output:
        reads += counts(config.head, crossbar)
    if method.stays_in == "arrays":
        reads += _read(sites, method.matrices, crossbar, one)
    return Work(
        reads,
        macs + _of_tokens(sites, method.macs, one),
        words + _of_tokens(sites, method.words, one),
    )


def _stages(
    method: BilledMethod, config: Architecture
) -> dict[frozenset[tuple[Matrix, ...]], int]:
    """Return the stages of a generated token: in every layer one stage after the other, then the head."""
    sites = adapted(config, method.update)
    chains: dict[tuple[str, str], set[tuple[Matrix, ...]]] = {}
    for name, site in config.sites.items():
        if "target" in site.reads:
            stage = chains.setdefault((stack_of(name), site.stage), set())
            stage.add(((site.d_in, site.d_out),))
            if name in sites and method.stays_in == "arrays":
                stage.add(tuple(method.matrices(site)[:2]))
    stages: Counter[frozenset[tuple[Matrix, ...]]] = Counter()
    for (stack, _), stage in chains.items():
        stages[frozenset(stage)] += config.stacks[stack].layers
    if not config.tied:
        stages[frozenset({(config.head,)})] += 1
    return dict(stages)


def _kernel(site: Site) -> list[Matrix]:
    return [(site.d_in, site.d_out)]


def _of_tokens(
    sites: Mapping[str, Site], work: Callable[[Site], int], shape: Shape
) -> int:
    """Return the work at all sites for a batch, from that of one token at one matrix."""
    return sum(
        tokens(site.reads, shape) * site.layers * work(site) for site in sites.values()
    )


def _read_base(config: Architecture, crossbar: CrossbarConfig, shape: Shape) -> Counts:
    """Return the counts of reading the base's sites, whose inputs are prepared once for all matrices of an input."""
    reads = _read(config.sites, _kernel, crossbar, shape)
    for site in (
        config.sites[names[0]] for names in sharing_inputs(config.sites, config.sites)
    ):
        reads += preparing(site.d_in, crossbar) * (
            tokens(site.reads, shape) * site.layers
        )
    return reads


def _read(
    sites: Mapping[str, Site],
    matrices: Callable[[Site], list[Matrix]],
    crossbar: CrossbarConfig,
    shape: Shape,
) -> Counts:
    """Return the counts of reading the sites' matrices with every token of a batch that they multiply."""
    return _sum(
        _standing({"": site}, matrices, crossbar) * tokens(site.reads, shape)
        for site in sites.values()
    )


def _standing(
    sites: Mapping[str, Site],
    matrices: Callable[[Site], list[Matrix]],
    crossbar: CrossbarConfig,
) -> Counts:
    """Return the counts of the sites' matrices, each in separate arrays."""
    return _sum(
        counts(matrix, crossbar, prepares=False) * (n * site.layers)
        for site in sites.values()
        for matrix, n in Counter(matrices(site)).items()
    )


def _shared(
    sites: Mapping[str, Site],
    matrices: Callable[[Site], list[Matrix]],
    crossbar: CrossbarConfig,
) -> Counts:
    """Return the counts of shared matrices that are large enough for every site."""
    widest = Site(
        1,
        max(site.d_in for site in sites.values()),
        max(site.d_out for site in sites.values()),
    )
    return _sum(counts(matrix, crossbar, prepares=False) for matrix in matrices(widest))


def _of_base(config: Architecture, crossbar: CrossbarConfig) -> Counts:
    return _sum(
        counts(matrix, crossbar) * layers for matrix, layers in base_matrices(config)
    )


def _sum(of: Iterable[Counts]) -> Counts:
    return sum(of, start=Counts())
