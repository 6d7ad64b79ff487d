"""From adapters of PEFT to a pool on disk and back: exact, complete or not at all, every damage noticed."""

import hashlib
import json
import os
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import small_llama
from json_files import read_json, write_json
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax import (
    base_tensor,
    io,
    load_pool,
    places,
    read_config,
    read_pool,
)
from lorafusion_jax.cli import main

_ROOT = Path(__file__).resolve().parents[2]
_SIZES = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 10,
    "num_heads": 2,
    "num_layers": 3,
}
_SIZES |= {
    "num_decoder_layers": 2,
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
}
_Q = "encoder.block.1.layer.0.SelfAttention.q"


def _base(folder):
    """Write a base of which there is config.json only."""
    folder.mkdir()
    write_json(folder / "config.json", _SIZES)
    return folder


@pytest.fixture
def base(tmp_path):
    return _base(tmp_path / "base")


@pytest.fixture
def adapter(base):
    return _writer(base)


def _writer(base):
    """Return a function that writes an adapter: rank `r` on every path that ends in one of `targets`."""

    def write(
        name,
        r=2,
        alpha=3,
        targets=("q", "v"),
        dtype="float32",
        prefix="base_model.model.",
        extra=(),
        **fields,
    ):
        rng = np.random.default_rng(len(name) + r)
        tensors = {}
        for path, (d_in, d_out) in lf.models.linear_shapes(read_config(base)).items():
            if path.endswith(tuple(targets)):
                tensors[f"{prefix}{path}.lora_A.weight"] = rng.standard_normal(
                    (r, d_in)
                ).astype(dtype)
                tensors[f"{prefix}{path}.lora_B.weight"] = rng.standard_normal(
                    (d_out, r)
                ).astype(dtype)
                if fields.get("use_dora"):
                    magnitude = rng.uniform(1, 2, d_out).astype(dtype)
                    tensors[f"{prefix}{path}.lora_magnitude_vector"] = magnitude
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": 0.1,
        } | fields
        # Spelt as nobody's JSON library would, to see that not a byte is lost.
        text = json.dumps(config, indent=3).replace("\n", "\r\n").encode()
        io.write_adapter(base.parent / name, text, tensors | dict(extra))
        return str(base.parent / name)

    return write


@pytest.fixture
def convert(base, tmp_path):
    """A function that converts adapters, into `tmp_path`/pool unless it is told otherwise."""

    def convert(adapters, **options):
        if not options.get("dry_run"):
            options = {"out": tmp_path / "pool"} | options
        return _convert(base, adapters, **options)

    return convert


def _convert(base, adapters, **options):
    return io.convert(
        io.ConvertOptions(base=str(base), adapters=tuple(adapters), **options)
    )


def _printed(capsys, base, adapters, *arguments, command=main):
    command(
        [*f"convert --base {base} --adapters".split(), *adapters, *map(str, arguments)]
    )
    return capsys.readouterr().out


def _run_script(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_peft_weights.py", *arguments[1:]])
        runpy.run_path(str(_ROOT / "convert_peft_weights.py"), run_name="__main__")


def _refused(message, convert, adapters, **options):
    with refused(message):
        convert(adapters, **options)


def _assert_same_pool(got, want):
    assert got.names == want.names
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(
        partial(assert_array_equal, strict=True),
        *map(jax.tree.leaves, (got, want)),
    )


def _assert_holds(pool, config, folders, scalings):
    """Compare with the files: dW is scaling * B A of each module, and zero where an adapter has none."""
    for n, (folder, scaling) in enumerate(zip(folders, scalings, strict=True)):
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        for path in lf.models.linear_shapes(config):
            site, layer = places(config)[path]
            a = tensors.get(f"base_model.model.{path}.lora_{'A'}.weight")
            b = tensors.get(f"base_model.model.{path}.lora_{'B'}.weight")
            if site not in pool.A:
                assert a is None
                continue
            r = 0 if a is None else len(a)
            assert pool.rank[site][layer, n] == r
            assert (
                not pool.A[site][layer, n, :, r:].any()
                and not pool.B[site][layer, n, r:].any()
            )
            if a is not None:
                assert_array_equal(pool.A[site][layer, n, :, :r], a.T)
                assert_allclose(pool.B[site][layer, n, :r], scaling * b.T, rtol=1e-6)


@pytest.mark.smoke
def test_a_pool_holds_what_the_files_hold(convert, base, adapter, tmp_path):
    folders = [
        adapter("one"),
        adapter("wide", r=5, targets=("q", "wo"), use_rslora=True),
        adapter("third"),
    ]
    config = read_config(base)
    convert(folders)
    pool = load_pool(tmp_path / "pool")
    assert pool.names == ("one", "wide", "third") and pool.magnitude is None
    assert list(pool.A) == [s for s in config.sites if s.endswith((".q", ".v", ".wo"))]
    assert pool.A["encoder.ff.wo"].shape == (3, 3, 10, 5) and pool.B[
        "decoder.cross.v"
    ].shape == (2, 3, 2, 6)
    _assert_holds(pool, config, folders, [3 / 2, 3 / 5**0.5, 3 / 2])
    _assert_same_pool(read_pool(folders, config), pool)


def test_some_adapters_of_a_pool_in_a_given_order(convert, base, adapter, tmp_path):
    folders = [adapter("one"), adapter("two", r=4), adapter("third")]
    convert(folders)
    config = read_config(base)
    chosen = load_pool(tmp_path / "pool", chosen=["third", 0])
    _assert_same_pool(chosen, read_pool([folders[2], folders[0]], config))
    assert all((rank == 2).all() for rank in chosen.rank.values())
    # What was not chosen is not read either.
    shutil.rmtree(tmp_path / "pool/adapters/0001")
    _assert_same_pool(load_pool(tmp_path / "pool", chosen=["third", "one"]), chosen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_a_pool(convert, base, adapter, tmp_path, dtype):
    folder = adapter("one", dtype=ml_dtypes.bfloat16)
    convert([folder])
    pool = load_pool(tmp_path / "pool", dtype=dtype)
    _assert_same_pool(read_pool([folder], read_config(base), dtype=dtype), pool)
    b = io.read_adapter(folder).factors[_Q][1].T.astype(np.float32)
    site, layer = places(read_config(base))[_Q]
    assert_array_equal(pool.B[site][layer, 0], (b * 1.5).astype(dtype))


def _assert_same_adapter(got, want):
    for folder in (got, want):
        assert (folder / "adapter_config.json").read_bytes() == (
            want / "adapter_config.json"
        ).read_bytes()
    got = load_file(got / "adapter_model.safetensors")
    want = load_file(want / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for key in want:
        assert (
            got[key].dtype == want[key].dtype
            and got[key].tobytes() == want[key].tobytes()
        )


def test_an_adapter_of_a_pool_is_its_source(convert, base, adapter, tmp_path):
    factor = {f"base_model.model.{_Q}.lora_A.weight": np.ones((2, 8), np.float16)}
    folders = [
        adapter("plain"),
        adapter("half", dtype=np.float16, r=3, targets=("o", "wi_1")),
        adapter("bf16", dtype=ml_dtypes.bfloat16),
        adapter("bare", prefix=""),
        adapter("state", extra={"base_model.model.lora_velora_x": np.arange(5.0)}),
        adapter("mixed", extra=factor),
    ]
    entries = convert(folders)["adapters"]
    kinds = ["float32", "float16", "bfloat16", "float32", "float32", "float16, float32"]
    assert [entry["dtype"] for entry in entries] == kinds
    for entry, folder in zip(entries, map(Path, folders), strict=True):
        _assert_same_adapter(tmp_path / "pool" / entry["folder"], folder)
        io.resave(
            io.ConvertedPool(tmp_path / "pool").adapter(folder.name),
            tmp_path / "again" / folder.name,
        )
        _assert_same_adapter(tmp_path / "again" / folder.name, folder)
    _assert_same_pool(
        load_pool(tmp_path / "pool"), read_pool(folders, read_config(base))
    )
    with refused("the pool lacks 'other': choose one of 6, 'plain' to 'mixed'"):
        io.ConvertedPool(tmp_path / "pool").adapter("other")


def test_a_dora_adapter_alone(convert, base, adapter, tmp_path):
    folder = adapter(
        "dora", use_dora=True, targets=("block.1.layer.0.SelfAttention.q", "wo")
    )
    convert([folder])
    pool = load_pool(tmp_path / "pool")
    _assert_same_pool(read_pool([folder], read_config(base)), pool)
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    assert pool.magnitude is not None and pool.magnitude.keys() == pool.A.keys()
    q = pool.magnitude["encoder.self.q"]
    assert_array_equal(q[1], tensors[f"base_model.model.{_Q}.lora_magnitude_vector"])
    assert not q[0].any() and not q[2].any()


def test_dora_is_refused_next_to_others(convert, base, adapter):
    plain = adapter("plain")
    dora = adapter("dora", use_dora=True)
    second = adapter("second", use_dora=True)
    for folders in ([plain, dora], [dora, plain], [dora, second]):
        with refused("(dora|second): magnitudes cannot be mixed"):
            read_pool(folders, read_config(base))
        _refused("magnitudes cannot be mixed", convert, folders)
    manifest = convert([dora, plain, second], skip_bad=True)
    assert [entry["name"] for entry in manifest["adapters"]] == ["plain"]


def test_the_manifest(convert, base, adapter, tmp_path):
    folders = [
        adapter("one", alpha=4),
        adapter("wide", r=5, targets=("block.1.layer.0.SelfAttention.q",)),
    ]
    returned = convert(folders)
    manifest = io.ConvertedPool(tmp_path / "pool").manifest
    assert manifest == returned
    one, wide = manifest["adapters"]
    assert (one["source"], one["folder"]) == (folders[0], "adapters/0000")
    weights = (Path(folders[0]) / "adapter_model.safetensors").read_bytes()
    assert one["sha256"] == hashlib.sha256(weights).hexdigest()
    assert one["sites"]["decoder.cross.v"] == {"rank": [2, 2], "scaling": [2.0, 2.0]}
    assert wide["sites"]["encoder.self.q"] == {
        "rank": [0, 5, 0],
        "scaling": [0.0, 3 / 5, 0.0],
    }
    assert manifest["totals"] == {"adapters": 2, "skipped": 0, "parameters": 392 + 140}
    config_hash = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    assert manifest["base"]["config_sha256"] == config_hash


def test_a_dry_run_reports_the_same_and_writes_nothing(base, adapter, tmp_path, capsys):
    folders = [adapter("one"), adapter("wide", r=5)]
    written = _printed(
        capsys, base, folders, "--out", tmp_path / "pool", command=_run_script
    )
    assert [line.split() for line in written.splitlines()][1:3] == [
        ["one", "14", "2", "1.5", "float32", "392"],
        ["wide", "14", "5", "0.6", "float32", "980"],
    ]
    before = sorted(tmp_path.rglob("*"))
    dry = [
        _printed(capsys, base, folders, "--dry-run", *out)
        for out in (("--out", tmp_path / "dry"), ())
    ]
    assert sorted(tmp_path.rglob("*")) == before
    would = written.replace(
        f"written to {tmp_path / 'pool'}", "would be written (dry run)"
    )
    assert dry == [would, would]


def test_a_dry_run_without_a_base_checks_the_files_alone(
    convert, base, adapter, capsys
):
    """Its report is that of a run with the base, except for the sites, which it cannot know."""
    good = adapter("one", base_model_name_or_path="google/flan-t5-small")
    bad = adapter("bad", bias="all")
    command = ["convert", "--dry-run", "--adapters", good]
    table = _printed(capsys, base, [good], "--dry-run").splitlines()[:2]
    main(command)
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == table
    assert (
        "1 x trained on google/flan-t5-small" in out
        and "these were not checked: modules, shapes" in out
    )
    main([*command, bad, "--json", "--skip-bad"])
    alone = json.loads(capsys.readouterr().out)
    whole = convert([good], dry_run=True)
    assert (
        alone["base"] is None
        and alone["totals"]["parameters"] == whole["totals"]["parameters"]
    )
    assert {
        path: of["rank"]
        for path, of in alone["adapters"][0]["sites"].items()
        if path == _Q
    } == {_Q: [2]}
    with pytest.raises(SystemExit) as ended:
        main([*command, bad])
    assert ended.value.code == 1 and "left out" in capsys.readouterr().out


def test_one_bad_adapter_stops_everything_or_is_left_out_and_listed(
    convert, base, adapter, tmp_path, capsys
):
    nan = {f"base_model.model.{_Q}.lora_A.weight": np.full((2, 8), np.nan, np.float32)}
    good = adapter("good")
    bad = adapter("bad", extra=nan)
    last = adapter("last")
    message = f"{bad}/adapter_model.safetensors: .*{_Q}.lora_A.weight holds NaN"
    _refused(
        f"^{message}.*Nothing was written; --skip-bad",
        convert,
        [good, bad],
    )
    _refused(f"^{message}", convert, [bad, good], dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad",
        "base",
        "good",
        "last",
    ]
    _refused(
        f"none of 1 adapters can be used; the first: {message}",
        convert,
        [bad],
        out=tmp_path / "p",
        skip_bad=True,
    )
    manifest = convert([good, bad, last], skip_bad=True)
    assert [entry["folder"] for entry in manifest["adapters"]] == [
        "adapters/0000",
        "adapters/0001",
    ]
    (skipped,) = io.ConvertedPool(tmp_path / "pool").manifest["skipped"]
    assert skipped["source"] == bad and "holds NaN" in skipped["reason"]
    assert f"left out {skipped['reason']}" in _printed(
        capsys, base, [good, bad, last], "--skip-bad", "--dry-run"
    )
    assert load_pool(tmp_path / "pool").names == ("good", "last")


@pytest.mark.parametrize(
    ("kind", "value", "dtype", "pool"),
    [
        ("lora_B", 3e38, np.float32, "float32"),
        ("lora_A", 1e300, np.float64, "float32"),
        ("lora_B", 1e300, np.float64, "float32"),
        ("lora_A", 3.402e38, np.float32, "bfloat16"),
    ],
)
def test_what_a_pool_would_hold_is_finite(
    convert, base, adapter, tmp_path, kind, value, dtype, pool
):
    array = np.full((2, 8) if kind == "lora_A" else (6, 2), value, dtype)
    key = f"base_model.model.{_Q}.{kind}.weight"
    folder = adapter("large", alpha=4, dtype=dtype, extra={key: array})
    message = f"{folder}: {_Q}.{kind} is infinite in {pool} with the scaling 2"
    with pytest.raises(io.AdapterError, match=message):
        read_pool([folder], read_config(base), dtype=pool)
    if pool == "float32":
        _refused(message, convert, [folder])
        assert not (tmp_path / "pool").exists()
    else:
        convert([folder])  # which holds float32
        with pytest.raises(io.AdapterError, match=f"{_Q}.{kind} is infinite"):
            load_pool(tmp_path / "pool", dtype="bfloat16")


def test_numbers_that_are_just_finite_with_the_scaling_are_kept(
    convert, base, adapter, tmp_path
):
    key = f"base_model.model.{_Q}.lora_B.weight"
    large = {key: np.full((6, 2), 1.7e38, np.float32)}
    convert([adapter("large", alpha=4, extra=large)])
    site, layer = places(read_config(base))[_Q]
    assert_allclose(load_pool(tmp_path / "pool").B[site][layer, 0], 3.4e38, rtol=1e-6)


def _edit_manifest(folder, change):
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    write_json(folder / "manifest.json", manifest)


@pytest.fixture(scope="module")
def one_pool(tmp_path_factory):
    """A pool that no test changes."""
    folder = tmp_path_factory.mktemp("one")
    base = _base(folder / "base")
    _convert(base, [_writer(base)("one")], out=folder / "pool")
    return folder / "pool"


def _first(manifest):
    return manifest["metadata"]["adapters"][0]


def _adapter(**fields):
    return lambda m: m["metadata"]["adapters"][0].update(fields)


def _config(**fields):
    return lambda m: m["metadata"]["base"]["config"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(files={}),
            "lists no adapters/0000/adapter_config.json and",
        ),
        (
            lambda m: m["files"].update({"adapters/0000/adapter_config.json": "0"}),
            "/adapters/0000/adapter_config.json: damaged or altered",
        ),
        (_adapter(folder="../../etc"), "'../../etc' is not a file inside this folder"),
        (
            lambda m: m["metadata"]["adapters"].append(_first(m) | {"name": "two"}),
            "two adapters of one folder",
        ),
        (
            lambda m: m["metadata"]["base"].update(family="mamba"),
            "family is 'mamba': expected one of t5, decoder",
        ),
        (_config(new=1), "new is unknown"),
        (_config(d_model=10**6), "modules do not fit; first"),
        (_config(d_kv=7), r"modules do not fit; first .*: expected \[r, "),
    ],
)
def test_a_manifest_that_was_edited_is_refused(one_pool, tmp_path, change, message):
    folder = tmp_path / "edited"
    shutil.copytree(one_pool, folder)
    _edit_manifest(folder, change)
    for read in (load_pool, lambda pool: io.ConvertedPool(pool).adapter("one")):
        with refused(message):
            read(folder)


def test_two_adapters_of_one_name(convert, base, adapter, tmp_path):
    first = adapter("one")
    again = shutil.copytree(first, tmp_path / "elsewhere/one")
    message = f"^{again}: another adapter is named 'one' already: rename one folder"
    _refused(message, convert, [first, str(again)])
    with refused(message):
        read_pool([first, str(again)], read_config(base))


def test_a_name_that_is_not_utf8_is_refused(base, adapter, tmp_path, capsys):
    folder = adapter("one")
    renamed = os.fsencode(folder) + b"\xff"
    os.rename(folder, renamed)
    with pytest.raises(SystemExit):
        _printed(capsys, base, [os.fsdecode(renamed)], "--out", tmp_path / "pool")
    message = r"one\udcff': a name that is not UTF-8 text: rename it"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


def test_options_of_adapters_without_adapters_are_refused(convert, adapter, tmp_path):
    pool = tmp_path / "pool"
    convert([adapter("one"), adapter("two")], out=pool)
    for options in ({"base": "x"}, {"dtype": "float16"}, {"skip_bad": True}):
        (flag,) = options
        with refused(
            f"--{flag.replace('_', '-')}: only for adapters that are converted"
        ):
            io.convert(io.ConvertOptions(out=pool, basis=2, **options))
    assert not (pool / "basis").exists()


def test_an_out_that_exists_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/precious").write_text("kept")
    with refused("pool exists: give a new folder"):
        _convert(tmp_path / "no_base", ["no_adapter"], out=tmp_path / "pool")
    assert (tmp_path / "pool/precious").read_text() == "kept"


def test_the_list_of_adapters(convert, base, adapter, tmp_path):
    one = adapter("one")
    two = adapter("two")
    listed = tmp_path / "list.txt"
    listed.write_text(
        f"# mine\n\n  {two}  # the second\n", encoding="utf-8-sig"
    )  # as Windows saves it
    manifest = convert([one], adapters_file=listed, dry_run=True)
    assert [entry["source"] for entry in manifest["adapters"]] == [one, two]
    _refused(
        r"no\.txt: no such file",
        convert,
        [one],
        adapters_file=tmp_path / "no.txt",
        dry_run=True,
    )
    listed.write_bytes(b"\xff\xfe")
    _refused(
        r"list\.txt: not UTF-8 text .* save it as UTF-8",
        convert,
        [one],
        adapters_file=listed,
        dry_run=True,
    )
    listed.write_text("# nothing\n")
    _refused(
        "no adapters given: --adapters", convert, [], adapters_file=listed, dry_run=True
    )
    _refused("the pool has no folder: give --out FOLDER", convert, [one], out=None)
    with refused(rf"'{one}', one adapter: .* a list, read_pool\(\['{one}'\]\)"):
        read_pool(one, read_config(base))


def test_the_list_of_lorahubs_adapters_comes_with_the_package(
    convert, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    _refused(
        "none of 196 adapters can be used; .*_separated_facts_3",
        convert,
        [],
        skip_bad=True,
        adapters_file=Path("lorahub"),
        dry_run=True,
    )
    (tmp_path / "lorahub").write_text("mine\n")
    _refused(
        "'mine' is neither a folder here nor a hub id",
        convert,
        [],
        adapters_file=Path("lorahub"),
        dry_run=True,
    )


def test_casting(convert, adapter, tmp_path):
    folder = adapter("one")
    convert([folder], dtype="bfloat16")
    manifest = io.ConvertedPool(tmp_path / "pool").manifest
    assert (
        manifest["cast_to"] == "bfloat16"
        and manifest["adapters"][0]["dtype"] == "bfloat16"
    )
    got = io.ConvertedPool(tmp_path / "pool").adapter("one")
    want = io.read_adapter(folder)
    for path, pair in want.factors.items():
        for a, b in zip(got.factors[path], pair, strict=True):
            assert_array_equal(a, b.astype(ml_dtypes.bfloat16))
    large = adapter(
        "large",
        extra={
            f"base_model.model.{_Q}.lora_A.weight": np.full((2, 8), 1e6, np.float32)
        },
    )
    message = (
        f"large: {_Q}.lora_A is infinite in float16 .*choose a dtype of wider range"
    )
    _refused(message, convert, [large], dry_run=True, dtype="float16")


def test_weights_of_the_base_inside_an_adapter(convert, base, adapter, tmp_path):
    shared = np.random.default_rng(0).standard_normal((20, 8), np.float32)
    same = adapter("same", extra={"base_model.model.shared.weight": shared})
    _refused("has no weights", convert, [same], dry_run=True)
    save_file({"shared.weight": shared}, base / "model.safetensors")
    manifest = convert([same])
    assert any(
        "shared.weight, equal to the base's" in note
        for note in manifest["adapters"][0]["notes"]
    )
    again = io.ConvertedPool(tmp_path / "pool").adapter("same")
    assert_array_equal(again.kept["base_model.model.shared.weight"], shared)
    other = adapter("other", extra={"base_model.model.shared.weight": shared + 1})
    _refused("unlike the base's shared.weight", convert, [other], dry_run=True)
    pool = read_pool([same], read_config(base), base_tensor=base_tensor(base))
    _assert_same_pool(load_pool(tmp_path / "pool"), pool)


_MT5 = _SIZES | {"_name_or_path": "google/mt5-small"}
_LLAMA = small_llama.CONFIG | {
    "vocab_size": 40,
    "model_type": "llama",
    "sliding_window": 4,
}


@pytest.mark.parametrize(
    ("config", "outcome", "names"),
    [
        (
            _SIZES,
            "same",
            ("base", "somebody/Base", "/elsewhere/base", "base@0123", None, "", 5),
        ),
        (
            _SIZES,
            "noted",
            (
                "google/flan-t5-large",
                "/a/checkpoint-500",
                "me/bert512",
                "me/t5-to-llama",
                "me/my-ollama-model",
                "saves/llama-factory",
                "unsloth/phi-4",
            ),
        ),
        (
            _SIZES,
            "refused",
            (
                "google/mt5-large",
                "/models/mT5-base/",
                "umt5-small",
                "Llama-3-1B",
                "my_qwen2.5@main",
            ),
        ),
        (_MT5, "noted", ("google/mt5-large",)),
        (
            _LLAMA,
            "noted",
            ("mistralai/Mistral-7B-v0.1", "me/Qwen-LLaMAfied"),
        ),
        (_LLAMA, "refused", ("Qwen/Qwen2.5-0.5B", "google/gemma-3-1b-it")),
        (_LLAMA | {"model_type": "qwen2"}, "noted", ("Qwen/Qwen3-4B",)),
        (_LLAMA | {"model_type": "gemma2"}, "noted", ("google/gemma-2b",)),
    ],
)
def test_names_of_bases_show_whether_an_adapter_belongs_to_this_one(
    convert, base, adapter, config, outcome, names
):
    write_json(base / "config.json", config)
    for theirs in names:
        folder = adapter("one", targets=("q", "q_proj"), base_model_name_or_path=theirs)
        if outcome == "refused":
            message = (
                rf"_config\.json: it was trained on '{theirs}', and the base is '{base}', "
                "a model of another family"
            )
            _refused(message, convert, [folder], dry_run=True)
        else:
            (entry,) = convert([folder], dry_run=True)["adapters"]
            notes = [note for note in entry["notes"] if "trained on" in note]
            assert len(notes) == (outcome == "noted")
            assert all(
                repr(name) in note for note in notes for name in (theirs, str(base))
            )
        shutil.rmtree(folder)


def test_a_classifier_and_its_adapter_make_no_pool(convert, base, adapter, tmp_path):
    head = np.random.default_rng(0).standard_normal((2, 8), np.float32)
    save_file({"classification_head.out_proj.weight": head}, base / "model.safetensors")
    extra = {"base_model.model.classification_head.out_proj.weight": head}
    folder = adapter(
        "one", extra=extra, task_type="SEQ_CLS", modules_to_save=["classification_head"]
    )
    _refused(
        r"task_type SEQ_CLS .*: retrain it as a language model",
        convert,
        [folder],
    )
    write_json(
        base / "config.json",
        _SIZES | {"architectures": ["T5ForSequenceClassification"]},
    )
    message = r"config\.json: architectures is \['T5ForSequenceClassification'\], .*: give the language model"
    _refused(message, convert, [folder])
    assert not (tmp_path / "pool").exists()


def test_a_pool_of_another_base(convert, base, adapter, tmp_path):
    convert([adapter("one")])
    io.open_pool(tmp_path / "pool", str(base))
    write_json(base / "config.json", _SIZES | {"d_kv": 4})
    message = r"converted for .*base: encoder\.self\.q is Site\(layers=3, d_in=8, d_out=6\) there and .*d_out=8"
    with refused(message):
        io.open_pool(tmp_path / "pool", str(base))
    write_json(base / "config.json", _SIZES | {"feed_forward_proj": "relu"})
    with refused(r"encoder\.ff\.wi_0 is Site.* there and None here"):
        io.open_pool(tmp_path / "pool", str(base))


def test_a_folder_of_peft_adapters_opens_like_a_converted_pool(
    convert, base, adapter, tmp_path
):
    folders = [adapter("one"), adapter("wide", r=5)]
    folder = Path(folders[0]).parent
    convert(folders)
    converted = io.open_pool(tmp_path / "pool", str(base))
    plain = io.open_pool(folder, str(base))
    for pool in (converted, plain):
        assert (pool.names, pool.largest_rank, pool.targets) == (
            ("one", "wide"),
            5,
            ("q", "v"),
        )
        assert pool.config.sites == read_config(base).sites
    _assert_same_pool(plain.load(["wide", 0]), converted.load(["wide", 0]))
    assert io.open_pool(folder).names == plain.names
    with refused("which are read for a base model: give its base"):
        io.open_pool(folder).load()
    with refused(r"nothing is not a pool: give one of `lorafusion convert`"):
        io.open_pool(tmp_path / "nothing")
    shutil.copytree(
        folders[0], folder / ".new.partial"
    )  # as a command that is killed leaves it
    assert io.open_pool(folder).names == plain.names
    # An adapter behind a link has the name of the link.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "mine").symlink_to(folders[0], target_is_directory=True)
    pool = io.open_pool(tmp_path / "linked", str(base))
    assert pool.load().names == pool.names == ("mine",)
