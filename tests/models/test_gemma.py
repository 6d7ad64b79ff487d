"""Gemma-3-270M from its GGUF file, whose Q4_K_M has rows in Q5_0, against transformers on the dequantised weights.

Gemma's terms apply to the file: https://ai.google.dev/gemma/terms
"""

import json

import gemma
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax import generate, load_base, load_tokenizer

pytestmark = [pytest.mark.gemma, pytest.mark.nightly, pytest.mark.usefixtures("optimised_by_llvm")]

_NEW_TOKENS = 16


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return gemma.gguf_file(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def texts(goldens):
    return json.loads((goldens / "gemma3" / "texts.json").read_text())


def test_ids_logits_and_answers_are_those_of_transformers(goldens, file, texts):
    golden = np.load(goldens / "gemma3" / "logits.npz")
    tokenizer, model = load_tokenizer(file), load_base(file)
    rows = [tokenizer(prompt)["input_ids"] for prompt in texts["prompts"]]
    assert rows == texts["ids"]
    width = max(map(len, rows))
    ids = jnp.array([[*row, *[0] * (width - len(row))] for row in rows])
    mask = jnp.arange(width)[None] < jnp.array([len(row) for row in rows])[:, None]
    logits = jax.jit(lambda model: model(ids, mask))(model)
    for number, (row, found) in enumerate(zip(rows, np.asarray(logits), strict=True)):
        lse = jax.nn.logsumexp(found[: len(row)], axis=-1)
        np.testing.assert_allclose(lse, golden[f"{number}_lse"], rtol=0, atol=1e-3)
        some = found[golden[f"{number}_positions"]]
        best = np.take_along_axis(some, golden[f"{number}_top_id"], axis=-1)
        np.testing.assert_allclose(best, golden[f"{number}_top_val"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(some[:, golden["probe_ids"]], golden[f"{number}_probe_val"], rtol=0, atol=1e-3)
    graph, weights = nnx.split(model)
    say = jax.jit(lambda weights: generate(nnx.merge(graph, weights), ids, mask, max_new_tokens=_NEW_TOKENS))
    for answer, expected in zip(np.asarray(say(weights)), texts["greedy"], strict=True):
        assert answer[: len(expected)].tolist() == expected


def test_the_harness_scores_the_first_word_of_each_answer_as_transformers(goldens, file, texts):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.api.instance import Instance

    from lorafusion_jax.harness.model import HarnessLM

    golden, model = np.load(goldens / "gemma3" / "logits.npz"), HarnessLM(base=str(file), max_length=64)
    pairs, scores = [], []
    for number, (prompt, answer) in enumerate(zip(texts["prompts"], texts["greedy"], strict=True)):
        word = model.tokenizer.decode(answer[:1])
        if model.tok_encode(prompt + word) == [*texts["ids"][number], answer[0]]:
            pairs.append((prompt, word))
            scores.append(golden[f"{number}_top_val"][-1, 0] - golden[f"{number}_lse"][-1])
    assert len(pairs) > 1
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    found = model.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx(scores, abs=1e-3)
    assert all(greedy for _, greedy in found)
