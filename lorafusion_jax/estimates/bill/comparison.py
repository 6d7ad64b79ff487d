"""Comparison of LoRA written into cells with LoRAFusion: savings per task, and tokens until break-even."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from ...crossbar import CONSTANTS, Constants, Counts, CrossbarConfig, Range
from .activity import Activity, Work
from .bill import price, token_energy
from .options import CostOptions

_WRITING = ("cell_write_energy",)


class Comparison(NamedTuple):
    """Comparison of LoRA in cells with LoRAFusion in one layout of its pool.

    A ratio is LoRA's energy over LoRAFusion's. Its range is over the published energies of writing a cell, with typical
    values for the other constants. In `learning_all` the other constants vary as well, equally for both methods.

    Attributes:
      install: ratio for installing the finished task.
      with_update: ratio for that and the work that each method adds to the base's passes in training.
      learning: ratio for all that and the base's passes.
      learning_all: the same ratio over all constants.
      writing_share: share of writing in LoRA's energy until the task is learned, over all constants.
      extra_per_token: extra joules of LoRAFusion for a generated token and its share of the source; 0 if it takes less.
      break_even: generated tokens per task at which that outweighs what putting the task in place saves; infinite if it
        never does.
    """

    install: Range
    with_update: Range
    learning: Range
    learning_all: Range
    writing_share: Range
    extra_per_token: Range
    break_even: Range


def compare(
    lora: Activity,
    fusion: Activity,
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants = CONSTANTS,
) -> Comparison:
    """Return the comparison of a method that writes cells with one that reads more.

    Args:
      lora: the method that writes cells for the task.
      fusion: the method that writes no cells.
      crossbar: the arrays.
      options: lengths of a row.
      constants: constants of devices, converters and digital logic.
    """
    rest = [name for name in constants.table if name not in _WRITING]
    ends: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    for writing in ("low", "typical", "high"):
        for other in ("low", "typical", "high"):
            fixed = constants.pinned(writing, *_WRITING).pinned(other, *rest)
            a, b = (price(each, crossbar, options, fixed) for each in (lora, fusion))
            ends[writing, other] = (
                a.install.typical / b.install.typical,
                (a.install + a.update).typical / (b.install + b.update).typical,
                a.learning.typical / b.learning.typical,
                a.written.energy.typical / a.learning.typical,
            )
    cells = [Range(*(ends[writing, "typical"][i] for writing in ("low", "typical", "high"))) for i in range(3)]
    every = [sorted(found[i] for found in ends.values()) for i in (2, 3)]
    ratio, share = (
        Range(found[0], ends["typical", "typical"][i], found[-1]) for i, found in zip((2, 3), every, strict=True)
    )
    extra = _extra(lora, fusion, crossbar, options, constants)
    saved = _difference(*(price(each, crossbar, options, constants).install for each in (lora, fusion)))
    return Comparison(
        install=cells[0],
        with_update=cells[1],
        learning=cells[2],
        learning_all=ratio,
        writing_share=share,
        extra_per_token=extra,
        break_even=_quotient(saved, extra),
    )


def _extra(
    lora: Activity, fusion: Activity, crossbar: CrossbarConfig, options: CostOptions, constants: Constants
) -> Range:
    """Return the energy that one method takes more than the other, from the difference of their counts."""

    def more(a: Work, b: Work) -> Range:
        work = Work(_excess(a.reads, b.reads), max(b.macs - a.macs, 0), max(b.words - a.words, 0))
        return token_energy(work, crossbar, constants).total

    def of_tokens(a: Activity, b: Activity) -> Range:
        return more(a.generated, b.generated) + more(a.source, b.source) * (options.source / options.target)

    return _difference(of_tokens(lora, fusion), of_tokens(fusion, lora))


def _excess(a: Counts, b: Counts) -> Counts:
    """Return how much more of everything the second counts have, 0 where they have less."""
    return Counts(**{f.name: max(getattr(b, f.name) - getattr(a, f.name), 0) for f in dataclasses.fields(Counts)})


def _difference(a: Range, b: Range) -> Range:
    """Return a difference, 0 where it would be negative."""
    return Range(*(max(end, 0.0) for end in (a.low - b.high, a.typical - b.typical, a.high - b.low)))


def _quotient(a: Range, b: Range) -> Range:
    """Return a quotient that is infinite where the divisor is zero."""
    ends = (a.low, b.high), (a.typical, b.typical), (a.high, b.low)
    return Range(*(above / below if below else math.inf for above, below in ends))


def comparisons(
    found: Mapping[str, Activity], crossbar: CrossbarConfig, options: CostOptions, constants: Constants = CONSTANTS
) -> dict[str, Comparison]:
    """Return the comparisons of LoRA in cells with LoRAFusion, by the layout of its pool, and by its bases."""
    lora, layouts = found["LoRA in cells"], [name for name in found if name.startswith("LoRAFusion")]
    return {name: compare(lora, found[name], crossbar, options, constants) for name in layouts}
