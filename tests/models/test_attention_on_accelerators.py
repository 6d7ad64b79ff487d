"""Attention as accelerators compute it, on a CPU: the same numbers as by a CPU's own way."""

import jax
import jax.numpy as jnp
import numpy as np
import small_llama
import tiny
from flax import nnx

from lorafusion_jax.models import Decoder, decoder_inputs
from lorafusion_jax.models.decoder import FAMILY

_TOKENS = jnp.array([[5, 9, 4, 7], [3, 3, 8, 6]])
_IDS = jnp.array([[3, 5, 7, 2, 9], [4, 8, 6, 0, 0]])
_GROUPED = small_llama.CONFIG | {
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "model_type": "gemma3_text",
    "sliding_window": 3,
}


def _same(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_each_token_of_t5_attends_to_those_before_it():
    model = tiny.t5()
    config = model.config
    inputs = decoder_inputs(_TOKENS, start_id=model.start_id, pad_id=config.pad_id)

    def both():
        return model(_IDS, _IDS > 0, inputs), model.prompt(_IDS, _IDS > 0, 6, {})[1]

    wanted, _ = jax.jit(both)()
    with tiny.for_tpu():
        logits, cache = jax.jit(both)()
        _same(logits, wanted)
        # Heads side by side, so that only the model's own width is padded.
        assert {a.shape[-1] for a in cache} == {config.num_heads * config.d_kv} and {
            a.ndim for a in cache
        } == {4}
        step = jax.jit(lambda token, *at: model.decode_token(token, *at, _IDS > 0, {}))
        for position, token in enumerate(inputs.T):
            logits, cache = step(token, jnp.int32(position), cache)
            _same(logits, wanted[:, position])


def test_a_decoder_attends_to_the_same_columns():
    """Heads in groups, a window, padding."""
    model = Decoder(FAMILY.read_config(_GROUPED), rngs=nnx.Rngs(1))

    def both():
        return model.label_logits(_IDS, _IDS > 0, _TOKENS, {}), model.prompt(
            _IDS, _IDS > 0, 2, {}
        )[0]

    wanted = jax.jit(both)()
    with tiny.for_tpu():
        found = jax.jit(both)()
    for got, of_cpu in zip(found, wanted, strict=True):
        _same(got, of_cpu)
