"""Floating-point operations of a forward pass, a training step and a generation, from shapes alone.

A multiplication and an addition count as two operations. Matrix products are counted, and so is the optimiser, which is
elementwise. Other elementwise operations are not; for this reason XLA's own count is a few percent higher.

The products in a traced step of FLAN-T5-large's shape are as many, within 0.1 %. Tracing takes 0.6 to 1 s for each of a
plan's 5 to 20 shapes, so a plan has formulas.

Axis letters: B batch, S source, T target.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from ..methods.entry import Update
from ..models.architecture import (
    Architecture,
    Attention,
    Parts,
    Site,
    Stack,
    stack_of,
    targeted,
)
from .workload import Shape

# Operations per trained number and step: Adam with bias correction, the check for non-finite gradients, their norm and
# clipping.
_OPTIMISER = 18


def apart(shape: Shape) -> tuple[Shape, ...]:
    """Return the shapes that attention computes."""
    return tuple(Shape(*group) for group in shape.groups) or (shape,)


def tokens(reads: Parts, shape: Shape) -> int:
    """Return the number of tokens in these parts of all rows of a batch."""
    return shape.rows * sum(getattr(shape, part) for part in reads)


def row_tokens(of: Stack | Attention, shape: Shape) -> int:
    """Return the number of tokens of a row that run through a stack, or that an attention attends to."""
    return tokens(of.reads, shape._replace(rows=1))


def adapted(config: Architecture, update: Update) -> Mapping[str, Site]:
    """Return the sites with an adapter."""
    return {} if update.trains_base else targeted(config, update.targets)


def products(sites: Iterable[Site], shape: Shape) -> int:
    """Return the FLOPs of multiplying the tokens of a batch by the matrices of sites."""
    return sum(
        2 * tokens(site.reads, shape) * site.layers * site.d_in * site.d_out
        for site in sites
    )


def head_flops(config: Architecture, shape: Shape) -> int:
    """Return the FLOPs of the logits of every target token."""
    return 2 * shape.rows * shape.target * math.prod(config.head)


def last_sites(config: Architecture) -> dict[str, Site]:
    """Return the site at the end of each stack's blocks, by stack."""
    return {stack_of(name): site for name, site in config.sites.items()}


def forward_flops(config: Architecture, shape: Shape, update: Update) -> float:
    """Return the FLOPs of making the adapters and running the model once."""
    return _base(config, shape) + _updates(config, shape, update)


def _base(config: Architecture, shape: Shape) -> float:
    dense = products(config.sites.values(), shape) + head_flops(config, shape)
    return dense + _attention(config, shape) + _recurrence(config, shape)


def generation_flops(config: Architecture, shape: Shape, update: Update) -> float:
    """Return the FLOPs of generating T tokens for B rows.

    They are those of a forward pass, because every token attends to every position of the cache, with three exceptions:
    a prompt in the answer's own stack is read before there are positions of an answer, the layers compute DoRA's norms
    again for every token, and an update, or a recurrence, may have another form for the few tokens of a step than for
    a prompt.
    """
    rows, source, target, _ = shape
    sites = [
        site for site in adapted(config, update).values() if "target" in site.reads
    ]
    again = sum(site.layers * update.repeat(site) for site in sites)
    unread = 4 * sum(
        stack.layers * rows * source * target * attention.heads * attention.d_head
        for stack in config.stacks.values()
        for attention in stack.attentions
        if "source" in stack.reads and "target" in attention.reads
    )
    read = shape._replace(target=0)
    answers = Shape(rows, 0, 1)
    updates = _updates(config, read, update) + target * _updates(
        config, answers, update, once=False
    )
    apart = (
        _recurrence(config, read)
        + target * _recurrence(config, answers)
        - _recurrence(config, shape)
    )
    return (
        _base(config, shape)
        + updates
        + apart
        + float(again * max(target - 1, 0) - unread)
    )


def step_flops(
    config: Architecture, shape: Shape, update: Update, *, trainable: int
) -> float:
    """Return the FLOPs of one training step.

    The backward pass has one product for every product with a frozen weight, for the gradient of the activations. Full
    fine-tuning adds the gradients of the weights. Each product of an attention or a recurrence has two in the backward
    pass.
    """
    matrices = products(config.sites.values(), shape)
    attention = _attention(config, shape)
    recurrence = _recurrence(config, shape)
    updates = _updates(config, shape, update, once=False)
    head = head_flops(config, shape)
    sites = adapted(config, update).values()
    gradients = sum(
        site.layers * update.gradients(site, tokens(site.reads, shape))
        for site in sites
    )
    backward = (
        matrices
        + head
        + 2 * attention
        + updates
        + (matrices + head if update.trains_base else gradients)
    )
    backward += 2 * recurrence
    if not config.unroll:
        backward += (
            attention / 2 + recurrence
        )  # the scores and all of a recurrence, which are recomputed
    elif not update.trains_base:
        backward -= _first_layers(config, shape)
    return forward_flops(config, shape, update) + backward + _OPTIMISER * trainable


def _attention(config: Architecture, shape: Shape) -> float:
    return 4.0 * sum(
        stack.layers
        * tokens(stack.reads, rows)
        * row_tokens(attention, rows)
        * attention.heads
        * attention.d_head
        for rows in apart(shape)
        for stack in config.stacks.values()
        for attention in stack.attentions
    )


def _recurrence(config: Architecture, shape: Shape) -> float:
    return 2.0 * sum(
        stack.layers
        * tokens(stack.reads, rows)
        * stack.recurrence.multiplications(row_tokens(stack, rows))
        for rows in apart(shape)
        for stack in config.stacks.values()
        if stack.recurrence is not None
    )


def _first_layers(config: Architecture, shape: Shape) -> int:
    """Return the FLOPs of the gradient into the embeddings, which is not needed and only computed in a loop."""
    first: dict[str, str] = {}
    for name, site in config.sites.items():
        first.setdefault(stack_of(name), site.stage)
    sites = (
        s
        for name, s in config.sites.items()
        if s.stage == first[stack_of(name)] and s.first == 0
    )
    return products((dataclasses.replace(site, layers=1) for site in sites), shape)


def _updates(
    config: Architecture, shape: Shape, update: Update, *, once: bool = True
) -> float:
    """Return the FLOPs of the updates of all sites, forward."""
    total = 0
    for site in adapted(config, update).values():
        count = tokens(site.reads, shape)
        token_work = update.width(site, count) * (site.d_in + site.d_out) + update.core(
            site
        )
        total += site.layers * 2 * count * token_work
        total += site.layers * update.once(site) if once else 0
    return float(total)
