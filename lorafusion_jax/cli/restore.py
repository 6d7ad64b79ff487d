"""`lorafusion restore`: digital corrections of a base model on simulated chips, from unlabelled text."""

from collections.abc import Sequence

import numpy as np

from ..hardware.restore import RestoreOptions, restore_chips
from ..support.reading import show
from ..support.text_tables import plain
from .parsing import parse

GROUPS = {
    "data and base": ("base", "text", "tokens"),
    "corrections": ("method", "rank", "epochs", "rate", "rate_low_rank", "seed"),
    "hardware": ("crossbar", "chip", "age", "in_advance", "keep_digital", "chip_key"),
    "run": ("out",),
}


def main(arguments: Sequence[str]) -> None:
    """Write the corrections, and print the divergence from the digital model before and after."""
    options = parse(RestoreOptions, arguments, "restore", groups=GROUPS)
    made = restore_chips(options)
    divergences = {str(chip): manifest["divergence"] for chip, manifest in made.items()}
    divergences["mean"] = np.mean(list(divergences.values()), axis=0).tolist()
    lines = [["chip", "before", "after"]]
    lines += [
        [chip, *(f"{value:.4f}" for value in values)]
        for chip, values in divergences.items()
    ]
    first = next(iter(made.values()))
    show(
        f"{first['numbers']:,} digital parameters a chip, {first['share']:.2%} of the weights in arrays"
    )
    show(
        f"KL from the digital model, nats per token of text left out:\n{plain(lines, left=(0,))}"
    )
    show(f"written to {options.out}")
