"""Text of several genres that nothing is fitted to.

The files lie in the source distribution of brotli 1.2.1 on PyPI (tests/testdata, from the Canterbury corpus).
Documentation is that of Python.
"""

import hashlib
import pydoc_data.topics
from pathlib import Path

UNSEEN = ("fiction", "proceedings", "dialogue", "documentation")
_FILES = {
    "fiction": "alice29.txt",
    "proceedings": "lcet10.txt",
    "dialogue": "asyoulik.txt",
}


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
