"""A real language model from its GGUF file: what PyTorch, PEFT and the model's own tokenizer made of it.

Bounds are those of the goldens: logits reach 44 and differ by up to 3.5e-4 between two float32 libraries, 5e-4 is
allowed; losses 2e-5; ids are equal.
"""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
from flax import nnx

from lorafusion_jax.io.hf import load_base, load_tokenizer, open_base
from lorafusion_jax.models.generate import generate


@pytest.fixture(scope="module")
def golden(goldens):
    return goldens / "smollm2"


@pytest.fixture(scope="module")
def inputs(golden):
    return dict(np.load(golden / "inputs.npz"))


@pytest.fixture(scope="module")
def smol():
    """The structure and the weights, in float32."""
    return nnx.split(load_base(smollm2.gguf_file()))


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, base, ids, mask, adapters):
    return nnx.merge(graph, base)(ids, mask, adapters)


# Level 0, which tests have, makes a step of generation three times as slow: 13 s of CPU time instead of 6.
@functools.partial(jax.jit, static_argnames="graph", compiler_options={"xla_backend_optimization_level": 1})
def _say(graph, base, ids, mask, adapters):
    return generate(nnx.merge(graph, base), ids, mask, adapters, max_new_tokens=24)


def _widened(ids, mask, width):
    more = ((0, 0), (0, width - ids.shape[1]))
    return np.pad(ids, more), np.pad(mask > 0, more)


def _prompts(inputs, numbers):
    """Some prompts as one batch, padded on the right."""
    rows = [inputs[f"prompt_{number}"][None] for number in numbers]
    width = max(row.shape[1] for row in rows)
    padded = [_widened(row, np.ones_like(row), width) for row in rows]
    return tuple(map(np.concatenate, zip(*padded, strict=True)))


def _assert_logits(logits, golden, prefix):
    """Compare the log-sum-exp of every position, and of some the largest logits and those of 64 fixed ids."""
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), golden[f"{prefix}_lse"], rtol=0, atol=5e-4)
    some = logits[golden[f"{prefix}_positions"]]
    top = np.take_along_axis(some, golden[f"{prefix}_top_id"], axis=-1)
    np.testing.assert_allclose(top, golden[f"{prefix}_top_val"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(some[:, golden["probe_ids"]], golden[f"{prefix}_probe_val"], rtol=0, atol=5e-4)


def test_every_tensor_is_bit_equal(golden):
    """Names, layout and the order of q's and k's rows are Hugging Face's."""
    wanted = json.loads((golden / "base" / "tensors.json").read_text())
    tensors = open_base(smollm2.gguf_file()).tensors()
    assert tensors.keys() == wanted.keys() and len(wanted) == 272
    for name, entry in wanted.items():
        tensor = np.asarray(tensors[name])
        assert [*tensor.shape] == entry["shape"]
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == entry["sha256"], name


def test_the_configuration_is_the_one_that_transformers_reads(golden):
    config = open_base(smollm2.gguf_file()).config()
    wanted = json.loads((golden / "base" / "config.json").read_text())
    assert config["rope_theta"] == wanted["rope_parameters"]["rope_theta"]
    same = config.keys() - {"architectures", "rope_theta"}
    assert {key: config[key] for key in same} == {key: wanted[key] for key in same}


def test_the_tokenizer_is_the_model_s_own(golden):
    tokenizer = load_tokenizer(smollm2.gguf_file())
    cases = json.loads((golden / "tokenizer_cases.json").read_text())
    for case in cases["strings"]:
        ids = tokenizer(case["text"])["input_ids"]
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]
    for case in cases["chats"]:
        template = functools.partial(
            tokenizer.apply_chat_template, case["messages"], add_generation_prompt=case["add_generation_prompt"]
        )
        assert template(tokenize=False) == case["text"]
        assert template(return_dict=False) == case["ids"]
    special = cases["special"]
    for name in ("bos", "eos", "pad", "unk"):
        assert [getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")] == special[name]
    assert {str(token) for token in tokenizer.added_tokens_decoder.values()} == {*special["control_tokens"]}


@pytest.mark.long
@pytest.mark.parametrize(("numbers", "side", "k"), [(range(4), "left", 0), ((4, 5), "right", 1)])
def test_logits_and_losses_of_the_base(numbers, side, k, golden, inputs, smol):
    """Of prompts alone, and of batches padded left and right: padding changes nothing."""
    wanted = dict(np.load(golden / "base.npz")) | {"probe_ids": inputs["probe_ids"]}
    prompts = _prompts(inputs, numbers)
    width = prompts[0].shape[1]  # one program serves all rows
    batch = _widened(inputs[f"batch_{side}_ids"], inputs[f"batch_{side}_mask"], width)
    parts = {
        "prompts": prompts,
        side: batch,
        "loss": _widened(inputs[f"loss_ids_{k}"], inputs[f"loss_mask_{k}"], width),
    }
    ids, mask = map(np.concatenate, zip(*parts.values(), strict=True))
    ends = np.cumsum([len(rows) for rows, _ in parts.values()])
    logits = np.split(np.asarray(_logits(*smol, jnp.asarray(ids), jnp.asarray(mask), {})), ends[:-1])
    found = dict(zip(parts, logits, strict=True))
    for number, row in zip(numbers, found["prompts"], strict=True):
        row = row[: len(inputs[f"prompt_{number}"])]
        _assert_logits(row, wanted, f"p{number}")
        if number == 4:  # whole at the last position
            np.testing.assert_allclose(row[-1], wanted["p4_last"], rtol=0, atol=5e-4)
    real, width = inputs[f"batch_{side}_mask"] > 0, inputs[f"batch_{side}_mask"].shape[1]
    _assert_logits(found[side][:, :width][real], wanted, side)
    labels = inputs[f"loss_labels_{k}"][:, 1:]
    logs = jax.nn.log_softmax(found["loss"][:, : labels.shape[1]], axis=-1)
    of_labels = np.take_along_axis(np.asarray(logs), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(-of_labels[labels >= 0].mean(), wanted[f"loss_mean_ce_{k}"], rtol=0, atol=2e-5)


@pytest.mark.long
def test_greedy_ids_of_the_base(golden, inputs, smol):
    said = _say(*smol, *map(jnp.asarray, _prompts(inputs, range(6))), {})
    for number, row in enumerate(np.asarray(said)):
        wanted = json.loads((golden / "greedy.json").read_text())["base"][f"prompt_{number}"]
        np.testing.assert_array_equal(row[: len(wanted)], wanted)
