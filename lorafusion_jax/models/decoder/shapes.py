"""Sizes of well-known decoder-only models, for counts and plans without weights.

Source: each model's config.json on the Hugging Face hub. Tokens of the end and of padding are not part of a shape.
"""

from typing import Any

from .config import DecoderConfig, Rope


def _shape(
    model_type: str,
    *,
    vocab_size: int,
    d_model: int,
    d_ff: int,
    num_layers: int,
    heads: tuple[int, int],
    d_head: int,
    context: int,
    theta: float,
    eps: float,
    llama3: float | None = None,
    **others: Any,
) -> DecoderConfig:
    """Return a shape; contexts are `llama3` times as long as 8,192 tokens by Llama 3's scaling, if it is given."""
    rope = Rope(theta=theta, width=d_head, context=context)
    if llama3:
        rope = Rope(theta=theta, width=d_head, scaling="llama3", factor=llama3, context=8_192)
    fields = {"query_scale": d_head**-0.5, "rope": rope} | others
    return DecoderConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        d_head=d_head,
        context=context,
        eps=eps,
        **fields,
    )


def _gemma(model_type: str, *, d_model: int, **others: Any) -> DecoderConfig:
    return _shape(
        model_type,
        d_model=d_model,
        num_layers=26,
        d_head=256,
        eps=1e-6,
        tied=True,
        activation="gelu_tanh",
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=d_model**0.5,
        **others,
    )


_SMOLLM = {"vocab_size": 49_152, "d_head": 64, "context": 8_192, "eps": 1e-5, "tied": True}
_LLAMA = {"vocab_size": 128_256, "context": 131_072, "theta": 500_000.0, "eps": 1e-5}
_QWEN2 = {"theta": 1e6, "eps": 1e-6, "biased": ("q_proj", "k_proj", "v_proj")}
_QWEN3 = {"vocab_size": 151_936, "d_head": 128, "context": 40_960, "theta": 1e6, "eps": 1e-6, "qk_norm": True}

SHAPES = {
    "smollm2-135m": _shape("llama", d_model=576, d_ff=1536, num_layers=30, heads=(9, 3), theta=1e5, **_SMOLLM),
    "smollm2-360m": _shape("llama", d_model=960, d_ff=2560, num_layers=32, heads=(15, 5), theta=1e5, **_SMOLLM),
    "smollm2-1.7b": _shape("llama", d_model=2048, d_ff=8192, num_layers=24, heads=(32, 32), theta=1.3e5, **_SMOLLM),
    "llama-3.2-1b": _shape(
        "llama", d_model=2048, d_ff=8192, num_layers=16, heads=(32, 8), d_head=64, llama3=32.0, tied=True, **_LLAMA
    ),
    "llama-3.2-3b": _shape(
        "llama", d_model=3072, d_ff=8192, num_layers=28, heads=(24, 8), d_head=128, llama3=32.0, tied=True, **_LLAMA
    ),
    "llama-3.1-8b": _shape(
        "llama", d_model=4096, d_ff=14_336, num_layers=32, heads=(32, 8), d_head=128, llama3=8.0, **_LLAMA
    ),
    "mistral-7b": _shape(
        "mistral",
        vocab_size=32_768,
        d_model=4096,
        d_ff=14_336,
        num_layers=32,
        heads=(32, 8),
        d_head=128,
        context=32_768,
        theta=1e6,
        eps=1e-5,
    ),
    "qwen2.5-0.5b": _shape(
        "qwen2",
        vocab_size=151_936,
        d_model=896,
        d_ff=4864,
        num_layers=24,
        heads=(14, 2),
        d_head=64,
        context=32_768,
        tied=True,
        **_QWEN2,
    ),
    "qwen2.5-7b": _shape(
        "qwen2",
        vocab_size=152_064,
        d_model=3584,
        d_ff=18_944,
        num_layers=28,
        heads=(28, 4),
        d_head=128,
        context=131_072,
        **_QWEN2,
    ),
    "qwen3-0.6b": _shape("qwen3", d_model=1024, d_ff=3072, num_layers=28, heads=(16, 8), tied=True, **_QWEN3),
    "qwen3-8b": _shape("qwen3", d_model=4096, d_ff=12_288, num_layers=36, heads=(32, 8), **_QWEN3),
    "gemma-2-2b": _gemma(
        "gemma2",
        vocab_size=256_000,
        d_model=2304,
        d_ff=9216,
        heads=(8, 4),
        context=8192,
        theta=1e4,
        window=4096,
        sliding=tuple(layer % 2 == 0 for layer in range(26)),
        attention_cap=50.0,
        logit_cap=30.0,
    ),
    "gemma-3-1b": _gemma(
        "gemma3_text",
        vocab_size=262_144,
        d_model=1152,
        d_ff=6912,
        heads=(4, 1),
        context=32_768,
        theta=1e6,
        local_rope=Rope(theta=1e4, width=256, context=32_768),
        window=512,
        sliding=tuple(layer % 6 != 5 for layer in range(26)),
        qk_norm=True,
    ),
    "phi-3-mini": _shape(
        "phi3",
        vocab_size=32_064,
        d_model=3072,
        d_ff=8192,
        num_layers=32,
        heads=(32, 32),
        d_head=96,
        context=4096,
        theta=1e4,
        eps=1e-5,
        fused=True,
        window=2047,
        sliding=(True,) * 32,
    ),
}
