"""Rotary positions from the fields of a Hugging Face config."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Required, TypedDict, get_args

import msgspec

from ...support.reading import decode_as
from ..architecture import Size
from .config import Rope, Scaling

_SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _RopeJson(TypedDict, total=False):
    rope_type: str
    rope_theta: Required[_Positive]
    partial_rotary_factor: Annotated[float, msgspec.Meta(ge=0, le=1)]
    factor: _Positive
    original_max_position_embeddings: Size
    low_freq_factor: _Positive
    high_freq_factor: _Positive
    beta_slow: _Positive
    beta_fast: _Positive
    truncate: bool
    short_factor: list[_Positive]
    long_factor: list[_Positive]
    attention_factor: _Positive | None
    mscale: float
    mscale_all_dim: float
    llama_4_scaling_beta: float
    alpha: _Positive | None


def rope_of(
    raw: Mapping[str, Any], d_head: int, context: int, *, reads: Collection[str] = ()
) -> Rope:
    """Return the rotary positions of a model with such heads and this context.

    `reads` are those of `partial_rotary_factor`, `llama_4_scaling_beta` and `alpha` that its family reads.
    """
    fields = decode_as(dict(raw), _RopeJson, "", allow_unknown=True)
    scaling = fields.get("rope_type", "default")
    if scaling not in _SCALINGS:
        fix = f"expected {', '.join(_SCALINGS)}"
        raise ValueError(
            f"the rope scaling is {scaling!r}, which is not implemented: {fix}"
        )
    theta = float(fields["rope_theta"])
    width = d_head
    if "partial_rotary_factor" in reads:
        width = int(d_head * fields.get("partial_rotary_factor", 1.0))
    growth = 0.0
    if "llama_4_scaling_beta" in reads:
        growth = fields.get("llama_4_scaling_beta", 0.0)
    if "alpha" in reads and scaling == "dynamic" and (alpha := fields.get("alpha")):
        # Not dynamic in spite of its name: one stretch for every length.
        theta *= alpha ** (width / max(width - 2, 1))
        scaling = "default"
    rope = Rope(
        theta=theta,
        width=width,
        scaling=scaling,
        factor=float(fields.get("factor", 1.0)),
        context=context,
        query_growth=growth,
    )
    return _FURTHER[scaling](rope, fields) if scaling in _FURTHER else rope


def _llama3(rope: Rope, fields: _RopeJson) -> Rope:
    return dataclasses.replace(
        rope,
        context=fields.get("original_max_position_embeddings", rope.context),
        low_freq=float(fields.get("low_freq_factor", 1.0)),
        high_freq=float(fields.get("high_freq_factor", 4.0)),
    )


def _yarn(rope: Rope, fields: _RopeJson) -> Rope:
    if rope.theta <= 1:
        raise ValueError(
            f"rope_theta is {rope.theta}: expected more than 1 with the scaling yarn"
        )
    context = fields.get("original_max_position_embeddings", rope.context)
    factor = float(fields.get("factor", rope.context / context))

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    m = fields.get("mscale", 0.0)
    m_all = fields.get("mscale_all_dim", 0.0)
    return dataclasses.replace(
        rope,
        factor=factor,
        context=context,
        low_freq=float(fields.get("beta_slow", 1.0)),
        high_freq=float(fields.get("beta_fast", 32.0)),
        whole_pairs=fields.get("truncate", True),
        scale=fields.get("attention_factor")
        or (scale(m) / scale(m_all) if m and m_all else scale(1.0)),
    )


def _proportional(rope: Rope, fields: _RopeJson) -> Rope:
    share = fields.get("partial_rotary_factor", 1.0)
    return dataclasses.replace(rope, share=float(share))


def _longrope(rope: Rope, fields: _RopeJson) -> Rope:
    context = fields.get("original_max_position_embeddings", rope.context)
    quotients = {
        "short_factor": fields.get("short_factor", []),
        "long_factor": fields.get("long_factor", []),
    }
    for name, numbers in quotients.items():
        if len(numbers) != rope.width // 2:
            pairs = rope.width // 2
            raise ValueError(
                f"{name} has {len(numbers)} numbers: expected one for each of {pairs} rotated pairs"
            )
    factor = float(fields.get("factor", rope.context / context))
    if factor > 1 < context:
        scale = math.sqrt(1 + math.log(factor) / math.log(context))
    else:
        scale = 1.0
    scale = fields.get("attention_factor") or scale
    return dataclasses.replace(
        rope,
        factor=factor,
        context=context,
        short=tuple(quotients["short_factor"]),
        long=tuple(quotients["long_factor"]),
        scale=scale,
    )


_FURTHER: dict[str, Callable[[Rope, _RopeJson], Rope]] = {
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
