"""The peer: the paper's way of fusing, PyTorch and PEFT's DoRA layers with the coefficients chained by hand.

PEFT holds one adapter, the mix. Before every step A' = sum_n c_n A_n and B' = sum_n c_n B_n are written into it; the
gradients that autograd leaves there give those of the coefficients, dc_n = <dA', A_n> + <dB', B_n>.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _model import MODULES, RANK, Dtype, graph_of
from flax import nnx

from lorafusion_jax.io.hf import save_base
from lorafusion_jax.linear import dense
from lorafusion_jax.models.sites import hf_path
from lorafusion_jax.models.t5 import T5Config
from lorafusion_jax.tasks import Batch
from lorafusion_jax.train.methods import Frozen
from lorafusion_jax.train.options import PRESETS


def peft_model(config: T5Config, base: nnx.State, dtype: Dtype) -> Any:
    """Return the base in PEFT, with one new DoRA adapter on q and v and without dropout."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        source, folder = Path(name) / "config", Path(name) / "base"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(_hf_config(config)))
        save_base(nnx.merge(graph_of(config), base), folder, source)
        loaded = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()  # no longer pages of the file
    adapter = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_2_SEQ_LM,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=["q", "v"],
        use_dora=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(loaded, adapter, autocast_adapter_dtype=False).eval()


class Peer:
    """A step of the peer, in the reference protocol, with the mix of a random pool."""

    def __init__(self, config: T5Config, weights: Frozen, batch: Batch, dtype: Dtype = "float32"):
        import torch

        assert weights.pool is not None
        pool = weights.pool
        self.model = peft_model(config, weights.base, dtype)
        # (LoRA layer, column of its block, A of all modules [N, r d_in], B likewise)
        self.sites: list[tuple[Any, int, Any, Any]] = []
        layers = {name.removeprefix("base_model.model."): module for name, module in self.model.named_modules()}
        for site in pool.A:
            A, B = (np.asarray(dense(w[site], jnp.float32))[:, :MODULES] for w in (pool.A, pool.B))
            for layer in range(A.shape[0]):
                column = layer + (config.num_layers if site.startswith("decoder") else 0)
                flat = [torch.tensor(w[layer].swapaxes(1, 2).reshape(MODULES, -1)) for w in (A, B)]
                self.sites.append((layers[hf_path(site, layer)], column, *flat))
        blocks = config.num_layers + config.num_decoder_layers
        self.coefficients = torch.full((MODULES, blocks), 1 / MODULES, requires_grad=True)
        self.write()
        magnitudes = [layer.lora_magnitude_vector["default"].weight for layer, *_ in self.sites]
        recipe = PRESETS["reference"]
        self.l1 = recipe.l1
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.coefficients], "lr": recipe.lr_coefficients, "weight_decay": recipe.l2},
                {"params": magnitudes, "lr": recipe.lr_magnitudes},
            ]
        )
        self.rows = batch.labels.shape[-2]
        self.inputs = {
            "input_ids": torch.tensor(np.asarray(batch.input_ids[0], np.int64)),
            "attention_mask": torch.tensor(np.asarray(batch.input_mask[0], np.int64)),
            "labels": torch.tensor(np.asarray(batch.labels[0], np.int64)),
        }
        self.losses: list[float] = []

    def write(self) -> None:
        """Write the mix into PEFT's adapter."""
        coefficients = self.coefficients.detach()
        for layer, column, A, B in self.sites:
            for factor, modules in ((layer.lora_A, A), (layer.lora_B, B)):
                weight = factor["default"].weight
                weight.data.copy_((coefficients[:, column] @ modules).view_as(weight))

    def __call__(self) -> None:
        """Take one step."""
        import torch

        self.write()
        self.optimiser.zero_grad()
        loss = self.model(**self.inputs).loss.float() / self.rows
        loss.backward()
        gradient = self.l1 * torch.sign(self.coefficients.detach()) / self.coefficients.numel()
        for layer, column, A, B in self.sites:
            for factor, modules in ((layer.lora_A, A), (layer.lora_B, B)):
                weight = factor["default"].weight
                gradient[:, column] += modules @ weight.grad.flatten().float()
                weight.grad = None
        self.coefficients.grad = gradient
        self.optimiser.step()
        self.losses.append(loss.item())


def _hf_config(config: T5Config) -> dict[str, Any]:
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    return {name: getattr(config, name) for name in sizes} | {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied,
        "decoder_start_token_id": config.start_id,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
    }
