"""The peer: the paper's way of fusing, PyTorch and PEFT's DoRA layers with the coefficients chained by hand.

`_mix` has its step; here it is made from our models and batches.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _mix import Mix, Site, lines, with_adapter
from _model import MODULES, RANK, Dtype, graph_of, hf_config, shape_parser
from flax import nnx

from lorafusion_jax import PRESETS, Architecture, Frozen, LoraPool
from lorafusion_jax.adapters import column_names
from lorafusion_jax.models import Model, dense, family_of, stack_of
from lorafusion_jax.tasks import IGNORED, Batch


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a script's parser that knows --json, --tasks and --shape."""
    parser = shape_parser(doc, "flan-t5-small", several=True)
    parser.add_argument("--tasks", nargs="+", type=Path, help="files or folders")
    return parser


def peft_model(
    config: Architecture, base: nnx.State, dtype: Dtype, *, dora: bool = True
) -> Any:
    """Return the base in PEFT, with one new adapter of rank 16 on the family's own targets, without dropout."""
    import torch
    import transformers

    kind = (
        transformers.AutoModelForCausalLM
        if config.causal
        else transformers.AutoModelForSeq2SeqLM
    )
    with torch.device("meta"):
        model = kind.from_config(transformers.AutoConfig.for_model(**hf_config(config)))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    if not config.tied:
        model.lm_head.weight = torch.nn.Parameter(
            torch.empty(config.vocab_size, config.d_model)
        )
    model = model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    _fill(model, nnx.merge(graph_of(config), base))
    return with_adapter(
        model, family_of(config).task_type, RANK, config.targets, dora=dora
    )


def _fill(theirs: Any, ours: Model) -> None:
    """Copy a model into PyTorch's parameters, one tensor at a time, and what its initialisation computes."""
    import torch

    parameters = dict(theirs.named_parameters())
    for slot in family_of(ours.config).checkpoint(ours.config).slots(ours):
        weights = np.asarray(slot.variable.get_value(), np.float32)
        for name, layer in zip(
            slot.names, weights if slot.stacked else weights[None], strict=True
        ):
            parameters.pop(name).copy_(
                torch.tensor(layer.T if slot.transposed else layer)
            )
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
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
    }
    for number, adapter in enumerate(adapters):
        model.add_adapter(str(number), model.peft_config["default"])
        for site, factors in adapter.items():
            for layer in range(len(factors[0])):
                of_site = layers[config.sites[site].path_of(layer)]
                for factor, matrix in zip(
                    (of_site.lora_A, of_site.lora_B), factors, strict=True
                ):
                    factor[str(number)].weight.data.copy_(torch.tensor(matrix[layer].T))
    model.eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(np.asarray(batch.input_ids, np.int64))
    mask = torch.tensor(np.asarray(batch.input_mask, np.int64))

    @torch.no_grad()
    def generate(numbers: Sequence[int]) -> np.ndarray:
        named = {"adapter_names": [str(number) for number in numbers]}
        said = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            **named,
        )
        return said[:, -new_tokens:].numpy()

    return generate


def lines_of(config: Architecture, batch: Batch) -> dict[str, np.ndarray]:
    """Return the real rows of a padded batch as transformers' models take them in training."""
    rows = zip(*(np.asarray(a)[batch.row_mask] for a in batch[:3]), strict=True)
    return lines(
        [(ids[is_real], labels[labels != IGNORED]) for ids, is_real, labels in rows],
        causal=config.causal,
    )


class Peer(Mix):
    """The peer with the mix of a random pool."""

    def __init__(
        self,
        config: Architecture,
        weights: Frozen,
        dtype: Dtype = "float32",
        device: str = "cpu",
    ):
        import torch

        self.device = torch.device(device)
        pool = weights.pool
        assert isinstance(pool, LoraPool)
        with self.device:
            model = peft_model(config, weights.base, dtype).to(self.device)
            layers = {
                name.removeprefix("base_model.model."): module
                for name, module in model.named_modules()
            }
            columns = {
                name: number for number, name in enumerate(column_names(pool, "block"))
            }
            sites: list[Site] = []
            for site in pool.A:
                A = np.asarray(dense(pool.A[site], jnp.float32))[:, :MODULES]
                B = np.asarray(dense(pool.B[site], jnp.float32))[:, :MODULES]
                for layer in range(A.shape[0]):
                    column = columns[f"{stack_of(site)}.{layer}"]
                    left = torch.tensor(A[layer].swapaxes(1, 2).reshape(MODULES, -1))
                    right = torch.tensor(B[layer].swapaxes(1, 2).reshape(MODULES, -1))
                    sites.append(
                        (layers[config.sites[site].path_of(layer)], column, left, right)
                    )
            super().__init__(model, sites, vars(PRESETS["reference"]))

    def inputs(self, lines: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return a step's inputs from the result of `lines_of`."""
        import torch

        return {
            name: torch.tensor(array, device=self.device)
            for name, array in lines.items()
        }
