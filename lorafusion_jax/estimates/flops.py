"""Floating-point operations of a forward pass, a training step and a generation, from shapes alone.

A multiplication and an addition are two. Counted are the products, which XLA's own count exceeds by the elementwise
rest, a few percent; the optimiser, which is nothing but elementwise, is counted too.

Axis letters: B batch, S source, T target, N modules of a fusion, P modules in memory, r rank.
"""

import dataclasses
from typing import Literal, NamedTuple

from ..models.sites import Site, sites, targeted
from ..models.t5.model import T5Config

UpdateKind = Literal["none", "magnitudes", "mix", "sum", "lora", "dora", "vera", "full"]

# Adam with bias correction, the check for non-finite gradients, their norm and clipping: a trained number and step.
_OPTIMISER = 18


class Shape(NamedTuple):
    """A padded batch: B rows, S source and T target tokens."""

    rows: int
    source: int
    target: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What a method does to every adapted matrix.

    Attributes:
      kind: `mix` and `sum` fuse modules, `lora`, `dora` and `vera` are one new module each.
      rank: of one module.
      modules: N.
      pool: P, those that any seed fuses; `mix` reads all of them.
      magnitudes: a fusion has them.
      targets: the linear maps that are adapted, wherever they occur.
    """

    kind: UpdateKind
    rank: int = 16
    modules: int = 1
    pool: int = 1
    magnitudes: bool = False
    targets: tuple[str, ...] = ("q", "v")

    def width(self, site: Site) -> int:
        """Return how many numbers a token has between the two products of the update; 0 where there are none."""
        if self.kind in ("none", "magnitudes", "full") or self.is_dense(site):
            return 0
        return self.rank * (self.modules if self.kind == "sum" else 1)

    def is_dense(self, site: Site) -> bool:
        """Whether the sum is formed as a whole matrix (see `adapters.updates.Dense`)."""
        return self.kind == "sum" and self.modules * self.rank >= site.d_in


def tokens(site: str, shape: Shape) -> int:
    """Return how many tokens a site meets: the decoder reads keys and values of the source at every layer."""
    of_source = site.startswith("encoder") or site in ("decoder.cross.k", "decoder.cross.v")
    return shape.rows * (shape.source if of_source else shape.target)


def forward_flops(config: T5Config, shape: Shape, update: Update) -> float:
    """Return the FLOPs of making the adapters and running the model once."""
    return _products(config, shape) + _head(config, shape) + _attention(config, shape) + _updates(config, shape, update)


def generation_flops(config: T5Config, shape: Shape, update: Update) -> float:
    """Return the FLOPs of generating T tokens for B rows.

    As many as of a forward pass, since every token meets every position of the cache; only DoRA's norms, which the
    layers make for themselves, are made for every token.
    """
    again = 0
    if update.kind == "dora":
        of_source = ("decoder.cross.k", "decoder.cross.v")
        there = {n: s for n, s in targeted(config, update.targets).items() if n.startswith("decoder")}
        again = sum(s.layers * _prepare(s, update) for name, s in there.items() if name not in of_source)
    return forward_flops(config, shape, update) + float(again * max(shape.target - 1, 0))


def step_flops(config: T5Config, shape: Shape, update: Update, *, trainable: int) -> float:
    """Return the FLOPs of one training step.

    Backward, every product with a frozen weight is met once more, by the gradient of the activations alone; full
    fine-tuning adds the gradients of the weights. An attention's two products are met twice.
    """
    products, attention = _products(config, shape), _attention(config, shape)
    updates = _updates(config, shape, update, prepare=False)
    backward = products + _head(config, shape) + 2 * attention + updates + _gradients(config, shape, update)
    if config.remat == "full":
        backward += products - _last_products(config, shape) + attention + updates
    elif config.remat == "dots" and not config.unroll:
        backward += attention / 2  # the scores; XLA sees through the recomputation where layers are unrolled
    if config.unroll and update.kind != "full":
        backward -= _first_layers(config, shape)
    return forward_flops(config, shape, update) + backward + _OPTIMISER * trainable


def _products(config: T5Config, shape: Shape) -> float:
    return float(sum(2 * tokens(name, shape) * s.layers * s.d_in * s.d_out for name, s in sites(config).items()))


def _head(config: T5Config, shape: Shape) -> float:
    return 2.0 * shape.rows * shape.target * config.d_model * config.vocab_size


def _attention(config: T5Config, shape: Shape) -> float:
    rows, source, target = shape
    scores = config.num_layers * source**2 + config.num_decoder_layers * target * (target + source)
    return 4.0 * rows * scores * config.num_heads * config.d_kv


def _last_products(config: T5Config, shape: Shape) -> float:
    """Return the products at the end of the blocks: no gradient needs what they say."""
    last = {name: s for name, s in sites(config).items() if name.endswith("ff.wo")}
    return float(sum(2 * tokens(name, shape) * s.layers * s.d_in * s.d_out for name, s in last.items()))


def _first_layers(config: T5Config, shape: Shape) -> float:
    """Return what a gradient into the embeddings would take, which nobody asks for and only a loop computes."""
    into = [f"{stack}.self.{name}" for stack in ("encoder", "decoder") for name in "qkv"]
    return float(sum(2 * tokens(name, shape) * s.d_in * s.d_out for name, s in sites(config).items() if name in into))


def _updates(config: T5Config, shape: Shape, update: Update, *, prepare: bool = True) -> float:
    """Return the FLOPs of the updates of all sites, forward."""
    if update.kind in ("none", "full"):
        return 0.0
    total = 0
    for name, site in targeted(config, update.targets).items():
        total += site.layers * 2 * tokens(name, shape) * update.width(site) * (site.d_in + site.d_out)
        total += site.layers * _prepare(site, update) if prepare else 0
    return float(total)


def _prepare(site: Site, update: Update) -> int:
    """Return what one matrix takes before any token: fused factors, and the norm of its columns."""
    d_in, d_out, r = site.d_in, site.d_out, update.rank
    k = update.modules * r
    if update.kind == "dora":
        return 2 * r * d_in * d_out + 2 * r * r * (d_in + d_out)
    if update.kind == "mix":
        factors = 2 * update.pool * r * (d_in + d_out)
        return factors + (2 * update.pool * r * d_out + 2 * r * r * (d_in + d_out) if update.magnitudes else 0)
    if update.is_dense(site):
        return 2 * k * d_in * d_out
    # The norm, by the order of products that `compose` takes.
    return 2 * k * min(k * (d_in + d_out), d_in * d_out) if update.kind == "sum" and update.magnitudes else 0


def _gradients(config: T5Config, shape: Shape, update: Update) -> float:
    """Return the FLOPs of the gradients of what is trained, from those of the outputs."""
    if update.kind == "full":
        return _products(config, shape) + _head(config, shape)
    if update.kind in ("none", "magnitudes", "vera"):
        return 0.0
    total = 0
    for name, site in targeted(config, update.targets).items():
        count, d_in, d_out = tokens(name, shape), site.d_in, site.d_out
        if update.kind == "mix":
            total += site.layers * 2 * update.pool * update.rank * (d_in + d_out)
        if update.is_dense(site):
            total += site.layers * 2 * (count + update.modules * update.rank) * d_in * d_out
        elif update.kind != "sum":
            total += site.layers * 2 * count * update.rank * (d_in + d_out)
    return float(total)
