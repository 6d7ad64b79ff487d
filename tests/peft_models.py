"""Models and adapters as transformers and PEFT make them, which are imported where a test calls, and fusions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.training import Params


def t5(kind="T5", **changes):
    """A random T5, or MT5, of the sizes of `tiny.CONFIG`."""
    import torch
    import transformers

    torch.manual_seed(0)
    names = (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_layers",
        "num_decoder_layers",
    )
    fields = {name: getattr(tiny.CONFIG, name) for name in names}
    fields |= {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**fields | changes)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def randomise(model, std=0.3):
    """Move adapters from where they start: random factors B, and magnitudes up to 30 % larger."""
    import torch

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=std)
            elif "lora_magnitude_vector" in key:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
    return model


class Fused(NamedTuple):
    """A fusion at coefficients of either sign and changed magnitudes."""

    method: lf.Fusion
    frozen: lf.Frozen
    params: Params
    adapters: dict[str, Any]


def fused(model, folders, method, coefficients=None, base=None):
    """Fuse adapters, at given coefficients or at some of either sign; `base` is needed for copies of its weights."""
    pool = lf.read_pool(
        [str(folder) for folder in folders],
        model.config,
        base_tensor=None if base is None else lf.base_tensor(base),
    )
    frozen = tiny.frozen(model, pool)
    index = jnp.arange(len(folders))
    params = method.init(frozen, index, jax.random.key(0))
    shape = params["coefficients"].shape
    params["coefficients"] = (
        tiny.coefficients(shape)
        if coefficients is None
        else jnp.full(shape, coefficients)
    )
    rng = np.random.default_rng(1)
    for site, m in params.get("magnitudes", {}).items():
        params["magnitudes"][site] = m * jnp.asarray(
            rng.uniform(1.0, 1.3, m.shape), jnp.float32
        )
    return Fused(
        method,
        frozen,
        params,
        _composed(method, params, lf.Frozen(nnx.State({}), pool, frozen.gram), index),
    )


# The base's weights are no argument: families whose matrices have the same sizes share the program.
@functools.partial(jax.jit, static_argnums=0)
def _composed(method, params, frozen, index):
    return method.adapters(params, frozen, index)[0]
