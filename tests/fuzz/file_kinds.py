"""Every kind of file that is read: a real one, and what reads it; and what may come of a damaged one."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import damage
import datasets
import gguf_models
import jax
import jax.numpy as jnp
import numpy as np
import one_block
import recipes
from json_files import read_json, write_json, write_rows
from made_up_rows import made_up
from safetensors import safe_open

import lorafusion_jax as lf
from lorafusion_jax.crossbar import (
    load_chip,
    load_config,
    load_constants,
    save_chip,
    save_config,
)
from lorafusion_jax.crossbar.config.files import config_fields
from lorafusion_jax.io import store
from lorafusion_jax.io.peft.adapter import CONFIG, WEIGHTS
from lorafusion_jax.runs.weight_list import coefficients_of, read_weights
from lorafusion_jax.support.reading import error_context
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import append_lines, read_rows


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      file: a sound one.
      read: reads it, or what it belongs to.
      sealed: a folder whose digests are put right after the file was damaged, as somebody who means harm would.
    """

    file: Path
    read: Callable[[Path], Any]
    sealed: Path | None = None


class Fault(Exception):
    """A file was read as none may be."""


def kinds(folder):
    """Write a sound file of every kind below a folder."""
    base, adapters = one_block.cut(folder, adapters=2)
    pool = folder / "converted"
    sources = tuple(map(str, sorted(adapters.iterdir())))
    lf.io.convert(
        lf.io.ConvertOptions(base=str(base), adapters=sources, out=pool, basis=4)
    )
    (entry, _) = lf.io.ConvertedPool(pool).manifest["adapters"]
    adapter = pool / entry["folder"]
    run = lf.runs.RunFolder(folder / "run")
    _write_run(run, base, pool)
    index = _written(
        folder / "sharded" / "model.safetensors.index.json",
        {"weight_map": _weight_map(base)},
    )
    for name, link in (
        ("config.json", "config.json"),
        ("model.safetensors", "one.safetensors"),
    ):
        os.link(base / name, index.with_name(link))
    pickled = shutil.copytree(
        one_block.SMALL / "adapters" / "rotl_prev", folder / "pickled"
    )
    mlx = shutil.copytree(
        Path(__file__).parents[1] / "goldens" / "mlx" / "dora", folder / "mlx"
    )
    tree = _write_qwix(folder / "qwix")
    chip = folder / "chip.safetensors"
    chips = folder / "chips.json"
    _write_chips(chips, chip)
    save_config(load_config("isaac"), folder / "isaac.yaml")
    append_lines(
        folder / "rows.jsonl",
        made_up(methods=("LoRA",), tasks=("easy",), seeds=(1, 2), items=8),
    )
    constants = Path(lf.crossbar.__file__ or "").parent / "cost" / "constants.yaml"
    shutil.copy(constants, folder)

    rows = [{"input": f"say {n}", "target": "x"} for n in range(4)]
    task = _written(folder / "task.json", rows)
    write_rows(folder / "task.jsonl", rows)
    bbh = _written(folder / "bbh" / "task.json", {"examples": rows})
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(folder / "saved")
    table.to_csv(folder / "task.csv")
    said = [
        [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]
        for n in range(4)
    ]
    write_rows(folder / "messages.jsonl", [{"messages": each} for each in said])

    def gguf_file(name, model, tokenizer):
        # Small tokenizers: most numbers of the header are the model's.
        return gguf_models.written(
            gguf_models.make(folder / name, model, lambda _, shape: np.ones(shape)),
            folder / f"{name}.gguf",
            tokenizer,
            kinds=lambda title: "Q8_0" if ".layers." in title else None,
        )

    digests = {"base": "0", "modules": {"a": "0", "b": "0"}}
    merged = _written(
        folder / "merged" / "merge.json",
        {"weights": {"a": 1, "b": {"x.0": 2}}, "digests": digests},
    )
    weights_file = _written(
        folder / "weights.json", {entry["name"]: {"encoder.0": 2.5, "decoder.0": 1}}
    )

    def gguf_base(file):
        lf.load_base(file)
        lf.load_tokenizer(file)("ab")

    def base_weights(file):
        lf.load_base(base)
        with safe_open(file, "np") as opened:
            types = [opened.get_slice(name).get_dtype() for name in opened.keys()]
        assert not any(name.startswith("F8") for name in types), (
            "8-bit numbers without scales were read"
        )

    def whole_pool(_):
        loaded = lf.load_pool(pool)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(loaded)), (
            "numbers that are not finite were read"
        )
        lf.io.resave(lf.io.ConvertedPool(pool).adapter(entry["name"]), folder / "out")
        shutil.rmtree(folder / "out")

    def weights(file):
        found = read_weights(file)
        assert found is not None
        with error_context(file):
            coefficients_of(found[0], lf.io.ConvertedPool(pool).load([*found[0]]))
        assert {} not in found[0].values(), "a module without weights was read"

    def load_basis(_):
        lf.load_basis(pool)

    def load_run(_):
        lf.load_run(run.folder)

    def read_tree(_):
        lf.io.read_adapter(str(tree), alpha=1.0)

    def read_task(file):
        load_task(file, train_rows=2)

    basis = pool / "basis"
    source = Path(sources[0])
    return {
        "pool manifest": Kind(pool / "manifest.json", whole_pool),
        "pool adapter weights": Kind(adapter / WEIGHTS, whole_pool, pool),
        "pool adapter config": Kind(adapter / CONFIG, whole_pool, pool),
        "basis manifest": Kind(basis / "manifest.json", load_basis),
        "basis arrays": Kind(basis / "arrays.safetensors", load_basis, basis),
        "final manifest": Kind(run.final / "manifest.json", load_run),
        "final arrays": Kind(run.final / "arrays.safetensors", load_run, run.final),
        "T5 config": Kind(base / "config.json", _read_structure),
        "decoder config": Kind(
            _written(folder / "decoder" / "config.json", _LLAMA), _read_structure
        ),
        "generation config": Kind(base / "generation_config.json", _read_structure),
        "base index": Kind(index, lambda file: lf.load_base(file.parent)),
        "base weights": Kind(base / "model.safetensors", base_weights),
        "adapter config": Kind(source / CONFIG, _read_adapter),
        "adapter weights": Kind(source / WEIGHTS, _read_adapter),
        "adapter pickle": Kind(pickled / "adapter_model.bin", _read_adapter),
        "MLX config": Kind(mlx / CONFIG, _read_adapter),
        "MLX weights": Kind(mlx / "adapters.safetensors", _read_adapter),
        "qwix manifest": Kind(tree / "manifest.ocdbt", read_tree),
        "qwix arrays": Kind(next((tree / "d").iterdir()), read_tree),
        "weights file": Kind(weights_file, weights),
        "merged list": Kind(merged, lambda file: read_weights(file.parent)),
        "GGUF, byte level": Kind(
            gguf_file("bytes", "llama with biases, tied", _BYTE_LEVEL), gguf_base
        ),
        "GGUF, pieces": Kind(gguf_file("pieces", "llama", _PIECES), gguf_base),
        "run config": Kind(run.folder / "config.json", load_run),
        "run results": Kind(run.folder / "results.json", lambda _: run.results()),
        "run metrics": Kind(run.folder / "metrics.jsonl", lambda _: run.metrics()),
        "run predictions": Kind(
            run.folder / "predictions.jsonl", lambda _: run.predictions()
        ),
        "chips": Kind(
            chips, lambda file: lf.hardware.load_chips(str(file)).chip_key(0)
        ),
        "chip arrays": Kind(chip, load_chip),
        "crossbar config": Kind(folder / "isaac.yaml", load_config),
        "cost constants": Kind(folder / "constants.yaml", load_constants),
        "result rows": Kind(folder / "rows.jsonl", read_rows),
        "task list": Kind(task, read_task),
        "task rows": Kind(folder / "task.jsonl", read_task),
        "messages": Kind(
            folder / "messages.jsonl",
            lambda file: load_task(file, train_rows=2, chat=True),
        ),
        "task CSV": Kind(folder / "task.csv", read_task),
        "bbh task": Kind(bbh, read_task),
        "data set info": Kind(
            folder / "saved" / "dataset_info.json", lambda file: read_task(file.parent)
        ),
        "data set rows": Kind(
            folder / "saved" / "data-00000-of-00001.arrow",
            lambda file: read_task(file.parent),
        ),
    }


def outcome(kind, root, draw):
    """Damage the file of a kind, read it, and return `read` or `refused`.

    Raises:
      Fault: anything else came of it; the message has the error and the file.
    """
    content = kind.file.read_bytes()
    hostile = damage.damaged(content, kind.file.suffix, draw)
    before = _files(root)
    sealed = {
        path: path.read_bytes() for path in before if path.name == "manifest.json"
    }
    kind.file.write_bytes(hostile)
    if kind.sealed is not None:
        _seal(kind.sealed)
    said = "read"
    try:
        kind.read(kind.file)
    except (ValueError, OSError) as error:
        said = "refused"
        if not any(name in str(error) for name in (str(root), kind.file.name)):
            raise Fault(
                f"no file is named: {error!r:.300} of {hostile!r:.500}"
            ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a panic of Rust code
        raise Fault(
            f"{type(error).__name__}: {error!s:.300} of {hostile!r:.500}"
        ) from error
    finally:
        kind.file.write_bytes(content)
        for path, text in sealed.items():
            path.write_bytes(text)
    if _files(root) != before:
        new = sorted(map(str, _files(root) ^ before))
        raise Fault(f"other files {new} of {hostile!r:.500}")
    return said


def _files(root):
    return set(root.rglob("*")) | set(root.parent.glob("*"))


def _written(path, content):
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)
    return path


def _seal(folder):
    manifest = read_json(folder / "manifest.json")
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    write_json(folder / "manifest.json", manifest)


def _read_structure(file):
    lf.models.abstract_model(lf.read_config(file.parent))


def _read_adapter(file):
    adapter = lf.io.read_adapter(str(file.parent))
    for factors in adapter.factors.values():
        assert all(np.isfinite(factor).all() for factor in factors), (
            "numbers that are not finite were read"
        )


def _weight_map(base):
    with safe_open(base / "model.safetensors", "np") as file:
        return dict.fromkeys(file.keys(), "one.safetensors")


def _write_run(run, base, pool):
    options = lf.FuseOptions(
        base=str(base), pool=str(pool), task="task.jsonl", seeds=(1, 2)
    )
    seed = {"seed": 1, "exact_match": 50.0, "loss": 0.5, "steps": 3, "modules": ["a"]}
    seed |= {"option_accuracy": None, "forward_rows": 6, "backward_rows": 5}
    with run.locked():
        config = recipes.run_config(
            options, modules=[["a"], ["b"]], task_sha256="0", trained_sha256=["0"]
        )
        config["digests"] = {"base": "0", "modules": {"a": "0"}, "basis": None}
        run.write_config(config)
        run.append_metrics(
            {"step": n, "epoch": 1, "seed": 1, "loss": 0.5} for n in range(3)
        )
        row = {
            "seed": 1,
            "row": 0,
            "input": "a",
            "target": "b",
            "prediction": "b",
            "correct": True,
        }
        row |= {"option_correct": None}
        run.write_predictions([row, row])
        run.write_results(
            lf.runs.folder.RunResults(
                task="task",
                method="fusion",
                control="none",
                trainable=3,
                trainable_by_group={"coefficients": 3},
                exact_match=50.0,
                exact_match_std=None,
                seeds=[seed],
                test_rows=2,
                test_sha256="0",
                seconds={"train": 1.0},
                environment=config["environment"],
            )
        )
    (run.folder / ".lock").unlink()
    store.save(
        run.final,
        "training result",
        {"coefficients": np.ones((2, 3), np.float32)},
        {"steps": [3, 3], "seconds": 1.0},
    )


def _write_chips(file, chip_file):
    """Write a chip, and a file of chips."""
    config = load_config("isaac")
    weights = jax.random.normal(jax.random.key(0), (8, 4), jnp.float32)
    chip = lf.program(weights, config, jax.random.key(1))
    save_chip(dataclasses.replace(chip, name="q"), chip_file)
    one = {"arrays": 1, "cells": 8, "utilisation": 0.5, "simulated_pulses": None}
    one |= {name: [1.0, 2.0, 3.0] for name in ("pulses", "joules", "seconds")}
    _written(
        file,
        {
            "base": "base",
            "base_sha256": "0",
            "pool": "pool",
            "modules": {"a": "0"},
            "basis_sha256": None,
            "crossbar": "isaac",
            "config": config_fields(config),
            "prepared": None,
            "sha256": lf.crossbar.config_hash(config),
            "digital": [],
            "key": 0,
            "chips": 1,
            "one_chip": one,
            "cells_sha256": {"q": "0"},
            "versions": {"jax": jax.__version__},
        },
    )


def _write_qwix(folder):
    """Write a LoRA as tunix does, and return its checkpoint."""
    from orbax.checkpoint import v1 as ocp

    leaves = {
        "w_lora_a": np.ones((6, 2), np.float32),
        "w_lora_b": np.ones((2, 5, 2), np.float32),
    }
    with ocp.training.Checkpointer(str(folder)) as checkpoints:
        checkpoints.save_checkpointables(
            1, {"model_params": {"layers": {"0": {"attn": {"q_proj": leaves}}}}}
        )
    return folder / "1" / "model_params"


_BYTE_LEVEL = {
    "tokenizer.ggml.tokens": ["<pad>", "<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}
_PIECES = {
    **dict.fromkeys(
        ("tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.chat_template")
    ),
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.unknown_token_id": 0,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": [1, 2],
}
