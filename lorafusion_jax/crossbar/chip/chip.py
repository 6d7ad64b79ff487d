"""A chip: a matrix in arrays, or a stack of them, with everything that a read needs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from ..config.schema import CrossbarConfig
from ..config.structure import Structure, split_config
from ..mapping import encoding
from ..mapping.bit_fields import FieldWords
from ..mapping.geometry import Geometry
from ..preparation.preparation import Preparation
from .plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Correction:
    """Correction of a chip's reads: y = scale * read(x) + offset + (x @ U) @ V. A part that is None is left out.

    Attributes:
      scale: factor of each column.
      offset: number that is added to each column.
      U: first factor of a matrix of low rank; matrices of a stack with a smaller rank than r have columns of zeros.
      V: second factor.
    """

    scale: Float[Array, "*N d_out"] | None = None
    offset: Float[Array, "*N d_out"] | None = None
    U: Float[Array, "*N d_in r"] | None = None
    V: Float[Array, "*N r d_out"] | None = None

    def __post_init__(self):
        if (self.U is None) != (self.V is None):
            raise ValueError(
                "Correction: U and V are the factors of one matrix: give both or neither"
            )

    def __call__(
        self, x: Float[Array, "*B d_in"], y: Float[Array, "*B d_out"]
    ) -> Float[Array, "*B d_out"]:
        """Return the corrected outputs, given the inputs and outputs of one matrix."""
        lead = range(y.ndim - 1)
        if self.scale is not None:
            y = y * jnp.expand_dims(self.scale.astype(y.dtype), lead)
        if self.offset is not None:
            y = y + jnp.expand_dims(self.offset.astype(y.dtype), lead)
        if self.U is not None and self.V is not None:
            y = y + (x @ self.U.astype(x.dtype)) @ self.V.astype(x.dtype)
        return y

    def weights(self, read: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Return the matrix of the corrected reads, without offsets, given that of the reads."""
        scaled = read if self.scale is None else read * self.scale[None]
        return scaled if self.U is None or self.V is None else scaled + self.U @ self.V

    def numbers(self) -> int:
        """Return how many digital parameters it has; columns of zeros in U, and their rows of V, do not count."""
        count = sum(part.size for part in (self.scale, self.offset) if part is not None)
        if self.U is None or self.V is None:
            return count
        ranks = int(jnp.sum(jnp.any(self.U != 0, axis=-2)))
        return count + ranks * (self.U.shape[-2] + self.V.shape[-1])


def numbers_per_rank(chips: Sequence[Any]) -> int:
    """Return how many numbers matrices of rank 1 have, one for each matrix of the chips, or of stacks of matrices."""
    return sum(math.prod(chip.shape[:-2]) * sum(chip.shape[-2:]) for chip in chips)


def check_correction(correction: Correction, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if a part of a correction does not fit the chip of this name and shape."""
    *lead, d_in, d_out = shape
    rank = () if correction.U is None else correction.U.shape[-1:]
    for part, expected_shape in {
        "scale": (d_out,),
        "offset": (d_out,),
        "U": (d_in, *rank),
        "V": (*rank, d_out),
    }.items():
        values = getattr(correction, part)
        if values is not None and values.shape != (*lead, *expected_shape):
            raise ValueError(
                f"the {part} of the correction of {name!r} has shape {values.shape}: expected "
                f"{(*lead, *expected_shape)}. Give "
                "the correction of this chip"
            )


def by_name(chips: Sequence[Any]) -> dict[str, Any]:
    """Return chips by their names; raises a ValueError if two share one."""
    names = [chip.name for chip in chips]
    for name in names:
        if (count := names.count(name)) > 1:
            raise ValueError(
                f"{count} chips have the name {name!r}, by which their data are given: set other names with "
                "dataclasses.replace(chip, name=...)"
            )
    return dict(zip(names, chips, strict=True))


# The corrections of a model, by the names of its chips.
Corrections = Mapping[str, Correction]


Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Chip:
    """The arrays that hold one matrix, or one for each entry of leading axes, and their configuration.

    Attributes:
      codes: [d_in, d_out] the weights as programmed, in weight codes: the sum of all slices in a perfect read.
      scale: [1 or R, 1 or d_out] the weight of one code.
      cells: every cell in level units, a unit column last; None if the path does not read single cells.
      columns: [k, R, rows, d_out + units] the factors of the inputs; integers share words.
      variance: variance of read noise at sigma = 1: of `columns`, or [d_in, d_out + units] of `codes` where slices
        telescope. A single column stands for all if they do not differ.
      occupied: [k, R] the planes of integer cells that are not all zero, for the path `loop`.
      flipped: [K, R, C, cols] columns that are stored inverted.
      gain: [K, P, R, C, cols] the gain of each column's conversion, and `offset` its offset in level units, or None.
      limits: [1 or R, K, 2] ADC range of each weight slice, in units of current, R for tiles of unequal height; None
        without an ADC or before calibration.
      input_limit: full scale of the DAC; None where each input vector has its own, or before calibration.
      pulses: mean write-verify pulses per cell, or None.
      clipped: share of weights whose remainder was more than the slices below could store, or None (`cell.residual`).
      values: the arrays among the configuration's values, each with the leading axes of the stack.
      structure: the configuration without `values`: plain numbers, bits, sizes.
      geometry: tiles, levels and bounds of one matrix, which follow from its shape and the structure.
      plan: path of a read, and its reason.
      key: PRNG key of the reads, with the leading axes of the stack (see `with_read_key`); None without read noise.
      tap: zeros whose gradient is the converters' statistics (see `calibration.whole_model`), or None.
      correction: digital correction of the reads, with the leading axes of the stack, or None.
      preparation: change of the weights before they were written, and of the inputs of a read, or None.
      name: name of the weight in rules and reports.
    """

    codes: Float[Array, "*N d_in d_out"]
    scale: Float[Array, "*N _R _cols"]
    cells: Float[Array, "*N K P R C rows cols"] | None
    columns: Num[Array, "*N k R rows _cols"] | FieldWords | None
    variance: Float[Array, "*N _rows _cols"] | Float[Array, "*N k R rows _cols"] | None
    occupied: Bool[Array, "*N k R"] | None
    flipped: Bool[Array, "*N K R C _cols"] | None
    gain: Float[Array, "*N K _P R C cols"] | None
    offset: Float[Array, "*N K _P R C cols"] | None
    limits: Float[Array, "*N _R K 2"] | None
    input_limit: Float[Array, "*N"] | None
    pulses: Float[Array, "*N"] | None
    values: list[Any]
    structure: Structure = dataclasses.field(metadata={"static": True})
    geometry: Geometry = dataclasses.field(metadata={"static": True})
    plan: Plan = dataclasses.field(metadata={"static": True})
    clipped: Float[Array, "*N"] | None = None
    key: Any = None
    tap: Any = None
    correction: Correction | None = None
    preparation: Preparation | None = None
    name: str = dataclasses.field(default="", metadata={"static": True})

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        if not isinstance(shape, tuple) or len(shape) < 2:
            return "Chip(...)"  # a pytree being rebuilt with placeholders
        each = [
            len(parts)
            for parts in (self.geometry.rows, self.geometry.cols, self.geometry.levels)
        ]
        arrays = math.prod((*shape[:-2], *each, self.geometry.polarities))
        name = f"{self.name!r}, " if self.name else ""
        return f"Chip({name}shape={shape}, arrays={arrays}, path={self.plan.path!r})"

    @functools.cached_property
    def config(self) -> CrossbarConfig:
        """Configuration of the crossbar; of a stack, its arrays have the leading axes of the stack."""
        return self.structure.config(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights: [..., d_in, d_out]."""
        return self.codes.shape

    @property
    def awaits_inputs(self) -> bool:
        """Whether the range of the DAC comes from data that it has not seen."""
        dac = self.config.dac
        return (
            dac is not None and dac.scaling == "calibrated" and self.input_limit is None
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of one matrix: (d_in, d_out)."""
        return self.codes.shape[-2], self.codes.shape[-1]


def reconfigured(chip: Chip, config: CrossbarConfig, **fields: Any) -> Chip:
    """Return the chip with another configuration of the same arrays, and other fields.

    Arrays among its values may have the leading axes of a stack; those without are shared by all matrices.
    """
    structure, values = split_config(config)
    lead = chip.shape[:-2]
    values = [
        v if v.shape[: len(lead)] == lead else jnp.broadcast_to(v, (*lead, *v.shape))
        for v in values
    ]
    geometry = Geometry.of(chip.matrix_shape, config)
    return dataclasses.replace(
        chip, structure=structure, values=values, geometry=geometry, **fields
    )


def with_read_key(chip: Chip, key: Array | None) -> Chip:
    """Return the chip with the key that its next read draws noise from. Use another key for every read.

    Args:
      key: [] one key, from which every matrix of a stack gets a separate one, or keys [*N] with the leading axes of the
        stack; None to remove the key.
    """
    if key is None:
        return dataclasses.replace(chip, key=None)
    lead = chip.shape[:-2]
    key = typed_key(key)
    if key.shape not in ((), lead):
        raise ValueError(
            f"keys of shape {key.shape} for arrays of {chip.shape}: give one key, or keys of shape {lead}"
        )
    if lead and key.ndim == 0:
        key = stacked_keys(key, [jnp.arange(size) for size in lead])
    return dataclasses.replace(chip, key=key)


def reads(tree: Any, *numbers: Array | int) -> Any:
    """Return a tree of weights whose next reads draw new noise, given numbers of the read such as (seed, step).

    An unchanged key gives the same noise at every step. So call this before every training step, every decoded token
    and every batch.
    """

    def of_leaf(leaf: Any) -> Any:
        if not is_chip(leaf) or leaf.key is None:
            return leaf
        return dataclasses.replace(leaf, key=functools.reduce(fold, numbers, leaf.key))

    return jax.tree.map(of_leaf, tree, is_leaf=is_chip)


def programmed_weights(chip: Chip) -> Float[Array, "*N d_in d_out"]:
    """Return the weights as programmed, and corrected: the matrix of a read with ideal converters."""

    def of_one(one: Chip) -> Array:
        weights = one.codes * encoding.per_weight(one.scale, one.geometry)
        weights = weights if one.preparation is None else one.preparation.undo(weights)
        return weights if one.correction is None else one.correction.weights(weights)

    return over_stack(of_one, chip.shape[:-2])(chip)


def is_chip(leaf: Any) -> bool:
    """Return whether a leaf of a tree of weights is a chip."""
    return isinstance(leaf, Chip)


def chips_in(weights: Any) -> list[Chip]:
    """Return the chips of a tree of weights, in its order."""
    return [leaf for leaf in jax.tree.leaves(weights, is_leaf=is_chip) if is_chip(leaf)]


def with_chips(weights: Tree, chips: Sequence[Chip]) -> Tree:
    """Return the tree with other chips, in the order of `chips_in`; raises a ValueError for another number of them."""
    if len(chips) != (count := len(chips_in(weights))):
        raise ValueError(
            f"{len(chips)} chips for a tree with {count}: give one for each of chips_in(weights)"
        )
    following = iter(chips)
    return jax.tree.map(
        lambda leaf: next(following) if is_chip(leaf) else leaf,
        weights,
        is_leaf=is_chip,
    )


def with_corrections(weights: Any, corrections: Corrections) -> Any:
    """Return a tree of weights whose chips have these corrections; the others keep theirs.

    Raises:
      ValueError: chips share a name, or a correction is of no chip, or of a chip of another shape.
    """
    chips = by_name(chips_in(weights))
    for name, correction in corrections.items():
        if name not in chips:
            raise ValueError(
                f"a correction of {name!r}: expected one of the chips {', '.join(chips)}"
            )
        check_correction(correction, name, chips[name].shape)
        chips[name] = dataclasses.replace(chips[name], correction=correction)
    return with_chips(weights, list(chips.values()))


def with_shared_factors(weights: Any) -> Any:
    """Return a tree of weights in which chips that prepare inputs alike have one array of factors.

    A compiled function then transforms the input of queries, keys and values once, because XLA merges operations with
    the same operands.
    """
    first: dict[Any, Any] = {}

    def of_leaf(leaf: Any) -> Any:
        one = leaf.preparation if is_chip(leaf) else None
        if one is None or one.factors is None or not one.identity:
            return leaf
        factors = first.setdefault(
            (one.identity.partition("-")[0], one.factors.shape), one.factors
        )
        return dataclasses.replace(
            leaf, preparation=dataclasses.replace(one, factors=factors)
        )

    return jax.tree.map(of_leaf, weights, is_leaf=is_chip)


def over_stack(fn: Callable[..., Any], lead: tuple[int, ...]) -> Callable[..., Any]:
    """Return `fn` mapped over the leading axes of a stack."""
    for _ in lead:
        fn = jax.vmap(fn)
    return fn


def one_by_one(fn: Callable[..., Any], lead: tuple[int, ...]) -> Callable[..., Any]:
    """Return what `over_stack` does, with the entries one after the other, so that only one's temporaries exist."""
    if not lead:
        return fn

    def mapped(*arguments: Any) -> Any:
        flat = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), arguments
        )
        results = jax.lax.map(lambda of_one: fn(*of_one), flat)
        return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), results)

    return mapped


def typed_key(key: Array) -> Array:
    """Return a key [...] as `jax.random.key` makes it, given that or the raw one [..., 2] of `jax.random.PRNGKey`."""
    return jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key


def fold(keys: Array, number: Array | int) -> Array:
    """Return `jax.random.fold_in(key, number)` of keys of any shape."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), number).reshape(
        keys.shape
    )


def stacked_keys(key: Array, indices: Sequence[Int[Array, " _size"]]) -> Array:
    """Return keys [*N] of a stack, given one [] and the indices of its axes: fold_in(fold_in(key, l), n) at l, n."""
    for of_axis in indices:
        key = jax.vmap(fold, in_axes=(None, 0), out_axes=-1)(key, of_axis)
    return key
