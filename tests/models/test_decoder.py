"""Padding, frequencies, generation and configs that are refused; `test_goldens.py` compares with PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.models.decoder.config import Rope
from lorafusion_jax.models.decoder.rotary import rotation
from lorafusion_jax.parts import Decoder

_TINY = small_llama.CONFIG | {
    "vocab_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _close(got, wanted, tolerance, relative=0.0):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=relative, atol=tolerance)


@functools.partial(jax.jit, static_argnames=("graph", "tokens"))
def _say(graph, base, adapters, ids, mask, tokens):
    return lf.generate(nnx.merge(graph, base), ids, mask, adapters, max_new_tokens=tokens)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, base, ids, mask, adapters):
    return nnx.merge(graph, base)(ids, mask, adapters)


def test_results_do_not_depend_on_padding():
    """Nor on the other rows: with a window, dynamic frequencies and a cap, padded on either side, much or little."""
    config = FAMILY.read_config(
        _TINY
        | {"model_type": "gemma2", "sliding_window": 3, "head_dim": 8, "max_position_embeddings": 6}
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert any(config.sliding) and not all(config.sliding)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5]]
    graph, base = nnx.split(model)
    alone = [_logits(graph, base, jnp.array([row]), jnp.ones((1, len(row)), bool), {})[0] for row in rows]
    left, right = 2, 3
    width = left + 8 + right
    for at_the_left in (True, False):
        ids, mask = np.full((2, width), 2), np.zeros((2, width), bool)
        for number, row in enumerate(rows):
            first = width - right - len(row) if at_the_left else left
            ids[number, first : first + len(row)], mask[number, first : first + len(row)] = row, True
        got = _logits(graph, base, jnp.asarray(ids), jnp.asarray(mask), {})
        for number, wanted in enumerate(alone):
            _close(got[number][mask[number]], wanted, 1e-5)


def test_the_first_answer_has_the_frequencies_of_the_whole_prompt():
    """Dynamic frequencies depend on the length: the whole prompt's in the cache, and one more for the next token."""
    config = FAMILY.read_config(
        _TINY
        | {"model_type": "llama", "pad_token_id": 0, "max_position_embeddings": 4}
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}}
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    ids, mask = jnp.array([[5, 6, 7, 8, 9, 10, 11]]), jnp.ones((1, 7), bool)
    first, wanted = jax.jit(lambda: (model.prompt(ids, mask, 1, {})[0], model(ids, mask)[:, -1]))()
    _close(first, wanted, 1e-5)


def test_llama3_stretches_low_frequencies_and_keeps_high_ones():
    plain = Rope(theta=100.0, width=8)
    llama3 = Rope(theta=100.0, width=8, scaling="llama3", factor=8.0, context=64)
    angles = [rotation(rope, jnp.ones((1, 1), int), jnp.ones((1, 1), int)) for rope in (plain, llama3)]
    before, after = (np.arctan2(np.asarray(by.sin), np.asarray(by.cos))[0, 0] for by in angles)
    # Wavelengths of 6, 20, 63 and 199 tokens: those below 64 / 4 are kept, those above 64 are stretched.
    ratio = after / before
    np.testing.assert_allclose(ratio[[0, 3]], [1, 1 / 8], rtol=1e-5)
    assert 1 > ratio[1] > ratio[2] > 1 / 8


@pytest.mark.parametrize("model_type", ["gemma3_text", pytest.param("phi3", marks=pytest.mark.long)])
def test_generation_follows_the_logits_of_labels(model_type):
    """One token after the other through the cache gives the tokens of all at once."""
    config = FAMILY.read_config(_TINY | {"model_type": model_type, "pad_token_id": 0, "sliding_window": 4})
    model = Decoder(config, rngs=nnx.Rngs(1))
    ids, mask = jnp.array([[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]), jnp.array([[True] * 5, [True, True] + [False] * 3])
    said = _say(*nnx.split(model), {}, ids, mask, 12)
    again = jax.jit(lambda said: jnp.argmax(model.label_logits(ids, mask, said, {}), axis=-1))(said)
    for row, wanted in zip(np.asarray(said), np.asarray(again), strict=True):
        ends = np.isin(row, config.end_ids)
        length = int(np.argmax(ends)) + 1 if ends.any() else len(row)
        np.testing.assert_array_equal(row[:length], wanted[:length])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "the rope scaling is 'yarn', which is not impl"),
        ({"rope_parameters": {"rope_type": "\x1b[31m", "factor": 2.0}}, r"the rope scaling is '\\x1b\[31m'"),
        ({"hidden_act": "relu"}, "the activation is 'relu': expected silu or gelu_pytorch_tanh"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4: expected a multiple of num_key_value_heads, 3"),
        ({"eos_token_id": None}, "eos_token_id is missing: expected the token, or tokens, that end an answer"),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised by awq: give the unquantised"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide': expected an integer from 1 to 10,000,000"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is set: expected"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
    ],
)
def test_a_config_that_the_decoder_cannot_run_is_refused_by_field(changes, message, capfd):
    with pytest.raises(ValueError, match=message):
        FAMILY.read_config(_TINY | {"model_type": "llama"} | changes)
    assert capfd.readouterr().err == ""  # libraries would print the file's text as it is
