"""The methods that the experiments compare, in the order of the tables, and the learning rates that tuning found."""

import dataclasses
from typing import Any, Literal

from lorafusion_jax.parts import LoadIn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of a table and its run.

    Attributes:
      method: of `lorafusion fuse`.
      control: of the pool.
      recipe: what differs from the default recipe, learning rates apart.
      rates: learning rates, found by `python experiments/tune.py`.
      few_rates: those for five examples, where they are other ones, found by `python experiments/tune.py --league 5`.
      train_rows: fewer rows to learn from than the league has.
      load_in: base and pool in 4 or 8 bits.
    """

    method: str
    control: Literal["none", "random-factors", "shuffled", "svd"] = "none"
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    few_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    train_rows: int | None = None
    load_in: LoadIn | None = None


METHODS = {
    "zero-shot": Entry(method="zero-shot"),
    "few-shot prompt": Entry(method="few-shot"),
    "constant answer": Entry(method="constant"),
    "uniform mean": Entry(method="mean"),
    "best single module": Entry(method="single"),
    "LoraHub": Entry(method="lorahub"),
    "CMA-ES": Entry(method="cma"),
    "LoRAFusion": Entry(
        method="fusion",
        rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01},
        few_rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0033},
    ),
    "LoRAFusion, mix": Entry(
        method="fusion", recipe={"composition": "mix"}, rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01}
    ),
    "coefficients only": Entry(
        method="coefficients", rates={"lr_coefficients": 0.3}, few_rates={"lr_coefficients": 0.0033}
    ),
    "magnitudes only": Entry(method="magnitudes", rates={"lr_magnitudes": 0.02}, few_rates={"lr_magnitudes": 0.0017}),
    "random pool": Entry(
        method="fusion",
        control="random-factors",
        rates={"lr_coefficients": 0.03, "lr_magnitudes": 0.03},
        few_rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0033},
    ),
    "LoRA": Entry(method="lora", rates={"lr_lora": 2e-3}, few_rates={"lr_lora": 1e-4}),
    "DoRA": Entry(method="dora", rates={"lr_lora": 2e-3, "lr_magnitudes": 0.01}),
    "VeRA": Entry(method="vera", rates={"lr_vera": 0.03}),
    "full fine-tuning": Entry(method="full", rates={"lr_full": 2e-4}),
}

# Coefficients of other granularities than the default: settings of an ablation, each at its own rates.
COEFFICIENTS = {
    f"coefficients only, {size}": Entry(method="coefficients", recipe={"granularity": size}, rates=rates)
    for size, rates in {
        "global": {"lr_coefficients": 0.3},
        "site": {"lr_coefficients": 0.03},
        "rank": {"lr_coefficients": 0.02},
    }.items()
}

# Which of the small pool's 28 modules a seed fuses, other than the 20 that it draws.
ALL, BEST = {"modules": 28}, {"modules": 10, "choose": "gradient"}
# In a shared basis of 32 directions, and its controls; the rates serve other sizes and other modules too.
IN_BASIS = {
    "basis": Entry(
        method="fusion",
        recipe=ALL | {"basis": 32},
        rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01},
        few_rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0033},
    ),
    "basis and core": Entry(
        method="fusion",
        recipe=ALL | {"basis": 32, "train_core": True},
        rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01, "lr_core": 5e-4},
    ),
    # Cores alone: the coefficients stay at zero.
    "LoRA-XS": Entry(
        method="coefficients",
        control="svd",
        recipe={"basis": 32, "train_core": True, "start": "zeros", "modules": 1},
        rates={"lr_coefficients": 0.0, "lr_core": 2e-3},
    ),
    "mean module": Entry(method="mean-fusion", rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.03}),
}
