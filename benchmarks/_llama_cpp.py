"""Answers from the types of a GGUF file in turns with llama.cpp: one row, one thread, CPU time."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import case, of_turns
from flax import nnx

from lorafusion_jax import Frozen, LowRank, generate, load_base, read_config
from lorafusion_jax.io import lora_adapter, write_adapter

# tokens of an answer, tokens of a prompt, rank of the run on queries and values
_NEW = 64
_PROMPT = 512
_RANK = 16
# (required, ambition) of our time over that of the fastest of these types in llama.cpp, and how we load the file.
_TYPES: dict[
    str, tuple[tuple[float, float | None], tuple[str, ...], dict[str, Any]]
] = {
    "F32": ((1.05, None), ("F32",), {}),
    "BF16": ((1.3, None), ("F16", "BF16"), {"dtype": "bfloat16"}),
    "Q8_0": ((1.6, 1.2), ("Q8_0",), {"quantise": "int8"}),
}
_OF_PROMPT = 1.3
_OF_RUN = 1.1
# Run by llama.cpp's interpreter: it reads [prompt, new tokens] in lines, and prints seconds.
_CHILD = """
import json, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = sys.argv[1], 1024, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
if sys.argv[2:]:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = sys.argv[2], 1.0
    params.lora_adapters = [lora]
server = xllamacpp.Server(params)
print(xllamacpp.get_system_info(), flush=True)
for line in sys.stdin:
    prompt, new = json.loads(line)
    asked = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    began = time.process_time()
    used = server.handle_completions(asked)["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (len(prompt), new), used
    print(time.process_time() - began, flush=True)
"""


def cases(file: Path, python: str, rounds: int) -> list[dict[str, Any]]:
    """Return ratios of CPU time for a token and for a long prompt; print llama.cpp's instruction set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {}
        files = {
            kind: _of_type(file, folder / f"{kind}.gguf", kind)
            for kind in ("F32", "F16", "BF16", "Q8_0")
        }
        run, lora = _run(files["F32"], folder)
        for kind, path in files.items():
            runs[f"llama.cpp {kind}"] = _theirs(python, path)
        runs["llama.cpp with a run"] = _theirs(python, files["Q8_0"], lora)
        for kind, (_, _, how) in _TYPES.items():
            runs[kind] = _ours(files[kind], how, {})
        runs["with a run"] = _ours(files["Q8_0"], _TYPES["Q8_0"][2], run)
        token = _seconds(runs, rounds, *([100], _NEW))
        prompt = _seconds(runs, rounds, *([*range(100, 100 + _PROMPT)], 1))
    found = []

    def add(
        what: str,
        took: dict[str, np.ndarray],
        ours: str,
        peers: Sequence[str],
        *bars: float | None,
    ) -> None:
        peer = min(peers, key=lambda name: np.median(took[name]))
        numbers = {
            f"{who}cpu_ms": 1e3 * float(np.median(took[of]))
            for who, of in (("", ours), ("peer_", peer))
        }
        title = f"{file.stem}, 1 core, 1 row, {what}: our {ours} / {peer}"
        found.append(
            case(
                title, of_turns(took[ours], took[peer]), *bars, **numbers, rounds=rounds
            )
        )

    for kind, (bars, names, _) in _TYPES.items():
        peers = [f"llama.cpp {name}" for name in names]
        add("a token", token, kind, peers, *bars)
        add(f"a prompt of {_PROMPT} tokens", prompt, kind, peers, _OF_PROMPT)
    for peer, bar in (("Q8_0", _OF_RUN), ("llama.cpp with a run", None)):
        add("a token of Q8_0", token, "with a run", [peer], bar)
    return found


def _seconds(
    runs: dict[str, Any], rounds: int, prompt: list[int], new: int
) -> dict[str, np.ndarray]:
    """Return the CPU seconds of a token of an answer, [rounds]; the first call of each compiles."""
    turns = [
        [run(prompt, new) / new for run in runs.values()] for _ in range(rounds + 1)
    ][1:]
    return dict(zip(runs, np.array(turns).T, strict=True))


def _theirs(python: str, file: Path, *lora: Path) -> Callable[[list[int], int], float]:
    command = [python, "-c", _CHILD, *map(str, (file, *lora))]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin and child.stdout
    sent = child.stdin
    got = child.stdout
    if not (system := got.readline()):
        sys.exit(
            f"{python} cannot run xllamacpp: give an interpreter that can with --llama-cpp"
        )
    print(f"llama.cpp, {file.stem}: {system.strip()}", file=sys.stderr)

    def run(prompt: list[int], new: int) -> float:
        print(json.dumps([prompt, new]), file=sent, flush=True)
        return float(got.readline())

    return run


def _ours(
    file: Path, how: dict[str, Any], adapters: dict[str, LowRank]
) -> Callable[[list[int], int], float]:
    model = load_base(file, **how)
    model.config = dataclasses.replace(model.config, eos_id=-1)
    graph, weights = nnx.split(model)
    weights = Frozen(weights).per_layer().base

    @partial(jax.jit, static_argnames="new")
    def answer(weights: Any, adapters: Any, ids: jax.Array, new: int) -> jax.Array:
        return generate(
            nnx.merge(graph, weights), ids, ids >= 0, adapters, max_new_tokens=new
        )

    def run(prompt: list[int], new: int) -> float:
        began = time.process_time()
        answer(weights, adapters, jnp.array([prompt]), new=new).block_until_ready()
        return time.process_time() - began

    return run


def _of_type(source: Path, target: Path, kind: str) -> Path:
    """Write a GGUF file with its matrices in another type."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture = "general.architecture"
    writer = GGUFWriter(target, reader.fields[architecture].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (
            architecture,
            "general.file_type",
        ):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        chosen = GGMLQuantizationType[kind if plain.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, quantize(plain, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _run(base: Path, folder: Path) -> tuple[dict[str, LowRank], Path]:
    """Return a random adapter of queries and values, and its GGUF file."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(0.01 * rng.standard_normal(shape), jnp.float32)

    config = read_config(base)
    out = folder / "lora"
    adapters = {
        name: LowRank(
            draw(site.layers, site.d_in, _RANK), draw(site.layers, _RANK, site.d_out)
        )
        for name, site in config.sites.items()
        if name.endswith(("q_proj", "v_proj"))
    }
    write_adapter(
        folder / "pool" / "one", *lora_adapter(config, adapters, base=str(base))
    )
    options = f"--base {base} --pool {folder}/pool --weights one=1 --format gguf --out {out}".split()
    command = [sys.executable, "-m", "lorafusion_jax.cli", "merge", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return adapters, out / "adapter.gguf"
