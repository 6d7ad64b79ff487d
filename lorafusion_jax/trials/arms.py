"""The arms that the experiments compare, in the order of the tables, and the learning rates that tuning found."""

import dataclasses
from typing import Any, Literal

from ..loading.spec import LoadIn
from ..methods import find
from ..methods.recipes import recipe_of as recipe_with
from ..training.recipe import Recipe

Shots = Literal[
    "95+5", "5"
]  # rows to learn from: 95 and 5 for validation, or LoraHub's 5

# Rows that a seed uses, and passes over them.
TRAIN_ROWS: dict[Shots, int] = {"95+5": 100, "5": 5}
EPOCHS: dict[Shots, int] = {"95+5": 20, "5": 40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A method with its settings: a row of a table, and its run.

    Attributes:
      method: name of the method, as in `lorafusion fuse`.
      control: control of the pool.
      recipe: differences from the default recipe, without learning rates.
      rates: learning rates, found by `python experiments/tune.py`.
      few_rates: those for five examples, where they are other ones, found by `python experiments/tune.py --shots 5`.
      train_rows: fewer rows to learn from than the others have.
      load_in: base and pool in 4 or 8 bits.
    """

    method: str
    control: Literal["none", "random-factors", "shuffled", "svd"] = "none"
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    few_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    train_rows: int | None = None
    load_in: LoadIn | None = None


ARMS = {
    "zero-shot": Arm(method="zero-shot"),
    "few-shot prompt": Arm(method="few-shot"),
    "constant answer": Arm(method="constant"),
    "uniform mean": Arm(method="mean"),
    "best single module": Arm(method="single"),
    "LoraHub": Arm(method="lorahub"),
    "CMA-ES": Arm(method="cma"),
    "LoRAFusion": Arm(
        method="fusion",
        rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01},
        few_rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0033},
    ),
    "LoRAFusion, mix": Arm(
        method="fusion",
        recipe={"composition": "mix"},
        rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01},
    ),
    "coefficients only": Arm(
        method="coefficients",
        rates={"lr_coefficients": 0.3},
        few_rates={"lr_coefficients": 0.0033},
    ),
    "magnitudes only": Arm(
        method="magnitudes",
        rates={"lr_magnitudes": 0.02},
        few_rates={"lr_magnitudes": 0.0017},
    ),
    "random pool": Arm(
        method="fusion",
        control="random-factors",
        rates={"lr_coefficients": 0.03, "lr_magnitudes": 0.03},
        few_rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0033},
    ),
    "LoRA": Arm(method="lora", rates={"lr_lora": 2e-3}, few_rates={"lr_lora": 1e-4}),
    "DoRA": Arm(method="dora", rates={"lr_lora": 2e-3, "lr_magnitudes": 0.01}),
    "VeRA": Arm(method="vera", rates={"lr_vera": 0.03}),
    "full fine-tuning": Arm(method="full", rates={"lr_full": 2e-4}),
}


def recipe_of(arm: Arm, *, shots: Shots = "95+5", **defaults: Any) -> Recipe:
    """Return the recipe of an arm; it has those of the default numbers that its method has.

    Rows are padded, as they were for the committed results.

    Raises:
      TypeError: the arm has a number that its method does not have.
    """
    kind = find(arm.method).recipe
    rates = (shots == "5" and arm.few_rates) or arm.rates
    shared = recipe_with(kind, {"epochs": EPOCHS[shots], "pack": False} | defaults)
    return dataclasses.replace(shared, **arm.recipe | rates)
