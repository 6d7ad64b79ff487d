"""Floating-point operations of a forward pass, a training step and a generation, from shapes alone.

A multiplication and an addition count as two operations. Matrix products are counted, and so is the optimiser, which is
elementwise. Other elementwise operations are not; for this reason XLA's own count is a few percent higher.

Axis letters: B batch, S source, T target, N modules of a fusion, P modules in memory, r rank, k directions of a basis.
"""

from typing import NamedTuple

from ..methods.method import Update
from ..models.architecture import Architecture, Attention, Parts, Site, Stack, stack_of, targeted

# Operations per trained number and step: Adam with bias correction, the check for non-finite gradients, their norm and
# clipping.
_OPTIMISER = 18


class Shape(NamedTuple):
    """Shape of a padded batch: B rows, S source and T target tokens."""

    rows: int
    source: int
    target: int


def tokens(reads: Parts, shape: Shape) -> int:
    """Return the number of tokens in these parts of all rows of a batch."""
    return shape.rows * sum(getattr(shape, part) for part in reads)


def queries(stack: Stack, shape: Shape) -> int:
    """Return the number of tokens of a row that run through a stack."""
    return tokens(stack.reads, shape._replace(rows=1))


def keys(attention: Attention, shape: Shape) -> int:
    """Return the number of tokens of a row that an attention attends to."""
    return tokens(attention.reads, shape._replace(rows=1))


def last_sites(config: Architecture) -> dict[str, Site]:
    """Return the site at the end of each stack's blocks, by stack."""
    return {stack_of(name): site for name, site in config.sites.items()}


def forward_flops(config: Architecture, shape: Shape, update: Update) -> float:
    """Return the FLOPs of making the adapters and running the model once."""
    return _products(config, shape) + _head(config, shape) + _attention(config, shape) + _updates(config, shape, update)


def generation_flops(config: Architecture, shape: Shape, update: Update) -> float:
    """Return the FLOPs of generating T tokens for B rows.

    It takes as many as a forward pass, because every token attends to every position of the cache, with two exceptions.
    A prompt in the answer's own stack is read before there are positions of an answer, and the layers compute DoRA's
    norms again for every token. (Compilers leave out what the prompt's pass through the last block of an unrolled model
    computes other than keys and values; it is counted.)
    """
    again, rows, source, target = 0, *shape
    if update.kind == "dora":
        there = targeted(config, update.targets).values()
        again = sum(site.layers * _prepare(site, update) for site in there if "target" in site.reads)
    unread = 4 * sum(
        stack.layers * rows * source * target * attention.heads * attention.d_head
        for stack in config.stacks.values()
        for attention in stack.attentions
        if "source" in stack.reads and "target" in attention.reads
    )
    return forward_flops(config, shape, update) + float(again * max(target - 1, 0) - unread)


def step_flops(config: Architecture, shape: Shape, update: Update, *, trainable: int) -> float:
    """Return the FLOPs of one training step.

    The backward pass has one product for every product with a frozen weight, for the gradient of the activations. Full
    fine-tuning adds the gradients of the weights. Each of an attention's two products has two in the backward pass.
    """
    products, attention = _products(config, shape), _attention(config, shape)
    updates = _updates(config, shape, update, prepare=False)
    backward = products + _head(config, shape) + 2 * attention + updates + _gradients(config, shape, update)
    if config.remat == "full":
        backward += products - _last_products(config, shape) + attention + updates
    elif config.remat == "dots" and not config.unroll:
        backward += attention / 2  # the scores; XLA removes the recomputation if layers are unrolled
    if config.unroll and update.kind != "full":
        backward -= _first_layers(config, shape)
    return forward_flops(config, shape, update) + backward + _OPTIMISER * trainable


def _products(config: Architecture, shape: Shape) -> float:
    return float(sum(2 * tokens(s.reads, shape) * s.layers * s.d_in * s.d_out for s in config.sites.values()))


def _head(config: Architecture, shape: Shape) -> float:
    return 2.0 * shape.rows * shape.target * config.d_model * config.vocab_size


def _attention(config: Architecture, shape: Shape) -> float:
    return 4.0 * sum(
        stack.layers * shape.rows * queries(stack, shape) * keys(attention, shape) * attention.heads * attention.d_head
        for stack in config.stacks.values()
        for attention in stack.attentions
    )


def _last_products(config: Architecture, shape: Shape) -> float:
    """Return the FLOPs of the last products of the blocks, whose results no gradient needs."""
    last = last_sites(config).values()
    return float(sum(2 * tokens(s.reads, shape) * s.layers * s.d_in * s.d_out for s in last))


def _first_layers(config: Architecture, shape: Shape) -> float:
    """Return the FLOPs of the gradient into the embeddings, which is not needed and only computed in a loop."""
    first: dict[str, str] = {}
    total = 0
    for name, site in config.sites.items():
        if site.stage == first.setdefault(stack_of(name), site.stage):
            total += 2 * tokens(site.reads, shape) * site.d_in * site.d_out
    return float(total)


def _updates(config: Architecture, shape: Shape, update: Update, *, prepare: bool = True) -> float:
    """Return the FLOPs of the updates of all sites, forward."""
    if update.kind in ("none", "full"):
        return 0.0
    total = 0
    for site in targeted(config, update.targets).values():
        of_token = update.width(site) * (site.d_in + site.d_out) + _core(update)
        total += site.layers * 2 * tokens(site.reads, shape) * of_token
        total += site.layers * _prepare(site, update) if prepare else 0
    return float(total)


def _prepare(site: Site, update: Update) -> int:
    """Return the FLOPs of one matrix before any token: fused factors, and the norm of its columns."""
    d_in, d_out, r = site.d_in, site.d_out, update.rank
    k = update.modules * r
    if update.kind == "dora":
        return 2 * r * d_in * d_out + 2 * r * r * (d_in + d_out)
    if update.kind == "mix":
        factors = 2 * update.pool * r * (d_in + d_out)
        return factors + (2 * update.pool * r * d_out + 2 * r * r * (d_in + d_out) if update.magnitudes else 0)
    if update.kind == "basis":
        mixed = 2 * r * r * (update.modules + (0 if update.in_arrays and not update.magnitudes else d_out))
        return mixed + (_norm(r, d_in, d_out) if update.magnitudes else 0)
    of_pairs = 2 * update.pair_terms * d_out
    if update.is_dense(site):
        return 2 * k * d_in * d_out + of_pairs
    if of_pairs:
        return of_pairs
    return _norm(k, d_in, d_out) if update.kind == "sum" and update.magnitudes else 0


def _norm(k: int, d_in: int, d_out: int) -> int:
    """Return the FLOPs of the columns' norms of a product of rank k, in the order that `squared_columns` uses."""
    return 2 * k * min(k * (d_in + d_out), d_in * d_out)


def _core(update: Update) -> int:
    """Return the multiply-adds of a token with the core between directions in arrays."""
    return update.rank**2 if update.kind == "basis" and update.in_arrays else 0


def _gradients(config: Architecture, shape: Shape, update: Update) -> float:
    """Return the FLOPs of the gradients of the trained numbers, given the gradients of the outputs."""
    if update.kind == "full":
        return _products(config, shape) + _head(config, shape)
    if update.kind in ("none", "magnitudes", "vera"):
        return 0.0
    total = 0
    for site in targeted(config, update.targets).values():
        count, d_in, d_out = tokens(site.reads, shape), site.d_in, site.d_out
        if update.kind == "mix":
            total += site.layers * 2 * update.pool * update.rank * (d_in + d_out)
        if update.kind == "basis":
            # Of the core, or of the core's product with V, and then of the coefficients.
            of_core = count * _core(update) if update.in_arrays else update.rank * d_out * (count + update.rank)
            total += site.layers * 2 * (of_core + update.modules * update.rank**2)
        elif update.is_dense(site):
            total += site.layers * 2 * (count + update.modules * update.rank) * d_in * d_out
        elif update.kind != "sum":
            total += site.layers * 2 * count * update.rank * (d_in + d_out)
    return float(total)
