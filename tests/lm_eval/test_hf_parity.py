"""The harness's own `hf` model, which computes with PyTorch, is the oracle of scores and answers on local tasks."""

import shutil

import lm_eval_tasks
import pretrained
import pytest
import small_llama

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from lorafusion_jax import load_base, save_base
from lorafusion_jax.lm_eval.model import LorafusionLM

pytestmark = pytest.mark.peft

_CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. " * 4,
    "A short text.",
    "Once upon a time a small robot lived in a large house near the sea. " * 3,
)
_NEW_TOKENS = 12


def _tasks(folder, **generation):
    folder.mkdir()
    questions = [f"The capital of {country} is" for country in _CAPITALS]
    questions[0] = " ".join(questions) + " Paris. " + questions[0]
    answers = dict(zip(questions, _CAPITALS.values(), strict=True))
    lm_eval_tasks.write_tasks(folder, answers, _TEXTS, **generation)
    return TaskManager(include_path=str(folder), include_defaults=False)


def _samples(model, manager, **how):
    """The answers to all requests of each task, in their order."""
    found = simple_evaluate(
        model=model,
        tasks=[*manager.all_tasks],
        task_manager=manager,
        bootstrap_iters=0,
        cache_requests=False,
        **how,
    )
    assert found is not None
    samples = {
        task: sorted(rows, key=lambda row: row["doc_id"])
        for task, rows in found["samples"].items()
    }
    return {
        task: [answer for row in rows for answer in row["resps"]]
        for task, rows in samples.items()
    }


def _assert_equal(ours, base, folder, **how):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=str(base),
        device="cpu",
        dtype="float32",
        batch_size=4,
        max_length=ours.max_length,
    )
    # With an encoder, `hf` takes the longest prompt's length for tokens of the answer too, unless it is given a length.
    limited = _tasks(folder / "ours", until=["\n\n"], max_gen_toks=_NEW_TOKENS)
    same = limited
    if ours.backend != "causal":
        same = _tasks(folder / "theirs", until=["\n\n"], max_length=_NEW_TOKENS + 1)
    found = _samples(ours, limited, **how)
    wanted = _samples(theirs, same, **how)
    assert found["local_answers"] == wanted["local_answers"] and any(
        text for (text,) in found["local_answers"]
    )
    for task in ("local_choices", "local_cloze"):
        for ((score, greedy),), ((wanted_score, wanted_greedy),) in zip(
            found[task], wanted[task], strict=True
        ):
            assert score == pytest.approx(wanted_score, abs=1e-3)
            assert greedy == wanted_greedy
    assert [score for (score,) in found["local_text"]] == pytest.approx(
        [score for (score,) in wanted["local_text"]], abs=1e-3
    )


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A small T5 of random weights, as transformers saves it, with a tokenizer of bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu",
        initializer_factor=2.0, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight.data *= 0.1  # scores of a size that float32 holds to 1e-3
    model.save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_a_small_t5_scores_and_answers_as_with_pytorch(t5, tmp_path):
    ours = LorafusionLM(base=str(t5), batch_size=3, max_length=48)
    assert ours.backend == "seq2seq"
    _assert_equal(ours, t5, tmp_path)


@pytest.mark.parametrize("chat", [False, True])
def test_a_small_llama_scores_and_answers_as_with_pytorch(chat, tmp_path):
    base = small_llama.make(tmp_path / "base")
    _assert_equal(
        LorafusionLM(base=str(base), batch_size=3, max_length=64),
        base,
        tmp_path,
        apply_chat_template=chat,
    )


def test_contexts_are_as_long_as_those_of_the_hf_model(t5, tmp_path):
    from lm_eval.models.huggingface import HFLM

    for base in (t5, small_llama.make(tmp_path / "base")):
        assert (
            LorafusionLM(base=str(base)).max_length
            == HFLM(pretrained=str(base), device="cpu").max_length
        )


@pytest.mark.nightly
@pytest.mark.parametrize("chat", [False, True])
def test_smollm2_scores_and_answers_as_with_pytorch(chat, tmp_path):
    """Our model reads the GGUF file, PyTorch a folder of its dequantised weights."""
    file = pretrained.smollm2_file()
    save_base(load_base(file), tmp_path / "base", file)
    _assert_equal(
        LorafusionLM(base=str(file), max_length=96),
        tmp_path / "base",
        tmp_path,
        apply_chat_template=chat,
    )
    shutil.rmtree(tmp_path / "base")
