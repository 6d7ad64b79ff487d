"""Tokenizers that mean harm: more added tokens than load, and steps that lengthen a text without a bound."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from lorafusion_jax import load_tokenizer
from lorafusion_jax.io.gguf.tokenizer import build_tokenizer
from lorafusion_jax.parts import open_base


def _charsmap(text):
    """Return a map without characters, and with a text that is as long as what they could become."""
    return (1024).to_bytes(4, "little") + bytes(1024) + text + b"\0"


def _prefixed(second):
    """Return a model of byte pairs whose tokens within a word begin with x."""
    merges = {"vocab": {"a": 0, second: 1, f"a{second}": 2}, "merges": [f"a {second}"]}
    return {"type": "BPE", "continuing_subword_prefix": "x", **merges}


def _precompiled(charsmap):
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


_LONG_TOKEN = {"id": "x", "ids": [0] * 2000, "tokens": ["a"] * 2000}
_with_a_long_token = processors.TemplateProcessing("x $A", "$A $B", [_LONG_TOKEN])


@pytest.fixture
def base(small, tmp_path):
    return shutil.copytree(small[0], tmp_path / "base")


_TOO_MANY = ": expected at most 100,000"
_REFUSED = [
    ("tokenizer.json", {"added_tokens": [{}] * 300_000}, f"added_tokens is 300,000{_TOO_MANY}"),
    ("tokenizer_config.json", {"added_tokens_decoder": {str(n): {} for n in range(300_000)}}, f"is 300,000{_TOO_MANY}"),
    ("tokenizer_config.json", {"extra_ids": 10**9}, f"extra_ids is 1,000,000,000{_TOO_MANY}"),
    ("tokenizer_config.json", {"model_max_length": "many"}, "model_max_length is 'many': expected a number"),
    # tokenizers 0.23 panics on the next four; the second and third end the process.
    (
        "tokenizer.json",
        {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 2**40}},
        "expected a stop of 0",
    ),
    (
        "tokenizer.json",
        {"model": _prefixed("é")},
        "a merge with 'é', which lacks the model's continuing_subword_prefix",
    ),
    ("tokenizer.json", {"normalizer": _precompiled("/////w==")}, "4 bytes, and claims 4,294,967"),
    ("tokenizer.json", {"normalizer": _precompiled("AAAAAA==")}, "it panics: index out of bounds"),
    ("tokenizer.json", {"model": {"max_input_chars_per_word": 2**40}}, "_per_word is 1,099,511,627,776: .* 1,000"),
    ("tokenizer.json", {"normalizer": {"type": "Replace"}}, "not a tokenizer .*content"),
    ("tokenizer.json", '"normalizer": null, "decoder"', "not a tokenizer .'normalizer' is given twice"),
]


@pytest.mark.parametrize(("file", "change", "message"), _REFUSED)
def test_tokenizers_that_are_refused(base, file, change, message):
    text = (base / file).read_text()
    twice = isinstance(change, str)
    (base / file).write_text(text.replace('"decoder"', change) if twice else json.dumps(json.loads(text) | change))
    with pytest.raises(ValueError, match=f"{base}.*{message}"):
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
        ("normalizer", normalizers.Sequence([normalizers.Replace("ا", "ﷺ"), normalizers.NFKD()] * 5)),
        ("normalizer", normalizers.Sequence([normalizers.NFD(), normalizers.Replace("α", "ΐ")] * 9)),
        ("normalizer", normalizers.Sequence([normalizers.Prepend("x" * 50)] * 2)),
        ("normalizer", normalizers.Precompiled(_charsmap(b"x" * 4000))),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Metaspace()] * 5)),
        ("decoder", decoders.Sequence([decoders.BPEDecoder(suffix="")] * 10)),
        ("decoder", decoders.Sequence([decoders.CTC(word_delimiter_token="")] * 10)),
        ("decoder", decoders.Sequence([decoders.WordPiece()] * 10)),
        ("post_processor", processors.TemplateProcessing(single=["$A"] * 1000, pair="$A $B", special_tokens=[])),
        ("post_processor", processors.TemplateProcessing(pair=["$A", "$B"] * 1000, special_tokens=[])),
        ("post_processor", _with_a_long_token),
        ("post_processor", processors.Sequence([processors.TemplateProcessing(["$A"] * 9, "$A $B", [])] * 3)),
    ],
)
def test_steps_that_lengthen_texts_without_a_bound_are_refused(base, part, of_part):
    """Before the file is loaded, because loading normalises the added tokens."""
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    setattr(raw, part, of_part)
    raw.save(str(base / "tokenizer.json"))
    for load in (load_tokenizer, lambda source: open_base(source).tokenizer):
        with pytest.raises(ValueError, match=f"{base}/tokenizer.json: .*its {part} has .* steps"):
            load(base)


@pytest.mark.parametrize(
    "steps",
    [
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
        [
            *(normalizers.Replace(*pair) for pair in (("``", '"'), ("''", '"'))),
            *(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()),
            *(normalizers.Precompiled(_charsmap(b"x" * 33)), normalizers.Replace(Regex(" {2,}"), "▁")),
        ],
    ],
    ids=["Llama 2", "XLNet"],
)
def test_steps_of_honest_tokenizers_are_taken(base, steps):
    """Next to those of SmolLM2. 33 bytes are the longest text in XLNet's map, of U+FDFA."""
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    raw.normalizer = normalizers.Sequence(steps)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)])
    raw.save(str(base / "tokenizer.json"))
    assert load_tokenizer(base).get_vocab()["b"] == 1
