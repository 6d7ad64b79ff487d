"""Bytes that a run holds: weights, pool, training state, and the working memory of a step or a generation.

The formulas follow XLA's allocations for the programs of `fit.train_seeds` and `runs.rows` on a CPU; the tests compare
them with XLA's own report. On a CPU a loop over stacked layers keeps a copy of the bits of bfloat16 weights
(`narrow.py`). On an accelerator this copy is left out; no such device was measured.
"""

import math
from typing import Literal

from ..loading.spec import LoadIn
from ..methods.entry import Update
from ..models.architecture import Architecture, unrolled_numbers
from ..models.weights import tile_size
from ..training.seeds import SeedMode
from .flops import Shape, adapted, last_sites, row_tokens, tokens
from .params import size

Device = Literal["cpu", "accelerator"]

_FLOAT32 = 4
_BITS = {"nf4": 4, "int8": 8}
# Copies of the trained parameters after the backward pass (gradients, finite gradients and updates, at their peak):
# measured as 2.4 times the 783 million numbers of FLAN-T5-large.
_UPDATING = 2.4


def weights_bytes(config: Architecture, load_in: LoadIn = "full") -> int:
    """Return the bytes of the base model's weights, whose matrices and head may be held in few bits."""
    itemsize = _itemsize(config)
    matrices = [(s.layers * s.d_out, s.d_in) for s in config.sites.values()]
    matrices += [] if config.tied else [(config.vocab_size, config.d_model)]
    whole = sum(columns * length for columns, length in matrices)
    return (size(config) - whole) * itemsize + sum(
        _bytes(*matrix, itemsize, load_in) for matrix in matrices
    )


def pool_bytes(config: Architecture, update: Update, load_in: LoadIn = "full") -> int:
    """Return the bytes of a method's frozen matrices, such as a pool's, and of the terms that are kept with them."""
    sites = tuple(adapted(config, update).values())
    width = update.frozen_width()
    factors = sum(
        _bytes(s.layers * width, side, _FLOAT32, load_in)
        for s in sites
        for side in (s.d_in, s.d_out)
    )
    return factors + _FLOAT32 * update.frozen_numbers(sites)


def state_bytes(trainable: int) -> int:
    """Return the bytes of one seed's state: trained parameters, Adam's two moments, and the best numbers so far."""
    return 4 * trainable * _FLOAT32


def step_bytes(
    config: Architecture,
    shape: Shape,
    update: Update,
    *,
    trainable: int,
    seeds: int,
    seed_mode: SeedMode,
    device: Device,
    load_in: LoadIn = "full",
) -> int:
    """Return the bytes that a training step of all seeds needs in addition to its arguments.

    These are the values that the backward pass keeps, the gradients, the working memory of one layer, and the fused
    factors. They are needed for all seeds if these are batched, else for one. In the second case the new state of all
    seeds is added, which cannot overwrite the old one. Shape and trained parameters are those of one seed.
    """
    gradients = trainable * _FLOAT32 * (1 if update.trains_base else 3)
    # A group of layers is recomputed as a whole.
    kept = _kept(config, shape, update) + sum(_recurrences(config, shape))
    batched = seeds if seed_mode == "batched" else 1
    needed = batched * (
        kept + gradients + _work(config, shape) + _fused(config, update)
    )
    needed += _copies(config, device, load_in, stacked=update.trains_base)
    if update.trains_base:
        needed = max(needed, int(_UPDATING * batched * gradients))
    return needed + (
        seeds * state_bytes(trainable) if seed_mode == "sequential" and seeds > 1 else 0
    )


def evaluation_bytes(
    config: Architecture,
    shape: Shape,
    new_tokens: int,
    update: Update,
    *,
    seeds: int,
    seed_mode: SeedMode,
    device: Device,
    load_in: LoadIn = "full",
) -> int:
    """Return the bytes that generating for one batch, or its loss (no new tokens), needs in addition to its arguments.

    The logits of the loss are those of all labels; generation has those of one token, and a cache. A causal model
    updates it in place. Otherwise it holds the source's keys and values once and the target's twice, because the scan
    over layers writes a new copy of the target's for every token.
    """
    batched = seeds if seed_mode == "batched" else 1
    # Without a backward pass a third of it is needed at a time, and of one layer.
    needed = _work(config, shape) + max(_recurrences(config, shape)) // 3
    if new_tokens:
        cache = _cache(config, shape._replace(target=new_tokens), device) * _itemsize(
            config
        )
        cache += (
            _FLOAT32 * 2 * shape.rows * _states(config)
        )  # the scan over layers writes new ones
        needed = max(needed, cache + _work(config, shape._replace(target=1)))
    bits = (
        2 * math.prod(config.head)
        if device == "cpu" and config.dtype == "bfloat16"
        else 0
    )
    stacked = update.trains_base or not new_tokens
    return (
        batched * (needed + _fused(config, update))
        + bits
        + _copies(config, device, load_in, stacked=stacked)
    )


def _cache(config: Architecture, shape: Shape, device: Device) -> int:
    """Return the number of values in the cache of all layers of the last stack, and in its copies.

    The target's part is written anew. A loop over layers copies the bits of the source's part in bfloat16 on a CPU.
    """
    bits = device == "cpu" and config.dtype == "bfloat16" and not config.unroll
    return sum(
        2
        * stack.layers
        * attention.kv_heads
        * attention.d_head
        * tokens(attention.reads, shape)
        * (2 if ("target" in attention.reads or bits) and not config.causal else 1)
        for stack in config.stacks.values()
        if "target" in stack.reads
        for attention in stack.attentions
    )


def _states(config: Architecture) -> int:
    """Return the numbers of a row's states of all layers."""
    return sum(
        stack.layers * (state.heads * state.d_key * state.d_value + state.inputs)
        for stack in config.stacks.values()
        if (state := stack.recurrence) is not None
    )


def _recurrences(config: Architecture, shape: Shape) -> list[int]:
    """Return the bytes of the values of one recurrence in each stack, chunk by chunk."""
    stacks = config.stacks.values()
    return [
        _FLOAT32 * tokens(s.reads, shape) * s.elementwise if s.recurrence else 0
        for s in stacks
    ]


def _kept(config: Architecture, shape: Shape, update: Update) -> int:
    """Return the bytes that the backward pass keeps: every layer's input, and most products.

    If layers are unrolled, these are followed by norms, attention weights and gates in float32.
    """
    stacks = config.stacks.values()
    itemsize = _itemsize(config)
    total = sum(
        stack.layers * tokens(stack.reads, shape) * config.d_model for stack in stacks
    )
    # The last product of a block is part of the next one's input, so it is not kept itself.
    last = last_sites(config).values()
    total += sum(
        tokens(s.reads, shape) * s.layers * s.d_out
        for s in config.sites.values()
        if s not in last
    )
    for site in adapted(config, update).values():
        count = tokens(site.reads, shape)
        width = update.width(site, count)
        total += count * site.layers * (width + site.d_out if width else 0)
    parts = shape.rows * shape.source, shape.rows * shape.target
    others = (
        unrolled_numbers(config, *parts, [rows[:3] for rows in shape.apart()])
        if config.unroll
        else 0
    )
    return total * itemsize + others * _FLOAT32


def _work(config: Architecture, shape: Shape) -> int:
    """Return the bytes of the logits and their gradient, and of one layer's attention and feed-forward."""
    logits = 2 * shape.rows * shape.target * config.vocab_size
    stacks = config.stacks.values()
    heads = max(
        (attention.heads for stack in stacks for attention in stack.attentions),
        default=0,
    )
    scores = heads * sum(
        max(tokens(s.reads, rows) * row_tokens(s, rows) for s in stacks)
        for rows in shape.apart()
    )
    hidden = max(tokens(stack.reads, shape) for stack in stacks) * max(
        stack.d_ff for stack in stacks
    )
    return _FLOAT32 * (logits + 2 * scores) + 2 * _itemsize(config) * hidden


def _fused(config: Architecture, update: Update) -> int:
    """Return the bytes of the modules that `compose` reads for a group of layers, of factors and their gradients."""
    return (
        _FLOAT32 * 2 * update.working_numbers(tuple(adapted(config, update).values()))
    )


def _copies(
    config: Architecture, device: Device, load_in: LoadIn, *, stacked: bool
) -> int:
    """Return the bytes of second copies of weights.

    A CPU holds `stacked` layers that are unrolled, and the bits of those in bfloat16 or of an NF4 model. Of weights in
    few bits one matrix at a time is dequantised; NF4's codes are copied twice on the way.
    """
    numbers = sum(s.layers * s.d_in * s.d_out for s in config.sites.values())
    itemsize = _itemsize(config)
    if load_in != "full":
        of_number = itemsize + (2 if load_in == "nf4" else 0)
        of_codes = numbers // 2 if device == "cpu" and load_in == "nf4" else 0
        head = 0 if config.tied else math.prod(config.head)
        return max(
            of_number * head,
            of_codes + of_number * max(s.d_in * s.d_out for s in config.sites.values()),
        )
    copied = stacked and (config.unroll or config.dtype == "bfloat16")
    return itemsize * numbers if device == "cpu" and copied else 0


def _bytes(columns: int, length: int, itemsize: int, load_in: LoadIn) -> int:
    """Return the bytes of columns of a matrix: of plain numbers, or of codes with a scale a tile."""
    if load_in == "full":
        return columns * length * itemsize
    return columns * (
        math.ceil(length * _BITS[load_in] / 8) + length // tile_size(length) * itemsize
    )


def _itemsize(config: Architecture) -> int:
    return 2 if config.dtype == "bfloat16" else _FLOAT32
