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

from ...crossbar import Counts, CrossbarConfig, counts
from ...methods.entry import Matrix, Update, module
from ...methods.recipes import recipe_of
from ...models.architecture import Architecture, Site, stack_of, targeted
from ...training.recipe import Recipe
from ..flops import Shape, forward_flops, keys, step_flops, tokens
from ..workload import Workload, uniform
from .methods import BilledMethod, base_matrices, methods
from .options import CostOptions

_OPTIMISER_WORDS = 7  # Adam reads the gradient, the number and two moments, and writes the last three


class Work(NamedTuple):
    """Counts of operations.

    Attributes:
      reads: reads of arrays.
      macs: digital multiply-adds.
      words: 32-bit words read from memory or written to it, without the operands of matrix products in training.
    """

    reads: Counts
    macs: float
    words: float


class Standing(NamedTuple):
    """What is there before any task.

    Attributes:
      counts: counts of the matrices in arrays.
      words: words of the tables that training reads.
      macs: digital multiply-adds of making them.
    """

    counts: Counts
    words: int = 0
    macs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activity:
    """Counts of one method's work.

    Attributes:
      method: name of the method.
      trainable: number of trained numbers.
      written: cells of the task's own matrices, all of which a programming pass writes.
      passes: programming passes for the task; 0 if the task writes no cells.
      installed_words: words that putting the finished task in place writes to memory or reads there.
      installed_macs: digital multiply-adds of that.
      adapters: counts of the arrays that hold the adapters, written for this task or earlier.
      base_training: work of the base's forward passes in training, and of its backward passes if there are gradients.
      update_training: work that the method adds to that.
      source: work of one source token at inference.
      generated: work of one generated token at inference.
      stages: dependent products of a generated token: chains of matrices that run in parallel -> number of such stages.
    """

    method: str
    trainable: int
    written: Counts
    passes: int
    installed_words: int
    installed_macs: int
    adapters: Counts
    base_training: Work
    update_training: Work
    source: Work
    generated: Work
    stages: Mapping[frozenset[tuple[Matrix, ...]], int]


def activities(config: Architecture, crossbar: CrossbarConfig, options: CostOptions) -> list[Activity]:
    """Return the counts of every method for one task.

    Args:
      config: the base model.
      crossbar: the arrays.
      options: the other assumptions; the shape and arrays in it are not used.

    Raises:
      ValueError: the model lacks one of the targets.
    """
    work = uniform(
        recipe_of(Recipe, options.numbers),
        source=options.source,
        target=options.target,
        train_rows=options.train_rows,
        test_rows=1,
    )
    found = methods(config, options, steps=len(work.steps))
    return [_activity(name, method, config, crossbar, options, work) for name, method in found.items()]


def installed_once(config: Architecture, crossbar: CrossbarConfig, options: CostOptions) -> dict[str, Standing]:
    """Return the matrices that are written once, before any task, with the tables that are computed from them.

    Tables are the norm's terms: A_n^T W of whole modules, U^T W of a basis, and ||W||^2. A basis has all S_n too, whose
    own computation is left out.
    """
    adapted, P, r = targeted(config, options.targets), options.stored, options.rank

    def norm_terms(rank: int) -> dict[str, int]:
        sites = adapted.values()
        return {
            "words": sum(site.layers * (rank + 1) * site.d_out for site in sites),
            "macs": sum(site.layers * (rank + 1) * site.d_in * site.d_out for site in sites),
        }

    matrices = sum(site.layers for site in adapted.values())
    own, together = _standing(adapted, module(r), crossbar) * P, _standing(adapted, module(P * r), crossbar)
    found = {
        "base": Standing(_sum(counts(matrix, crossbar) * layers for matrix, layers in base_matrices(config))),
        f"pool of {P}, each module on its own": Standing(own, **norm_terms(P * r)),
        f"pool of {P}, side by side": Standing(together, **norm_terms(P * r)),
        "VeRA's random matrices": Standing(_shared(adapted, module(options.vera_rank), crossbar)),
    }
    for k in options.bases:
        basis = Standing(_standing(adapted, module(k), crossbar), **norm_terms(k))
        found[f"basis of {k} of {P} modules"] = basis._replace(words=basis.words + matrices * P * k**2)
    return found


def _activity(
    name: str,
    method: BilledMethod,
    config: Architecture,
    crossbar: CrossbarConfig,
    options: CostOptions,
    work: Workload,
) -> Activity:
    adapted = _adapted(method, config)
    place = _shared if method.shared else _standing
    adapters = place(adapted, method.matrices, crossbar) if method.stays_in == "arrays" else Counts()
    written = adapters
    if method.update.trains_base:
        written = _sum(counts(matrix, crossbar) * layers for matrix, layers in base_matrices(config))
    base_training, update_training = _training(method, config, crossbar, work)
    row = Shape(1, options.source, options.target)
    return Activity(
        method=name,
        trainable=method.trainable,
        written=written if method.passes else Counts(),
        passes=method.passes,
        installed_words=method.installed_words,
        installed_macs=method.installed_macs,
        adapters=adapters,
        base_training=base_training,
        update_training=update_training,
        source=_token(method, config, crossbar, adapted, row, generated=False),
        generated=_token(method, config, crossbar, adapted, row, generated=True),
        stages=_stages(method, config, adapted),
    )


def _adapted(method: BilledMethod, config: Architecture) -> Mapping[str, Site]:
    return {} if method.update.trains_base else targeted(config, method.update.targets)


def _training(
    method: BilledMethod, config: Architecture, crossbar: CrossbarConfig, work: Workload
) -> tuple[Work, Work]:
    """Return the work of the base's passes and the work that the method adds, until the task is learned."""
    if method.evaluations:
        return _passes(method, config, crossbar, Counter(), Counter(work.search * method.evaluations))
    found = [_passes(method, config, crossbar, Counter(work.steps), Counter({work.validation: work.epochs}))]
    if method.ranking is not None:
        found.append(_passes(method.ranking, config, crossbar, Counter(work.search), Counter()))
    base, update = (
        Work(_sum(w.reads for w in works), sum(w.macs for w in works), sum(w.words for w in works))
        for works in zip(*found, strict=True)
    )
    return base, update


def _passes(
    method: BilledMethod, config: Architecture, crossbar: CrossbarConfig, steps: Counter[Shape], forward: Counter[Shape]
) -> tuple[Work, Work]:
    """Return the work of the base, and the work that a method adds, of training steps and of forward passes alone."""
    none, update, adapted = Update(), method.update, _adapted(method, config)
    base_flops = sum(n * step_flops(config, shape, none, trainable=0) for shape, n in steps.items())
    base_flops += sum(n * forward_flops(config, shape, none) for shape, n in forward.items())
    flops = sum(n * step_flops(config, shape, update, trainable=method.trainable) for shape, n in steps.items())
    flops += sum(n * forward_flops(config, shape, update) for shape, n in forward.items()) - base_flops
    base_reads = update_reads = Counts()
    if not update.trains_base:
        for shape, n in (steps + forward).items():
            base_reads += _read(config.sites, lambda site: [(site.d_in, site.d_out)], crossbar, shape) * n
            base_flops -= n * sum(
                2 * tokens(site.reads, shape) * site.layers * site.d_in * site.d_out for site in config.sites.values()
            )
            if not config.tied:
                base_reads += counts(config.head, crossbar) * (n * shape.rows * shape.target)
                base_flops -= n * 2 * shape.rows * shape.target * math.prod(config.head)
            if method.trains_in == "arrays":
                update_reads += _read(adapted, method.matrices, crossbar, shape) * n
                flops -= n * sum(
                    2 * tokens(site.reads, shape) * site.layers * update.width(site) * (site.d_in + site.d_out)
                    for site in adapted.values()
                )
    macs = flops / 2
    if method.evaluations:  # the arrays' outputs are mixed, where `estimates.flops` counts mixing the weights
        macs = float(
            sum(
                n * tokens(site.reads, shape) * site.layers * method.macs(site)
                for shape, n in forward.items()
                for site in adapted.values()
            )
        )
    tables = sum(site.layers * method.tables(site) for site in adapted.values())
    words = _OPTIMISER_WORDS * method.trainable * steps.total() + tables * (steps + forward).total()
    return Work(base_reads, base_flops / 2, 0), Work(update_reads, macs, words)


def _token(
    method: BilledMethod,
    config: Architecture,
    crossbar: CrossbarConfig,
    adapted: Mapping[str, Site],
    row: Shape,
    *,
    generated: bool,
) -> Work:
    """Return the work of one token of a row, read or generated."""
    one = Shape(1, 0, 1) if generated else Shape(1, 1, 0)
    reads = _read(config.sites, lambda site: [(site.d_in, site.d_out)], crossbar, one)
    # Scores and the weighted sum of values, for every position that an attention attends to.
    macs = words = sum(
        2 * stack.layers * keys(attention, row) * attention.heads * attention.d_head
        for stack in config.stacks.values()
        if ("target" if generated else "source") in stack.reads
        for attention in stack.attentions
    )
    if generated and config.tied:
        macs, words = macs + math.prod(config.head), words + math.prod(config.head)
    elif generated:
        reads += counts(config.head, crossbar)
    if method.stays_in == "arrays":
        reads += _read(adapted, method.matrices, crossbar, one)
    macs += sum(tokens(site.reads, one) * site.layers * method.macs(site) for site in adapted.values())
    words += sum(tokens(site.reads, one) * site.layers * method.words(site) for site in adapted.values())
    return Work(reads, macs, words)


def _stages(
    method: BilledMethod, config: Architecture, adapted: Mapping[str, Site]
) -> dict[frozenset[tuple[Matrix, ...]], int]:
    """Return the stages of a generated token: in every layer one stage after the other, then the head."""
    chains: dict[tuple[str, str], set[tuple[Matrix, ...]]] = {}
    for name, site in config.sites.items():
        if "target" in site.reads:
            stage = chains.setdefault((stack_of(name), site.stage), set())
            stage.add(((site.d_in, site.d_out),))
            if name in adapted and method.stays_in == "arrays":
                stage.add(tuple(method.matrices(site)[:2]))
    stages: Counter[frozenset[tuple[Matrix, ...]]] = Counter()
    for (stack, _), stage in chains.items():
        stages[frozenset(stage)] += config.stacks[stack].layers
    if not config.tied:
        stages[frozenset({(config.head,)})] += 1
    return dict(stages)


def _read(
    of: Mapping[str, Site], matrices: Callable[[Site], list[Matrix]], crossbar: CrossbarConfig, shape: Shape
) -> Counts:
    """Return the counts of reading the sites' matrices with every token of a batch that they multiply."""
    return _sum(
        counts(matrix, crossbar) * (n * site.layers * tokens(site.reads, shape))
        for site in of.values()
        for matrix, n in Counter(matrices(site)).items()
    )


def _standing(
    adapted: Mapping[str, Site], matrices: Callable[[Site], list[Matrix]], crossbar: CrossbarConfig
) -> Counts:
    """Return the counts of the sites' matrices, each in separate arrays."""
    return _sum(
        counts(matrix, crossbar) * (n * site.layers)
        for site in adapted.values()
        for matrix, n in Counter(matrices(site)).items()
    )


def _shared(adapted: Mapping[str, Site], matrices: Callable[[Site], list[Matrix]], crossbar: CrossbarConfig) -> Counts:
    """Return the counts of shared matrices that are large enough for every site."""
    widest = Site(1, max(site.d_in for site in adapted.values()), max(site.d_out for site in adapted.values()))
    return _sum(counts(matrix, crossbar) for matrix in matrices(widest))


def _sum(of: Iterable[Counts]) -> Counts:
    return sum(of, start=Counts())
