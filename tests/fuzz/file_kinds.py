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
from lorafusion_jax.runs.weight_list import coefficients_of, read_weights
from lorafusion_jax.support.reading import error_context
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import append_lines, read_rows


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      file: a sound one.
      read: reads the folder that it is in, or the file.
      seal: puts digests right after the file was damaged, as somebody who means harm would.
    """

    file: Path
    read: Callable[[], Any]
    seal: Callable[[], None] = lambda: None


class Fault(Exception):
    """A file was read as none may be."""


def kinds(folder):
    """Write a sound file of every kind below a folder."""
    base, adapters = one_block.cut(folder, adapters=2)
    pool = folder / "converted"
    out = folder / "out"
    basis = pool / "basis"
    sources = tuple(map(str, sorted(adapters.iterdir())))
    lf.io.convert(
        lf.io.ConvertOptions(base=str(base), adapters=sources, out=pool, basis=4)
    )
    entry = lf.io.ConvertedPool(pool).manifest["adapters"][0]
    first = pool / entry["folder"]
    config = read_json(base / "config.json")
    decoder = _written(folder / "decoder" / "config.json", _LLAMA)
    index = _written(
        folder / "sharded" / "model.safetensors.index.json",
        {"weight_map": _weight_map(base)},
    )
    _written(folder / "sharded" / "config.json", config)
    os.link(base / "model.safetensors", folder / "sharded" / "one.safetensors")
    pickled = shutil.copytree(
        one_block.SMALL / "adapters" / "rotl_prev", folder / "pickled"
    )
    mlx = shutil.copytree(
        Path(__file__).parents[1] / "goldens" / "mlx" / "dora", folder / "mlx"
    )
    tree = _write_qwix(folder / "qwix")
    run = lf.runs.RunFolder(folder / "run")
    _write_run(run, base, pool)
    chip = folder / "chip.safetensors"
    chips = folder / "chips.json"
    _write_chips(chips, chip)
    save_config(load_config("isaac"), folder / "isaac.yaml")
    append_lines(
        folder / "rows.jsonl",
        made_up(methods=("LoRA",), tasks=("easy",), seeds=(1, 2), items=8),
    )
    shutil.copy(
        Path(lf.crossbar.__file__ or "").parent / "cost" / "constants.yaml", folder
    )
    task = _written(
        folder / "task.json", [{"input": f"say {n}", "output": "x"} for n in range(4)]
    )
    write_rows(
        folder / "task.jsonl", [{"input": f"say {n}", "target": "x"} for n in range(4)]
    )

    (folder / "bbh").mkdir()
    bbh = _written(
        folder / "bbh" / "task.json",
        {"examples": [{"input": f"say {n}", "target": "x"} for n in range(4)]},
    )
    saved = folder / "saved"
    table = datasets.Dataset.from_list(read_json(task))
    table.save_to_disk(saved)
    messages = folder / "messages.jsonl"
    said = [
        [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]
        for n in range(4)
    ]
    write_rows(messages, [{"messages": each} for each in said])
    csv_file = folder / "task.csv"
    table.to_csv(csv_file)

    def stored(at):
        manifest = read_json(at / "manifest.json")
        for name in manifest["files"]:
            manifest["files"][name] = hashlib.sha256(
                (at / name).read_bytes()
            ).hexdigest()
        write_json(at / "manifest.json", manifest)

    def gguf_base(file):
        lf.load_base(file)
        lf.load_tokenizer(file)("ab")

    # Small tokenizers: most numbers of the header are the model's.
    bytes_file = gguf_models.written(
        gguf_models.make(
            folder / "bytes", "llama with biases, tied", lambda _, shape: np.ones(shape)
        ),
        folder / f"{'bytes'}.gguf",
        _BYTE_LEVEL,
        kinds=lambda title: "Q8_0" if ".layers." in title else None,
    )
    pieces_file = gguf_models.written(
        gguf_models.make(folder / "pieces", "llama", lambda _, shape: np.ones(shape)),
        folder / f"{'pieces'}.gguf",
        _PIECES,
        kinds=lambda title: "Q8_0" if ".layers." in title else None,
    )

    def base_weights():
        lf.load_base(base)
        with safe_open(base / "model.safetensors", "np") as file:
            types = [file.get_slice(name).get_dtype() for name in file.keys()]
        assert not any(name.startswith("F8") for name in types), (
            "8-bit numbers without scales were read"
        )

    def whole_pool():
        loaded = lf.load_pool(pool)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(loaded)), (
            "numbers that are not finite were read"
        )
        lf.io.resave(lf.io.ConvertedPool(pool).adapter(entry["name"]), out)
        shutil.rmtree(out)

    digests = {"base": "0", "modules": {"a": "0", "b": "0"}}
    merged = _written(
        folder / "merged" / "merge.json",
        {"weights": {"a": 1, "b": {"x.0": 2}}, "digests": digests},
    ).parent
    weights_file = _written(
        folder / "weights.json", {entry["name"]: {"encoder.0": 2.5, "decoder.0": 1}}
    )

    def weights():
        found = read_weights(weights_file)
        assert found is not None
        with error_context(weights_file):
            coefficients_of(found[0], lf.io.ConvertedPool(pool).load([*found[0]]))
        assert {} not in found[0].values(), "a module without weights was read"

    return {
        "pool manifest": Kind(pool / "manifest.json", whole_pool),
        "pool adapter weights": Kind(
            first / "adapter_model.safetensors", whole_pool, lambda: stored(pool)
        ),
        "pool adapter config": Kind(
            first / "adapter_config.json", whole_pool, lambda: stored(pool)
        ),
        "basis manifest": Kind(basis / "manifest.json", lambda: lf.load_basis(pool)),
        "basis arrays": Kind(
            basis / "arrays.safetensors",
            lambda: lf.load_basis(pool),
            lambda: stored(basis),
        ),
        "final manifest": Kind(
            run.final / "manifest.json", lambda: lf.load_run(run.folder)
        ),
        "final arrays": Kind(
            run.final / "arrays.safetensors",
            lambda: lf.load_run(run.folder),
            lambda: stored(run.final),
        ),
        "T5 config": Kind(
            base / "config.json", lambda: lf.models.abstract_model(lf.read_config(base))
        ),
        "decoder config": Kind(
            decoder, lambda: lf.models.abstract_model(lf.read_config(decoder.parent))
        ),
        "generation config": Kind(
            base / "generation_config.json", lambda: lf.read_config(base)
        ),
        "base index": Kind(index, lambda: lf.load_base(index.parent)),
        "base weights": Kind(base / "model.safetensors", base_weights),
        "adapter config": Kind(
            Path(sources[0]) / "adapter_config.json",
            lambda: _read_adapter(sources[0]),
        ),
        "adapter weights": Kind(
            Path(sources[0]) / "adapter_model.safetensors",
            lambda: _read_adapter(sources[0]),
        ),
        "adapter pickle": Kind(
            pickled / "adapter_model.bin", lambda: _read_adapter(str(pickled))
        ),
        "MLX config": Kind(
            mlx / "adapter_config.json", lambda: lf.io.read_adapter(str(mlx))
        ),
        "MLX weights": Kind(
            mlx / "adapters.safetensors", lambda: _read_adapter(str(mlx))
        ),
        "qwix manifest": Kind(
            tree / "manifest.ocdbt", lambda: lf.io.read_adapter(str(tree), alpha=1.0)
        ),
        "qwix arrays": Kind(
            next((tree / "d").iterdir()),
            lambda: lf.io.read_adapter(str(tree), alpha=1.0),
        ),
        "weights file": Kind(weights_file, weights),
        "merged list": Kind(merged / "merge.json", lambda: read_weights(merged)),
        "GGUF, byte level": Kind(bytes_file, lambda: gguf_base(bytes_file)),
        "GGUF, pieces": Kind(pieces_file, lambda: gguf_base(pieces_file)),
        "run config": Kind(run.folder / "config.json", lambda: lf.load_run(run.folder)),
        "run results": Kind(run.folder / "results.json", run.results),
        "run metrics": Kind(run.folder / "metrics.jsonl", run.metrics),
        "run predictions": Kind(run.folder / "predictions.jsonl", run.predictions),
        "chips": Kind(chips, lambda: lf.hardware.load_chips(str(chips)).chip_key(0)),
        "chip arrays": Kind(chip, lambda: load_chip(chip)),
        "crossbar config": Kind(
            folder / "isaac.yaml", lambda: load_config(folder / "isaac.yaml")
        ),
        "cost constants": Kind(
            folder / "constants.yaml", lambda: load_constants(folder / "constants.yaml")
        ),
        "result rows": Kind(
            folder / "rows.jsonl", lambda: read_rows(folder / "rows.jsonl")
        ),
        "task list": Kind(task, lambda: load_task(task, train_rows=2)),
        "task rows": Kind(
            folder / "task.jsonl",
            lambda: load_task(folder / "task.jsonl", train_rows=2),
        ),
        "messages": Kind(
            messages, lambda: load_task(messages, train_rows=2, chat=True)
        ),
        "task CSV": Kind(csv_file, lambda: load_task(csv_file, train_rows=2)),
        "bbh task": Kind(bbh, lambda: load_task(bbh, train_rows=2)),
        "data set info": Kind(
            saved / "dataset_info.json", lambda: load_task(saved, train_rows=2)
        ),
        "data set rows": Kind(
            saved / "data-00000-of-00001.arrow", lambda: load_task(saved, train_rows=2)
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
    kind.seal()
    said = "read"
    try:
        kind.read()
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


def _read_adapter(source):
    adapter = lf.io.read_adapter(source)
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
