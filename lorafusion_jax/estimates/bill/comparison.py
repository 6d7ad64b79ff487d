"""LoRA written into cells against LoRAFusion: what is saved per task, and after how many tokens it is spent."""

from collections.abc import Mapping
from typing import NamedTuple

from ...crossbar import CONSTANTS, Constants, CrossbarConfig, Range
from .activity import Activity, Work
from .bill import price, token_energy
from .options import CostOptions

_WRITING = ("cell_write_energy",)


class Comparison(NamedTuple):
    """LoRA in cells, and LoRAFusion in one layout of its pool.

    A ratio is LoRA's energy over LoRAFusion's. Its range is over the published energies of writing a cell, all else
    typical; `_all` lets all else vary as well, alike on both sides.

    Attributes:
      install: of putting the finished task in place alone.
      with_update: that, and what each adds to the base's passes in training.
      learning: that, and the base's passes.
      learning_all: the same over all constants.
      writing_share: of LoRA's energy until the task is learned, over all constants.
      extra_per_token: joules that LoRAFusion takes more for a generated token and its share of the source.
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
    """Return the comparison of two methods, of which the first writes cells and the second reads more.

    Args:
      lora: writes cells for the task.
      fusion: writes none.
      crossbar: the arrays.
      options: lengths of a row.
      constants: of devices, converters and digital logic.
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
    """Return the energy of what one method does more than the other, from the difference of their counts."""

    def more(a: Work, b: Work) -> Range:
        work = Work(b.reads + a.reads * -1, b.macs - a.macs, b.words - a.words)
        return token_energy(work, crossbar, constants).total

    share = options.source / options.target
    return more(lora.generated, fusion.generated) + more(lora.source, fusion.source) * share


def comparisons(
    found: Mapping[str, Activity], crossbar: CrossbarConfig, options: CostOptions, constants: Constants = CONSTANTS
) -> dict[str, Comparison]:
    """Return LoRA in cells against LoRAFusion, by the layout of its pool."""
    lora = found["LoRA in cells"]
    layouts = ("LoRAFusion", "LoRAFusion, side by side")
    return {name: compare(lora, found[name], crossbar, options, constants) for name in layouts}
