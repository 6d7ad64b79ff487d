"""Gemma-3-270M from its GGUF file, whose Q4_K_M has rows in Q5_0, against transformers on the dequantised weights.

Gemma's terms apply to the file: https://ai.google.dev/gemma/terms
"""

import numpy as np
import pretrained
import pytest
from json_files import read_json

pytestmark = [
    pytest.mark.gemma,
    pytest.mark.nightly,
    pytest.mark.usefixtures("optimised_by_llvm"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return pretrained.gemma_file(tmp_path_factory.mktemp("gemma"))


def test_ids_logits_and_answers_are_those_of_transformers(goldens, file):
    pretrained.check(file, goldens / "gemma3", 1e-3)


def test_the_harness_scores_the_first_word_of_each_answer_as_transformers(
    goldens, file
):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.api.instance import Instance

    from lorafusion_jax.lm_eval.model import LorafusionLM

    texts = read_json(goldens / "gemma3" / "texts.json")
    golden = np.load(goldens / "gemma3" / "logits.npz")
    model = LorafusionLM(base=str(file), max_length=64)
    pairs = []
    scores = []
    for number, (prompt, answer) in enumerate(
        zip(texts["prompts"], texts["greedy"], strict=True)
    ):
        word = model.tokenizer.decode(answer[:1])
        if model.tok_encode(prompt + word) == [*texts["ids"][number], answer[0]]:
            pairs.append((prompt, word))
            scores.append(
                golden[f"{number}_top_val"][-1, 0] - golden[f"{number}_lse"][-1]
            )
    assert len(pairs) > 1
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        for pair in pairs
    ]
    found = model.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx(scores, abs=1e-3)
    assert all(greedy for _, greedy in found)
