"""GGUF files as base models: the numbers, the families' layouts, the tokenizers, 8 bits kept, and what is refused."""

import itertools
import re
import string
from dataclasses import replace

import gguf
import gguf_models
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
import qwix
import tiny
from gguf_models import (
    BYTE_LEVEL,
    IDS,
    INTERLEAVED,
    MODELS,
    PIECES,
    SENTENCE_PIECE,
    byte_letters,
    close,
    interleaved,
    of_delta_net,
    writer_of,
    written,
)
from hypothesis import given, strategies as st
from json_files import read_json, write_json
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax.estimates import shape_config
from lorafusion_jax.io import ConvertOptions, convert, open_base, write_adapter
from lorafusion_jax.io.base_files import GGUFBase
from lorafusion_jax.io.gguf.reader import read_gguf
from lorafusion_jax.io.gguf.tokenizer import build_tokenizer
from lorafusion_jax.io.gguf.write import write_lora, write_merged
from lorafusion_jax.models import dense
from lorafusion_jax.runs import ExportOptions, export
from lorafusion_jax.runs.export import MergeOptions, merge


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_dequantises_is_read(tmp_path, kind):
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 64, (2, 3 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=kind)
    file = close(writer)
    try:
        expected = gguf.dequantize(data, kind)
    except NotImplementedError:
        with refused(
            f"a is stored as {kind.name}, which the gguf package cannot dequantise"
        ):
            read_gguf(file)
    else:
        tensor = read_gguf(file).tensors["a"]
        assert (tensor.shape, tensor.kind) == (
            expected.shape,
            kind.name,
        ) and expected.shape == (2, 3 * numbers)
        assert_array_equal(tensor, expected)
        assert_array_equal(tensor[1:2], expected[1:2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The models with random weights: multiples of 1 / 64 below 8, so that 1 + w and -exp(A_log) lose nothing."""
    found = {}
    for number, name in enumerate(MODELS):
        rng = np.random.default_rng(number)
        folder = tmp_path_factory.mktemp("base")
        found[name] = gguf_models.make(
            folder,
            name,
            lambda title, shape, rng=rng: (
                rng.integers(128 if "A_log" in title else -512, 512, shape) / 64
            ),
        )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_folder_it_was_made_of(tmp_path, folders, name):
    """The same structure and the same weights, bit for bit."""
    folder = folders[name]
    file = written(folder, tmp_path / "model.gguf")
    assert (
        lf.read_config(file) == lf.read_config(folder)
        and open_base(file).digest == open_base(folder).digest
    )


def test_codes_have_another_digest(tmp_path, folders):
    folder = folders["llama"]
    coded = written(folder, tmp_path / "1.gguf", kinds=lambda _name: "Q8_0")
    again = written(folder, tmp_path / "2.gguf", kinds=lambda _name: "Q8_0")
    assert (
        open_base(coded).digest == open_base(again).digest != open_base(folder).digest
    )


def test_a_file_has_a_digest_of_its_tokenizer_alone(tmp_path, folders):
    changes = (
        {},
        {"tokenizer.chat_template": "hi"},
        {"tokenizer.ggml.add_bos_token": True},
    )
    files = [
        written(folders["llama"], tmp_path / f"{n}.gguf", of)
        for n, of in enumerate(changes)
    ]
    plain = open_base(files[0]).files.tokenizer_sha256()
    other_template = open_base(files[1]).files.tokenizer_sha256()
    other_tokenizer = open_base(files[2]).files.tokenizer_sha256()
    assert plain == other_template != other_tokenizer


def test_other_values_of_older_and_newer_files(tmp_path, folders):
    """A pattern of windows, absent widths of heads, the older key of a scaling, keys without effect, ends of turns."""

    def read(name, changes):
        return lf.read_config(written(folders[name], tmp_path / "model.gguf", changes))

    pattern = {
        "attention.sliding_window_pattern": [True] * 6 + [False],
        "rope.freq_base_swa": 5_000.0,
    }
    config = read(
        "gemma3",
        {
            f"gemma3.{key}": value
            for key, value in (pattern | {"expert_count": 0}).items()
        },
    )
    assert (
        config.sliding == (True,) * 6 + (False,) and config.local_rope.theta == 5_000.0
    )
    absent = dict.fromkeys(
        f"llama.attention.{key}"
        for key in ("key_length", "value_length", "head_count_kv")
    )
    config = read("llama", absent | {"llama.rope.scale_linear": 2.0})
    assert (
        config.d_head,
        config.num_kv_heads,
        config.rope.scaling,
        config.rope.factor,
    ) == (16, 4, "linear", 2.0)
    for text in ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"):
        tokens = [*BYTE_LEVEL["tokenizer.ggml.tokens"]]
        tokens[7] = text
        assert read("llama", {"tokenizer.ggml.tokens": tokens}).end_ids == (2, 7)
    # The largest Gemmas scale queries by a width that their files lack.
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        large = read(
            name, {f"{name}.block_count": layers, f"{name}.embedding_length": 80}
        )
        assert large.query_scale == (80 // 4) ** -0.5


# 8 bits.


def _in_turn(title):
    """Layer 0 in Q8_0, layer 1 in Q4_0, the gates in float32 alone, the head in Q8_0."""
    if "gate_proj" in title:
        return None
    return "Q4_0" if ".layers.1." in title else "Q8_0"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_q8_0_keeps_its_codes(tmp_path, folders, dtype):
    file = written(folders["llama"], tmp_path / "model.gguf", kinds=_in_turn)
    tensor = lf.base_tensor(file)
    model = lf.load_base(file, dtype=dtype, quantise="int8")
    tensors = open_base(file).files.tensors()
    head = model.variables()["head"].get_value()
    matrices = {
        ("lm_head", 0): qwix.QArray(head.qvalue[None], head.scale[None], qtype="int8")
    }
    for (site, kernel), layer in itertools.product(lf.kernels(model).items(), range(2)):
        matrices[model.config.sites[site].path_of(layer), layer] = kernel
    assert len(matrices) == 15
    for (path, layer), weight in matrices.items():
        wanted = tensor(f"{path}.weight").T.astype(dtype)
        got = np.asarray(dense(weight, dtype)[layer])
        if tensors[f"{path}.weight"].kind == "Q8_0":
            codes, scales = tensors[f"{path}.weight"].codes()
            assert_array_equal(weight.qvalue[layer], codes.T)
            assert_array_equal(weight.scale[layer], scales.T.astype(np.float32))
            assert_array_equal(got, wanted)
        else:
            tile = weight.scale_tile_shape[1]
            again = lf.quantise(jnp.asarray(wanted), "int8", tiled_axis=-2, tile=tile)
            assert_array_equal(got, dense(again, dtype))
            assert tile == (64 if "gate_proj" in path else 32)


def test_an_embedding_that_is_the_head_keeps_its_codes(tmp_path, folders):
    """Oracle: logits and answers of the same numbers in float32."""
    file = written(
        folders["llama with biases, tied"],
        tmp_path / "model.gguf",
        kinds=lambda title: "Q8_0",
    )
    models = [lf.load_base(file, quantise=quantise) for quantise in ("int8", None)]
    codes = models[0].embedding.get_value()
    plain = models[1].embedding.get_value()
    assert isinstance(codes, qwix.QArray)
    assert_array_equal(dense(codes, "float32"), plain)
    ids = jnp.arange(1, 7)[None]
    assert_allclose(*(model(ids, ids > 0) for model in models), rtol=1e-4, atol=1e-4)
    assert_array_equal(
        *(lf.generate(model, ids, ids > 0, max_new_tokens=4) for model in models)
    )


# Tokenizers.


def _ids(tokens):
    names = BYTE_LEVEL["tokenizer.ggml.tokens"]
    return [names.index(token) for token in tokens]


_DIGITS = "He|'s| |1|2|3|4| won|'T|  | x|!?\n\n|y"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "He|'s| 1234| won|'|T|  | x|!?|\n|\n|y"),
        ("default", "He|'|s| |123|4| won|'|T|  | x|!?|\n|\n|y"),
        ("smollm", "He|'s| |1|2|3|4| won|'|T|  | x|!?|\n|\n|y"),
        ("llama-bpe", "He|'s| |123|4| won|'T|  | x|!?\n\n|y"),
        ("qwen2", _DIGITS),
        ("qwen35", _DIGITS),
        ("tekken", _DIGITS),
    ],
)
def test_pre_tokenizers_split_by_name(pre, pieces):
    tokenizer = build_tokenizer(BYTE_LEVEL | IDS | {"tokenizer.ggml.pre": pre})
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    letters = {letter: byte for byte, letter in byte_letters().items()}
    assert [
        bytes(letters[letter] for letter in piece).decode()
        for piece, _ in splitter.pre_tokenize_str("He's 1234 won'T   x!?\n\ny")
    ] == pieces.split("|")


def test_byte_level_tokens_special_tokens_and_flags():
    tokenizer = build_tokenizer(BYTE_LEVEL | IDS)
    assert tokenizer("the th é</s><think>")["input_ids"] == _ids(
        ["the", "Ġ", "th", "Ġ", "Ã", "©", "</s>", "<think>"]
    )
    assert (
        tokenizer.decode(
            tokenizer("the é</s><think>")["input_ids"], skip_special_tokens=True
        )
        == "the é<think>"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "</s>",
    )
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    both = build_tokenizer(
        BYTE_LEVEL | IDS | flags | {"tokenizer.ggml.padding_token_id": 0}
    )
    assert (
        both("the")["input_ids"] == _ids(["<s>", "the", "</s>"])
        and both.pad_token == "<pad>"
    )
    assert both.whole("the", "th")["input_ids"] == _ids(
        ["<s>", "the", "</s>", "<s>", "th", "</s>"]
    )
    # Llama 3's tokenizers begin with BOS unless told otherwise, and keep a word that no merges make.
    merges = {"tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.pre": "llama-bpe"}
    with refused("its merges give no tokenizer"):
        build_tokenizer(BYTE_LEVEL | IDS | merges)
    merges["tokenizer.ggml.merges"] = ["t h"]
    assert build_tokenizer(BYTE_LEVEL | IDS | merges)("the")["input_ids"] == _ids(
        ["<s>", "the"]
    )
    merges["tokenizer.ggml.pre"] = "gpt-2"
    assert build_tokenizer(BYTE_LEVEL | IDS | merges)("the")["input_ids"] == _ids(
        ["th", "e"]
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], return_dict=False
    )
    assert chat == _ids(["<s>", "the", "</s>"])


def _by_score(text):
    """SentencePiece's merges by a loop: the best pair, the first one of equals."""
    parts = [*text]
    while True:
        pairs = [
            (PIECES[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in PIECES
        ]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentence_piece_merges_by_score():
    tokenizer = build_tokenizer(SENTENCE_PIECE)

    @given(
        st.text("abc ", min_size=1, max_size=12).filter(lambda text: "  " not in text)
    )
    def check(text):
        assert tokenizer.tokenize(text) == _by_score("▁" + text.replace(" ", "▁"))

    check()


def test_sentence_piece_bytes_special_tokens_and_the_space_before():
    tokenizer = build_tokenizer(SENTENCE_PIECE)
    assert tokenizer.tokenize("abé") == ["▁ab", "<0xC3>", "<0xA9>"]
    assert tokenizer("ab")["input_ids"][0] == 1
    assert tokenizer.tokenize("a<turn>a") == ["▁a", "<turn>", "▁a"]
    for text in ("ab é c", "  b"):
        assert (
            tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
            == text
        )
    gemma = build_tokenizer(SENTENCE_PIECE | {"tokenizer.ggml.add_space_prefix": False})
    assert gemma.tokenize("a  ab a") == ["a", "  ", "ab", "▁a"]
    assert (
        gemma.decode(gemma("a  ab")["input_ids"], skip_special_tokens=True) == "a  ab"
    )
    without = {
        key: value
        for key, value in SENTENCE_PIECE.items()
        if not key.endswith("scores")
    }
    merged = build_tokenizer(without | {"tokenizer.ggml.merges": ["b c", "▁ a"]})
    assert merged.tokenize("abc") == ["▁a", "bc"]


# A file wherever a folder goes.


def test_adapters_are_converted_for_a_file(tmp_path, folders):
    file = str(written(folders["llama"], tmp_path / "model.gguf"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    factors = tiny.lora_tensors(lf.read_config(file), np.ones)
    # A copy of the base's head, as PEFT saves one: it is compared with the file's.
    copies = {"base_model.model.lm_head.weight": lf.base_tensor(file)("lm_head.weight")}
    write_adapter(tmp_path / "adapter", config, factors | copies)
    manifest = convert(
        ConvertOptions(base=file, adapters=(str(tmp_path / "adapter"),), dry_run=True)
    )
    assert manifest["base"]["source"] == file and manifest["totals"]["adapters"] == 1
    assert shape_config(file) == lf.read_config(file)


# Files that are written.


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_is_read_back_with_its_weights_and_metadata(
    tmp_path, folders, name, kind
):
    file = written(folders[name], tmp_path / "base.gguf")
    tensors = {
        key: -array
        for key, array in load_file(folders[name] / "model.safetensors").items()
    }
    write_merged(tmp_path / "merged.gguf", GGUFBase(file), tensors, kind)
    merged = GGUFBase(tmp_path / "merged.gguf")
    assert merged.config == GGUFBase(file).config
    # The weights are multiples of 1 / 64 below 8, which float16 has; a step of Q8_0 is at most 8 / 127.
    tolerance = 0 if kind == "F16" else 8 / 127 / 2 + 2**-8

    def negative(ours, theirs, err_msg):
        assert_allclose(ours, -theirs, 0, tolerance, err_msg=err_msg)

    tiny.assert_same_model(lf.load_base(merged.place), lf.load_base(file), negative)
    reader = gguf.GGUFReader(tmp_path / "merged.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {kind, "F32"}
    assert (
        reader.fields["general.quantization_version"].contents()
        == gguf.GGML_QUANT_VERSION
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_folder_is_written_with_its_structure_and_tokenizer(
    tmp_path, folders, name
):
    folder = folders[name]
    file = tmp_path / "model.gguf"
    write_merged(
        file, open_base(folder).files, load_file(folder / "model.safetensors"), "F16"
    )
    assert lf.read_config(file) == lf.read_config(folder)
    tiny.assert_same_model(*map(lf.load_base, (file, folder)))
    ours = lf.load_tokenizer(file)
    theirs = lf.load_tokenizer(folder)
    for text in ("the th é</s><think>", "ab  abc<turn>", string.printable):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (
        ours.chat_template == theirs.chat_template
        and ours.special_tokens_map == theirs.special_tokens_map
    )


def test_the_text_model_of_a_qwen_3_5_with_images_and_its_blocks_for_several_tokens(
    tmp_path, folders
):
    folder = folders["qwen3.5"]
    text = read_json(folder / "config.json")
    tensors = load_file(folder / "model.safetensors")
    build_tokenizer(BYTE_LEVEL | IDS).save_pretrained(tmp_path)
    config = {
        key: text[key]
        for key in ("tie_word_embeddings", "eos_token_id", "pad_token_id")
    }
    config |= {"model_type": "qwen3_5", "text_config": text}
    write_json(tmp_path / "config.json", config)
    inside = {
        re.sub("^model", "model.language_model", name): tensor
        for name, tensor in tensors.items()
    }
    save_file(inside, tmp_path / "model.safetensors")
    write_merged(tmp_path / "model.gguf", open_base(tmp_path).files, inside, "F16")
    assert (
        open_base(tmp_path / "model.gguf").digest
        == open_base(
            written(folder, tmp_path / "text.gguf", kinds=lambda _: "F16")
        ).digest
    )
    further = {"qwen35.block_count": 3, "qwen35.nextn_predict_layers": 1}
    writer = writer_of(folder, tmp_path / "several.gguf", further)
    writer.add_tensor("blk.2.attn_norm.weight", np.ones(64, np.float32))
    several = open_base(close(writer))
    assert (several.config, several.digest) == (
        lf.read_config(folder),
        open_base(folder).digest,
    )
    write_merged(tmp_path / "again.gguf", several.files, tensors, "F16")
    assert "blk.2.attn_norm.weight" in read_gguf(tmp_path / "again.gguf").tensors


@pytest.mark.peft
@pytest.mark.parametrize(
    "name", ["llama", "qwen2"]
)  # of the others transformers ignores keys
def test_transformers_reads_a_written_model_as_its_folder(tmp_path, folders, name):
    import torch
    from transformers import AutoModelForCausalLM

    folder = folders[name]
    write_merged(
        tmp_path / "model.gguf",
        open_base(folder).files,
        load_file(folder / "model.safetensors"),
        "F16",
    )
    ids = torch.arange(3, 40)[None]
    logits = []
    for where, how in ((tmp_path, {"gguf_file": "model.gguf"}), (folder, {})):
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, **how
        ).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits.numpy())
    assert_allclose(*logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama 3", "gemma3", "qwen3.5"])
def test_an_exported_folder_is_the_model_of_its_file(tmp_path, folders, name):
    file = written(folders[name], tmp_path / "base.gguf")
    folder = tmp_path / "folder"
    assert export(ExportOptions(base=str(file), out=folder)) == f"base {file}"
    tiny.assert_same_model(lf.load_base(folder), lf.load_base(file))
    files = [open_base(base).files for base in (folder, file)]
    assert files[0].config_sha256() == files[1].config_sha256()
    ids = [lf.load_tokenizer(base)("a bcd").input_ids for base in (folder, file)]
    assert ids[0] == ids[1]


@pytest.mark.peft
@pytest.mark.parametrize("name", ["llama 3", "qwen3", "gemma3", "olmo3"])
def test_peft_adapts_the_exported_folder_of_a_file(tmp_path, folders, name):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    file = written(folders[name], tmp_path / "base.gguf")
    export(ExportOptions(base=str(file), out=tmp_path / "folder"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapted = peft_models.randomise(peft.get_peft_model(base, lora))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = np.arange(3, 40)[None]
    with torch.no_grad():
        wanted = adapted(input_ids=torch.tensor(ids)).logits.numpy()
    model = lf.load_base(file)
    fusion = lf.Fusion(magnitudes=False)
    fused = peft_models.fused(model, [tmp_path / "adapter"], fusion, 1.0)
    logits = model(jnp.asarray(ids), jnp.asarray(ids > 0), fused.adapters)
    tolerance = 1e-4 * np.abs(wanted).max()
    assert_allclose(logits, wanted, rtol=0, atol=tolerance)


_LLAMA_CPP = "convert the folder with llama.cpp's"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            f"would hold rope .* {_LLAMA_CPP}",
        ),
        (
            "qwen3.5",
            {"linear_value_head_dim": 8},
            "linear_value_head_dim is 8: in GGUF it is linear_key_head_dim, 32; use --format",
        ),
        (
            "gemma3",
            {"query_pre_attn_scalar": 7},
            "would hold query_scale .*: no GGUF file holds it; use --format merged$",
        ),
        ("gemma3", {}, f"not one of byte-pair merges .* {_LLAMA_CPP}"),
    ],
)
def test_a_folder_that_no_file_describes_is_refused_with_the_remedy(
    tmp_path, folders, name, changes, message
):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if changes:
        tokenizer = build_tokenizer(BYTE_LEVEL | IDS).whole
    else:
        words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words)
        )
    tokenizer.save_pretrained(tmp_path)
    config = read_json(folders[name] / "config.json") | changes
    write_json(tmp_path / "config.json", config)
    tensors = load_file(folders[name] / "model.safetensors")
    with refused(message):
        write_merged(tmp_path / "model.gguf", open_base(tmp_path).files, tensors, "F16")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_has_the_names_and_the_order_of_rows_of_its_base(
    tmp_path, folders, name
):
    config = lf.read_config(folders[name])
    content = open_base(folders[name]).raw
    tensors = tiny.lora_tensors(config, np.random.default_rng(0).standard_normal)
    write_lora(tmp_path / "lora.gguf", content, tensors, alpha=4.0)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    architecture = reader.fields["general.architecture"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 4.0
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], content["num_hidden_layers"]
    )
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == len(tensors)
    for key, array in tensors.items():
        path, factor = (
            key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        )
        heads = {
            "q_proj": content["num_attention_heads"],
            "k_proj": content["num_key_value_heads"],
        }
        last = path.rpartition(".")[2]
        if architecture in INTERLEAVED and last in heads and factor == "lora_B":
            array = interleaved(array, heads[last])
        if "linear_attn" in path and factor == (
            "lora_A" if last == "out_proj" else "lora_B"
        ):
            array = of_delta_net(path, array, content)
        assert_array_equal(
            found[f"{names.get_name(path)}.weight.{factor.lower()}"], array
        )


def test_weighted_modules_are_written_as_files(tmp_path, folders):
    file = str(written(folders["llama"], tmp_path / "base.gguf"))
    path = "model.layers.1.self_attn.k_proj"
    other = "model.layers.0.self_attn.v_proj"
    draw = np.random.default_rng(0)
    tensors = {}
    updates = {}
    for name, rank in ((path, 2), (other, 5)):
        A = draw.normal(size=(rank, 64)).astype("f4")
        B = draw.normal(size=(32, rank)).astype("f4")
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        updates[name] = 0.5 * B @ A
    ranks = {"rank_pattern": {other: 5}, "alpha_pattern": {other: 5}}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | ranks
    write_adapter(tmp_path / "adapters" / "one", config, tensors)
    options = MergeOptions(
        base=file,
        pool=str(tmp_path / "adapters"),
        weights=("one=0.5",),
        out=tmp_path / "lora",
        format="gguf",
    )
    merge(options)
    reader = gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, wanted in (
        ("blk.1.attn_k", interleaved(updates[path], 2)),
        ("blk.0.attn_v", updates[other]),
    ):
        a = found[f"{name}.weight.lora_a"]
        b = found[f"{name}.weight.lora_b"]
        # llama.cpp's scaling: alpha by the rank of the matrix
        assert_allclose(alpha / len(a) * b @ a, wanted, atol=1e-5)
    merge(replace(options, out=tmp_path / "merged", format="gguf-f16"))
    merged = lf.base_tensor(tmp_path / "merged" / "model.gguf")(f"{path}.weight")
    base = lf.base_tensor(file)(f"{path}.weight")
    assert_allclose(merged, base + updates[path], atol=2**-8)


def test_a_family_without_gguf_files_is_refused(tmp_path):
    with refused(
        "model_type is 't5': expected one of llama, .* for GGUF, or --format adapter"
    ):
        write_lora(tmp_path / "lora.gguf", {"model_type": "t5"}, {}, alpha=1.0)
    assert not list(tmp_path.iterdir())


# What is refused.


# Changes of metadata and tensors, and parts of the messages.
_FILES = [
    (
        {"model.layers.1.mlp.up_proj.weight": None},
        r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    (
        {"model.embed_tokens.weight": None},
        r"the tensors lack token_embd\.weight: \w+ a model, not an adapter",
    ),
    (
        {"llama.feed_forward_length": 64},
        r"layers\.0\.mlp\.gate_proj\.weight has shape \[96, 64\], not \[64, 64\]",
    ),
    (
        {"llama.attention.head_count_kv": 4},
        r"self_attn\.k_proj\.weight has shape \[32, 64\], not \[64, 64\]: give a",
    ),
    ({"llama.block_count": 1}, r"the model has no place for model\.layers\.1\."),
    (
        {"llama.context_length": None},
        r"the metadata lack llama\.context_length: fetch the file again",
    ),
    (
        {"llama.attention.head_count_kv": [2, 1]},
        r"attention\.head_count_kv is a list: \w+ one number for all",
    ),
    (
        {"llama.attention.value_length": 8},
        r"attention\.key_length is 16 and value_length is 8: \w+ one width",
    ),
    (
        {"llama.expert_count": 8},
        r"llama\.expert_count is 8, which is not implemented for llama",
    ),
    (
        {"llama.rope.scaling.type": "other"},
        r"the rope scaling is other, which is not implemented: \w+ linear, yarn",
    ),
    (
        {"llama.attention.head_count": 0},
        r"attention\.head_count is 0: \w+ an integer from 1 to 10,000,000",
    ),
    ({"llama.rope.scaling.type": 1}, r"llama\.rope\.scaling\.type is 1: \w+ a text"),
    (
        {"llama.rope.dimension_count": 8},
        r"llama\.rope\.dimension_count is 8: \w+ the width of a head, 16",
    ),
    (
        {"split.count": 3},
        r"is one of 3 parts: merge them by `llama-gguf-split --merge`",
    ),
    (
        {"general.architecture": "mamba"},
        r"general\.architecture is 'mamba': \w+ one of llama, qwen2, qwen3",
    ),
    (
        {"tokenizer.ggml.eos_token_id": 4000},
        r"the eos token is 4000, but there are 262 tokens",
    ),
    (
        {"tokenizer.ggml.eos_token_id": None},
        r"eos_token_id is missing: \w+ the token, or tokens, that end an",
    ),
]
_TOKENIZERS = [
    (
        {"model": "bert"},
        "tokenizer.ggml.model is 'bert', which is not implemented: expected gpt2 or llama",
    ),
    (
        {"pre": "viking"},
        "tokenizer.ggml.pre is 'viking', not implemented: give one of default, gpt-2",
    ),
    ({"merges": None}, "the metadata lack tokenizer.ggml.merges: fetch the file again"),
    (
        {"model": "llama", "merges": None},
        "the metadata lack tokenizer.ggml.scores, and merges instead of them",
    ),
    (
        {"tokens": ["a", "a"]},
        "tokenizer.ggml.tokens holds 2 tokens, 1 of them different",
    ),
    ({"tokens": None}, "tokenizer.ggml.tokens holds 0 tokens"),
    (
        {"unknown_token_id": 4000},
        r"the unknown token is 4000, and tokenizer\.ggml\.tokens holds 262",
    ),
    (
        {"token_type": [1, 1]},
        r"tokenizer\.ggml\.token_type holds 2 numbers, and tokens 262 tokens",
    ),
]


@pytest.mark.parametrize(
    ("read", "prefix", "changes", "message"),
    [(lf.load_base, "", *case) for case in _FILES]
    + [(lf.load_tokenizer, "tokenizer.ggml.", *case) for case in _TOKENIZERS],
)
def test_files_that_are_refused(tmp_path, folders, read, prefix, changes, message):
    changes = {f"{prefix}{key}": value for key, value in changes.items()}
    file = written(folders["llama"], tmp_path / "model.gguf", changes)
    with refused(f"^{file}.*{message}") as caught:
        read(file)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("shape", [(2**62, 2**62, 2, 32), (0, 2**62), (2**40,)])
def test_shapes_that_no_file_holds_are_refused(tmp_path, shape):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.tensors[0]["x"].shape = shape
    with refused(
        r"model\.gguf: (x has .* blocks of|truncated or damaged, x ends).* fetch"
    ):
        read_gguf(close(writer))


@pytest.mark.parametrize(
    "change", [lambda q: q[::-1], lambda q: q * np.float32(1.01), lambda q: q[:-1]]
)
def test_stretched_frequencies_that_are_not_llama3_s_are_refused(
    tmp_path, folders, change
):
    writer = writer_of(folders["llama 3"], tmp_path / "model.gguf")
    held = writer.tensors[0]["rope_freqs.weight"]
    held.tensor = np.ascontiguousarray(change(held.tensor))
    held.shape = held.tensor.shape
    held.nbytes = held.tensor.nbytes
    message = r"rope_freqs\.weight (has shape \[31\]: \w+ \[32\]|are not those of a rope scaling llama3)"
    with refused(message):
        lf.read_config(close(writer))


def test_half_of_longrope_is_refused(tmp_path, folders):
    writer = writer_of(folders["phi3"], tmp_path / "model.gguf")
    writer.add_tensor("rope_factors_long.weight", np.ones(4, np.float32))
    with refused(
        "the rope scaling is longrope: expected rope_factors_short.weight and rope_"
    ):
        lf.read_config(close(writer))
