"""One layer of SmolLM2-135M on arrays: tokens per second, beside the digital layer and CrossSim's order of work.

    python benchmarks/decoder_on_arrays.py [--tokens 512] [--json]

The seven projections of a layer with random weights, in the arrays of examples/smollm2/chip.yaml, as teacher forcing
reads them. The floor is a loop of the float32 products that such a read consists of, 28 for signed inputs. The tokens
per second of the whole model are extrapolated: all layers, and the head, which is digital; norms and attention are left
out. Seconds are CPU seconds of one core, so that other work beside it counts less.

CrossSim 3.2 (Sandia) itself is not run. Its part is taken by a NumPy loop over row tiles, input slices and weight
slices with the operations of its bitsliced_core.py and quantizer_adc.py in float32, positive and negative cells
subtracted beforehand (its `fast_balanced`), and without the rest of what it does.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import ROOT, case, in_turns, of_turns

from lorafusion_jax import crossbar, matmul
from lorafusion_jax.parts import known_shapes

_SHAPE = "smollm2-135m"
_CONFIG = ROOT / "examples" / "smollm2" / "chip.yaml"
_ERROR = 0.01
_PROBED = 64  # tokens that ranges are calibrated on


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _measure.launch(1)
    cases = _cases(options.tokens, options.rounds)
    _measure.show(cases, as_json=options.json)


def _cases(tokens: int, rounds: int) -> list[dict[str, Any]]:
    shape, key = known_shapes()[_SHAPE], jax.random.key(0)
    sizes = {name: (site.d_in, site.d_out) for name, site in shape.sites.items()}
    weights = {name: jax.random.normal(jax.random.fold_in(key, i), s) for i, (name, s) in enumerate(sizes.items())}
    inputs = {name: jax.random.normal(jax.random.fold_in(key, s[0]), (tokens, s[0])) for name, s in sizes.items()}
    perfect = crossbar.load_config(_CONFIG)
    device = dataclasses.replace(perfect.device, programming=crossbar.Independent(_ERROR))
    on_arrays = {
        "ideal ADC": dataclasses.replace(perfect, adc=None),
        "8-bit ADC": perfect,
        f"8-bit ADC, programming error {_ERROR:.0%}": dataclasses.replace(perfect, device=device),
    }
    chips = {name: programmed(weights, inputs, config) for name, config in on_arrays.items()}
    read = jax.jit(lambda x, w: {name: matmul(x[name], w[name]) for name in w})
    layers: dict[str, Callable[[], Any]] = {
        name: lambda w=w: jax.block_until_ready(read(inputs, w)) for name, w in ({"digital": weights} | chips).items()
    }
    layers["the products of a read"] = _products(sizes, tokens)
    loops = [crosssim_loop(np.asarray(x), chips["8-bit ADC"][name]) for name, x in inputs.items()]
    layers["CrossSim's loop, 8-bit ADC"] = lambda: [loop() for loop in loops]
    d_model, words = shape.d_model, shape.vocab_size
    head = jax.jit(lambda x, w: x @ w)
    x, w = jax.random.normal(key, (tokens, d_model)), jax.random.normal(key, (d_model, words))
    turns = layers | {"head": lambda: jax.block_until_ready(head(x, w))}
    seconds = in_turns(turns, rounds, time.process_time)
    of_head, floor = seconds.pop("head"), seconds["the products of a read"]
    depth = next(iter(shape.sites.values())).layers
    return [
        case(
            f"a layer of {_SHAPE}, {name} / the products of a read",
            of_turns(took, floor),
            None,
            tokens_per_second_of_the_model=tokens / float(np.median(depth * took + of_head)),
            milliseconds_of_a_layer=1e3 * float(np.median(took)),
            paths=sorted({_path(chip) for chip in chips[name].values()}) if name in chips else [],
        )
        for name, took in seconds.items()
    ]


def _path(chip: crossbar.Chip) -> str:
    """Return the path of a large batch."""
    return "tables" if chip.plan.tabulates else chip.plan.path


def programmed(
    weights: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array], config: crossbar.CrossbarConfig
) -> dict[str, crossbar.Chip]:
    """Return the chips of a layer, as a model's are programmed, calibrated on some inputs."""
    chips = crossbar.program_tree(dict(weights), {"*": config}, jax.random.key(1))
    if config.adc is None:
        return chips
    probe = jax.jit(lambda x, chip: crossbar.probe(x, chip)[1])
    return {name: crossbar.calibrated(chip, probe(inputs[name][:_PROBED], chip)) for name, chip in chips.items()}


def crosssim_loop(x: np.ndarray, chip: crossbar.Chip) -> Callable[[], np.ndarray]:
    """Return CrossSim's product of inputs [B, d_in] and the perfect cells of a calibrated chip, [B, d_out].

    Cells are in units of Gmax and inputs in those of the full scale, as there.
    """
    config, codes = chip.config, np.asarray(chip.codes)
    assert config.dac is not None and config.adc is not None and chip.limits is not None
    width, count = config.weight_slices[0], len(config.weight_slices)
    tops = np.asarray(chip.limits)[0, :, 1].tolist()
    magnitude = config.dac.magnitude_bits
    steps = 2.0**config.adc.bits - 2
    ends = np.cumsum((0, *chip.geometry.rows))
    cells = [
        [
            np.ascontiguousarray((np.sign(codes) * (np.abs(codes) // 2 ** (width * i) % 2**width))[a:b].T, np.float32)
            / np.float32(2**width - 1)
            for i in range(count)
        ]
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    scale = np.asarray(chip.scale).reshape(-1, 1)
    rows = np.ascontiguousarray(x.T, np.float32)

    def convert(current: np.ndarray, top: float) -> np.ndarray:
        current = current.clip(-top, top)
        current -= -top
        current *= steps / (2 * top)
        np.rint(current, out=current)
        current /= steps / (2 * top)
        current += -top
        return current

    def run() -> np.ndarray:
        limit = np.abs(rows).max(axis=0)
        n = np.rint(rows / limit * (2**magnitude - 1))
        total = np.zeros((codes.shape[1], rows.shape[1]), np.float32)
        for tile, a, b in zip(cells, ends, ends[1:], strict=False):
            of_tile, sign = np.abs(n[a:b]).astype(np.int32), np.sign(n[a:b])
            sums = [np.zeros_like(total) for _ in range(count)]
            for k in range(magnitude):
                pulses = sign * ((of_tile >> k) & 1).astype(np.float32)
                for i in range(count):
                    sums[i] += convert(np.dot(tile[i], pulses), tops[i])
                    sums[i] /= 2.0
            for i in range(count):
                total += 2.0 ** (width * i) * (2**width - 1) * 2.0**magnitude / (2**magnitude - 1) * sums[i]
        return (total * scale * limit).T

    return run


def _products(sizes: Mapping[str, tuple[int, int]], tokens: int) -> Callable[[], Any]:
    """Return compiled loops of the full float32 products of a layer's reads."""
    key = jax.random.key(3)
    x = {name: jax.random.normal(key, (4, tokens, d_in)) for name, (d_in, _) in sizes.items()}
    w = {name: jax.random.normal(key, (4, *size)) for name, size in sizes.items()}

    @jax.jit
    def products(x: dict[str, jax.Array], w: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def of_site(x: jax.Array, w: jax.Array) -> jax.Array:
            zero = jnp.zeros((x.shape[1], w.shape[2]))
            return jax.lax.fori_loop(0, 28, lambda i, y: y + jnp.dot(x[i % 4], w[i % 4], precision="highest"), zero)

        return {name: of_site(x[name], w[name]) for name in w}

    return lambda: jax.block_until_ready(products(x, w))


if __name__ == "__main__":
    main()
