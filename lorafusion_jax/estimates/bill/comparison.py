"""Comparison of LoRA written into cells with LoRAFusion: savings per task, and tokens until break-even."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from ...crossbar import CONSTANTS, Constants, Counts, CrossbarConfig, Range
from .activity import Activity, Work
from .bill import price, token_energy
from .options import CostOptions

_WRITING = ("cell_write_energy",)
_LEVELS: tuple[Literal["low", "typical", "high"], ...] = ("low", "typical", "high")


class Comparison(NamedTuple):
    """Comparison of LoRA in cells with LoRAFusion in one layout of its pool.

    A ratio is LoRA's energy over LoRAFusion's. Its range is over the published energies of writing a cell, with typical
    values for the other constants. In `learning_all` the other constants vary as well, equally for both methods.
    """

    install: Range  # ratio for installing the finished task
    with_update: Range  # ratio for that and the work that each method adds to the base's passes in training
    learning: Range  # ratio for all that and the base's passes
    learning_all: Range  # the same ratio over all constants
    writing_share: Range  # share of writing in LoRA's energy until the task is learned, over all constants
    # extra joules of LoRAFusion for a generated token and its share of the source; 0 if it takes less
    extra_per_token: Range
    # generated tokens per task at which that outweighs what putting the task in place saves; infinite if it never does
    break_even: Range


def comparisons(
    of_methods: Mapping[str, Activity],
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants = CONSTANTS,
) -> dict[str, Comparison]:
    """Return the comparisons of LoRA in cells with LoRAFusion, by the layout of its pool, and by its bases."""
    lora = of_methods["LoRA in cells"]
    layouts = [name for name in of_methods if name.startswith("LoRAFusion")]
    return {
        name: _compare(lora, of_methods[name], crossbar, options, constants)
        for name in layouts
    }


def _compare(
    lora: Activity,
    fusion: Activity,
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants,
) -> Comparison:
    """Return the comparison of a method that writes cells with one that reads more."""
    others = [name for name in constants.table if name not in _WRITING]
    ends: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    for writing, other in itertools.product(_LEVELS, _LEVELS):
        fixed = constants.pinned(writing, *_WRITING).pinned(other, *others)
        a = price(lora, crossbar, options, fixed)
        b = price(fusion, crossbar, options, fixed)
        ends[writing, other] = (
            a.install.typical / b.install.typical,
            (a.install + a.update).typical / (b.install + b.update).typical,
            a.learning.typical / b.learning.typical,
            a.written.energy.typical / a.learning.typical,
        )
    over_cells = zip(*(ends[level, "typical"] for level in _LEVELS), strict=True)
    install, with_update, learning, _ = itertools.starmap(Range, over_cells)

    def over_all(place: int) -> Range:
        values = [ratios[place] for ratios in ends.values()]
        return Range(min(values), ends["typical", "typical"][place], max(values))

    ratio = over_all(2)
    share = over_all(3)
    extra = _extra(lora, fusion, crossbar, options, constants)
    saved = _difference(
        *(price(each, crossbar, options, constants).install for each in (lora, fusion))
    )
    ends_of_both = (
        (saved.low, extra.high),
        (saved.typical, extra.typical),
        (saved.high, extra.low),
    )
    break_even = Range(
        *(above / below if below else math.inf for above, below in ends_of_both)
    )
    return Comparison(install, with_update, learning, ratio, share, extra, break_even)


def _extra(
    lora: Activity,
    fusion: Activity,
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants,
) -> Range:
    """Return the energy that one method takes more than the other, from the difference of their counts."""

    def more(a: Work, b: Work) -> Range:
        work = Work(
            _excess(a.reads, b.reads),
            max(b.macs - a.macs, 0),
            max(b.words - a.words, 0),
        )
        return token_energy(work, crossbar, constants).total

    def of_tokens(a: Activity, b: Activity) -> Range:
        return more(a.generated, b.generated) + more(a.source, b.source) * (
            options.source / options.target
        )

    return _difference(of_tokens(lora, fusion), of_tokens(fusion, lora))


def _excess(a: Counts, b: Counts) -> Counts:
    """Return how much more of everything the second counts have, 0 where they have less."""
    return Counts(
        **{
            f.name: max(getattr(b, f.name) - getattr(a, f.name), 0)
            for f in dataclasses.fields(Counts)
        }
    )


def _difference(a: Range, b: Range) -> Range:
    """Return a difference, 0 where it would be negative."""
    return Range(
        *(
            max(end, 0.0)
            for end in (a.low - b.high, a.typical - b.typical, a.high - b.low)
        )
    )
