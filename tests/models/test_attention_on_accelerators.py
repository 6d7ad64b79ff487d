"""Attention as accelerators compute it, on a CPU: the same numbers as by a CPU's own way."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from lorafusion_jax.models.decoder import FAMILY, Decoder
from lorafusion_jax.models.decoder import model as decoder
from lorafusion_jax.models.t5 import attention
from lorafusion_jax.models.t5.model import decoder_inputs

_TOKENS = jnp.array([[5, 9, 4, 7], [3, 3, 8, 6]])
_IDS = jnp.array([[3, 5, 7, 2, 9], [4, 8, 6, 0, 0]])
_GROUPED = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "eos_token_id": [1],
    "pad_token_id": 0,
    "model_type": "gemma3_text",
    "sliding_window": 3,
}


def _same(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_each_token_of_t5_attends_to_those_before_it(monkeypatch):
    model = tiny.t5()
    config = model.config
    inputs = decoder_inputs(_TOKENS, start_id=model.start_id, pad_id=config.pad_id)
    wanted = model(_IDS, _IDS > 0, inputs)

    monkeypatch.setattr(attention, "for_cpu", lambda: False)
    _same(model(_IDS, _IDS > 0, inputs), wanted)
    _, cache = model.prompt(_IDS, _IDS > 0, 6, {})
    # Heads side by side, so that nothing is padded but the model's own width.
    assert {a.shape[-1] for a in cache} == {config.num_heads * config.d_kv} and {a.ndim for a in cache} == {4}
    step = jax.jit(lambda token, position, cache: model.decode_token(token, position, cache, _IDS > 0, {}))
    for position, token in enumerate(inputs.T):
        logits, cache = step(token, jnp.int32(position), cache)
        _same(logits, wanted[:, position])


def test_a_mesh_that_divides_heads_keeps_them_apart(monkeypatch):
    monkeypatch.setattr(attention, "for_cpu", lambda: False)
    for sizes, apart in (((2, 2), True), ((4, 1), False)):
        with jax.set_mesh(jax.make_mesh(sizes, ("seed", "model"))):
            assert attention.heads_apart() == apart


def test_a_decoder_attends_to_the_same_columns(monkeypatch):
    """Heads in groups, a window, padding."""
    model = Decoder(FAMILY.read_config(_GROUPED), rngs=nnx.Rngs(1))

    def both():
        return model.label_logits(_IDS, _IDS > 0, _TOKENS, {}), model.prompt(_IDS, _IDS > 0, 2, {})[0]

    wanted = both()
    monkeypatch.setattr(decoder, "for_cpu", lambda: False)
    for got, of_cpu in zip(both(), wanted, strict=True):
        _same(got, of_cpu)
