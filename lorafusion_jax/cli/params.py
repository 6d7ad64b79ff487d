"""`lorafusion params`: print the number of trainable parameters of each method."""

import dataclasses
from collections.abc import Sequence

from ..estimates.params import counts, shape_config
from ..support.options import ShapeOptions, SharedMatricesOptions
from ..support.reading import show
from ..support.text_tables import markdown
from .parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamsOptions(SharedMatricesOptions, ShapeOptions):
    """Print how many numbers each method trains, exactly and without loading weights.

    Example:
      lorafusion params --shape flan-t5-large --modules 20 --rank 16

    Attributes:
      basis: number of directions of a shared basis (`lorafusion convert --basis`).
    """

    basis: int = 32


def main(arguments: Sequence[str]) -> None:
    """Print the counts as a Markdown table."""
    options = parse(ParamsOptions, arguments, "params")
    numbers = {name: value for name, value in vars(options).items() if name != "shape"}
    method_counts = counts(shape_config(options.shape), **numbers)
    full = method_counts["full fine-tuning"]
    lines = [
        [method, f"{count:,}", f"{100 * count / full:.4g} %"]
        for method, count in method_counts.items()
    ]
    show(
        markdown([["method", "trainable parameters", f"of {options.shape}"], *lines]),
        end="",
    )
