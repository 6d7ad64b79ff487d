"""Tokenizers that mean harm: more added tokens than load, and steps that lengthen a text without a bound."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from lorafusion_jax.files import FileError
from lorafusion_jax.io.gguf.tokenizer import build_tokenizer
from lorafusion_jax.io.hf import load_tokenizer


@pytest.fixture
def base(small, tmp_path):
    return shutil.copytree(small[0], tmp_path / "base")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("tokenizer.json", {"added_tokens": [{}] * 300_000}, "added_tokens is 300,000"),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(n): {} for n in range(300_000)}}, "added_.* is 300"),
        ("tokenizer_config.json", {"extra_ids": 10**9}, "extra_ids is 1,000,000,000"),
    ],
)
def test_a_tokenizer_that_adds_too_many_tokens_is_refused_before_it_is_loaded(base, file, fields, message):
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | fields))
    with pytest.raises(FileError, match=f"{file}: {message}.*: expected at most 100,000"):
        load_tokenizer(base)


def test_a_longest_text_that_is_no_number_is_refused(base):
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "many"}))
    with pytest.raises(ValueError, match=f"{base} gives no tokenizer: .*model_max_length is 'many': expected a number"):
        load_tokenizer(base)


def test_a_gguf_file_with_too_many_special_tokens_is_refused():
    tokens = [f"<{number}>" for number in range(300_000)]
    held = {"model": "gpt2", "tokens": tokens, "token_type": [3] * len(tokens), "merges": []}
    with pytest.raises(ValueError, match="token_type makes 300,000 tokens special: expected at most 100,000"):
        build_tokenizer({f"tokenizer.ggml.{key}": value for key, value in held.items()})


@pytest.mark.parametrize(
    ("part", "of_part"),
    [
        ("normalizer", normalizers.Sequence([normalizers.Replace("a", "aa")] * 28)),
        ("normalizer", normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", "aa")] * 14)] * 2)),
        ("normalizer", normalizers.Replace(Regex(""), "x" * 2000)),
        ("normalizer", normalizers.Sequence([normalizers.ByteLevel()] * 28)),
        ("normalizer", normalizers.Sequence([normalizers.Prepend("x")] * 1000)),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(use_regex=False)] * 28)),
        ("decoder", decoders.Sequence([decoders.Replace("a", "aa")] * 28)),
        ("post_processor", processors.TemplateProcessing(single=["$A"] * 1000, pair="$A $B", special_tokens=[])),
    ],
)
def test_steps_that_lengthen_texts_without_a_bound_are_refused(base, part, of_part):
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    setattr(raw, part, of_part)
    raw.save(str(base / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"{base} gives no tokenizer: .* its {part[:5]}.* has .* steps"):
        load_tokenizer(base)


def test_steps_of_honest_tokenizers_are_taken(base):
    """Those of Llama 2, XLNet and SmolLM2, in `tokenizers`."""
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    raw.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend("▁"),
            *(normalizers.Replace(*pair) for pair in ((" ", "▁"), ("``", '"'), ("''", '"'))),
            *(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)])
    raw.save(str(base / "tokenizer.json"))
    assert load_tokenizer(base).get_vocab()["b"] == 1
