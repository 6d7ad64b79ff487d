"""Decoder-only models: Llama, SmolLM2, Mistral, Qwen 2 to 3, Gemma 2 and 3, Phi-3."""

from ..architecture import Family
from .checkpoint import CHECKPOINT
from .config import DecoderConfig
from .gguf import GGUF
from .hf_config import MODEL_TYPES, NAMES, read_config
from .model import Decoder
from .shapes import SHAPES

__all__ = ["FAMILY", "Decoder", "DecoderConfig"]

FAMILY = Family(
    name="decoder",
    members="Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text) or Phi-3",
    model_types=MODEL_TYPES,
    names=NAMES,
    config=DecoderConfig,
    read_config=read_config,
    model=Decoder,
    checkpoint=CHECKPOINT,
    gguf=GGUF,
    task_type="CAUSAL_LM",
    shapes=SHAPES,
)
