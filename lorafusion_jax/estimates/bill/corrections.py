"""Cost of digital corrections next to the arrays: what they add to each token, and what computing them takes."""

import math
from typing import NamedTuple

from ...crossbar import CONSTANTS, Constants, Counts, CrossbarConfig, Range, WriteCost, counts, read_energy, write_cost
from ...models.architecture import Architecture
from .activity import Work
from .bill import training_energy
from .methods import base_matrices


class CorrectionBill(NamedTuple):
    """Cost of the corrections of one chip.

    Attributes:
      numbers: digital parameters; each is one multiply-add, and one 32-bit word that is read, per token.
      token: energy that they add to a token, in J, and `base_token` that of the base's reads.
      once: energy of computing them, in J.
      rewriting: cost of the alternative, to write all cells of the base once more with write-verify.
    """

    numbers: int
    token: Range
    base_token: Range
    once: Range
    rewriting: WriteCost


def correction_bill(
    config: Architecture,
    crossbar: CrossbarConfig,
    *,
    numbers: int,
    tokens: int,
    epochs: int,
    constants: Constants = CONSTANTS,
) -> CorrectionBill:
    """Return the cost of corrections that were computed from some tokens in some epochs of distillation.

    Computing them runs the digital model once, reads the arrays once for the closed form and once per epoch, and goes
    back through the matrices digitally once per epoch. Adam reads and writes seven words per number and step of 128
    tokens.
    """
    matrices = base_matrices(config)
    of_token = sum((counts(matrix, crossbar) * layers for matrix, layers in matrices), start=Counts())
    weights = sum(layers * math.prod(matrix) for matrix, layers in matrices)
    passes = tokens * (1 + epochs)
    once = Work(of_token * passes, weights * passes, 7 * numbers * epochs * tokens / 128)
    return CorrectionBill(
        numbers=numbers,
        token=(constants["mac_energy"] + constants["word_energy"]) * numbers,
        base_token=read_energy(of_token, crossbar, constants).total,
        once=training_energy(once, crossbar, constants),
        rewriting=write_cost(of_token, constants),
    )
