"""Where adapters may sit: the linear maps of a T5, their names, shapes and Hugging Face paths.

A *site* is one linear map of a block, stacked over the layers of its stack: `encoder.self.q`,
`decoder.cross.v`, `encoder.ff.wi_0`. Site and layer together name one matrix of the base model, which
Hugging Face calls for example `encoder.block.3.layer.0.SelfAttention.q`.
"""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .t5.model import T5Config

_HF_MODULES = {
    ("encoder", "self"): "layer.0.SelfAttention",
    ("encoder", "ff"): "layer.1.DenseReluDense",
    ("decoder", "self"): "layer.0.SelfAttention",
    ("decoder", "cross"): "layer.1.EncDecAttention",
    ("decoder", "ff"): "layer.2.DenseReluDense",
}
_NAMES = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
_MODULE_OF_HF = {(stack, hf): module for (stack, module), hf in _HF_MODULES.items()}
_HF_PATH = re.compile(r"(encoder|decoder)\.block\.(\d+)\.(layer\.\d\.\w+)\.(\w+)")


class Site(NamedTuple):
    """One linear map, stacked over the `layers` of its stack: kernels [layers, d_in, d_out]."""

    layers: int
    d_in: int
    d_out: int


def sites(config: "T5Config") -> dict[str, Site]:
    """Return every site of a model, encoder first, in the order of the block's computation."""
    inner = config.num_heads * config.d_kv
    wi = ("wi_0", "wi_1") if config.gated else ("wi",)
    shapes = dict.fromkeys("qkv", (config.d_model, inner)) | {"o": (inner, config.d_model)}
    ff = dict.fromkeys(wi, (config.d_model, config.d_ff)) | {"wo": (config.d_ff, config.d_model)}
    layers = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    return {
        f"{stack}.{module}.{name}": Site(layers[stack], *shape)
        for stack, module in _HF_MODULES
        for name, shape in (ff if module == "ff" else shapes).items()
    }


def targeted(config: "T5Config", targets: Collection[str], option: str = "targets") -> dict[str, Site]:
    """Return the sites whose linear map, wherever it occurs, is one of `targets`: of q k v o wi wi_0 wi_1 wo.

    Args:
      config: of the model.
      targets: last names of sites.
      option: what a message calls them.

    Raises:
      ValueError: there are no targets, or the model does not have one.
    """
    there = dict.fromkeys(name.rpartition(".")[2] for name in sites(config))
    if not targets or set(targets) - there.keys():
        raise ValueError(f"{option} are {' '.join(targets) or 'none'}: choose of {' '.join(there)}, such as q v")
    return {name: site for name, site in sites(config).items() if name.rpartition(".")[2] in targets}


def site_order(site: str) -> tuple[int, int]:
    """Return a key that sorts sites in the order of the computation (dicts lose it inside `jax.jit`)."""
    stack, module, name = site.split(".")
    return list(_HF_MODULES).index((stack, module)), _NAMES.index(name)


def hf_path(site: str, layer: int) -> str:
    """Return the Hugging Face module path of a site's matrix in one layer."""
    stack, module, name = site.split(".")
    return f"{stack}.block.{layer}.{_HF_MODULES[stack, module]}.{name}"


def locate(path: str) -> tuple[str, int] | None:
    """Return (site, layer) of a Hugging Face module path, or None if no adapter may sit there."""
    match = _HF_PATH.fullmatch(path)
    if match is None or (match[1], match[3]) not in _MODULE_OF_HF:
        return None
    return f"{match[1]}.{_MODULE_OF_HF[match[1], match[3]]}.{match[4]}", int(match[2])


def linear_shapes(config: "T5Config") -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of every adaptable matrix by its Hugging Face module path."""
    return {
        hf_path(name, layer): (site.d_in, site.d_out)
        for name, site in sites(config).items()
        for layer in range(site.layers)
    }
