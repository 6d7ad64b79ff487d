"""From texts to token ids, by the base model's own tokenizer."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from .data import Example

if TYPE_CHECKING:
    import transformers


LONGEST = 2048  # tokens that a text is cut to, as in the paper's code


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids, row by row and unpadded; a row ends as the tokenizer ends it (often with EOS)."""

    inputs: tuple[Int32[np.ndarray, " _"], ...]
    labels: tuple[Int32[np.ndarray, " _"], ...]

    def __len__(self) -> int:
        return len(self.inputs)


def load_tokenizer(source: str | Path) -> "transformers.PreTrainedTokenizerBase":
    """Load a tokenizer from a Hugging Face folder or hub id.

    Raises:
      ValueError: if there is none, or transformers cannot read it.
    """
    # Imported without PyTorch, transformers warns that there are no models: none are needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # tokenizers raises a bare Exception on a file that it cannot parse
        raise ValueError(
            f"{source} gives no tokenizer: wanted a folder or hub id with config.json and tokenizer.json or "
            f"spiece.model. From transformers: {error}"
        ) from error


def encode(
    tokenizer: "transformers.PreTrainedTokenizerBase", examples: Sequence[Example], *, max_length: int = LONGEST
) -> Encoded:
    """Tokenise inputs and targets, each cut to `max_length` tokens with EOS kept (the paper's code: 2,048).

    Raises:
      ValueError: on a text that gives no tokens.
    """

    def ids(texts: list[str]) -> tuple[np.ndarray, ...]:
        rows = tokenizer(texts, max_length=max_length, truncation=True)["input_ids"] if texts else []
        for row, text in zip(rows, texts, strict=True):
            if not row:
                raise ValueError(f"the tokenizer makes no tokens of {text!r}: take the row out")
        return tuple(np.array(row, np.int32) for row in rows)

    return Encoded(
        inputs=ids([example.input for example in examples]),
        labels=ids([example.target for example in examples]),
    )
