"""The tokenizer that a GGUF file describes, built from its tokens, merges or scores, and its pre-tokenizer's name.

Source: llama.cpp's src/llama-vocab.cpp for what the names mean; Hugging Face's converters for the parts they become.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..fast_tokenizer import FastTokenizer

if TYPE_CHECKING:
    import tokenizers
    import transformers


class _Splitting(NamedTuple):
    """How a byte-level tokenizer splits texts before merging."""

    patterns: tuple[
        str, ...
    ]  # regular expressions, applied in turn; texts between matches are pieces too
    adds_bos: bool = False  # if true, texts begin with BOS by default
    whole_words: bool = False  # if true, a piece that is a token is not split, even if no merges make it
    normalised: bool = False  # if true, texts are normalised to Unicode's NFC first


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _Splitting((_WORDS + r"\p{N}{1,3}" + _REST,), adds_bos=True, whole_words=True)
_QWEN2 = _Splitting((_WORDS + r"\p{N}" + _REST,), normalised=True)
_QWEN35 = _QWEN2._replace(
    patterns=(
        _WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+")
        + r"\p{N}"
        + _REST.replace(r"\p{L}", r"\p{L}\p{M}"),
    )
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By tokenizer.ggml.pre.
_SPLITTINGS = {
    "default": _Splitting(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "gpt-2": _Splitting((_GPT2,)),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _Splitting(_LLAMA3.patterns),  # Phi-4
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _QWEN35,
    "tekken": _Splitting((_TEKKEN,), adds_bos=True, whole_words=True),  # Mistral Nemo
}
# tokenizer.ggml.token_type
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
_BYTE = 6
_SPACE = "▁"
_AGAIN = "fetch the file again"
# Texts whose ids tell tokenizers apart.
_CHECKS = (
    "He's 1234 won'T   x!?\n\ny",
    " two  spaces\r\n z ",
    "été e\u0301 東京 🙂\t{a_b}<|c|>",
    "$1,000.50 (ok) ~~ x²½ १२३ नमस्ते HTTPServer camelCase won’t/n",
)


def build_tokenizer(metadata: Mapping[str, Any], base: str = "") -> FastTokenizer:
    """Return the tokenizer, with the file's special tokens and chat template; ValueError if it is not implemented.

    `base` is the base's name, for messages. A file without a token for padding gets its end token, because padding is
    masked by its position.
    """
    metadata = {
        key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()
    }
    tokens = metadata.get("tokens", [])
    model = metadata.get("model")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise ValueError(
            f"tokenizer.ggml.tokens holds {len(tokens)} tokens, {len(vocabulary)} of them different: {_AGAIN}"
        )
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}, which is not implemented: expected gpt2 or llama"
        )
    kinds = metadata.get("token_type", [_NORMAL] * len(tokens))
    for key, numbers in {
        "token_type": kinds,
        "scores": metadata.get("scores", kinds),
    }.items():
        if len(numbers) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.{key} holds {len(numbers)} numbers, and tokens {len(tokens)} tokens: {_AGAIN}"
            )
    special: dict[str, str | None] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        number = metadata.get(f"{name}_token_id")
        if number is not None and number >= len(tokens):
            raise ValueError(
                f"the {name} token is {number}, and tokenizer.ggml.tokens holds {len(tokens)}: {_AGAIN}"
            )
        special[name] = None if number is None else tokens[number]
    try:
        return _built(metadata, vocabulary, kinds, special, base)
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # tokenizers raises bare ones, on merges of unknown tokens for example
        raise ValueError(
            f"tokenizer.ggml.tokens and its merges give no tokenizer ({error}): {_AGAIN}"
        ) from error


def tokenizer_metadata(
    tokenizer: "transformers.PreTrainedTokenizerBase", rows: int
) -> dict[str, Any]:
    """Return the keys of a file that describe a tokenizer, the inverse of `build_tokenizer`.

    Args:
      tokenizer: the tokenizer.
      rows: rows of the embedding; those without a token get unused ones.

    Raises:
      ValueError: a file cannot describe a tokenizer that gives the same ids.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if fast is None else json.loads(fast.to_str())["model"]
    if model.get("type") != "BPE" or len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer is not one of byte-pair merges with at most {rows:,} tokens"
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        tokens[number] = token
        kinds[number] = _NORMAL
        if model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kinds[number] = _BYTE
    for number, token in tokenizer.added_tokens_decoder.items():
        kinds[number] = _CONTROL if token.special else _USER_DEFINED
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    keys = {
        f"{name}_token_id": number for name, number in ids.items() if number is not None
    }
    around = tokenizer("a")["input_ids"]
    keys |= {"tokens": tokens, "token_type": kinds}
    keys |= {
        "add_bos_token": around[0] == ids["bos"],
        "add_eos_token": around[-1] == ids["eos"],
    }
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in model["merges"]
    ]
    if model["byte_fallback"]:
        ranks = {
            merge.replace(" ", ""): -float(rank)
            for rank, merge in reversed([*enumerate(merges, 1)])
        }
        scores = [ranks.get(token, 0.0) for token in tokens]
        choices = [
            {"model": "llama", "scores": scores, "add_space_prefix": adds}
            for adds in (True, False)
        ]
    else:
        whole_words = model.get("ignore_merges", False)
        names = [
            name
            for name, splitting in _SPLITTINGS.items()
            if splitting.whole_words == whole_words
        ]
        choices = [{"model": "gpt2", "merges": merges, "pre": name} for name in names]
    template = tokenizer.chat_template
    further = {"tokenizer.chat_template": template} if isinstance(template, str) else {}
    for choice in choices:
        metadata = {
            f"tokenizer.ggml.{key}": value for key, value in (keys | choice).items()
        } | further
        again = build_tokenizer(metadata)
        if all(_pieces(again, text) == _pieces(tokenizer, text) for text in _CHECKS):
            return metadata
    raise ValueError(
        "a GGUF file cannot describe a tokenizer that gives the same ids as the base's"
    )


def _pieces(
    tokenizer: Any, text: str
) -> tuple[list[int], list[tuple[str, tuple[int, int]]]]:
    """Return the ids of a text, and of byte-level merges the pieces that it is split into before merging."""
    if _SPACE not in tokenizer.get_vocab():
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
    else:
        splitter = None
    return tokenizer(text)["input_ids"], splitter.pre_tokenize_str(
        text
    ) if splitter else []


def _built(
    metadata: Mapping[str, Any],
    vocabulary: dict[str, int],
    kinds: list[int],
    special_tokens: Mapping[str, str | None],
    base: str,
) -> FastTokenizer:
    from tokenizers import AddedToken, processors

    if metadata["model"] == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, vocabulary)
    else:
        tokenizer = _sentence_piece(
            metadata, vocabulary, kinds, special_tokens["unknown"]
        )
        adds_bos = True
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, token_kind in zip(vocabulary, kinds, strict=True)
                if token_kind == kind
            ]
        )
    bos = special_tokens["bos"]
    eos = special_tokens["eos"]
    first = [bos] if bos and metadata.get("add_bos_token", adds_bos) else []
    last = [eos] if eos and metadata.get("add_eos_token", False) else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[
                *first,
                "$A",
                *last,
                *(f"{token}:1" for token in first),
                "$B:1",
                *(f"{token}:1" for token in last),
            ],
            special_tokens=[
                (token, vocabulary[token]) for token in dict.fromkeys((*first, *last))
            ],
        )
    special = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": special_tokens["unknown"],
        "pad_token": special_tokens["padding"] or eos,
    }
    template = metadata.get("tokenizer.chat_template")

    def whole() -> "transformers.PreTrainedTokenizerFast":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **special,
            chat_template=template,
            clean_up_tokenization_spaces=False,
        )

    return FastTokenizer(tokenizer, special, template, base, whole)


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int]
) -> tuple["tokenizers.Tokenizer", bool]:
    """Return byte-pair merges on bytes that are written as letters, and whether texts begin with BOS."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    name = metadata.get("pre", "default")
    if name not in _SPLITTINGS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, not implemented: give one of {', '.join(_SPLITTINGS)}"
        )
    splitting = _SPLITTINGS[name]
    if "merges" not in metadata:
        raise ValueError(f"the metadata lack tokenizer.ggml.merges: {_AGAIN}")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, _pairs(metadata["merges"]), ignore_merges=splitting.whole_words
        )
    )
    if splitting.normalised:
        tokenizer.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in splitting.patterns
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.adds_bos


def _sentence_piece(
    metadata: Mapping[str, Any],
    vocabulary: dict[str, int],
    kinds: list[int],
    unknown: str | None,
) -> "tokenizers.Tokenizer":
    """Return SentencePiece's byte-pair merges on characters, with bytes for characters that are not tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if "merges" in metadata:
        merges = _pairs(metadata["merges"])
    elif "scores" in metadata:
        merges = _merges_of_scores(vocabulary, metadata["scores"], kinds)
    else:
        raise ValueError(
            f"the metadata lack tokenizer.ggml.scores, and merges instead of them: {_AGAIN}"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    prefixed = metadata.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    if prefixed:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), spaces]
        )
    else:
        tokenizer.normalizer = spaces
    words = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*words, decoders.Strip(" ", 1, 0)] if prefixed else words
    )
    return tokenizer


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in merges]
    return [(left, right) for left, _, right in pairs]


def _merges_of_scores(
    vocabulary: dict[str, int], scores: list[float], kinds: list[int]
) -> list[tuple[str, str]]:
    """Return the pairs of normal tokens that form a third one, in SentencePiece's order: the highest score first."""
    normal = {
        token: scores[number]
        for token, number in vocabulary.items()
        if kinds[number] == _NORMAL
    }
    merges = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]
