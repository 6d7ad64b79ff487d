"""The peer: the paper's way of fusing, PyTorch and PEFT's DoRA layers with the coefficients chained by hand.

PEFT holds one adapter, the mix. Before every step A' = sum_n c_n A_n and B' = sum_n c_n B_n are written into it; the
gradients that autograd leaves there give those of the coefficients, dc_n = <dA', A_n> + <dB', B_n>.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from _model import MODULES, RANK, Dtype, graph_of, hf_config
from flax import nnx

from lorafusion_jax import PRESETS, Architecture, Frozen, LoraPool
from lorafusion_jax.parts import Model, column_names, dense, family_of, stack_of
from lorafusion_jax.tasks import IGNORED, Batch

_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def peft_model(config: Architecture, base: nnx.State, dtype: Dtype, *, dora: bool = True) -> Any:
    """Return the base in PEFT, with one new adapter of rank 16 on the family's own targets, without dropout."""
    import peft
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM if config.causal else transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model = kind.from_config(transformers.AutoConfig.for_model(**hf_config(config)))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    if not config.tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, config.d_model))
    model = model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    _fill(model, nnx.merge(graph_of(config), base))
    adapter = peft.LoraConfig(
        task_type=family_of(config).task_type,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=list(config.targets),
        use_dora=dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).eval()


def _fill(theirs: Any, ours: Model) -> None:
    """Copy a model into PyTorch's parameters, one tensor at a time, and what its initialisation computes."""
    import torch

    parameters = dict(theirs.named_parameters())
    for slot in family_of(ours.config).checkpoint(ours.config).slots(ours):
        weights = np.asarray(slot.variable.get_value(), np.float32)
        for name, layer in zip(slot.names, weights if slot.stacked else weights[None], strict=True):
            parameters.pop(name).copy_(torch.tensor(layer.T if slot.transposed else layer))
    assert not parameters, list(parameters)
    # The frequencies of rotary positions are no parameters: `to_empty` left them undefined.
    for module in theirs.modules():
        if hasattr(module, "original_inv_freq"):
            module.__init__(theirs.config)


def mixed_batch(
    config: Architecture,
    base: nnx.State,
    batch: Batch,
    adapters: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]],
    *,
    new_tokens: int,
) -> Callable[[Sequence[int]], np.ndarray]:
    """Return a function that generates with PEFT's `adapter_names`, from the number of each row's adapter.

    Args:
      config: of the base.
      base: its weights.
      batch: the rows.
      adapters: A [L, d_in, r] and B [L, r, d_out] by site.
      new_tokens: tokens of every row.
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = peft_model(config, base, "float32", dora=False)
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    for number, adapter in enumerate(adapters):
        model.add_adapter(str(number), model.peft_config["default"])
        for site, factors in adapter.items():
            for layer in range(len(factors[0])):
                of_site = layers[config.sites[site].path_of(layer)]
                for factor, matrix in zip((of_site.lora_A, of_site.lora_B), factors, strict=True):
                    factor[str(number)].weight.data.copy_(torch.tensor(matrix[layer].T))
    model.eval()
    model.generation_config.eos_token_id = None
    ids, mask = (torch.tensor(np.asarray(a, np.int64)) for a in (batch.input_ids, batch.input_mask))

    @torch.no_grad()
    def generate(numbers: Sequence[int]) -> np.ndarray:
        named = {"adapter_names": [str(number) for number in numbers]}
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **named)
        return said[:, -new_tokens:].numpy()

    return generate


def lines_of(config: Architecture, batch: Batch) -> dict[str, np.ndarray]:
    """Return the real rows of a padded batch as transformers' models take them in training, as wide as the longest.

    A causal model's row is one text, whose prompt is no target.
    """
    rows = []
    for ids, is_real, labels in zip(*(np.asarray(a)[batch.row_mask] for a in batch[:3]), strict=True):
        source, target = ids[is_real], labels[labels != IGNORED]
        if config.causal:
            source, target = np.append(source, target), np.append(np.full(len(source), IGNORED), target)
        rows.append((source, np.ones(len(source), int), target))
    made = {}
    for (name, fill), ragged in zip(_FILL.items(), zip(*rows, strict=True), strict=True):
        made[name] = np.full((len(ragged), max(map(len, ragged))), fill)
        for line, row in zip(made[name], ragged, strict=True):
            line[: len(row)] = row
    return made


class Peer:
    """The peer with the mix of a random pool, and its step in the reference protocol.

    Attributes:
      model: PEFT's model; what replaces it is called by steps.
    """

    def __init__(self, config: Architecture, weights: Frozen, dtype: Dtype = "float32", device: str = "cpu"):
        import torch

        self.device = torch.device(device)
        with self.device:
            self._set_up(config, weights, dtype)

    def _set_up(self, config: Architecture, weights: Frozen, dtype: Dtype) -> None:
        import torch

        pool = weights.pool
        assert isinstance(pool, LoraPool)
        self.model = peft_model(config, weights.base, dtype).to(self.device)
        # (LoRA layer, column of its block, A of all modules [N, r d_in], B of all modules)
        self.sites: list[tuple[Any, int, Any, Any]] = []
        layers = {name.removeprefix("base_model.model."): module for name, module in self.model.named_modules()}
        columns = {name: number for number, name in enumerate(column_names(pool, "block"))}
        for site in pool.A:
            A, B = (np.asarray(dense(w[site], jnp.float32))[:, :MODULES] for w in (pool.A, pool.B))
            for layer in range(A.shape[0]):
                column = columns[f"{stack_of(site)}.{layer}"]
                left, right = (torch.tensor(w[layer].swapaxes(1, 2).reshape(MODULES, -1)) for w in (A, B))
                self.sites.append((layers[config.sites[site].path_of(layer)], column, left, right))
        self.coefficients = torch.empty((MODULES, len(columns)), requires_grad=True)
        self.magnitudes = [layer.lora_magnitude_vector["default"].weight for layer, *_ in self.sites]
        self.coefficients.data.fill_(1 / MODULES)
        self.write()
        self.first = [magnitude.detach().clone() for magnitude in self.magnitudes]
        self.reset()

    def reset(self) -> None:
        """Begin the training again."""
        import torch

        recipe = PRESETS["reference"]
        self.l1 = recipe.l1
        self.coefficients.data.fill_(1 / MODULES)
        for magnitude, first in zip(self.magnitudes, self.first, strict=True):
            magnitude.data.copy_(first)
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.coefficients], "lr": recipe.lr_coefficients, "weight_decay": recipe.l2},
                {"params": self.magnitudes, "lr": recipe.lr_magnitudes},
            ]
        )

    def inputs(self, lines: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return a step's inputs from the result of `lines_of`."""
        import torch

        return {name: torch.tensor(array, device=self.device) for name, array in lines.items()}

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
        gradient = self.l1 * torch.sign(self.coefficients.detach()) / self.coefficients.numel()
        for layer, column, A, B in self.sites:
            for factor, modules in ((layer.lora_A, A), (layer.lora_B, B)):
                weight = factor["default"].weight
                gradient[:, column] += modules @ weight.grad.flatten().float()
                weight.grad = None
        self.coefficients.grad = gradient
        self.optimiser.step()
        return loss.item()
