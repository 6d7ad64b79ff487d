"""A real language model from its GGUF file against PyTorch and its tokenizer.

Bounds are those of the goldens: logits, which reach 44, 5e-4, losses 5e-5. Ids are equal.
"""

import functools
import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.parts import cross_entropy, open_base

pytestmark = pytest.mark.usefixtures("optimised_by_llvm")

_TOKENS = 24


class _Golden(NamedTuple):
    """The base model, the golden's inputs, and its files."""

    folder: Any
    inputs: dict[str, np.ndarray]
    model: Any
    graph: nnx.GraphDef
    base: nnx.State

    def prompts(self, numbers=range(6)):
        """Some prompts as one batch, padded on the right."""
        rows = [self.inputs[f"prompt_{number}"] for number in numbers]
        width = max(map(len, rows))
        ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        return jnp.asarray(ids), jnp.arange(width)[None] < jnp.array([len(row) for row in rows])[:, None]

    def logits(self, ids, mask):
        return np.asarray(_logits(self.graph, self.base, ids, mask))

    def check_logits(self, file, logits, numbers):
        for number, row in zip(numbers, logits, strict=True):
            row = row[: len(self.inputs[f"prompt_{number}"])]
            self.check_row(row, file, f"p{number}")

    def check_row(self, row, file, name):
        """Compare the log-sum-exp of every position, and of some the largest logits and those of fixed ids."""
        _close(jax.nn.logsumexp(row, axis=-1), file[f"{name}_lse"], 5e-4)
        some = row[file[f"{name}_positions"]]
        _close(np.take_along_axis(some, file[f"{name}_top_id"], axis=-1), file[f"{name}_top_val"], 5e-4)
        _close(some[:, self.inputs["probe_ids"]], file[f"{name}_probe_val"], 5e-4)

    def batch(self, k):
        """A loss batch: prompts of different lengths, and the completions behind them; both batches get four rows."""
        ids, labels = self.inputs[f"loss_ids_{k}"], self.inputs[f"loss_labels_{k}"]
        starts, counts = np.argmax(labels >= 0, axis=1), (labels >= 0).sum(axis=1)
        shape = (4, 16), (4, 10)
        prompts, answers = np.zeros(shape[0], np.int32), np.full(shape[1], -100, np.int32)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            prompts[row, :start], answers[row, :count] = ids[row, :start], labels[row, start : start + count]
        lengths = np.pad(starts, (0, 4 - len(starts)))
        mask = np.arange(16)[None] < lengths[:, None]
        return lf.Batch(jnp.asarray(prompts), jnp.asarray(mask), jnp.asarray(answers), jnp.arange(4) < len(ids))


def _close(got, wanted, tolerance):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=0.0, atol=tolerance)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, base, ids, mask):
    return nnx.merge(graph, base)(ids, mask)


# Level 0, which tests have, makes a step of generation three times as slow.
@functools.partial(jax.jit, static_argnames="graph", compiler_options={"xla_backend_optimization_level": 1})
def _say(graph, base, ids, mask):
    return lf.generate(nnx.merge(graph, base), ids, mask, max_new_tokens=_TOKENS)


@functools.partial(jax.jit, static_argnames="graph")
def _label_logits(graph, base, ids, mask, labels):
    return nnx.merge(graph, base).label_logits(ids, mask, labels, {})


@pytest.fixture(scope="module")
def golden(goldens):
    folder, model = goldens / "smollm2", lf.load_base(smollm2.gguf_file())
    return _Golden(folder, dict(np.load(folder / "inputs.npz")), model, *nnx.split(model))


def test_every_tensor_is_bit_equal(goldens):
    """Names, layout and the order of q's and k's rows are Hugging Face's."""
    wanted = json.loads((goldens / "smollm2" / "base" / "tensors.json").read_text())
    tensors = open_base(smollm2.gguf_file()).files.tensors()
    assert tensors.keys() == wanted.keys() and len(wanted) == 272
    for name, entry in wanted.items():
        tensor = np.asarray(tensors[name])
        assert [*tensor.shape] == entry["shape"]
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == entry["sha256"], name


def test_the_configuration_is_the_one_that_transformers_reads(goldens):
    config = open_base(smollm2.gguf_file()).files.config()
    wanted = json.loads((goldens / "smollm2" / "base" / "config.json").read_text())
    assert config["rope_theta"] == wanted["rope_parameters"]["rope_theta"]
    same = config.keys() - {"architectures", "rope_theta"}
    assert {key: config[key] for key in same} == {key: wanted[key] for key in same}


def test_the_tokenizer_is_the_model_s_own(goldens):
    tokenizer = lf.load_tokenizer(smollm2.gguf_file())
    cases = json.loads((goldens / "smollm2" / "tokenizer_cases.json").read_text())
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
def test_logits_and_losses_of_the_base(numbers, side, k, golden):
    """Of prompts alone, and of batches padded left and right: padding changes nothing."""
    file, inputs = dict(np.load(golden.folder / "base.npz")), golden.inputs
    logits = golden.logits(*golden.prompts(numbers))
    golden.check_logits(file, logits, numbers)
    if 4 in numbers:  # whole at the last position
        _close(logits[0][len(inputs["prompt_4"]) - 1], file["p4_last"], 5e-4)
    real = inputs[f"batch_{side}_mask"] > 0
    golden.check_row(golden.logits(jnp.asarray(inputs[f"batch_{side}_ids"]), jnp.asarray(real))[real], file, side)
    tokens, mask, labels, *_ = golden.batch(k)
    found = cross_entropy(_label_logits(golden.graph, golden.base, tokens, mask, labels), labels)
    _close(found, file[f"loss_mean_ce_{k}"], 2e-5)


@pytest.mark.long
def test_greedy_ids_of_the_base(golden):
    said = json.loads((golden.folder / "greedy.json").read_text())["base"]
    labels = jnp.array([[*row, *[-100] * (_TOKENS - len(row))] for row in said.values()])
    found = _say(golden.graph, golden.base, *golden.prompts([int(name.removeprefix("prompt_")) for name in said]))
    np.testing.assert_array_equal(np.where(labels >= 0, found, -100), labels)
