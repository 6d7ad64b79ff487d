"""The configuration of a crossbar: one tree of frozen dataclasses.

Structure (bits, slices, tile sizes, encodings) is static: metadata of the pytree, hashable. Physical values
(on/off ratio, noise levels, times, ADC limits) are leaves: numbers, or arrays that can be vmapped over and learned.
`None` means ideal or absent, never zero bits.

Units: conductances are normalised to Gmax = 1 and inputs to a full-scale DAC step = 1, so that a column's
current is at most the number of rows of its array.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ...support.platform import is_traced
from ..devices.device import Device, best_significance
from ..devices.physical import NUMBER, Physical, model, require
from ..devices.wires import Wire
from ..devices.write_error import Table
from ..mapping.adc.architectures import ARCHITECTURES

_MOST_SLICES = 16  # as weights have at most 16 bits
# Types of a limit other than tracers and a pytree's placeholders.
_CONCRETE = int | float | np.ndarray | np.generic | jax.Array


def _is_whole(value: Any, least: int, most: int = 2**62) -> bool:
    return isinstance(value, int) and least <= value <= most


def _check_shares(converter: Any, what: str) -> None:
    for name, least in (("quantile", 0.5), ("clip_share", 0)):
        valid = least <= getattr(converter, name) <= 1
        require(converter, name, valid, f"give a share of {what} from {least} to 1")


@model(kw_only=True)
class Cell:
    """A ReRAM cell.

    Attributes:
      bits: bits of each weight slice, least significant first, as in RAELLA's (2, 2, 4); None for one analogue cell;
        `auto` for cells of 2 bits that use every level, (2, 2, 2, 1) for differential weights of 8 bits.
      on_off_ratio: Gmax / Gmin; None is infinite.
      residual: slices are written from the most significant one on, and each also stores what those above missed, as
        `device.readback` reads it; a second pair of analogue cells where `bits` is None.
      significance: full scale of that second pair, of the first's; `auto` for the best for normal weights.
    """

    bits: tuple[int, ...] | Literal["auto"] | None = "auto"
    on_off_ratio: Physical = None
    residual: bool = False
    significance: float | Literal["auto"] = "auto"

    def __post_init__(self):
        if self.bits is not None and self.bits != "auto":
            listed = (
                isinstance(self.bits, tuple | list)
                and 1 <= len(self.bits) <= _MOST_SLICES
            )
            remedy = (
                f"give 1 to 8 bits for each weight slice, least significant first, at most {_MOST_SLICES} slices, as "
                "in (2, 2, 2, 1) for a mapping.weight_bits of 8, or (4,) for one of 5; or 'auto'"
            )
            require(
                self,
                "bits",
                listed and all(_is_whole(bits, 1, 8) for bits in self.bits),
                remedy,
            )
            object.__setattr__(self, "bits", tuple(self.bits))
        if self.significance != "auto":
            paired = self.residual and self.bits is None
            remedy = "give a share of the first pair in (0, 1], with residual=True and bits=None, or 'auto'"
            valid = isinstance(self.significance, NUMBER) and 0 < self.significance <= 1
            require(self, "significance", paired and valid, remedy)
        valid = not isinstance(self.on_off_ratio, NUMBER) or self.on_off_ratio > 1
        require(
            self,
            "on_off_ratio",
            bool(valid),
            "give Gmax / Gmin > 1, or None for infinite",
        )


@model(kw_only=True)
class Encoding:
    """Encoding of signed weights as conductances, which have no sign.

    Attributes:
      kind: `differential` (a positive and a negative array, subtracted) or `offset` (weights shifted to be positive;
        the shift is removed after the conversion).
      two_sided: with `differential`, both cells hold the weight, (1 + w) / 2 and (1 - w) / 2, instead of one of them.
      unit_column: with `offset`, one more column of each array measures the shift, instead of digital logic.
      flip: with a unit column, columns whose digits would sum to more than half of the full scale are stored inverted
        (ISAAC), which halves the range of the ADC.
    """

    kind: Literal["differential", "offset"] = "differential"
    two_sided: bool = False
    unit_column: bool = False
    flip: bool = False

    def __post_init__(self):
        if self.kind == "differential" and (self.unit_column or self.flip):
            raise ValueError(
                "encoding: unit_column and flip need kind='offset': set it, or leave them out"
            )
        if self.kind == "offset" and self.two_sided:
            raise ValueError(
                "encoding: two_sided needs kind='differential': set it, or leave it out"
            )
        if self.flip and not self.unit_column:
            raise ValueError(
                "encoding: flipped columns are recovered by the unit column: set unit_column=True"
            )


@model(kw_only=True)
class DAC:
    """Conversion of inputs to voltages: they are quantised and sent in slices.

    Attributes:
      bits: bits of the input, its sign included.
      slice_bits: bits of one pulse (the DAC's own resolution); None sends all bits in one pulse.
      signed: sign and magnitude on +-limit, 2^bits - 1 levels; else 2^bits levels on 0..limit.
      scaling: full scale: `fixed` (limit, for every input), `calibrated` (one value for every input, from data) or
        `row` (the largest |x| of each input vector). Inputs beyond it are clipped, and so are negative inputs of an
        unsigned DAC.
      limit: full scale for `fixed`.
      quantile: share of the |x| above zero that a calibrated full scale covers.
      clip_share: share of clipped inputs above which statistics warn.
      rounding: to the `nearest` code, or `stochastic`: up or down at random, right on average.
    """

    bits: int = 8
    slice_bits: int | None = 1
    signed: bool = True
    scaling: Literal["fixed", "calibrated", "row"] = "row"
    limit: Physical = 1.0
    quantile: float = 0.9995
    clip_share: float = 0.02
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self):
        least = 1 + self.signed
        remedy = f"give {least} to 16 bits, or dac=None for ideal inputs"
        require(self, "bits", _is_whole(self.bits, least, 16), remedy)
        sliced = self.slice_bits is None or _is_whole(self.slice_bits, 1, self.bits)
        require(
            self,
            "slice_bits",
            sliced,
            f"give 1 to {self.bits} bits, or None for no slicing",
        )
        _check_shares(self, "inputs")
        valid = not isinstance(self.limit, NUMBER) or 0 < self.limit < float("inf")
        require(self, "limit", bool(valid), "give the largest |x|, positive and finite")

    @property
    def magnitude_bits(self) -> int:
        """Bits without the sign."""
        return self.bits - self.signed

    @property
    def slices(self) -> tuple[int, ...]:
        """Bits of each input slice, least significant first; the top slice has the remaining bits."""
        total = self.magnitude_bits
        step = self.slice_bits or total
        return tuple(min(step, total - start) for start in range(0, total, step))


@model(kw_only=True)
class ADC:
    """Conversion of column currents to numbers.

    Attributes:
      bits: bits of one conversion; signed sums use 2^bits - 1 levels about zero. A table has a row for each weight
        slice and a column for each input slice, least significant first: bits after which a converter of 8 bits, or of
        the most in the table, is stopped, and 0 for no conversion.
      range: `calibrated` from data, `max` (everything the array could produce: wasteful), `granular` (a step is one
        level of one cell at the smallest input), or `given` in `limits`.
      convert: after every input slice (`slice`), or once after an analogue shift-and-add (`sum`).
      separate: with `differential`, convert the positive and the negative column separately and subtract digitally.
      quantile: share of the |current| above zero that a calibrated range covers, where sums are not integers.
      clip_share: share of clipped conversions above which statistics warn.
      limits: [K, 2] lowest and highest current of each weight slice, or [R, K, 2] with those of each row tile, for
        range `given`; may be learned.
      gain_error: standard deviation of each column's ADC gain, drawn once per chip.
      offset_error: standard deviation of each column's ADC offset, in units of Gmax at full input.
      noise: standard deviation of each conversion's noise, in units of Gmax at full input (aihwkit's `out_noise`).
      architecture: kind of ADC (see `register_adc`): `sar` and `ramp` differ in energy and latency.
    """

    bits: int | tuple[tuple[int, ...], ...] = 8
    range: Literal["calibrated", "max", "granular", "given"] = "calibrated"
    convert: Literal["slice", "sum"] = "slice"
    separate: bool = False
    quantile: float = 0.9995
    clip_share: float = 0.02
    limits: Any = None
    gain_error: Physical = None
    offset_error: Physical = None
    noise: Physical = None
    architecture: str = "sar"

    def __post_init__(self):
        for name in ("bits", "limits"):  # hashable
            object.__setattr__(self, name, tuples(getattr(self, name)))
        if isinstance(self.bits, tuple):
            valid = all(
                isinstance(row, tuple) and all(_is_whole(bits, 0, 16) for bits in row)
                for row in self.bits
            )
            remedy = (
                "give 0 to 16 bits for each pair of a weight slice and an input slice"
            )
        else:
            valid = _is_whole(self.bits, 2, 16)
            remedy = "give 2 to 16 bits, or adc=None for an ideal ADC"
        require(self, "bits", valid, remedy)
        if (self.range == "given") != (self.limits is not None):
            raise ValueError(
                "adc.limits go with adc.range='given', and only with it: give both or neither"
            )
        _check_shares(self, "conversions")
        remedy = f"choose {', '.join(ARCHITECTURES)}, or call register_adc before"
        require(self, "architecture", self.architecture in tuple(ARCHITECTURES), remedy)
        for name in ("gain_error", "offset_error", "noise"):
            value = getattr(self, name)
            valid = not isinstance(value, NUMBER) or value >= 0
            require(
                self,
                name,
                bool(valid),
                "give a standard deviation of at least 0, or None",
            )

    @property
    def full_bits(self) -> int:
        """Bits of a conversion that is not stopped."""
        if isinstance(self.bits, int):
            return self.bits
        return max(8, *(bits for row in self.bits for bits in row))


@model(kw_only=True)
class Tile:
    """One physical array, and how a matrix is cut into such arrays.

    Attributes:
      rows: inputs of an array; None for all inputs of the matrix.
      cols: outputs of an array, without a unit column; None for all outputs of the matrix.
      partition: `equal` (ceil(d / rows) parts of one rounded size; the last part is smaller) or `full` (all but the
        last).
      wire: resistance of the wires (IR drop); None for ideal wires.
      current_limit: the largest current of a column (Gmax at full input = 1), clipped before any subtraction.
    """

    rows: int | None = 128
    cols: int | None = 128
    partition: Literal["equal", "full"] = "equal"
    wire: Wire | None = None
    current_limit: Physical = None

    def __post_init__(self):
        for name in ("rows", "cols"):
            valid = getattr(self, name) is None or _is_whole(getattr(self, name), 1)
            require(self, name, valid, "give a positive number, or None for no limit")
        valid = not isinstance(self.current_limit, NUMBER) or self.current_limit > 0
        require(self, "current_limit", bool(valid), "give a positive current, or None")


@model(kw_only=True)
class Mapping:
    """Scaling of weights onto the cells.

    Attributes:
      weight_bits: bits of a weight, its sign included; None for real-valued weights in one analogue cell.
      scale: the weights that share one full scale M = max |w|: the `matrix`, a `tile`, or an output `column`.
      quantile: share of |w| that M covers; weights beyond it are clipped. Where the others are zeros, M covers all.
      clip: `optimal` for the M of each column at which errors of cells and clipping are least together (`prepare`).
      factors: inputs are divided, and rows of weights multiplied, by factors (`prepare`).
      transform: orthogonal transform of inputs and rows (`prepare`).
    """

    weight_bits: int | None = 8
    scale: Literal["matrix", "tile", "column"] = "matrix"
    quantile: float = 1.0
    clip: Literal["none", "optimal"] = "none"
    factors: bool = False
    transform: Literal["none", "hadamard"] = "none"

    def __post_init__(self):
        valid = self.weight_bits is None or _is_whole(self.weight_bits, 2, 16)
        require(
            self, "weight_bits", valid, "give 2 to 16 bits, or None for real weights"
        )
        require(
            self,
            "quantile",
            0 < self.quantile <= 1,
            "give a share of weights in (0, 1]",
        )
        columns = self.scale == "column" and self.quantile == 1
        require(
            self,
            "clip",
            self.clip == "none" or columns,
            "it needs scale = 'column' and quantile = 1",
        )


@model(kw_only=True)
class CrossbarConfig:
    """Configuration of a crossbar; by default 128 x 128 arrays, 8-bit weights in differential cells, no ADC or noise.

    It has the bits that `Cell(bits="auto")` stands for. Raises a ValueError for parts that do not fit together.
    """

    cell: Cell = Cell()
    encoding: Encoding = Encoding()
    mapping: Mapping = Mapping()
    tile: Tile = Tile()
    dac: DAC | None = DAC()
    adc: ADC | None = None
    device: Device = Device()

    def __post_init__(self):
        cell = self.cell
        mapping = self.mapping
        parts = (cell, self.encoding, mapping, self.tile, self.device)
        if not all(dataclasses.is_dataclass(part) for part in parts):
            return  # a pytree being rebuilt with placeholders
        device = self.device
        differential = self.encoding.kind == "differential"
        needed = self.stored_bits
        if cell.bits == "auto":
            # 2 bits a slice; the top one has the bits that are left.
            filled = None
            if needed is not None:
                filled = (2,) * (needed // 2) + (1,) * (needed % 2)
            cell = dataclasses.replace(cell, bits=filled)
            object.__setattr__(self, "cell", cell)
        if (cell.bits is None) != (needed is None):
            raise ValueError(
                f"cell.bits = {cell.bits}, mapping.weight_bits = {mapping.weight_bits}: both or neither must be None"
            )
        slices = len(self.weight_slices)
        if cell.residual and not differential:
            raise ValueError(
                "cell.residual stores remainders of both signs: it needs encoding.kind = 'differential'"
            )
        if cell.residual and slices < 2:
            raise ValueError(
                f"cell.residual writes slice after slice, but cell.bits = {cell.bits}: give two slices or more"
            )
        if device.readback and not cell.residual and not device.write_verify:
            raise ValueError(
                "device.readback reads cells while they are written: it needs cell.residual or device.write_verify"
            )
        if cell.residual and cell.bits is None and cell.significance == "auto":
            leaves = jax.tree.leaves((device, cell.on_off_ratio))
            in_jit = is_traced(jnp.zeros(()))
            if in_jit or not all(isinstance(leaf, NUMBER) for leaf in leaves):
                raise ValueError(
                    "cell.significance = 'auto' needs plain numbers in device and cell.on_off_ratio, outside of "
                    "jax.jit: give a number"
                )
            # The number, which a saved configuration states.
            best = best_significance(device, self.g_min)
            cell = dataclasses.replace(cell, significance=best)
            object.__setattr__(self, "cell", cell)
        stored = sum(self.weight_slices)
        if needed is not None and stored < needed:
            raise ValueError(
                f"cell.bits = {cell.bits} hold {stored} bits, but {mapping.weight_bits}-bit weights in "
                f"{self.encoding.kind} encoding need {needed}: give cell.bits = 'auto', more bits, or "
                f"mapping.weight_bits = {stored + differential}"
            )
        if needed is None and self.encoding.flip:
            raise ValueError(
                "encoding.flip inverts digits: give cell.bits and mapping.weight_bits"
            )
        if mapping.transform != "none" and not self.signed_inputs:
            raise ValueError(
                "mapping.transform makes inputs of both signs: it needs dac.signed = True"
            )
        if device.compensate and not differential:
            raise ValueError(
                "device.compensate scales what is left after subtraction: it needs kind='differential'"
            )
        cells = device.programming
        if (
            isinstance(cells, Table)
            and isinstance(cell.on_off_ratio, NUMBER | None)
            and cells.targets[0] > self.g_min + 1e-6
        ):
            raise ValueError(
                f"device.programming is measured from {cells.targets[0]:g} of Gmax on, but the cells' Gmin is "
                f"{self.g_min:g}: measure that too, or give cell.on_off_ratio = {1 / cells.targets[0]:g}"
            )
        adc = self.adc
        if isinstance(adc, ADC):
            if adc.separate and not differential:
                raise ValueError(
                    "adc.separate converts positive and negative columns: it needs kind='differential'"
                )
            if adc.range == "granular" and (self.dac is None or cell.bits is None):
                raise ValueError(
                    "adc.range='granular' is one level at one input step: give dac and cell.bits"
                )
            check_limits(adc.limits, slices, signed=self.signed_sums)
            if isinstance(adc.bits, tuple):
                self._check_table(adc, adc.bits)

    def _check_table(self, adc: ADC, table: tuple[tuple[int, ...], ...]) -> None:
        """Raise a ValueError for a table of ADC bits that does not fit the slices."""
        shape = (len(self.weight_slices), len(self.input_slices))
        if len(table) != shape[0] or {len(row) for row in table} != {shape[1]}:
            raise ValueError(
                f"adc.bits = {table}: give {shape[0]} rows, one for each weight slice, of {shape[1]} numbers, one "
                "for each input slice"
            )
        if adc.convert == "sum":
            raise ValueError(
                "adc.convert = 'sum' has one conversion for all input slices: give adc.bits as one number"
            )
        kept = {bits for row in table for bits in row if bits}
        if not kept:
            raise ValueError(
                "adc.bits are all 0: give some conversion bits, or adc=None for an ideal ADC"
            )
        if 1 in kept and self.signed_sums:
            raise ValueError(
                "adc.bits has a 1, but these sums are signed: give 2 bits or more, or 0 for no conversion"
            )

    @property
    def stored_bits(self) -> int | None:
        """Bits of a weight in its cells: without the sign in differential encoding; None for real-valued weights."""
        bits = self.mapping.weight_bits
        if bits is None:
            return None
        return bits - 1 if self.encoding.kind == "differential" else bits

    @property
    def weight_slices(self) -> tuple[int, ...]:
        """Bits of every weight slice; 1 for an analogue cell, of which residual writing has two."""
        if self.cell.bits is None:
            return (1, 1) if self.cell.residual else (1,)
        assert self.cell.bits != "auto"  # a configuration has bits instead
        return self.cell.bits

    @property
    def input_slices(self) -> tuple[int, ...]:
        """Bits of every input slice; one slice of 1 for an ideal DAC."""
        return self.dac.slices if self.dac else (1,)

    @property
    def signed_inputs(self) -> bool:
        """Return whether an input slice may be negative."""
        return self.dac is None or self.dac.signed

    @property
    def signed_sums(self) -> bool:
        """Return whether a current that is converted may be negative."""
        differential = self.encoding.kind == "differential"
        return self.signed_inputs or differential and not self.converts_each

    @property
    def converts_sums(self) -> bool:
        """Return whether input slices are shifted and added before the ADC, with one conversion for all of them."""
        return self.adc is not None and self.adc.convert == "sum"

    @property
    def converts_each(self) -> bool:
        """Return whether positive and negative columns are converted separately."""
        return self.adc is not None and self.adc.separate

    @property
    def mismatched(self) -> bool:
        """Return whether every column's ADC has a different gain or offset."""
        return self.adc is not None and (
            self.adc.gain_error is not None or self.adc.offset_error is not None
        )

    @property
    def distorts(self) -> bool:
        """Return whether the ADC is of an architecture with a transfer curve."""
        return (
            self.adc is not None
            and ARCHITECTURES[self.adc.architecture].transfer is not None
        )

    @property
    def draws_at_conversion(self) -> bool:
        """Return whether a column sum has noise when it is converted."""
        return self.device.read_noise is not None or (
            self.adc is not None and self.adc.noise is not None
        )

    @property
    def reads_at_random(self) -> bool:
        """Return whether every read draws random numbers."""
        return self.draws_at_conversion or (
            self.dac is not None and self.dac.rounding == "stochastic"
        )

    @property
    def g_min(self) -> Any:
        """Smallest conductance, as a fraction of Gmax."""
        return 0.0 if self.cell.on_off_ratio is None else 1.0 / self.cell.on_off_ratio


def deterministic(config: CrossbarConfig) -> CrossbarConfig:
    """Return the configuration without random effects: no errors, no drift, no noise, and inputs rounded to nearest."""
    device = Device(iv=config.device.iv, clip=config.device.clip)
    adc = config.adc and dataclasses.replace(
        config.adc, gain_error=None, offset_error=None, noise=None
    )
    dac = config.dac and dataclasses.replace(config.dac, rounding="nearest")
    return dataclasses.replace(config, device=device, adc=adc, dac=dac)


def tuples(values: Any) -> Any:
    """Return nested lists as nested tuples."""
    return tuple(map(tuples, values)) if isinstance(values, list | tuple) else values


def check_limits(limits: Any, slices: int, *, signed: bool) -> None:
    """Raise a ValueError for ADC limits [K, 2] or [R, K, 2] that a converter cannot have; tracers and None pass."""
    leaves = jax.tree.leaves(limits, is_leaf=lambda leaf: leaf is None)
    if is_traced(leaves) or not all(isinstance(leaf, _CONCRETE) for leaf in leaves):
        return
    values = np.asarray(limits, float)
    if values.shape[-2:] != (slices, 2):
        raise ValueError(
            f"ADC limits of shape {values.shape}: give [lowest, highest] for each of {slices} slices"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"ADC limits {values.tolist()} are not finite: give currents")
    low = values[..., 0]
    high = values[..., 1]
    if not (low < high).all():
        raise ValueError(
            f"ADC range {values.tolist()} is empty: the lowest current must be below the highest"
        )
    if signed and not np.allclose(low, -high):
        raise ValueError(
            f"ADC range {values.tolist()} is one-sided, but these sums are signed: give [-a, a]"
        )
    if not signed and (low != 0).any():
        raise ValueError(
            f"ADC range {values.tolist()}: these sums are never negative: give [0, a]"
        )
