"""Arms that the experiments compare, in the order of the tables, with the learning rates that tuning found."""

from .matrix import Arm

ARMS = {
    "zero-shot": Arm(method="zero-shot"),
    "few-shot prompt": Arm(method="few-shot"),
    "constant answer": Arm(method="constant"),
    "uniform mean": Arm(method="mean"),
    "best single module": Arm(method="single"),
    "LoraHub": Arm(method="lorahub"),
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

# Coefficients of other granularities than the default: settings of an ablation, each at its own rates.
COEFFICIENTS = {
    f"coefficients only, {size}": Arm(
        method="coefficients", recipe={"granularity": size}, rates=rates
    )
    for size, rates in {
        "global": {"lr_coefficients": 0.3},
        "site": {"lr_coefficients": 0.03},
        "rank": {"lr_coefficients": 0.02},
    }.items()
}

# Which of the small pool's 28 modules a seed fuses, other than the 20 that it draws.
ALL = {"modules": 28}
BEST = {"modules": 10, "choose": "gradient"}
# In a shared basis of 32 directions; the rates serve other sizes and other modules too.
IN_BASIS = {
    "basis": Arm(
        method="fusion",
        recipe=ALL | {"basis": 32},
        rates={"lr_coefficients": 0.1, "lr_magnitudes": 0.01},
        few_rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0033},
    ),
}
