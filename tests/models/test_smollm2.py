"""A real language model from its GGUF file against PyTorch and its tokenizer."""

import functools
import hashlib

import numpy as np
import pretrained
import pytest
from json_files import read_json

import lorafusion_jax as lf
from lorafusion_jax.io import open_base


def test_every_tensor_is_bit_equal(goldens):
    """Names, layout and the order of q's and k's rows are Hugging Face's."""
    wanted = read_json(goldens / "smollm2" / "base" / "tensors.json")
    tensors = open_base(pretrained.smollm2_file()).files.tensors()
    assert tensors.keys() == wanted.keys() and len(wanted) == 272
    for name, entry in wanted.items():
        tensor = np.asarray(tensors[name])
        assert [*tensor.shape] == entry["shape"]
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == entry["sha256"], name


def test_the_configuration_is_the_one_that_transformers_reads(goldens):
    config = open_base(pretrained.smollm2_file()).files.config
    wanted = read_json(goldens / "smollm2" / "base" / "config.json")
    assert config["rope_theta"] == wanted["rope_parameters"]["rope_theta"]
    same = config.keys() - {"architectures", "rope_theta"}
    assert {key: config[key] for key in same} == {key: wanted[key] for key in same}


def test_the_tokenizer_is_the_model_s_own(goldens):
    tokenizer = lf.load_tokenizer(pretrained.smollm2_file())
    cases = read_json(goldens / "smollm2" / "tokenizer_cases.json")
    for case in cases["strings"]:
        ids = tokenizer(case["text"])["input_ids"]
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids) == case["decoded"]
        assert (
            tokenizer.decode(ids, skip_special_tokens=True)
            == case["decoded_skip_special"]
        )
    for case in cases["chats"]:
        template = functools.partial(
            tokenizer.apply_chat_template,
            case["messages"],
            add_generation_prompt=case["add_generation_prompt"],
        )
        assert template(tokenize=False) == case["text"]
        assert template(return_dict=False) == case["ids"]
    special = cases["special"]
    for name in ("bos", "eos", "pad", "unk"):
        assert [
            getattr(tokenizer, f"{name}_token"),
            getattr(tokenizer, f"{name}_token_id"),
        ] == special[name]
    assert {str(token) for token in tokenizer.added_tokens_decoder.values()} == {
        *special["control_tokens"]
    }


@pytest.mark.long
@pytest.mark.usefixtures("optimised_by_llvm")
def test_ids_logits_and_answers_are_those_of_transformers(goldens):
    """Logits reach 44."""
    pretrained.check(pretrained.smollm2_file(), goldens / "smollm2", 5e-4)
