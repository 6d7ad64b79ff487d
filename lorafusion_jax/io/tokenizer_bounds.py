"""Bounds of a tokenizer's files: added tokens, which cost time and memory to load, and steps that lengthen texts."""

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.checks import panics
from ..support.reading import FileError, named, parse_json
from ..support.text import shown

if TYPE_CHECKING:
    import transformers

MOST_ADDED = 100_000  # added tokens; each takes 0.1 ms and 4 kB
MOST_GROWTH = 1_000  # bytes made from one byte of a text
MOST_STEPS = 100  # steps of a normaliser, a pre-tokenizer, a post-processor or a decoder
MOST_CHARACTERS = 1_000  # of a word that WordPiece divides, in a time that grows by the cube of its length

_FIX = "give a base with a sound tokenizer"
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Most bytes from one byte (forms: unicode.org/faq/normalization.html), with the space that steps put before a piece.
_GROWTH = {"NFC": 3.0, "NFD": 3.0, "NFKC": 11.0, "NFKD": 11.0, "Lowercase": 1.5, "BertNormalizer": 3.0}
_GROWTH |= {"ByteLevel": 4.0, "Metaspace": 5.0, "WordPiece": 2.0}
_SHORT = (*map(chr, range(1, 0x800)), "\r\n")  # what is replaced as a whole, and has one or two bytes
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_files(folder: Path) -> None:
    """Raise a FileError if a tokenizer's files are not JSON, add too many tokens, or have steps or a model to refuse.

    Loading normalises the added tokens, and ends the process where tokenizers fails in some ways.
    """
    for path in (folder / name for name in _FILES):
        try:
            content = parse_json(path.read_bytes()) if path.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise FileError(path, got=f"not a tokenizer ({error})", fix=_FIX) from None
        if isinstance(content, dict):
            _check_count(path, "its fields", len(content))
            for field, value in content.items():
                if isinstance(value, dict | list):
                    _check_count(path, field, len(value))
            if isinstance(number := content.get("extra_ids"), int | float):
                _check_count(path, "extra_ids", number)
            if path.name == "tokenizer.json":
                with named(path):
                    _check_tokenizer(content)


def _check_count(path: Path | str, field: str, count: int | float, most: int = MOST_ADDED) -> None:
    if count > most:
        raise FileError(path, field=field, got=f"{count:,}", expected=f"at most {most:,}", fix=_FIX)


def check_growth(tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
    """Raise a ValueError if the steps of a tokenizer may lengthen texts without a bound."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = {name: getattr(backend, name) for name in _PARTS}
        _check_steps({name: part and json.loads(part.__getstate__()) for name, part in parts.items()})


def _check_tokenizer(content: Mapping[str, Any]) -> None:
    """Raise a FileError for a tokenizer.json that would stop the process, or take long."""
    try:
        _check_steps(content)
        model = content.get("model") or {}
        length = "max_input_chars_per_word"
        _check_count("", f"model.{length}", model.get(length, 0), MOST_CHARACTERS)
        prefix: Any = model.get("continuing_subword_prefix")
        for merge in model.get("merges", []) if prefix else ():
            second = merge.partition(" ")[2] if isinstance(merge, str) else merge[1]
            if not second.startswith(prefix):
                got = f"a merge with {shown(second)}, which lacks the model's continuing_subword_prefix"
                raise FileError("", got=got, fix=_FIX)
    except (AttributeError, LookupError, RecursionError, TypeError) as error:
        raise FileError("", got=f"not a tokenizer ({error!r})", fix=_FIX) from None


def _check_steps(parts: Mapping[str, Any]) -> None:
    for name in _PARTS:
        steps = _steps(parts[name]) if parts.get(name) else []
        growth = math.prod(map(_growth, steps[:MOST_STEPS]))
        if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
            raise ValueError(
                f"its {name} has {len(steps):,} steps, which may make texts {growth:.0f} times as long: expected at "
                f"most {MOST_STEPS} steps and {MOST_GROWTH:,} times"
            )
        if any(step["type"] == "Strip" and step.get("stop") for step in steps):
            raise ValueError("its decoder strips the ends of tokens, which fails on empty ones: expected a stop of 0")


def _steps(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = [part.get(name, []) for name in ("normalizers", "pretokenizers", "processors", "decoders")]
    return [part, *(step for parts in inner for each in parts for step in _steps(each))]


def _growth(step: Mapping[str, Any]) -> float:
    """Return the most bytes that a step makes from one byte, or tokens from one token."""
    kind = step["type"]
    if kind == "Replace":
        content, pattern = len(step["content"].encode()), step["pattern"].get("String", "")
        return max(1.0, content / len(pattern.encode())) if pattern else 1.0 + content  # a regex may match nothing
    if kind == "Prepend":
        return 1.0 + len(step["prepend"].encode())
    if kind == "Precompiled":
        return _growth_of_map(base64.b64decode(step["precompiled_charsmap"] or ""))
    if kind == "TemplateProcessing":
        ids = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        pieces = [*step["single"], *step["pair"]]
        return float(sum(ids[p["SpecialToken"]["id"]] if "SpecialToken" in p else 1 for p in pieces))
    if kind in ("BPEDecoder", "CTC"):  # an empty text is found between all characters
        return 1.0 if step["suffix" if kind == "BPEDecoder" else "word_delimiter_token"] else 2.0
    return _GROWTH.get(kind, 1.0)


def _growth_of_map(charsmap: bytes) -> float:
    """Return the growth by a map of characters: a trie, behind its size, and texts that end in a NUL."""
    from tokenizers.normalizers import Precompiled

    start = 4 + int.from_bytes(charsmap[:4], "little")
    if start > len(charsmap):
        raise ValueError(f"its precompiled_charsmap has {len(charsmap)} bytes, and claims {start:,}: {_FIX}")
    longest = max(map(len, charsmap[start:].split(b"\0")))
    with panics():
        replace = Precompiled(charsmap).normalize_str
        short = [replace(text).encode() for text in _SHORT]
    return max(1.0, longest / 3, *(len(new) / len(old.encode()) for new, old in zip(short, _SHORT, strict=True)))
