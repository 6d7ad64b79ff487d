"""Text in batches that a base model reads, and its outputs on them."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..loading.model import LoadedModel, load_model
from ..loading.spec import LoadOptions
from ..models.architecture import Model
from ..models.generate import Sampling, generate
from ..support.reading import utf8
from ..tasks import IGNORED, Batch, Example, encode, eval_batches, tokenise

WINDOW = 128  # most tokens of a row of text
# lines in a batch of a model that is not causal, and most tokens of its answers
LINES = 16
_ANSWER = 32


def load_base(base: str) -> LoadedModel:
    """Return a base model, without a pool, with a loop over its layers."""
    loaded = load_model(LoadOptions(base=base, method="zero-shot"))
    return loaded.with_layers(unroll=False)


def read_texts(paths: Sequence[Path]) -> str:
    """Return the content of text files, one after the other."""
    texts = []
    for path in paths:
        with utf8(path):
            texts.append(path.read_text(encoding="utf-8"))
    return "\n".join(texts)


def read_batches(loaded: LoadedModel, content: str, tokens: int) -> list[Batch]:
    """Return batches of a text: windows of its first tokens for a causal model, for others lines and their answers."""
    if loaded.config.causal:
        return windows(loaded, token_ids(loaded, content)[:tokens])
    return answered(loaded, [line for line in content.splitlines() if line.strip()])


def token_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Return the tokens of a text, without special ones."""
    return tokenise(loaded.tokenizer, text, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


class Outputs(Sequence[Array]):
    """Outputs of a model on batches, computed where they are read: all logits together can be larger than the model."""

    def __init__(
        self, run: Callable[[Any, Any], Array], weights: Any, batches: Sequence[Any]
    ):
        self._run = run
        self._weights = weights
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, at: Any) -> Any:
        return self._run(self._weights, self._batches[at])


@functools.lru_cache  # the same function again: it is compiled once for each
def logits_of_base(
    graph: nnx.GraphDef,
) -> Callable[[nnx.State, Batch], Float[Array, "B T V"]]:
    """Return the base model as a function of its weights and a batch; logits of positions without a label are 0."""

    def run(base: nnx.State, batch: Batch) -> Float[Array, "B T V"]:
        model: Model = nnx.merge(graph, base)
        logits = model.label_logits(batch.input_ids, batch.input_mask, batch.labels, {})
        return jnp.where((batch.labels != IGNORED)[..., None], logits, 0)

    return run


def windows(loaded: LoadedModel, ids: Sequence[int]) -> list[Batch]:
    """Return text in rows of `WINDOW` tokens, a batch each, that predict all tokens but their first.

    Rows begin with the token that the tokenizer puts before a text, if it has one: models that were trained with it
    read text badly without it.
    """
    bos = _before_a_text(loaded)
    width = WINDOW - len(bos)
    text = np.asarray(ids[: len(ids) // width * width], np.int32).reshape(-1, width)
    rows = jnp.asarray(
        np.concatenate(
            [np.tile(np.asarray(bos, np.int32), (len(text), 1)), text], axis=1
        )
    )[:, None]
    first = jnp.ones((1, 1), bool)
    alone = jnp.ones(1, bool)
    return [Batch(row[:, :1], first, row[:, 1:], alone) for row in rows]


def _before_a_text(loaded: LoadedModel) -> list[int]:
    return [
        token
        for token in tokenise(loaded.tokenizer, "")["input_ids"]
        if token == loaded.tokenizer.bos_token_id
    ]


def sampled(loaded: LoadedModel, tokens: int, seed: int) -> list[int]:
    """Return text that a causal model samples from itself at temperature 1, in rows that fill a window each.

    Rows continue the token before a text, or the end-of-text token. What follows the end of an answer is `IGNORED`.
    """
    bos = _before_a_text(loaded)
    rows = -(-tokens // (WINDOW - len(bos)))
    start = np.tile(np.asarray(bos or loaded.config.end_ids[:1], np.int32), (rows, 1))
    keys = jax.random.split(jax.random.key(seed), rows)
    model = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base)
    new = jax.jit(
        functools.partial(
            generate,
            max_new_tokens=WINDOW - start.shape[1],
            sampling=Sampling(temperature=1.0),
        ),
    )(model, jnp.asarray(start), jnp.ones_like(start, bool), row_keys=keys)
    texts = np.concatenate([start, _until_the_end(loaded, new)], axis=1)
    return texts[:, len(bos) :].reshape(-1).tolist()


def _until_the_end(loaded: LoadedModel, tokens: Array) -> np.ndarray:
    """Return generated tokens with `IGNORED` behind the first that ends an answer."""
    ended = np.cumsum(np.isin(tokens, loaded.config.end_ids), axis=1)
    return np.where(
        np.pad(ended, [(0, 0), (1, 0)])[:, :-1] > 0, IGNORED, np.asarray(tokens)
    )


def answered(loaded: LoadedModel, lines: Sequence[str]) -> list[Batch]:
    """Return lines of text as sources, in batches; targets are the digital model's answers."""
    model = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base)
    tokenizer = loaded.tokenizer
    answer = jax.jit(functools.partial(generate, max_new_tokens=_ANSWER))
    encoded = encode(
        tokenizer, [Example(line, "") for line in lines], loaded.text_format
    )
    batches = []
    for numbers, batch in eval_batches(encoded, LINES, pad_id=tokenizer.pad_token_id):
        tokens = answer(model, batch.input_ids, batch.input_mask)
        labels = np.where(
            (numbers < 0)[:, None], IGNORED, _until_the_end(loaded, tokens)
        )
        batches.append(batch._replace(labels=labels))
    return [jax.tree.map(jnp.asarray, batch) for batch in batches]


def no_padding(
    loaded: LoadedModel,
) -> Callable[[Batch, str], Bool[Array, "B T"]] | None:
    """Return a function to the inputs of a matrix that are no padding; None for a causal model, which has none here."""
    sites = loaded.config.sites

    def of_matrix(batch: Batch, name: str) -> Bool[Array, "B T"]:
        reads_source = name in sites and sites[name].reads == ("source",)
        return batch.input_mask if reads_source else batch.labels != IGNORED

    return None if loaded.config.causal else of_matrix
