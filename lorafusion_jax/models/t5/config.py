"""The structure of a T5: its sizes, its stacks and its sites, from Hugging Face's config.json or by name."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ...support.reading import decode_as
from ..architecture import (
    Architecture,
    Attention,
    Layers,
    Parts,
    Site,
    Size,
    Split,
    Stack,
)

_MODULES = {
    ("encoder", "self"): "layer.0.SelfAttention",
    ("encoder", "ff"): "layer.1.DenseReluDense",
    ("decoder", "self"): "layer.0.SelfAttention",
    ("decoder", "cross"): "layer.1.EncDecAttention",
    ("decoder", "ff"): "layer.2.DenseReluDense",
}
_SOURCE: Parts = ("source",)
_TARGET: Parts = ("target",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Json:
    """The fields of a config.json that are read, as transformers 4 and 5 write them."""

    model_type: str
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"
    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_heads: Size
    num_layers: Layers
    num_decoder_layers: Layers | None = None
    tie_word_embeddings: bool | None = None
    scale_decoder_outputs: bool | None = None
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] = 1
    decoder_start_token_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Architecture):
    """Structure of a T5 and how to run it.

    Attributes:
      gated: gated GELU feed-forward (T5 1.1, FLAN) rather than ReLU (T5 1.0).
      scale_logits: the decoder's output is multiplied by d_model ** -0.5 before the head.
    """

    family: ClassVar[str] = "t5"
    splits: ClassVar[Mapping[str, Split]] = {**Architecture.splits, "table": "columns"}

    d_kv: Size
    d_ff: Size
    num_heads: Size
    num_layers: Layers
    num_decoder_layers: Layers
    gated: bool = True
    scale_logits: bool = False
    buckets: Size = 32
    max_distance: Size = 128
    eps: float = 1e-6
    start_id: int = 0

    @property
    def targets(self) -> tuple[str, ...]:
        return ("q", "v")  # as in PEFT

    @functools.cached_property
    def stacks(self) -> Mapping[str, Stack]:
        def attention(reads: Parts) -> Attention:
            return Attention(reads, self.num_heads, self.num_heads, self.d_kv)

        def stack(layers: int, reads: Parts, *attentions: Attention) -> Stack:
            return Stack(layers, reads, attentions, self.d_ff)

        return {
            "encoder": stack(self.num_layers, _SOURCE, attention(_SOURCE)),
            "decoder": stack(
                self.num_decoder_layers, _TARGET, attention(_TARGET), attention(_SOURCE)
            ),
        }

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        """Every linear map, such as `encoder.self.q`, `decoder.cross.v` and `encoder.ff.wi_0`."""
        inner = self.num_heads * self.d_kv
        wi = ("wi_0", "wi_1") if self.gated else ("wi",)
        shapes = dict.fromkeys("qkv", (self.d_model, inner)) | {
            "o": (inner, self.d_model)
        }
        ff = dict.fromkeys(wi, (self.d_model, self.d_ff)) | {
            "wo": (self.d_ff, self.d_model)
        }
        sites = {}
        for (stack, module), path in _MODULES.items():
            for name, (d_in, d_out) in (ff if module == "ff" else shapes).items():
                last = name in ("o", "wo")
                # The decoder reads keys and values of the source at every layer.
                reads_source = stack == "encoder" or (
                    module == "cross" and name in ("k", "v")
                )
                sites[f"{stack}.{module}.{name}"] = Site(
                    self.stacks[stack].layers,
                    d_in,
                    d_out,
                    path=f"{stack}.block.{{layer}}.{path}.{name}",
                    reads=_SOURCE if reads_source else _TARGET,
                    split="rows" if last else "columns",
                    stage=f"{module} out" if last else f"{module} in",
                )
        return sites

    @property
    def presumed_tied(self) -> bool:
        # transformers 5 wrongly writes that FLAN's head is tied. In every T5 a tied head has scaled logits.
        return self.tied and self.scale_logits


def read_config(raw: Mapping[str, Any]) -> T5Config:
    """Return the structure that a config.json describes, as transformers 4 and 5 write it."""
    if raw["model_type"] == "umt5":
        raise ValueError(
            "model_type is 'umt5', whose every layer has a relative bias: give a T5, FLAN-T5 or mT5"
        )
    fields = decode_as(raw, _Json, "", allow_unknown=True)
    t5 = fields.model_type == "t5"
    tied = t5 if fields.tie_word_embeddings is None else fields.tie_word_embeddings
    pad_id = max(
        fields.pad_token_id or 0, 0
    )  # -1 is written where there is none; padding is masked by its place
    return T5Config(
        vocab_size=fields.vocab_size,
        d_model=fields.d_model,
        d_kv=fields.d_kv,
        d_ff=fields.d_ff,
        num_heads=fields.num_heads,
        num_layers=fields.num_layers,
        num_decoder_layers=fields.num_decoder_layers or fields.num_layers,
        gated=fields.feed_forward_proj == "gated-gelu",
        tied=tied,
        # transformers 5 has a field for this. Before, logits were scaled if the head was tied, except in mT5.
        scale_logits=tied and t5
        if fields.scale_decoder_outputs is None
        else fields.scale_decoder_outputs,
        buckets=fields.relative_attention_num_buckets,
        max_distance=fields.relative_attention_max_distance,
        eps=fields.layer_norm_epsilon,
        pad_id=pad_id,
        eos_id=fields.eos_token_id,
        start_id=pad_id
        if fields.decoder_start_token_id is None
        else fields.decoder_start_token_id,
    )


def _shape(d_model: int, d_ff: int, heads: int, layers: int, *, flan: bool) -> T5Config:
    return T5Config(
        vocab_size=32128,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_heads=heads,
        num_layers=layers,
        num_decoder_layers=layers,
        gated=flan,
        tied=not flan,
        scale_logits=not flan,
    )


SHAPES = {
    "flan-t5-small": _shape(512, 1024, 6, 8, flan=True),
    "flan-t5-base": _shape(768, 2048, 12, 12, flan=True),
    "flan-t5-large": _shape(1024, 2816, 16, 24, flan=True),
    "flan-t5-xl": _shape(2048, 5120, 32, 24, flan=True),
    "flan-t5-xxl": _shape(4096, 10240, 64, 24, flan=True),
    "t5-small": _shape(512, 2048, 8, 6, flan=False),
    "t5-base": _shape(768, 3072, 12, 12, flan=False),
    "t5-large": _shape(1024, 4096, 16, 24, flan=False),
}
