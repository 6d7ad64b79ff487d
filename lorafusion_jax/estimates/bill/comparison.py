"""Comparison of LoRA written into cells with LoRAFusion: savings per task, and tokens until break-even."""

from collections.abc import Mapping
from typing import NamedTuple

from ...crossbar import CONSTANTS, Constants, CrossbarConfig, Range
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
      extra_per_token: extra joules of LoRAFusion for a generated token and its share of the source.
      break_even: generated tokens per task at which that outweighs the saved writes.
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
    return Comparison(
        install=cells[0],
        with_update=cells[1],
        learning=cells[2],
        learning_all=ratio,
        writing_share=share,
        extra_per_token=extra,
        break_even=price(lora, crossbar, options, constants).written.energy / extra,
    )


def _extra(
    lora: Activity, fusion: Activity, crossbar: CrossbarConfig, options: CostOptions, constants: Constants
) -> Range:
    """Return the energy that one method takes more than the other, from the difference of their counts."""

    def more(a: Work, b: Work) -> Range:
        work = Work(b.reads + a.reads * -1, b.macs - a.macs, b.words - a.words)
        return token_energy(work, crossbar, constants).total

    share = options.source / options.target
    return more(lora.generated, fusion.generated) + more(lora.source, fusion.source) * share


def comparisons(
    found: Mapping[str, Activity], crossbar: CrossbarConfig, options: CostOptions, constants: Constants = CONSTANTS
) -> dict[str, Comparison]:
    """Return the comparisons of LoRA in cells with LoRAFusion, by the layout of its pool."""
    lora = found["LoRA in cells"]
    layouts = ("LoRAFusion", "LoRAFusion, side by side")
    return {name: compare(lora, found[name], crossbar, options, constants) for name in layouts}
