"""Sizes of well-known decoder-only models, for counts and plans without weights.

Source: each model's config.json on the Hugging Face hub. Tokens of the end and of padding are not part of a shape.
"""

from typing import Any

from .config import DecoderConfig, Rope


def _shape(
    model_type: str,
    d_model: int,
    d_ff: int,
    num_layers: int,
    heads: tuple[int, int, int],
    vocab_size: int,
    context: int,
    theta: float,
    **others: Any,
) -> DecoderConfig:
    """Return a shape; `heads` are those of queries, those of keys and values, and their width."""
    num_heads, num_kv_heads, width = heads
    rope = Rope(theta=theta, width=width, context=context)
    return DecoderConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_head=width,
        context=context,
        **{"eps": 1e-5, "rope": rope, "query_scale": width**-0.5} | others,
    )


def _llama(d_model: int, d_ff: int, num_layers: int, heads: int, d_head: int, factor: float, tied: bool):
    rope = Rope(theta=5e5, width=d_head, scaling="llama3", factor=factor, context=8_192)
    sizes = (d_model, d_ff, num_layers, (heads, 8, d_head), 128_256, 131_072, 5e5)
    return _shape("llama", *sizes, rope=rope, tied=tied)


def _gemma(model_type: str, d_model: int, d_ff: int, heads: tuple[int, int, int], *others: Any, **fields: Any):
    norms = {"post_norms": True, "norm_offset": 1.0, "embedding_scale": d_model**0.5}
    fields |= {"eps": 1e-6, "tied": True, "activation": "gelu_tanh"} | norms
    return _shape(model_type, d_model, d_ff, 26, heads, *others, **fields)


_BIASED = ("q_proj", "k_proj", "v_proj")
_GEMMA_2 = {
    "window": 4096,
    "sliding": tuple(layer % 2 == 0 for layer in range(26)),
    "attention_cap": 50.0,
    "logit_cap": 30.0,
}
_GEMMA_3 = {
    "local_rope": Rope(theta=1e4, width=256, context=32_768),
    "window": 512,
    "sliding": tuple(layer % 6 != 5 for layer in range(26)),
    "qk_norm": True,
}

# model_type, d_model, d_ff, layers, (heads, their width), vocabulary, context, base of the rotary frequencies
SHAPES = {
    "smollm2-135m": _shape("llama", 576, 1536, 30, (9, 3, 64), 49_152, 8_192, 1e5, tied=True),
    "smollm2-360m": _shape("llama", 960, 2560, 32, (15, 5, 64), 49_152, 8_192, 1e5, tied=True),
    "smollm2-1.7b": _shape("llama", 2048, 8192, 24, (32, 32, 64), 49_152, 8_192, 1.3e5, tied=True),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, factor=32.0, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, factor=32.0, tied=True),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 128, factor=8.0, tied=False),
    "mistral-7b": _shape("mistral", 4096, 14_336, 32, (32, 8, 128), 32_768, 32_768, 1e6),
    "qwen2.5-0.5b": _shape(
        "qwen2", 896, 4864, 24, (14, 2, 64), 151_936, 32_768, 1e6, eps=1e-6, biased=_BIASED, tied=True
    ),
    "qwen2.5-7b": _shape("qwen2", 3584, 18_944, 28, (28, 4, 128), 152_064, 131_072, 1e6, eps=1e-6, biased=_BIASED),
    "qwen3-0.6b": _shape(
        "qwen3", 1024, 3072, 28, (16, 8, 128), 151_936, 40_960, 1e6, eps=1e-6, qk_norm=True, tied=True
    ),
    "qwen3-8b": _shape("qwen3", 4096, 12_288, 36, (32, 8, 128), 151_936, 40_960, 1e6, eps=1e-6, qk_norm=True),
    "gemma-2-2b": _gemma("gemma2", 2304, 9216, (8, 4, 256), 256_000, 8_192, 1e4, **_GEMMA_2),
    "gemma-3-1b": _gemma("gemma3_text", 1152, 6912, (4, 1, 256), 262_144, 32_768, 1e6, **_GEMMA_3),
    "phi-3-mini": _shape(
        "phi3", 3072, 8192, 32, (32, 32, 96), 32_064, 4096, 1e4, fused=True, window=2047, sliding=(True,) * 32
    ),
}
