"""Bounds of a tokenizer's files: added tokens, which cost time and memory to load, and steps that lengthen texts."""

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..files import FileError

if TYPE_CHECKING:
    import transformers

    from .fast_tokenizer import FastTokenizer

MOST_ADDED = 100_000  # added tokens; each takes 0.1 ms and 4 kB
MOST_GROWTH = 1_000  # bytes made from one byte of a text
MOST_STEPS = 100  # steps of a normaliser, a pre-tokenizer, a post-processor or a decoder

_FIX = "give a base with a sound tokenizer"
_OF_PYTHON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class _Added(msgspec.Struct):
    """The part of tokenizer.json that is checked before it is loaded; the vocabulary is skipped."""

    added_tokens: list[msgspec.Raw] | None = None


def check_added(folder: Path) -> None:
    """Raise a FileError if a tokenizer's files add too many tokens."""
    if (path := folder / "tokenizer.json").is_file():
        try:
            added = msgspec.json.decode(path.read_bytes(), type=_Added).added_tokens or []
        except (ValueError, RecursionError) as error:
            raise FileError(path, got=f"not a tokenizer ({error})", fix=_FIX) from None
        _check_count(path, "added_tokens", len(added))
    for path in (folder / name for name in _OF_PYTHON):
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else {}
        except (ValueError, RecursionError):  # an error of transformers, too
            continue
        if isinstance(found, dict):
            _check_count(path, "its fields", len(found))
            for field, value in found.items():
                if isinstance(value, dict | list):
                    _check_count(path, field, len(value))
            if isinstance(number := found.get("extra_ids"), int | float):
                _check_count(path, "extra_ids", number)


def _check_count(path: Path, field: str, count: int | float) -> None:
    if count > MOST_ADDED:
        raise FileError(path, field=field, got=f"{count:,}", expected=f"at most {MOST_ADDED:,}", fix=_FIX)


def check_growth(tokenizer: "FastTokenizer | transformers.PreTrainedTokenizerBase") -> None:
    """Raise a ValueError if the steps of a tokenizer may lengthen texts without a bound."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    parts = {
        "normalizer": backend.normalizer,
        "pre_tokenizer": backend.pre_tokenizer,
        "post_processor": backend.post_processor,
        "decoding": backend.decoder,
    }
    for name, part in parts.items():
        steps = [] if part is None else _steps(json.loads(part.__getstate__()))
        growth = math.prod(map(_growth, steps))
        if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
            raise ValueError(
                f"its {name} has {len(steps):,} steps, which may make texts {growth:.0f} times as long: expected at "
                f"most {MOST_STEPS} steps and {MOST_GROWTH:,} times"
            )


def _steps(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = [part.get(name, []) for name in ("normalizers", "pretokenizers", "processors", "decoders")]
    of_template = [{"type": "Piece"} for piece in part.get("single", []) if part["type"] == "TemplateProcessing"]
    return [part, *of_template, *(step for parts in inner for each in parts for step in _steps(each))]


def _growth(step: Mapping[str, Any]) -> float:
    """Return the most bytes that a step makes from one byte; 1 for steps without effect when repeated."""
    if step["type"] == "Replace":
        content, pattern = len(step["content"].encode()), step["pattern"].get("String", "")
        return max(1.0, content / len(pattern.encode())) if pattern else 1.0 + content  # a regex may match nothing
    if step["type"] == "Precompiled":
        # A trie, behind its size, and texts that end in a NUL.
        charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
        return 1.0 + max(map(len, texts.split(b"\0")))
    return {"ByteLevel": 2.0, "BertNormalizer": 3.0, "Metaspace": 4.0}.get(step["type"], 1.0)
