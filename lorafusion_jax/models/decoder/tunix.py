"""Names of the modules in decoders of tunix, where one kernel may hold several linear maps."""

import re

_MODULE = re.compile(r"(?:model\.)?layers\.(\d+)\.(attn|mlp)\.(\w+)")
_PARTS = {"attn": "self_attn", "mlp": "mlp"}
_MAPS = {
    "q_einsum": ("q_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}


def linear_maps(module: str) -> tuple[str, ...]:
    """Return Hugging Face's paths of a module of tunix's, such as `layers.0.attn.kv_einsum`; none for other names."""
    match = _MODULE.fullmatch(module)
    if match is None:
        return ()
    layer, part, name = match.groups()
    return tuple(
        f"model.layers.{layer}.{_PARTS[part]}.{last}"
        for last in _MAPS.get(name, (name,))
    )
