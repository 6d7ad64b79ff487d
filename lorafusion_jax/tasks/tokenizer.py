"""From texts to token ids and back, by the base model's own tokenizer."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Int32

from ..support.checks import panics
from .data import Example

# transformers' tokenizer, or one with the methods that are called here.
Tokenizer: TypeAlias = Any

LONGEST = 2048  # tokens that a text is cut to, as in the paper's code
_SHOWN = 40  # characters of a text in a message
_NO_TOKENS = "the tokenizer makes no tokens of {text!r}: take the row out"


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """Rule that makes tokens of an input and its target: two separate texts, which the tokenizer ends, or one text.

    Attributes:
      ends: tokens that end an answer, where it continues its prompt as one text. Targets get the first.
      chat: the tokenizer's chat template renders the prompt, with the input as the user's message, and the answer.
      context: most tokens of a prompt and its answer together; None for no limit.
      vocabulary: number of rows of the model's embedding, which tokenizers may exceed; None for no limit.
    """

    ends: tuple[int, ...] = ()
    chat: bool = False
    context: int | None = None
    vocabulary: int | None = None


SEPARATE_TEXTS = TextFormat()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids, row by row and unpadded; inputs and labels end according to `TextFormat`."""

    inputs: tuple[Int32[np.ndarray, " _"], ...]
    labels: tuple[Int32[np.ndarray, " _"], ...]

    def __len__(self) -> int:
        return len(self.inputs)


def encode(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    text_format: TextFormat = SEPARATE_TEXTS,
    *,
    max_length: int = LONGEST,
    new_tokens: int = 0,
) -> Encoded:
    """Tokenise inputs and targets.

    Two separate texts are each cut to `max_length` tokens with EOS kept (the paper's code: 2,048).

    One text is never cut. Its input is the prompt as the tokenizer makes it, with the token that begins a text, if the
    tokenizer has one, and without one that ends it. Its labels are the tokens of the answer up to an end token:

    * A space is put between a prompt that does not end in white space and an answer that does not begin with it, as
      lm-evaluation-harness does with its `target_delimiter`.
    * The answer's tokens are those that follow the prompt's in the whole text. Where tokens would merge across the
      border, the answer is tokenised alone.
    * A chat template renders the prompt and the whole. Text behind the end token is left out.

    Args:
      tokenizer: the base model's.
      examples: texts; an empty target makes a prompt alone.
      text_format: rule for the tokens.
      max_length: most tokens of each of two separate texts.
      new_tokens: most tokens that will be generated after every prompt.

    Raises:
      ValueError: on a text that gives no tokens or one that the model lacks, a row that is longer than the model's
        context, and a chat template that fails or does not render the answer as a continuation of the prompt.
    """
    if text_format.ends:
        encoded = _continued(tokenizer, examples, text_format)
    else:
        parts = (
            [example.input for example in examples],
            [example.target for example in examples],
        )
        encoded = Encoded(*(_separate(tokenizer, texts, max_length) for texts in parts))
    _check_rows(tokenizer, encoded, examples, text_format, new_tokens)
    return encoded


def _separate(
    tokenizer: Tokenizer, texts: list[str], max_length: int
) -> tuple[np.ndarray, ...]:
    if texts:
        rows = tokenise(tokenizer, texts, max_length=max_length, truncation=True)[
            "input_ids"
        ]
    else:
        rows = []
    for row, text in zip(rows, texts, strict=True):
        if not row:
            raise ValueError(_NO_TOKENS.format(text=text))
    return tuple(np.array(row, np.int32) for row in rows)


def decode(
    tokenizer: Tokenizer,
    rows: list[list[int]] | Int[np.ndarray, "rows T"],
    text_format: TextFormat,
) -> list[str]:
    """Return the texts of generated tokens, without special tokens and without what follows an end token."""
    if text_format.ends:
        rows = [[*row[: _end(row, text_format.ends)]] for row in rows]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def stream_text(
    tokenizer: Tokenizer, tokens: Iterable[int], text_format: TextFormat
) -> Iterator[str]:
    """Yield the text of generated tokens, piece by piece as they come; together the pieces are `decode`'s text.

    A piece waits until no later token can change it: a character for all of its bytes, and a word for the space behind
    it where the tokenizer removes spaces before punctuation.
    """
    row: list[int] = []
    yielded = ""
    for token in tokens:
        row.append(token)
        text = decode(tokenizer, [row], text_format)[0].rstrip(
            "\N{REPLACEMENT CHARACTER}"
        )
        if tokenizer.clean_up_tokenization_spaces:
            text = text[: max(text.rfind(" "), 0)]
        if len(text) > len(yielded):
            yield text[len(yielded) :]
            yielded = text
    if rest := decode(tokenizer, [row], text_format)[0][len(yielded) :]:
        yield rest


def _continued(
    tokenizer: Tokenizer, examples: Sequence[Example], text_format: TextFormat
) -> Encoded:
    texts = [_rendered(tokenizer, example, text_format) for example in examples]
    # A chat template has written the special tokens already.
    special = not text_format.chat
    prompts = _open_ended(tokenizer, [prompt for prompt, _ in texts], special=special)
    wholes = _open_ended(
        tokenizer, [full_text for _, full_text in texts], special=special
    )
    inputs = []
    labels = []
    for (prompt, full_text), start, ids in zip(texts, prompts, wholes, strict=True):
        answer = ids[len(start) :]
        if ids[: len(start)] != start:
            answer = tokenise(
                tokenizer, full_text[len(prompt) :], add_special_tokens=False
            )["input_ids"]
        for text, tokens in ((prompt, start), (full_text[len(prompt) :], answer)):
            if not tokens and (text or tokens is start):
                raise ValueError(_NO_TOKENS.format(text=text))
        end = _end(answer, text_format.ends)
        answer = [*answer[:end], *(answer[end : end + 1] or text_format.ends[:1])]
        inputs.append(np.array(start, np.int32))
        labels.append(np.array(answer, np.int32))
    return Encoded(tuple(inputs), tuple(labels))


def _end(row: Sequence[int] | Int[np.ndarray, " T"], ends: tuple[int, ...]) -> int:
    """Return the place of the first end token, or the length of a row without one."""
    return next((place for place, token in enumerate(row) if token in ends), len(row))


def _rendered(
    tokenizer: Tokenizer, example: Example, text_format: TextFormat
) -> tuple[str, str]:
    """Return the prompt, and the whole text of prompt and answer."""
    if not text_format.chat:
        spaced = (
            not example.input[-1:].isspace()
            and example.target
            and not example.target[0].isspace()
        )
        return example.input, f"{example.input}{' ' if spaced else ''}{example.target}"
    turns = [*example.history, ("user", example.input), ("assistant", example.target)]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
    if not example.target:
        return prompt, prompt
    full_text = render_chat(tokenizer, messages, add_generation_prompt=False)
    if not full_text.startswith(prompt):
        raise ValueError(
            f"the chat template renders {_beginning(example.input)} with its answer as {full_text!r}, which does "
            f"not begin with the prompt for the answer, {prompt!r}: leave out --chat, and write the format into "
            "--prompt"
        )
    return prompt, full_text


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> str:
    """Return the text of a conversation, as `tokenizer.apply_chat_template` renders it, in jinja2's sandbox.

    Raises a ValueError for a template that fails.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    special = tokenizer.special_tokens_map
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **special,
        )
    except Exception as error:  # a template may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template rejects messages of {roles}: {error}: leave out --chat"
        ) from error
    return rendered[0][0]


def tokenise(tokenizer: Tokenizer, texts: str | list[str], **how: Any) -> Any:
    """Return `tokenizer(texts, **how)`; raises a ValueError that names the base for whatever it fails with."""
    try:
        with panics():
            return tokenizer(texts, **how)
    except (
        Exception
    ) as error:  # tokenizers raises a bare one, such as for a missing unknown token
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} rejects a text ({error}): give a base with a sound tokenizer"
        ) from error


def _open_ended(
    tokenizer: Tokenizer, texts: list[str], *, special: bool
) -> list[list[int]]:
    """Return the tokens of texts that are continued: with the tokenizer's first special tokens, without its last."""
    if not texts:
        return []
    encoded = tokenise(
        tokenizer,
        texts,
        add_special_tokens=special,
        return_special_tokens_mask=True,
        verbose=False,
    )
    rows = []
    for row, added in zip(
        encoded["input_ids"], encoded["special_tokens_mask"], strict=True
    ):
        length = len(row)
        while special and length and added[length - 1]:
            length -= 1
        rows.append(row[:length])
    return rows


def _check_rows(
    tokenizer: Tokenizer,
    encoded: Encoded,
    examples: Sequence[Example],
    text_format: TextFormat,
    new_tokens: int,
) -> None:
    """Raise ValueError for the first row that the model's context does not hold, or its embedding: logits were NaN."""
    context = text_format.context if text_format.ends else None
    vocabulary = text_format.vocabulary
    for row, (prompt, answer) in enumerate(
        zip(encoded.inputs, encoded.labels, strict=True)
    ):
        where = f"row {row + 1}, {_beginning(examples[row].input)}, has"
        length = len(prompt) + max(len(answer), new_tokens)
        if context is not None and length > context:
            raise ValueError(
                f"{where} {len(prompt)} tokens, and {length} with its answer of up to {length - len(prompt)}: the "
                f"model's context holds {context}. Shorten the row or take it out, give fewer examples in the prompt "
                "(--shots), or shorten answers (--max-new-tokens)"
            )
        largest = max(
            (int(ids.max()) for ids in (prompt, answer) if ids.size), default=0
        )
        if vocabulary is not None and largest >= vocabulary:
            raise ValueError(
                f"{where} the token {tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}, and the model's "
                f"embedding holds {vocabulary}: take it out of the row, or give a base that was trained with this "
                "tokenizer"
            )


def _beginning(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
