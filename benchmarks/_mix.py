"""The peer's step: one PEFT adapter that holds the mix of some modules. JAX is not imported, as a peer would not.

Before every step A' = sum_n c_n A_n and B' = sum_n c_n B_n are written into PEFT's adapter; the gradients that autograd
leaves there give those of the coefficients, dc_n = <dA', A_n> + <dB', B_n>.
"""

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_FILL = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
}  # what transformers' losses leave out

# LoRA layer, column of its block, A of all modules [N, r d_in], B of all modules [N, d_out r].
Site = tuple[Any, int, Any, Any]


def with_adapter(
    model: Any, task_type: str, rank: int, targets: Iterable[str], *, dora: bool
) -> Any:
    """Return PEFT's model with one new adapter, without dropout."""
    import peft

    adapter = peft.LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=[*targets],
        use_dora=dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).eval()


def compiled(model: Any, mode: str = "default") -> Any:
    """Return PEFT's model compiled for rows of any length, all layers in one graph."""
    import torch

    # Neither PEFT's wrapper nor this function, which does nothing here, can be traced.
    dora: Any = importlib.import_module("peft.tuners.lora.dora")
    dora.dequantize_module_weight = lambda module: module.weight
    return torch.compile(model.get_base_model(), dynamic=True, mode=mode)


def lines(
    rows: Iterable[tuple[Sequence[int], Sequence[int]]], *, causal: bool
) -> dict[str, np.ndarray]:
    """Return prompts and answers as transformers' models take them in training, as wide as the longest.

    A causal model's row is one text, whose prompt is no target.
    """
    sides = []
    for source, target in rows:
        if causal:
            source, target = (
                [*source, *target],
                [*[_FILL["labels"]] * len(source), *target],
            )
        sides.append((source, [1] * len(source), target))
    made = {}
    for (name, fill), ragged in zip(
        _FILL.items(), zip(*sides, strict=True), strict=True
    ):
        made[name] = np.full((len(ragged), max(map(len, ragged))), fill)
        for line, row in zip(made[name], ragged, strict=True):
            line[: len(row)] = row
    return made


class Mix:
    """The mix of modules in PEFT's adapter, and its step in the reference protocol.

    Attributes:
      model: PEFT's model; what replaces it is called by steps.
    """

    def __init__(self, model: Any, sites: Sequence[Site], recipe: Mapping[str, float]):
        import torch

        self.model = model
        self.sites = sites
        self.recipe = recipe
        modules = len(sites[0][2])
        columns = 1 + max(column for _, column, *_ in sites)
        self.coefficients = torch.full(
            (modules, columns), 1 / modules, requires_grad=True
        )
        self.magnitudes = [
            layer.lora_magnitude_vector["default"].weight for layer, *_ in sites
        ]
        self.first = [magnitude.detach().clone() for magnitude in self.magnitudes]
        self.write()
        self.reset()

    def reset(self) -> None:
        """Begin the training again."""
        import torch

        self.coefficients.data.fill_(1 / len(self.coefficients))
        for magnitude, first in zip(self.magnitudes, self.first, strict=True):
            magnitude.data.copy_(first)
        recipe = self.recipe
        coefficients = [self.coefficients]
        self.optimiser = torch.optim.Adam(
            [
                {
                    "params": coefficients,
                    "lr": recipe["lr_coefficients"],
                    "weight_decay": recipe["l2"],
                },
                {"params": self.magnitudes, "lr": recipe["lr_magnitudes"]},
            ]
        )

    def write(self) -> None:
        """Write the mix into PEFT's adapter."""
        coefficients = self.coefficients.detach()
        for layer, column, A, B in self.sites:
            for factor, modules in ((layer.lora_A, A), (layer.lora_B, B)):
                weight = factor["default"].weight
                weight.data.copy_((coefficients[:, column] @ modules).view_as(weight))

    def __call__(self, inputs: Mapping[str, Any]) -> float:
        """Take one step, and return its loss."""
        import torch

        self.write()
        self.optimiser.zero_grad()
        loss = self.model(**inputs).loss.float() / len(inputs["labels"])
        loss.backward()
        gradient = (
            self.recipe["l1"]
            * torch.sign(self.coefficients.detach())
            / self.coefficients.numel()
        )
        for layer, column, A, B in self.sites:
            for factor, modules in ((layer.lora_A, A), (layer.lora_B, B)):
                weight = factor["default"].weight
                gradient[:, column] += modules @ weight.grad.flatten().float()
                weight.grad = None
        self.coefficients.grad = gradient
        self.optimiser.step()
        return loss.item()
