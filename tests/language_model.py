"""A language model from a GGUF file against what transformers computes with it: ids, logits and answers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorafusion_jax import generate, load_base, load_tokenizer


def check(file: Path, golden: Path, tolerance: float) -> None:
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
