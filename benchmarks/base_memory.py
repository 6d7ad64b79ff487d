"""Memory of a decoder's weights in 4 and 8 bits over that in float32, and the peak of loading them.

    python benchmarks/base_memory.py [--shape smollm2-135m] [--json]

Random weights in a GGUF file of Q8_0. `int8` keeps the file's own codes, NF4 is quantised
from them. The embedding is the head of a tied model and stays in float32. Each load has a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import _measure
import jax
import numpy as np
from _measure import case
from _model import config_of
from flax import nnx

from lorafusion_jax import Architecture, load_base
from lorafusion_jax.parts import DecoderConfig, abstract_model, family_of

_PAGE = 4096
_KINDS = ("float32", "nf4", "int8")


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--shape", default="smollm2-135m", help="of the base model")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(_loaded(*options.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "base.gguf"
        _write(file, config_of(options.shape))
        found = {}
        for kind in _KINDS:
            command = [sys.executable, __file__, "--load", str(file), kind]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[kind] = json.loads(said.splitlines()[-1])
    cases = [
        case(
            f"{options.shape}, base of Q8_0 in {kind}: bytes / those of float32",
            found[kind]["weights"] / found["float32"]["weights"],
            None,
            mib=found[kind]["weights"] / 2**20,
        )
        for kind in _KINDS[1:]
    ]
    cases += [
        case(
            f"{options.shape}, base of Q8_0 loaded in {kind}: peak / bytes of the weights",
            of_kind["peak"] / of_kind["weights"],
            None,
            peak_mib=of_kind["peak"] / 2**20,
        )
        for kind, of_kind in found.items()
    ]
    _measure.show(cases, as_json=options.json)


def _loaded(file: str, kind: str) -> dict[str, int]:
    """Load the base, and return the bytes of its arrays and how far the process's memory rose meanwhile."""
    jax.block_until_ready(jax.numpy.zeros(1))
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(file, quantise=None if kind == "float32" else kind)
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    done.set()
    watcher.join()
    return {"weights": sum(a.on_device_size_in_bytes() for a in arrays), "peak": max(peak, _resident()) - before}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _write(file: Path, config: Architecture) -> None:
    """Write a GGUF file of a Llama with random weights in Q8_0 and norms of one."""
    import gguf

    assert isinstance(config, DecoderConfig) and config.model_type == "llama", config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_eos_token_id(config.end_ids[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(number) for number in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    rng = np.random.default_rng(0)
    for slot in family_of(config).checkpoint.slots(abstract_model(config)):
        for name in slot.names:
            path, _, suffix = name.rpartition(".")
            if len(slot.shape) == 1:
                numbers, kind = np.ones(slot.shape, np.float32), gguf.GGMLQuantizationType.F32
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                numbers = gguf.quants.quantize(0.02 * rng.standard_normal(slot.shape, np.float32), kind)
            writer.add_tensor(f"{names.get_name(path)}.{suffix}", numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
