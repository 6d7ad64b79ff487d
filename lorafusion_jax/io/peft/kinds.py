"""PEFT's other adapters that add a matrix to a weight: their updates as LoRA factors.

An update dW [d_out, d_in] of rank at most r becomes B A exactly. Another one is truncated by an SVD to rank r, the
closest matrix of that rank in the Frobenius norm. The formulas are those of PEFT 0.21 (`get_delta_weight`).
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ...support.text import shown, some
from .config import check_fields, configured

_MOST_TERMS = 100  # of a series; PEFT's default is 5
Matrix = Float[np.ndarray, "d_out d_in"]


class Module(NamedTuple):
    """One adapted matrix.

    Attributes:
        tensors: Its tensors and the shared ones, by PEFT's names.
        config: The content of adapter_config.json.
        d_out: Rows of the weight.
        d_in: Columns of the weight.
        scaling: alpha / r.
        weight: Function that returns the base's weight [d_out, d_in].
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    d_out: int
    d_in: int
    scaling: float
    weight: Callable[[], np.ndarray]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return a tensor in float64, after a check of its shape; None stands for any size."""
        if name not in self.tensors:
            raise ValueError(f"expected a tensor {name}, got {', '.join(self.tensors)}")
        array = self.tensors[name]
        if len(array.shape) != len(shape) or any(
            size not in (None, axis) for size, axis in zip(shape, array.shape, strict=True)
        ):
            raise ValueError(
                f"expected {name} of shape {str(list(shape)).replace('None', '*')}, got {list(array.shape)}"
            )
        return array.astype(np.float64)


def _loha(module: Module) -> Matrix:
    """Hadamard product of two low-rank matrices (LoHa, arXiv 2108.06098)."""
    factors = []
    for part in ("hada_w1", "hada_w2"):
        left = module.take(f"{part}_a", module.d_out, None)
        factors.append(left @ module.take(f"{part}_b", left.shape[1], module.d_in))
    return module.scaling * factors[0] * factors[1]


def _lokr(module: Module) -> Matrix:
    """Kronecker product of two matrices, each a matrix or a product of factors (LoKr, arXiv 2309.14859)."""
    factors = [
        [module.take(name, None, None) for name in ([part] if module.has(part) else [f"{part}_a", f"{part}_b"])]
        for part in ("lokr_w1", "lokr_w2")
    ]
    # Before anything is multiplied: a small file could state a huge product.
    rows, columns = (math.prod(of[end].shape[axis] for of in factors) for end, axis in ((0, 0), (-1, 1)))
    if (rows, columns) != (module.d_out, module.d_in):
        raise ValueError(f"expected a Kronecker product of [{module.d_out}, {module.d_in}], got [{rows}, {columns}]")
    return module.scaling * np.kron(*(functools.reduce(np.matmul, of) for of in factors))


def _vera(module: Module) -> Matrix:
    """Two trained vectors around two shared random matrices (VeRA, arXiv 2310.11454)."""
    down, up = module.take("vera_A", None, None), module.take("vera_B", None, None)
    scale = module.take("vera_lambda_d", down.shape[0]), module.take("vera_lambda_b", module.d_out)
    return (scale[1][:, None] * up[: module.d_out]) @ (scale[0][:, None] * down[:, : module.d_in])


def _randlora(module: Module) -> Matrix:
    """Sum of scaled products of shared random matrices (RandLoRA, arXiv 2502.00987)."""
    small, large = sorted((module.d_in, module.d_out))
    diagonal = module.take("randlora_lambda", None, None)
    rank, bases = diagonal.shape
    if bases != math.ceil(small / max(rank, 1)):
        raise ValueError(f"expected randlora_lambda of {small} / {rank} columns, rounded up, got {bases}")
    gamma = module.take("randlora_gamma", bases, small)
    narrow = module.take("randlora_A", rank, None, None)[:, :bases, :small]
    wide = module.take("randlora_B", None, None, rank)[:large, :bases]
    # PEFT flattens [rank, bases] of one factor and [bases, rank] of the other.
    update = wide.reshape(large, -1) @ (diagonal[..., None] * narrow * gamma).reshape(-1, small)
    return module.scaling * (update if small == module.d_in else update.T)


def _oft(module: Module) -> Matrix:
    """Rotation of the inputs in blocks (OFT, arXiv 2306.07280)."""
    packed = module.take("oft_R", None, None)
    size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
    if size * (size - 1) // 2 != packed.shape[1] or module.d_in % size:
        raise ValueError(f"expected blocks that divide {module.d_in} inputs, got oft_R of shape {list(packed.shape)}")
    blocks = 1 if module.config.get("block_share") else module.d_in // size
    packed = module.take("oft_R", blocks, None)
    skew = np.zeros((blocks, size, size))
    skew[:, *np.triu_indices(size, 1)] = packed
    skew -= skew.swapaxes(1, 2)
    if module.config.get("coft"):
        bound = module.config.get("eps", 6e-5) / math.sqrt(blocks)
        norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew *= np.minimum(1, bound / np.maximum(norm, 1e-300))
    if module.config.get("use_cayley_neumann", True):
        terms = module.config.get("num_cayley_neumann_terms", 5)
        if not isinstance(terms, int) or not 1 <= terms <= _MOST_TERMS:
            raise ValueError(f"num_cayley_neumann_terms is {shown(terms)}: expected 1 to {_MOST_TERMS}")
        rotation = _cayley_series(skew, terms)
    else:
        rotation = _cayley(skew)
    inputs = module.weight().reshape(module.d_out, -1, size)
    rotation = np.broadcast_to(rotation, (inputs.shape[1], size, size))
    return (np.einsum("okj,kij->oki", inputs, rotation) - inputs).reshape(module.d_out, module.d_in)


def _boft(module: Module) -> Matrix:
    """Rotation of the inputs by a product of permuted blocks, and a scale of every output (BOFT, arXiv 2311.06243)."""
    skew = module.take("boft_R", None, None, None, None)
    factors, blocks, size, other = skew.shape
    if size != other or blocks * size != module.d_in:
        raise ValueError(f"expected square blocks of {module.d_in} inputs, got boft_R of shape {list(skew.shape)}")
    scale = module.take("boft_s", module.d_out, 1)
    rotations = _cayley((skew - skew.swapaxes(2, 3)) / 2)
    inputs = weight = module.weight()
    for level, rotation in enumerate(rotations):
        order = np.arange(module.d_in)
        if factors > 1:  # the blocks of one level lie next to each other
            groups = order.reshape(blocks >> level, -1, size // 2)
            order = np.concatenate([groups[:, 0::2], groups[:, 1::2]], axis=1).ravel()
        parts = np.empty_like(weight)
        parts[:, order] = inputs
        parts = np.einsum("okj,kij->oki", parts.reshape(module.d_out, blocks, size), rotation)
        inputs = parts.reshape(weight.shape)[:, order]
    return inputs * scale - weight


def _cayley(skew: np.ndarray) -> np.ndarray:
    """Return (I - Q) (I + Q)^-1."""
    identity = np.eye(skew.shape[-1])
    return np.linalg.solve((identity + skew).swapaxes(-2, -1), (identity - skew).swapaxes(-2, -1)).swapaxes(-2, -1)


def _cayley_series(skew: np.ndarray, terms: int) -> np.ndarray:
    """Return PEFT's truncated series of (I + Q) (I - Q)^-1: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)."""
    # At three terms and more, PEFT ends with one power of half the weight, and has Q^2 and Q^3 in any case.
    last = max(terms - 1, 3) if terms > 2 else None
    power = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape)
    total = power.copy()
    for term in range(1, (last or terms - 1) + 1):
        power = power @ skew
        total += power if term == last else 2 * power
    return total


class Kind(NamedTuple):
    """A kind of adapter.

    Attributes:
        update: Function from a module to dW.
        names: Names of a module's tensors.
        shared: Names of tensors that all modules share.
        alpha: Field of the configuration that holds alpha, or None without a scaling by alpha / r.
    """

    update: Callable[[Module], Matrix]
    names: tuple[str, ...]
    shared: tuple[str, ...] = ()
    alpha: str | None = None


KINDS = {
    "LOHA": Kind(_loha, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), alpha="alpha"),
    "LOKR": Kind(_lokr, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), alpha="alpha"),
    "VERA": Kind(_vera, ("vera_lambda_b", "vera_lambda_d"), shared=("vera_A", "vera_B")),
    "RANDLORA": Kind(
        _randlora, ("randlora_lambda", "randlora_gamma"), shared=("randlora_A", "randlora_B"), alpha="randlora_alpha"
    ),
    "OFT": Kind(_oft, ("oft_R",)),
    "BOFT": Kind(_boft, ("boft_R", "boft_s")),
}
"""By `peft_type`."""

_KEPT = ("base_model_name_or_path", "bias", "modules_to_save", "peft_version", "target_modules", "task_type")


class Converted(NamedTuple):
    """An adapter as LoRA.

    Attributes:
        config: The content of an adapter_config.json of peft_type LORA.
        tensors: By PEFT's keys.
        residual: ||dW - B A|| / ||dW|| by module.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    residual: dict[str, float]


def as_lora(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    rank: int,
    shapes: Mapping[str, tuple[int, int]],
    base_tensor: Callable[[str], np.ndarray],
) -> Converted:
    """Return an adapter of one of `KINDS` as LoRA of one rank, with scaling 1.

    Args:
        config: The content of adapter_config.json.
        tensors: The file's tensors by key. Tensors that belong to no module are kept unchanged. The result has A
            [r, d_in] and B [d_out, r].
        rank: Rank of all factors.
        shapes: (d_in, d_out) of the base's linear modules by path.
        base_tensor: Function from a name to the base's tensor [d_out, d_in].

    Raises:
        ValueError: A module is not in the base, or its tensors are missing or of the wrong shape.
    """
    title = config["peft_type"]
    kind = KINDS[title]
    key = re.compile(
        rf"(?:base_model\.model\.)*(?:(?P<path>.+)\.)?(?P<name>{'|'.join(kind.names + kind.shared)})"
        r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
    )
    modules: dict[str, dict[str, np.ndarray]] = {}
    shared, others = {}, {}
    for name, array in tensors.items():
        if not (match := key.fullmatch(name)):
            others[name] = array
        elif match["name"] in kind.shared:
            shared[match["name"]] = array
        else:
            modules.setdefault(match["path"] or "", {})[match["name"]] = array
    for name in kind.shared:
        if name not in shared:
            raise ValueError(f"it has no {name}, which modules share: save it from PEFT with save_projection=True")
    if not modules:
        raise ValueError(f"it has no tensors of a {title} adapter: expected names such as {kind.names[0]}")
    strange = sorted(set(modules) - set(shapes))
    if strange:
        raise ValueError(
            f"the base lacks module {some(strange)}: give the base {shown(config.get('base_model_name_or_path'))}"
        )
    scaling = dict.fromkeys(modules, 1.0)
    if kind.alpha:
        settings = dict(config) | {"lora_alpha": config.get(kind.alpha, 8)}
        check_fields(settings)
        scaling = {path: alpha / r for path, (r, alpha) in configured(settings, modules).items()}
    factors, residual = {}, {}
    for path, parts in modules.items():
        d_in, d_out = shapes[path]

        def weight(path: str = path) -> np.ndarray:
            return np.asarray(base_tensor(f"{path}.weight"), np.float64)

        module = Module(parts | shared, config, d_out, d_in, scaling[path], weight)
        try:
            update = kind.update(module)
        except ValueError as error:
            raise ValueError(f"{path} [{d_out}, {d_in}]: {error}: save the adapter again") from None
        a, b, residual[path] = _factors(update, rank)
        factors[f"base_model.model.{path}.lora_A.weight"] = a
        factors[f"base_model.model.{path}.lora_B.weight"] = b
    lora = {field: config[field] for field in _KEPT if field in config}
    return Converted(lora | {"peft_type": "LORA", "r": rank, "lora_alpha": rank}, factors | others, residual)


def _factors(update: Matrix, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return A [rank, d_in] and B [d_out, rank] in float32, of equal column norms, and the relative residual."""
    if not np.isfinite(update).all():  # reported with the factors
        bad = np.full((rank, update.shape[1]), np.nan, np.float32), np.zeros((update.shape[0], rank), np.float32)
        return *bad, math.nan
    left, values, right = np.linalg.svd(update, full_matrices=False)
    total = float(np.linalg.norm(values))
    kept, root = min(rank, len(values)), np.sqrt(values)
    a, b = np.zeros((rank, update.shape[1]), np.float32), np.zeros((update.shape[0], rank), np.float32)
    a[:kept] = (root[:, None] * right)[:kept]
    b[:, :kept] = (left * root)[:, :kept]
    return a, b, float(np.linalg.norm(values[kept:])) / total if total else 0.0
