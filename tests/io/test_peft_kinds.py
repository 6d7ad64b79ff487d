"""Adapters of PEFT that add a matrix, converted to LoRA, against PEFT's merged weights and `convert_to_lora`."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorafusion_jax import base_tensor, load_pool, read_config
from lorafusion_jax.io.peft.kinds import as_lora
from lorafusion_jax.parts import ConvertOptions, convert, linear_shapes, read_adapter, write_adapter

_SMALL = Path(__file__).resolve().parents[2] / "examples" / "small"


def _of_peft(test):
    """Mark a test that needs PEFT, which warns about odd options."""
    return pytest.mark.peft(pytest.mark.filterwarnings("ignore")(test))


# The protocol of a kind: an entry here is saved by PEFT with drawn options, and converted as PEFT merges it.
_RANKS = {"rank_pattern": [{}, {"k": 2}], "alpha_pattern": [{}, {r"layers\.0\.q": 9, "o": 2}]}
_LAYERS = {"layers_to_transform": [None, None, [1]], "exclude_modules": [None, ["layers.0.o"]]}
_DROPOUTS = {"rank_dropout": [0.0, 0.2], "module_dropout": [0.0, 0.2]}
_LYCORIS = {"r": [1, 3, 40], "alpha": [1, 5], "init_weights": [True, False], **_RANKS, **_LAYERS, **_DROPOUTS}
_OPTIONS = {
    "LORA": {
        **{"r": [1, 3, 20], "lora_alpha": [1, 5.5], "lora_dropout": [0.0, 0.1], "use_rslora": [False, True]},
        **{"use_dora": [False, True], "init_lora_weights": [True, False, "gaussian"]},
        **_RANKS,
        **_LAYERS,
    },
    "LOHA": {**_LYCORIS, "use_effective_conv2d": [False, True]},
    "LOKR": {
        **_LYCORIS,
        **{"decompose_both": [False, True], "decompose_factor": [-1, 2, 8], "rank_dropout_scale": [False, True]},
    },
    "VERA": {"r": [2, 5], "vera_dropout": [0.0, 0.1], "d_initial": [0.1, 1.0], "projection_prng_key": [0, 5]},
    "RANDLORA": {"r": [4, 7], "randlora_alpha": [3, 640], "sparse": [False, True], "very_sparse": [False, True]},
    "OFT": {
        **{"oft_block_size": [2, 4, 8], "coft": [False, True], "eps": [6e-5, 0.3], "block_share": [False, True]},
        **{"use_cayley_neumann": [False, True], "num_cayley_neumann_terms": [1, 2, 3, 5, 8]},
        **_LAYERS,
    },
    "BOFT": {
        **{"boft_block_size": [2, 4], "boft_n_butterfly_factor": [1, 2], "boft_dropout": [0.0, 0.1]},
        "init_weights": [True, False],
        **_LAYERS,
    },
}

# Arguments that classes of other kinds need.
_NEEDED = {"ADALORA": {"total_step": 10}, "TRAINABLE_TOKENS": {"token_indices": [0]}}


def _butterflies(monkeypatch):
    """Give PEFT the kernel of several butterfly factors, which it has for CUDA only."""
    import torch
    from peft.tuners.boft import layer

    class Diagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*row) for row in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Diagonal)


def _saved(folder, kind, fields):
    """Save an adapter of PEFT's for a model of two layers, and return it with the base's weights."""
    import peft
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = torch.nn.Linear(16, 24), torch.nn.Linear(16, 16), torch.nn.Linear(24, 16)

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Layer(), Layer()])})})
    base = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    model = peft.get_peft_model(model, _config(kind, target_modules=["q", "k", "o"], **fields))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    return model, base


def _config(kind, **fields):
    import peft

    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**fields)


def _read(folder, base, rank=24):
    weights = {name: array for name, array in base.items() if name.endswith(".weight")}
    shapes = {name.removesuffix(".weight"): array.shape[::-1] for name, array in weights.items()}
    return read_adapter(str(folder), shapes=shapes, base_tensor=base.__getitem__, rank=rank)


def _merged(adapter, base):
    """Return the weights with an adapter's updates and magnitudes, in float64."""
    found = {name: array.astype(float) for name, array in base.items()}
    for path, (a, b) in adapter.factors.items():
        weight = found[f"{path}.weight"] + adapter.scaling[path] * b.astype(float) @ a
        if adapter.magnitude is not None:
            weight *= (adapter.magnitude[path] / np.linalg.norm(weight, axis=1))[:, None]
        found[f"{path}.weight"] = weight
    return found


@_of_peft
@pytest.mark.parametrize("kind", _OPTIONS)
def test_drawn_configurations_are_converted_as_peft_merges_them(kind, tmp_path, monkeypatch):
    _butterflies(monkeypatch)
    draw = random.Random(f"configurations, {kind}")
    for number in range(8):
        fields = {name: draw.choice(values) for name, values in _OPTIONS[kind].items()}
        model, base = _saved(tmp_path / str(number), kind, fields)
        adapter = _read(tmp_path / str(number), base)
        assert adapter.config["peft_type"] == "LORA" and adapter.factors
        merged = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
        for name, weight in _merged(adapter, base).items():
            np.testing.assert_allclose(weight, merged[name], atol=1e-5, err_msg=f"{fields} {name}")


@_of_peft
@pytest.mark.parametrize(("kind", "r"), [("LOHA", 3), ("LOKR", 2), ("VERA", 6), ("RANDLORA", 5)])
def test_low_rank_equals_convert_to_lora_of_peft(kind, r, tmp_path):
    import peft

    model, base = _saved(tmp_path, kind, {"r": r})
    found, whole = (_read(tmp_path, base, rank) for rank in (4, 24))
    _, converted = peft.tuners.lora.conversion.convert_to_lora(model, rank=4)
    wanted = _updates({key: tensor.numpy() for key, tensor in converted.items()})
    assert set(wanted) == set(found.factors)
    for path, (a, b) in found.factors.items():
        update, full = found.scaling[path] * b @ a, whole.scaling[path] * np.matmul(*whole.factors[path][::-1])
        np.testing.assert_allclose(update, wanted[path], atol=1e-4 * max(1, np.abs(update).max()))
        residual = np.linalg.norm(full - update) / np.linalg.norm(full)
        assert found.residual[path] == pytest.approx(residual, abs=1e-5)


@_of_peft
@pytest.mark.parametrize("kind", ["OFT", "BOFT", "VERA", "RANDLORA"])
def test_trained_biases_of_other_kinds_are_refused(kind, tmp_path):
    _, base = _saved(tmp_path, kind, {"bias": "all"})
    with pytest.raises(ValueError, match="bias is 'all'.*retrain with bias='none'"):
        _read(tmp_path, base)


@_of_peft
def test_other_kinds_are_refused_by_their_configuration(tmp_path):
    """No weights are needed to refuse them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    others = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - _OPTIONS.keys())
    assert {"IA3", "LN_TUNING", "ADALORA", "PREFIX_TUNING", "XLORA"} <= set(others)
    for kind in others:
        remedy = r"merge it into the base with PEFT" if kind in ("IA3", "LN_TUNING") else "retrain as LoRA"
        folder = tmp_path / kind
        folder.mkdir()
        if kind in _NEEDED:
            _config(kind, **_NEEDED[kind]).save_pretrained(folder)
        else:
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(ValueError, match=f"peft_type is '{kind}'.*{remedy}"):
            read_adapter(str(folder))


def _updates(tensors):
    ends = ".lora_A.weight", ".lora_B.weight"
    paths = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    return {path.removeprefix("base_model.model."): tensors[path + ends[1]] @ tensors[path + ends[0]] for path in paths}


def _vera(rank=3, d_in=6, d_out=5, **changes):
    """Return the configuration and tensors of a VeRA adapter of one matrix."""
    draw = np.random.default_rng(0)
    tensors = {
        "base_model.vera_A": draw.normal(size=(rank, 8)),
        "base_model.vera_B": draw.normal(size=(7, rank)),
        "base_model.model.block.q.vera_lambda_d": draw.normal(size=rank),
        "base_model.model.block.q.vera_lambda_b": draw.normal(size=d_out),
    } | changes
    config = {"peft_type": "VERA", "r": rank, "target_modules": ["q"]}
    return config, {key: np.asarray(array, np.float32) for key, array in tensors.items() if array is not None}


def _converted(config, tensors, rank=3):
    return as_lora(config, tensors, rank=rank, shapes={"block.q": (6, 5)}, base_tensor={}.__getitem__)


def test_a_vera_becomes_lora_exactly_at_its_rank_and_with_a_residual_below():
    config, tensors = _vera()
    scaled = tensors["base_model.model.block.q.vera_lambda_b"][:, None] * tensors["base_model.vera_B"][:5]
    expected = scaled @ (
        tensors["base_model.model.block.q.vera_lambda_d"][:, None] * tensors["base_model.vera_A"][:, :6]
    )
    for rank in (3, 2):
        found = _converted(config, tensors, rank)
        difference = np.linalg.norm(_updates(found.tensors)["block.q"] - expected) / np.linalg.norm(expected)
        assert found.config["peft_type"] == "LORA"
        assert found.config["r"] == found.config["lora_alpha"] == rank
        assert found.residual["block.q"] == pytest.approx(difference, abs=1e-6)
        assert (difference < 1e-6) == (rank == 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model.vera_A": None}, "has no vera_A.*save_projection=True"),
        ({"base_model.model.block.q.vera_lambda_d": np.ones(4)}, r"expected vera_lambda_d of shape \[3\], got \[4\]"),
        ({"base_model.model.block.q.vera_lambda_b": None}, "expected a tensor vera_lambda_b, got vera_lambda_d"),
        ({"base_model.model.block.z.vera_lambda_b": np.ones(5)}, "the base lacks module block.z"),
    ],
)
def test_incomplete_adapters_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        _converted(*_vera(**changes))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"peft_type": "LOKR", "r": 1, "alpha": 1},
            {"lokr_w1_a": (10**6, 1), "lokr_w1_b": (1, 10**6), "lokr_w2": (1, 1)},
            r"expected a Kronecker product of \[5, 6\], got \[1000000, 1000000\]",
        ),
        (
            {"peft_type": "RANDLORA", "r": 1000, "randlora_alpha": 1},
            {"randlora_lambda": (1000, 1000), "randlora_gamma": (1000, 5)},
            "expected randlora_lambda of 5 / 1000 columns, rounded up, got 1000",
        ),
        (
            {"peft_type": "OFT", "num_cayley_neumann_terms": 10**9},
            {"oft_R.weight": (3, 1)},
            "num_cayley_neumann_terms is 1000000000: expected 1 to 100",
        ),
    ],
    ids=["lokr", "randlora", "oft"],
)
def test_a_small_file_cannot_ask_for_a_huge_computation(config, tensors, message):
    arrays = {f"base_model.model.block.q.{name}": np.zeros(shape, np.float32) for name, shape in tensors.items()}
    shared = {f"base_model.randlora_{name}": np.zeros((1, 1, 1), np.float32) for name in "AB"}
    with pytest.raises(ValueError, match=message):
        _converted(config, arrays | (shared if config["peft_type"] == "RANDLORA" else {}))


def _on_small_base(folder, config, tensors_of):
    """Write an adapter of every query of the embedded base."""
    paths = {path: shape for path, shape in linear_shapes(read_config(_SMALL / "base")).items() if path.endswith(".q")}
    tensors = {}
    for path, (d_in, d_out) in paths.items():
        of_path = tensors_of(d_in, d_out)
        tensors |= {f"base_model.model.{path}.{name}": np.asarray(array, "f4") for name, array in of_path.items()}
    write_adapter(folder, config | {"target_modules": ["q"]}, tensors)
    return str(folder), paths


def test_other_kinds_are_in_a_pool_next_to_lora_with_its_rank_and_their_residuals(tmp_path):
    draw = np.random.default_rng(0)

    def factors(d_in, d_out):
        return {
            f"hada_{part}": 0.1 * draw.normal(size=(d_out, 2) if part.endswith("a") else (2, d_in))
            for part in ("w1_a", "w1_b", "w2_a", "w2_b")
        }

    loha, paths = _on_small_base(tmp_path / "loha", {"peft_type": "LOHA", "r": 2, "alpha": 2}, factors)
    lora = next((_SMALL / "adapters").iterdir())
    rank = json.loads((lora / "adapter_config.json").read_text())["r"]
    options = ConvertOptions(base=str(_SMALL / "base"), adapters=(loha, str(lora)), out=tmp_path / "pool")
    entry = convert(options)["adapters"][0]
    assert max(entry["sites"]["encoder.self.q"]["rank"]) == rank >= 4  # that of the update is 2 times 2
    assert entry["residual"].keys() == paths.keys() and max(entry["residual"].values()) < 1e-5
    assert f"converted from LOHA to LoRA of rank {rank}, exactly" in entry["notes"]
    assert load_pool(tmp_path / "pool").names == (entry["name"], lora.name)
    (entry,) = convert(ConvertOptions(base=options.base, adapters=(loha,), rank=1, dry_run=True))["adapters"]
    assert min(entry["residual"].values()) > 0.05
    assert any(n.startswith("warning: converted from LOHA to LoRA of rank 1: the relative") for n in entry["notes"])


def test_several_doras_fit_into_a_pool_without_their_magnitudes(tmp_path):
    """A column of W + dW that is zero has no direction, and stays zero."""
    draw, base = np.random.default_rng(0), tmp_path / "base"
    shutil.copytree(_SMALL / "base", base)
    weights = load_file(base / "model.safetensors")
    weights["encoder.block.0.layer.0.SelfAttention.q.weight"][0] = 0
    save_file(weights, base / "model.safetensors")

    def factors(d_in, d_out):
        factors = {"lora_A.weight": draw.normal(size=(2, d_in)), "lora_B.weight": draw.normal(size=(d_out, 2))}
        factors["lora_B.weight"][0] = 0
        return factors | {"lora_magnitude_vector": draw.uniform(1, 2, d_out)}

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "use_dora": True}
    folders = [_on_small_base(tmp_path / name, config, factors)[0] for name in ("one", "two")]
    options = {"base": str(base), "adapters": tuple(folders), "out": tmp_path / "pool"}
    with pytest.raises(ValueError, match="convert it alone, or with --drop-magnitudes"):
        convert(ConvertOptions(**options))
    manifest = convert(ConvertOptions(**options, drop_magnitudes=True))
    assert not any(entry["dora"] for entry in manifest["adapters"])
    pool = load_pool(tmp_path / "pool")
    assert pool.magnitude is None and pool.names == ("one", "two")
    adapter, errors = read_adapter(folders[0]), []
    for path, (a, b) in adapter.factors.items():
        plain = base_tensor(base)(f"{path}.weight") + b @ a / 2
        dora = plain * (adapter.magnitude[path] / np.linalg.norm(plain, axis=1).clip(1e-30))[:, None]
        inputs = draw.normal(size=(20_000, plain.shape[1]))
        errors.append(np.linalg.norm(inputs @ (dora - plain).T) / np.linalg.norm(inputs @ dora.T))
    (note,) = [note for note in manifest["adapters"][0]["notes"] if "without its magnitudes" in note]
    mean, worst = (float(text) / 100 for text in re.findall(r"([\d.]+)%", note))
    assert (mean, worst) == pytest.approx((np.mean(errors), max(errors)), rel=0.02)
