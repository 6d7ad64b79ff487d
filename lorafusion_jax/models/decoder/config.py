"""The structure of a decoder-only model: its sizes, its stack, its sites, and where its family departs from Llama."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..architecture import Architecture, Attention, Layers, Parts, Site, Size, Stack

# Scalings of rotary positions by the names of Hugging Face.
Scaling = Literal[
    "default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"
]

_ALL: Parts = ("source", "target")
# The linear maps at the ends of modules.
_LAST = ("o_proj", "out_proj", "down_proj", "per_layer_projection")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: pairs of numbers of a head are rotated by position x frequency.

    Attributes:
      theta: base of the frequencies, theta ** (-2 i / width).
      width: number of rotated numbers of a head; the others keep their values.
      scaling: rule that changes frequencies for contexts that are longer than those of the pretraining; `none` for no
        rotation at all.
      factor: ratio of the new to the old length.
      context: tokens of the pretraining's contexts, for the scalings other than `linear`.
      low_freq: wavelengths above context / low_freq are stretched by `factor` (`llama3`, `yarn`).
      high_freq: wavelengths below context / high_freq are not stretched (`llama3`, `yarn`).
      whole_pairs: the pairs of these two wavelengths are rounded to whole ones (`yarn`).
      short: quotient of each pair's frequency in rows of up to `context` tokens (`longrope`).
      long: quotient of each pair's frequency in longer rows (`longrope`).
      scale: factor of the rotated numbers (`yarn`, `longrope`).
      share: share of the pairs, those of the highest frequencies, that are rotated at all (`proportional`).
      query_growth: queries at position p grow by 1 + query_growth log(1 + floor(p / context)) (Ministral 3).
    """

    theta: float = 10_000.0
    width: Size
    scaling: Literal[Scaling, "none"] = "default"
    factor: float = 1.0
    context: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    whole_pairs: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    scale: float = 1.0
    share: float = 1.0
    query_growth: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Architecture):
    """Structure of a decoder-only model and how to run it.

    Attributes:
      model_type: Hugging Face's name of the family.
      stem: module path of the embedding, the blocks and the last norm.
      context: most tokens of a row, prompt and answer together.
      num_kv_heads: heads of keys and values; each serves num_heads / num_kv_heads heads of queries.
      local_rope: rotary positions of sliding layers, if they differ.
      window: number of tokens, itself included, that a token of a sliding layer attends to; 0 for all.
      sliding: for every layer, whether it has the window and `local_rope`; empty if none has.
      activation: activation function of the gate.
      fused: matrices that stand for several: `qkv_proj`, `gate_up_proj`.
      fused_by_head: `qkv_proj` has the queries of each head of keys before these keys and their values, not before all
        keys (GPT-NeoX).
      gated: the feed-forward has a gate.
      parallel: the feed-forward reads what the attention reads, and both are added at once; without a norm of its own
        it reads the attention's.
      biased: last names of the sites that have a bias, also `lm_head`.
      renamed: pairs of a module's path in a Llama's block, or under the stem, and its path in files, where they differ.
      conv1d: files hold the matrices of blocks as [d_in, d_out] (GPT-2).
      learned_positions: every position has an embedding, which is added to the token's.
      norm: kind of the norms.
      norms: names of those before and behind the attention, and before and behind the feed-forward; empty for none.
      qk_norm: what is normalised of queries and keys: each `head`, `all` heads together, or each head when it is
        `rotated`.
      absent: maps that the attention lacks. Without `v_proj` the values are the keys; without `k_proj` too, keys and
        values are those of an earlier layer (Gemma 4).
      value_norm: values are normalised, without a scale (Gemma 4).
      attention_gate: every head of q_proj has a gate for its output behind the query (Qwen 3.5).
      norm_offset: added to the scales of norms; Gemma's scales are 1 + w.
      query_scale: factor of the attention's products.
      embedding_scale: factor of the embeddings.
      residual_scale: factor of the outputs of attention and feed-forward, which the blocks add (Granite).
      logit_scale: factor of the logits.
      attention_cap: soft limit of the attention's products; 0 for none.
      logit_cap: soft limit of the logits; 0 for none.
    """

    family: ClassVar[str] = "decoder"
    causal: ClassVar[bool] = True

    model_type: str
    stem: str = "model"
    context: Size
    d_head: Size
    d_ff: Size
    num_heads: Size
    num_kv_heads: Size
    num_layers: Layers
    eps: float
    rope: Rope
    local_rope: Rope | None = None
    window: int = 0
    sliding: tuple[bool, ...] = ()
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    fused: tuple[str, ...] = ()
    fused_by_head: bool = False
    gated: bool = True
    parallel: bool = False
    biased: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False
    learned_positions: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norms: tuple[str, str, str, str] = (
        "input_layernorm",
        "",
        "post_attention_layernorm",
        "",
    )
    qk_norm: Literal["", "head", "all", "rotated"] = ""
    absent: tuple[str, ...] = ()
    value_norm: bool = False
    attention_gate: bool = False
    norm_offset: float = 0.0
    query_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    def plain(self) -> "DecoderConfig":
        """Return the fields that every decoder has."""
        fields = dataclasses.fields(DecoderConfig)
        values: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields
        }
        return DecoderConfig(**values)

    @property
    def targets(self) -> tuple[str, ...]:
        # As in PEFT.
        return ("qkv_proj",) if "qkv_proj" in self.fused else ("q_proj", "v_proj")

    @property
    def longest_row(self) -> int:
        return self.context

    @functools.cached_property
    def stacks(self) -> Mapping[str, Stack]:
        attention = Attention(_ALL, self.num_heads, self.num_kv_heads, self.d_head)
        return {"decoder": Stack(self.num_layers, _ALL, (attention,), self.d_ff)}

    @functools.cached_property
    def maps(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """Shapes of a block's linear maps, by module and name."""
        d = self.d_model
        inner = self.num_heads * self.d_head
        kv = self.num_kv_heads * self.d_head
        if "qkv_proj" in self.fused:
            attention = {"qkv_proj": (d, inner + 2 * kv)}
        else:
            queries = (d, (2 if self.attention_gate else 1) * inner)
            attention = {"q_proj": queries, "k_proj": (d, kv), "v_proj": (d, kv)}
        if "gate_up_proj" in self.fused:
            gate = {"gate_up_proj": (d, 2 * self.d_ff)}
        elif self.gated:
            gate = dict.fromkeys(("gate_proj", "up_proj"), (d, self.d_ff))
        else:
            gate = {"up_proj": (d, self.d_ff)}
        for name in self.absent:
            del attention[name]
        return {
            "self_attn": attention | {"o_proj": (inner, d)},
            "mlp": gate | {"down_proj": (self.d_ff, d)},
        }

    def sites_of(
        self,
        maps: Mapping[str, Mapping[str, tuple[int, int]]],
        first: int = 0,
        every: int = 1,
    ) -> dict[str, Site]:
        """Return the sites of a block's linear maps by their places in it, such as `mlp.down_proj`.

        `first` and `every` are those of the sites.
        """
        sites = {}
        for module, shapes in maps.items():
            for name, (d_in, d_out) in shapes.items():
                last = name in _LAST
                place = f"{module}.{name}".removeprefix(".")
                sites[place] = Site(
                    self.num_layers,
                    d_in,
                    d_out,
                    path=f"{self.blocks}.{{layer}}.{self.name_of(place)}",
                    reads=_ALL,
                    split="rows" if last else "columns",
                    stage=f"{module} out" if last else f"{module} in",
                    first=first,
                    every=every,
                )
        return sites

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        """Every linear map, such as `decoder.self_attn.q_proj` and `decoder.mlp.down_proj`."""
        sites = self.sites_of(self.maps)
        return {f"decoder.{place}": site for place, site in sites.items()}

    def name_of(self, module: str) -> str:
        """Return the path in files of a module of a Llama's block, or under the stem."""
        return dict(self.renamed).get(module, module)

    @property
    def blocks(self) -> str:
        """Module path of the blocks."""
        return f"{self.stem}.{self.name_of('layers')}"

    @property
    def embedding(self) -> str:
        """Name of the embedding's tensor."""
        return f"{self.stem}.{self.name_of('embed_tokens')}.weight"
