"""Text of several genres that packages ship: what preparations are fitted to, and what they are measured on.

The files lie in source distributions on PyPI: brotli 1.2.1 (tests/testdata, from the Canterbury corpus) and gensim
4.4.0 (gensim/test/test_data, news of the Australian Broadcasting Corporation). Documentation is that of Python.
"""

import hashlib
import pydoc_data.topics
from pathlib import Path

from .smollm2 import EXAMPLES

UNSEEN = ("fiction", "proceedings", "dialogue", "documentation")
_FILES = {
    "fiction": "alice29.txt",
    "proceedings": "lcet10.txt",
    "dialogue": "asyoulik.txt",
}
_NEWS = "lee_background.cor"
_FITTED_ARTICLES = 110  # with the shipped texts, 33,000 tokens of SmolLM2


def fitted_text(folder: Path) -> str:
    """Return what may be fitted to: the shipped texts, and as many articles between any two of them."""
    shipped = [file.read_text() for file in sorted((EXAMPLES / "text").glob("*.txt"))]
    articles = (folder / _NEWS).read_text().splitlines()[:_FITTED_ARTICLES]
    each = _FITTED_ARTICLES // len(shipped)
    parts = [
        [text, *articles[n * each : (n + 1) * each]] for n, text in enumerate(shipped)
    ]
    return "\n".join(text for part in parts for text in part)


def digest(folder: Path) -> str:
    """Return the SHA-256 of the texts of all genres; documentation differs between versions of Python."""
    texts = [measured_text(genre, folder) for genre in UNSEEN]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def measured_text(genre: str, folder: Path) -> str:
    """Return the second half of a genre's text, without headings."""
    if genre == "documentation":
        text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    else:
        text = (folder / _FILES[genre]).read_text(errors="replace")
    return text[len(text) // 2 :]
