"""A model of lm-evaluation-harness that computes with JAX, as its own `hf` model does with PyTorch.

    lm_eval.simple_evaluate(model=LorafusionLM(run="runs/snarks-fusion"), tasks=["arc_easy"])

Texts become tokens, and long ones lose their first tokens, as in the harness's own `hf` model.
"""

import collections
import dataclasses
import json
import math
import os
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..io.hf import open_base
from ..models.generate import GREEDY, Sampling
from ..runs.evaluate import score_rows
from ..runs.generation import draw_keys, generate_rows
from ..support.checks import at_least
from ..support.progress import progress
from ..tasks import Batch, Encoded, decode, eval_batches, render_chat, tokenise
from ..training.loss import batch_logits
from ..training.method import GENERATION, OPTIONS, Params
from ..training.problem import Problem, per_seed
from .options import LmEvalOptions, load_measured

_BATCH = 32  # rows
_NEW_TOKENS = 256  # of an answer, where a task states no number
_MOST_LOGITS = 1 << 28  # numbers of a batch's logits: 1 GiB
_BETWEEN_CHECKS = (
    8  # tokens that are generated before rows are searched for the texts that end them
)
_SAMPLING = ("temperature", "top_k", "top_p")
_NEUTRAL = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
}  # arguments of generation with which nothing changes
# Contexts, continuations and the texts that they were made of.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


class _Plan(NamedTuple):
    """How answers are generated: at most so many tokens, texts that end them, and how tokens are chosen."""

    new_tokens: int
    until: list[str]
    sampling: Sampling


class LorafusionLM(TemplateLM):
    """A fused run, a base model, or modules of its pool, digitally or on simulated chips.

    Args:
      batch_size: most rows of a batch; `auto` is 32.
      max_batch_size: ignored, since no batch size is searched for.
      device: ignored, since JAX chooses the device (JAX_PLATFORMS) and the harness's default is `cuda:0`.
      trust_remote_code: ignored, since no code of a base is run.
      **options: fields of `LmEvalOptions`.

    Raises:
      ValueError: the options do not name one model, or a file cannot be used.
    """

    def __init__(
        self,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        super().__init__()
        fields = LmEvalOptions.__dataclass_fields__
        unknown = sorted(options.keys() - fields.keys())
        if unknown:
            raise ValueError(
                f"no model argument {unknown[0]}: expected some of {', '.join(fields)}, batch_size"
            )
        for name, value in options.items():
            if isinstance(value, list):  # JSON has no tuples
                options[name] = tuple(value)
            elif isinstance(value, str) and isinstance(fields[name].default, tuple):
                options[name] = (value,)  # `adapters=NAME` is one text
            elif name == "run" and value is not None:
                options[name] = Path(value)
        chosen = LmEvalOptions(**options)
        self.batch_size = _BATCH
        if batch_size is not None and not str(batch_size).startswith("auto"):
            self.batch_size = int(batch_size)
        at_least(1, batch_size=self.batch_size)
        at_least(2, max_length=chosen.max_length)
        loaded, params, base = load_measured(chosen)
        # With an axis of seeds, as runs are scored and generate.
        self._params = jax.tree.map(lambda p: p[None], params)
        # The harness would fork processes for the standard errors of perplexities, but JAX's threads may hold locks.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        self._problem = loaded.problem.replace(index=loaded.problem.index[None])
        self.tokenizer = loaded.tokenizer
        self._text_format = loaded.text_format
        config = loaded.config
        self.backend = "causal" if config.causal else "seq2seq"
        self._vocabulary = config.vocab_size
        context = config.longest_row
        if context is not None and (chosen.max_length or 0) > context:
            raise ValueError(
                f"max_length is {chosen.max_length}: expected at most the model's context of {context}"
            )
        raw: Any = types.SimpleNamespace(**({} if context else open_base(base).raw))
        self.max_length = (
            chosen.max_length or context or resolve_max_length(raw, self.tokenizer)
        )
        self._reads = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that scored texts without a context follow."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name that cached requests with a chat template are kept under."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text; those that begin a text are not added twice."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(
                string, self.tokenizer.decode([self.prefix_token_id])
            )
        tokens = tokenise(
            self.tokenizer, string, add_special_tokens=add_special_tokens
        )["input_ids"]
        if max(tokens, default=0) >= self._vocabulary:
            raise ValueError(
                f"{string[:40]!r} has the token {max(tokens)}, and the model's embedding holds {self._vocabulary}: "
                "give a base that was trained with this tokenizer"
            )
        return tokens

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the base's own template renders it; without a system message if it rejects one."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.tokenizer.name_or_path} has no chat template: leave out --apply_chat_template"
            )

        def render(messages: list[dict[str, str]]) -> str:
            return render_chat(
                self.tokenizer,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except ValueError:
            without_system = [m for m in chat_history if m["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            return render(without_system)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's context."""
        windows = []
        request_numbers = []
        for number, request in enumerate(requests):
            text_windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in text_windows:
                windows.append((None, *make_disjoint_window(window)))
                request_numbers.append(number)
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        totals = np.bincount(
            request_numbers, weights=scores, minlength=len(requests)
        ).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        rows = []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens: expected 1 to {self.max_length}, the model's "
                    "context. Take it out of the task"
                )
            # Contexts lose the first tokens that the model has no room for. The last one of a continuation is not read.
            room = self.max_length
            if self.backend == "causal":
                room += 1 - len(continuation)
            rows.append((context[-room:], continuation))
        scores = np.zeros(len(rows))
        greedy = np.zeros(len(rows), bool)
        # A context is read once for all its continuations of one token; longer ones are read in groups of like lengths.
        indices_by_context = collections.defaultdict[tuple[int, ...], list[int]](list)
        indices_by_length = collections.defaultdict(list)
        for index, (context, continuation) in enumerate(rows):
            if len(continuation) == 1:
                indices_by_context[tuple(context)].append(index)
            else:
                longest = 4 ** math.ceil(math.log(len(continuation), 4))
                indices_by_length[longest].append(index)
        with progress("log-likelihoods", len(rows)) as bar:
            groups = list(indices_by_context.values())
            first_rows = [rows[group[0]] for group in groups]
            for numbers, batch in eval_batches(
                _encoded(first_rows),
                self._rows(1),
                pad_id=self.tokenizer.pad_token_id,
            ):
                seed_batch = jax.tree.map(lambda a: a[None], batch)
                log_probs = np.asarray(
                    _next_log_probs(self._params, seed_batch, self._read(OPTIONS))
                )[0]
                most_likely = log_probs.argmax(axis=1)
                for batch_row, number in enumerate(numbers):
                    if number < 0:  # padding
                        continue
                    for index in groups[number]:
                        (token,) = rows[index][1]
                        scores[index] = log_probs[batch_row, token]
                        greedy[index] = token == most_likely[batch_row]
                        bar.update()
            for longest, indices in indices_by_length.items():
                likelihoods, likeliest = score_rows(
                    self._params,
                    lambda _: self._read(OPTIONS),
                    _encoded([rows[index] for index in indices]),
                    batch_size=self._rows(longest),
                    pad_id=self.tokenizer.pad_token_id,
                    update=bar.update,
                )
                scores[indices] = likelihoods[0]
                greedy[indices] = likeliest[0]
        answers = list(zip(scores.tolist(), greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # else a window of a text that is kept as a whole
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Return the text that follows each prompt, up to the first of its stop texts."""
        prompts_and_arguments: list[Any] = [request.args for request in requests]
        indices_by_arguments = collections.defaultdict(list)
        for index, (_, arguments) in enumerate(prompts_and_arguments):
            indices_by_arguments[json.dumps(arguments, sort_keys=True)].append(index)
        plans = [
            (self._plan(prompts_and_arguments[indices[0]][1]), indices)
            for indices in indices_by_arguments.values()
        ]
        answers = [""] * len(requests)
        with progress("answers", len(requests)) as bar:
            for plan, indices in plans:
                longest = self.max_length
                if self.backend == "causal":
                    longest -= plan.new_tokens
                prompts = []
                for index in indices:
                    prompt = self.tok_encode(prompts_and_arguments[index][0])
                    prompts.append(prompt[-longest:] or [self.prefix_token_id])
                texts = self._generated(prompts, plan, bar.update)
                for index, text in zip(indices, texts, strict=True):
                    answers[index] = postprocess_generated_text(text, plan.until, None)
        for arguments, text in zip(prompts_and_arguments, answers, strict=True):
            self.cache_hook.add_partial("generate_until", arguments, text)
        return answers

    def _plan(self, arguments: dict[str, Any]) -> _Plan:
        """Return the plan that a task's arguments of generation describe."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(arguments, _NEW_TOKENS))
        until = handle_stop_sequences(
            options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id])
        )
        new_tokens = options.pop("max_gen_toks")
        at_least(1, max_gen_toks=new_tokens)
        if self.backend == "causal" and new_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {new_tokens}: expected less than the model's context, {self.max_length}"
            )
        draws = options.pop("do_sample")
        sampling: dict[str, Any] = {
            "temperature": 1.0
        }  # of a draw by default, as in `hf`
        sampling |= {name: options.pop(name) for name in _SAMPLING if name in options}
        unsupported = [
            name for name, value in options.items() if _NEUTRAL.get(name) != value
        ]
        if unsupported:
            raise ValueError(
                f"the task generates with {unsupported[0]}, which is not supported: expected some of do_sample, "
                f"{', '.join(_SAMPLING)}, until, max_gen_toks (--gen_kwargs overrides a task's own)"
            )
        return _Plan(new_tokens, until, Sampling(**sampling) if draws else GREEDY)

    def _generated(
        self, prompts: Sequence[list[int]], plan: _Plan, update: Callable[[int], Any]
    ) -> list[str]:
        """Return the texts that follow prompts, with their stop texts and what follows those."""
        # Special tokens are not in the texts, so those that end an answer are searched for by number.
        special = set(self.tokenizer.all_special_tokens) & set(plan.until)
        ends = (
            *self._problem.config.end_ids,
            *self.tokenizer.convert_tokens_to_ids(sorted(special)),
        )
        text_format = dataclasses.replace(self._text_format, ends=ends)

        def stops(rows: list[Int[np.ndarray, " _"]]) -> list[bool]:
            texts = decode(self.tokenizer, [row.tolist() for row in rows], text_format)
            return [
                bool(np.isin(row, ends).any())
                or any(stop and stop in text for stop in plan.until)
                for row, text in zip(rows, texts, strict=True)
            ]

        generated = generate_rows(
            self._params,
            lambda _: self._read(GENERATION),
            _encoded([(prompt, []) for prompt in prompts]),
            batch_size=self._rows(1),
            max_new_tokens=plan.new_tokens,
            pad_id=self.tokenizer.pad_token_id,
            sampling=plan.sampling,
            keys=partial(draw_keys, plan.sampling, 0),
            stops=stops,
            between_stops=_BETWEEN_CHECKS,
            update=update,
        )
        return decode(self.tokenizer, generated[0], text_format)

    def _rows(self, longest: int) -> int:
        """Return how many rows a batch has at most, given the tokens whose logits are computed."""
        return min(
            self.batch_size, max(1, _MOST_LOGITS // (longest * self._vocabulary))
        )

    def _read(self, purpose: int) -> Problem:
        """Return the problem with read noise that no earlier batch had."""
        self._reads += 1
        return self._problem.read(purpose, self._reads)


def _encoded(rows: Sequence[tuple[list[int], list[int]]]) -> Encoded:
    inputs = tuple(np.array(row[0], np.int32) for row in rows)
    labels = tuple(np.array(row[1], np.int32) for row in rows)
    return Encoded(inputs, labels)


@per_seed
def _next_log_probs(
    params: Params, batch: Batch, problem: Problem
) -> Float[Array, "B V"]:
    """Return the log-probabilities of the token that follows each context."""
    logits, _ = batch_logits(params, batch, problem)
    return jax.nn.log_softmax(logits[:, 0].astype(jnp.float32))


register_model("lorafusion")(LorafusionLM)
