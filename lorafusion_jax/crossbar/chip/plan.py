"""The plan of a read: the choice among paths that give the same result, which docs/concepts/reads.md lists."""

import dataclasses
import functools
import math
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ...support.platform import for_cpu, for_one_tpu, is_traced
from ..config.schema import CrossbarConfig
from ..mapping.adc.quantiser import Ties, are_power_steps, level_units
from ..mapping.bit_fields import Packing
from ..mapping.geometry import Geometry

Path = Literal["definition", "product", "loop", "lookup", "tables", "planes", "packed", "mosaic"]

ON_REQUEST = "asked for"  # reason of a path that the caller requested
_NARROW = 2  # bits of the widest input slices for tables and bit planes, which have 4 levels, or 7 with a sign
_BYTE, _TALL = 255, 4096  # largest input that bfloat16 holds with all smaller ones, and rows of a TPU's fast memory
_WIDE = 512  # columns from which counting bits is faster than packed products, for a single vector


@dataclasses.dataclass(frozen=True)
class Plan:
    """The path of a read, and the reason of its choice.

    Attributes:
      integers: column sums, before read noise, are integers.
      packing: fields of the weight slices in the words of `lookup` and `packed`; None if they are not packed.
      ties: method that keeps the codes of sums half-way between two codes exact.
      tabulates: large batches are read by `tables`, whatever the path.
    """

    path: Path
    reason: str
    integers: bool
    packing: Packing | None = None
    ties: Ties = None
    tabulates: bool = False


def choose(
    geometry: Geometry,
    config: CrossbarConfig,
    limits: Array | np.ndarray | None,
    *,
    perfect: bool,
    path: Path | None = None,
) -> Plan:
    """Return the fastest exact path, or a ValueError if the requested one would not be exact.

    Traced `limits` count as unknown; `perfect` cells are all at their target levels.
    """
    known = None if limits is None or is_traced((limits, level_units(geometry, config))) else np.asarray(limits)
    nonlinear = _nonlinearity(config)
    integers = perfect and nonlinear is None and sums_integers(config)
    lossless = integers and _is_lossless(geometry, config, known)
    telescopes = nonlinear is None and (lossless or (config.adc is None and _needs_cells(config) is None))
    ties = exact_ties(geometry, config, known) if integers else None
    plan = functools.partial(Plan, integers=integers, ties=ties)
    loops = nonlinear is None and config.adc is not None and not _needs_cells(config)
    narrow, quiet = _bits(config) <= _NARROW, not config.draws_at_conversion
    fits = config.dac is not None and geometry.converted_top <= _BYTE and geometry.tallest <= _TALL
    if path is not None:
        size = f"takes inputs of up to 8 bits in a conversion and arrays of up to {_TALL:,} rows"
        for paths, holds, why in (
            (("product",), telescopes, f"is not exact here: {nonlinear or 'the ADC loses bits'}; leave path out"),
            (("lookup", "tables", "planes"), narrow, f"takes input slices of up to {_NARROW} bits: set dac.slice_bits"),
            (("planes", "packed"), integers, "takes integer cells: perfect ones, whose Gmin does not reach the ADC"),
            (("tables", "planes", "mosaic"), quiet, "computes no variances: leave out the noise, or the path"),
            (("mosaic",), fits, f"{size}: set dac.slice_bits and tile.rows"),
        ):
            if path in paths and not holds:
                raise ValueError(f"path={path!r} {why}")
        if path not in ("definition", "product") and not loops:
            reason = nonlinear or _needs_cells(config) or "this without an ADC"
            raise ValueError(f"path={path!r} cannot compute {reason}")
        return plan(path, ON_REQUEST)
    if telescopes:
        why = "there is no ADC" if config.adc is None else "the ADC loses nothing: integer levels within its range"
        return plan("product", f"one matrix product: {why}, so that all slices and tiles telescope")
    if not loops:
        return plan("definition", f"every conversion separately: {nonlinear or _needs_cells(config)}")
    # A conversion that divides takes the kernel longer than XLA.
    if for_one_tpu() and quiet and fits and ties != "divide":
        return plan("mosaic", "slices, conversions and their sums in one kernel, next to a TPU's units")
    if not for_cpu() and quiet:
        return plan("definition", "every conversion separately, batched: fastest on an accelerator")
    if not for_cpu():
        return plan("loop", "one draw of the noise for each conversion, where `definition` draws every cell's")
    if _bits(config) == 1 and (integers or not config.signed_inputs):
        return plan("lookup", "input slices have one bit: sums of a few rows come from tables")
    return plan("loop", "the ADC quantises each conversion: one product each, with the ADC in its epilogue")


def in_models(plan: Plan, geometry: Geometry, config: CrossbarConfig) -> Path:
    """Return the path of a planned read in a model, which often reads one vector at a time.

    There a table costs more than it saves. Large batches are read by `tables` where `lookup` would be the fastest path.
    """
    if plan.path not in ("lookup", "loop", "packed"):
        return plan.path
    counts = plan.integers and _bits(config) <= _NARROW and not config.draws_at_conversion
    if counts and geometry.shape[1] >= _WIDE and for_cpu() and _counts_vectors():
        return "planes"
    if plan.path == "lookup":
        return "packed" if plan.integers else "loop"
    return plan.path


def _bits(config: CrossbarConfig) -> float:
    """Return the bits of the widest input in a conversion; infinitely many if it is not one input slice."""
    return math.inf if config.dac is None or config.converts_sums else float(max(config.dac.slices))


def exact_ties(geometry: Geometry, config: CrossbarConfig, limits: np.ndarray | None) -> Ties:
    """Return how ties of integer sums are kept exact; `calibrated` ranges get steps of powers of two."""
    if config.adc is None or config.distorts or config.draws_at_conversion:
        return None
    powers = config.adc.range == "calibrated" or (limits is not None and are_power_steps(limits, geometry, config))
    return "shift" if powers else "divide"


@functools.cache
def _counts_vectors() -> bool:
    """Return whether the processor counts the bits of whole vectors (AVX512_VPOPCNTDQ)."""
    try:
        return "avx512_vpopcntdq" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _nonlinearity(config: CrossbarConfig) -> str | None:
    """Return the reason why an array's sums are not linear in its inputs and cells, or None if they are."""
    if config.tile.wire is not None:
        return "IR drop depends on all currents of an array"
    if config.device.iv is not None:
        return "cells are nonlinear"
    if config.tile.current_limit is not None:
        return "column currents are limited before they are subtracted"
    return None


def _needs_cells(config: CrossbarConfig) -> str | None:
    """Return the reason why single cells are needed instead of one product per slice, or None."""
    if config.adc is not None and config.adc.offset_error is not None:
        return "every column's ADC has its offset"
    if config.distorts:
        return "its ADC has a transfer curve"
    if config.encoding.flip and config.adc is None and config.device.read_noise is not None:
        return "flipped columns are recovered tile by tile, each with its noise"
    if config.adc is not None and config.encoding.flip and not config.signed_sums and config.draws_at_conversion:
        return "noise below zero is cut off, which negated columns would not show"
    noise = config.device.read_noise
    if noise is not None and noise.clip:
        return "read noise is clipped cell by cell"
    if noise is not None and config.converts_sums:
        return "read noise of every input slice adds up before the ADC"
    return None


def sums_integers(config: CrossbarConfig) -> bool:
    """Return whether column sums of perfect cells are integers in level units."""
    if config.cell.bits is None or config.dac is None or config.mismatched:
        return False
    if config.converts_each and config.encoding.two_sided:
        return False  # halves of odd digits
    subtracted = config.encoding.kind == "differential" and not config.converts_each
    return config.cell.on_off_ratio is None or subtracted  # else Gmin reaches the ADC


def _is_lossless(geometry: Geometry, config: CrossbarConfig, limits: np.ndarray | None) -> bool:
    """Return whether every possible (integer) column sum has a separate code that represents it exactly."""
    adc = config.adc
    if adc is None or geometry.code_range is None or config.distorts or config.draws_at_conversion:
        return False
    if adc.range == "granular":
        return max(geometry.bounds) <= geometry.code_range[1]
    return limits is not None and bool(loses_nothing(limits, geometry, config))


def loses_nothing(
    limits: np.ndarray | Float[Array, "_R K 2"], geometry: Geometry, config: CrossbarConfig
) -> np.bool_ | Bool[Array, ""]:
    """Return whether ADCs with these limits have a code for every possible integer sum."""
    xp = jnp if isinstance(limits, jax.Array) else np
    assert geometry.code_range is not None
    top = geometry.code_range[1]
    inv_lsb = top / (limits[..., 1] * xp.asarray(level_units(geometry, config), limits.dtype)[None])
    step = xp.round(inv_lsb)
    whole = (step >= 1) & (abs(inv_lsb - step) < 1e-6 * step)
    return xp.all(whole & (xp.asarray(geometry.bounds, limits.dtype)[None] * step <= top))
