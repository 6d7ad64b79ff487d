"""Tokenizers without transformers: the same tokens and texts as transformers', which other methods load."""

import shutil
import subprocess
import sys

import one_block
import pretrained
import pytest
import small_llama
from hypothesis import given, settings, strategies as st
from json_files import read_json, write_json

import lorafusion_jax as lf
from lorafusion_jax.io import open_base

_BASE = one_block.SMALL / "base"
_TEXTS = (
    st.text()
    | st.text("abc :<>/s|im_endtard\n\t", max_size=40)
    | st.just("<|im_start|>a</s><pad> b<|im_end|>")
)


def _pair(base):
    fast = open_base(base).tokenizer
    whole = lf.load_tokenizer(base)
    assert type(fast) is not type(whole)
    return fast, whole


@pytest.fixture(scope="module", params=["tokenizer.json", "GGUF"])
def pair(request):
    return _pair(
        _BASE if request.param == "tokenizer.json" else pretrained.smollm2_file()
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"add_special_tokens": False}, {"truncation": True, "max_length": 3}],
    ids=str,
)
def test_tokens_and_texts_are_those_of_transformers(pair, how):
    fast, whole = pair

    @settings(max_examples=50)
    @given(st.lists(_TEXTS, min_size=1, max_size=3))
    def check(texts):
        wanted = whole(texts, return_special_tokens_mask=True, **how)
        found = fast(texts, return_special_tokens_mask=True, **how)
        assert {name: wanted[name] for name in found} == found
        assert fast(texts[0], **how)["input_ids"] == wanted["input_ids"][0]
        for skip in (True, False):
            said = (
                one.batch_decode(found["input_ids"], skip_special_tokens=skip)
                for one in pair
            )
            assert next(said) == next(said)

    check()


def test_vocabulary_special_tokens_and_further_methods_are_those_of_transformers(pair):
    fast, whole = pair
    assert len(fast) == len(whole) and fast.get_vocab() == whole.get_vocab()
    assert (
        fast.special_tokens_map == whole.special_tokens_map
        and fast.name_or_path == whole.name_or_path
    )
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "pad")]
    for name in (
        *names,
        *(f"{name}_id" for name in names),
        "chat_template",
        "clean_up_tokenization_spaces",
    ):
        assert getattr(fast, name) == getattr(whole, name)
    assert [*map(fast.convert_ids_to_tokens, range(60))] == whole.convert_ids_to_tokens(
        [*range(60)]
    )
    assert fast.encode("a b") == whole.encode("a b")
    with pytest.raises(AttributeError, match="no_such_method"):
        _ = fast.no_such_method


def test_another_token_for_padding_holds_for_further_methods():
    fast, _ = _pair(_BASE)
    fast.pad_token = "</s>"
    assert fast.pad_token_id == fast.whole.pad_token_id == 1
    assert fast.pad({"input_ids": [[5], [5, 6]]})["input_ids"] == [[5, 1], [5, 6]]


@pytest.mark.parametrize(
    "changes",
    [
        {"clean_up_tokenization_spaces": True},
        {"tokenizer_class": "OtherTokenizer"},
        {"padding_side": "left"},
    ],
    ids=str,
)
def test_transformers_loads_what_its_settings_change(tmp_path, changes):
    folder = shutil.copytree(_BASE, tmp_path / "base")
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", settings | changes)
    assert type(open_base(folder).tokenizer) is type(lf.load_tokenizer(folder))


@pytest.mark.parametrize("content", ["{}", "["], ids=["no model", "no JSON"])
def test_faults_of_the_file_are_reported_and_not_left_to_transformers(
    tmp_path, content
):
    folder = shutil.copytree(_BASE, tmp_path / "base")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(lf.FileError, match="tokenizer.json: not a tokenizer"):
        open_base(folder).tokenizer("a")


def test_transformers_loads_tokenizers_of_causal_models_in_folders(tmp_path):
    folder = small_llama.make(tmp_path / "base", chat_template=None)
    assert type(open_base(folder).tokenizer) is type(lf.load_tokenizer(folder))


def test_config_and_tokenizer_load_no_transformers():
    code = (
        "import sys; from lorafusion_jax.io.hf import open_base, read_config; "
        "[(read_config(base), open_base(base).tokenizer('a')) for base in sys.argv[1:]]; "
        "print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, _BASE, pretrained.smollm2_file()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
