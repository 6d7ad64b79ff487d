"""`lorafusion restore`: digital corrections of a base model on simulated chips, from unlabelled text."""

from collections.abc import Sequence

import numpy as np

from ..hardware.restored import RestoreOptions, restore_chips
from ..text_tables import plain
from .parsing import parse

GROUPS = {
    "data and base": ("base", "text", "self_text", "tokens"),
    "corrections": ("method", "rank", "epochs", "rate", "rate_low_rank", "seed"),
    "hardware": ("crossbar", "chip", "age", "keep_digital", "chip_key"),
    "run": ("out",),
}


def main(arguments: Sequence[str]) -> None:
    """Write the corrections, and print the divergence from the digital model before and after."""
    options = parse(RestoreOptions, arguments, "restore", groups=GROUPS)
    manifest = restore_chips(options)
    lines = [["chip", "before", "after"]]
    lines += [[chip, *(f"{value:.4f}" for value in values)] for chip, values in manifest["divergence"].items()]
    lines.append(["mean", *(f"{value:.4f}" for value in np.mean(list(manifest["divergence"].values()), axis=0))])
    print(f"{manifest['numbers']:,} digital numbers a chip, {manifest['share']:.2%} of the weights in arrays")
    print(f"KL from the digital model, nats per token of text left out:\n{plain(lines, left=(0,))}")
    where = options.out or f"{options.crossbar}/restored-{options.method}"
    print(f"written to {where}")
