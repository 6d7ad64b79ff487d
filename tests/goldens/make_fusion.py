"""Make `fusion/` again: what PyTorch, transformers and PEFT compute for three small models, alone and adapted.

    python tests/goldens/make_fusion.py      # with the extra `peft`; a minute on one core

The models and adapters come from `seeded.py`. A fusion is computed by its definition, as dense weights put in place of
the base's; PyTorch derives the gradients and Adam's steps. Single adapters are computed by PEFT itself, and a fusion of
one adapter with all coefficients 1 is checked against PEFT.
"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import seeded
import torch
import transformers

STEPS = 20
LR_COEFFICIENTS = 0.02
LR_MAGNITUDES = 0.005
L1 = 0.0005
L2 = 1e-5
NEW_TOKENS = 16
MAGNITUDE_STEPS = (1, 2, 5, 10, 20)
# The logits that are kept, of 6 positions of the decoder and of 12 of the decoder-only model.
POSITIONS = {"t5": (0, 2, 5), "llama": (0, 3, 7, 11)}
# Two implementations' logits differ by 1e-4 or less: no text may hang on less than this.
SMALLEST_MARGIN = 1e-3

SINGLES = {
    "t5a": ("lora_0", "lora_0_bin", "rank_alpha_pattern", "rslora", "dora"),
    "t5b": (),
    "llama": (),
}
# File, adapters, whether factors are mixed (else products are summed), whether magnitudes are trained.
POOL = ("lora_0", "lora_1", "lora_2", "lora_3")
FUSIONS = {
    "t5a": (
        ("pool_factors_lora", POOL, True, False),
        ("pool_factors_dora", POOL, True, True),
        ("pool_products_dora", POOL, False, True),
        ("single_dora_fused", ("dora",), True, True),
    ),
    "t5b": (
        ("pool_factors_dora", POOL, True, True),
        ("pool_products_lora", POOL, False, False),
    ),
    "llama": (("pool_factors_lora", POOL[:2], True, False),),
}


class Factors(NamedTuple):
    """One adapter at one matrix, as PEFT holds it."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None


def load(folder):
    """Return the base model in float32 and without dropout."""
    config = json.loads((folder / "base" / "config.json").read_text())
    t5 = config["model_type"] == "t5"
    family = (
        transformers.T5ForConditionalGeneration if t5 else transformers.LlamaForCausalLM
    )
    return family.from_pretrained(folder / "base", dtype=torch.float32).eval()


def inputs(kind, vocabulary=256):
    """Return two batches, of four and three rows of falling lengths."""
    decoder_only = kind == "llama"
    arrays = {}
    for k, rows in enumerate((4, 3)):
        ids = seeded.integers(f"{kind}/ids{k}", (rows, 12), 3, vocabulary)
        lengths = np.array([12, 10, 8, 6])[:rows, None]
        mask = np.arange(12)[None] < lengths
        if decoder_only:
            labels = np.where(mask & (np.arange(12)[None] >= 4), ids, -100)
        else:
            ids = np.where(np.arange(12)[None] == lengths - 1, 1, ids)
            labels = seeded.integers(f"{kind}/labels{k}", (rows, 6), 3, vocabulary)
            ends = np.array([6, 5, 4, 3])[:rows, None]
            places = np.arange(6)[None]
            labels = np.where(
                places < ends - 1, labels, np.where(places == ends - 1, 1, -100)
            )
        arrays |= {
            f"input_ids_{k}": np.where(mask, ids, 0),
            f"attention_mask_{k}": mask.astype(np.int64),
        }
        arrays[f"labels_{k}"] = labels
    return arrays


class Texts:
    """The batches on a model: logits, losses and greedily generated tokens."""

    def __init__(self, model, arrays):
        self.model = model
        self.decoder_only = not model.config.is_encoder_decoder
        self.batches = [
            {
                name: torch.from_numpy(
                    np.ascontiguousarray(arrays[f"{name}_{k}"], np.int64)
                )
                for name in ("input_ids", "attention_mask", "labels")
            }
            for k in (0, 1)
        ]

    def run(self, k, weights=None):
        """Return the output of a batch, with the mean cross-entropy and the logits, with some weights replaced."""
        return torch.func.functional_call(
            self.model, weights or {}, kwargs=self.batches[k]
        )

    def greedy(self, weights=None):
        """Generate from batch 0."""
        prompt = {
            name: self.batches[0][name] for name in ("input_ids", "attention_mask")
        }
        if self.decoder_only:
            prompt = {name: array[:, :4] for name, array in prompt.items()}
        return greedy(self.model, prompt, NEW_TOKENS, weights)


def greedy(model, prompt, tokens, weights=None):
    """Generate with some weights replaced.

    Raises:
      ValueError: a choice hangs on a smaller difference of two logits than SMALLEST_MARGIN.
    """
    own = dict(model.named_parameters())
    before = {name: own[name].detach().clone() for name in weights or {}}
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            own[name].copy_(weight)
        found = model.generate(
            **prompt,
            max_new_tokens=tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for name, weight in before.items():
            own[name].copy_(weight)
    ends = torch.as_tensor(model.generation_config.eos_token_id).reshape(-1)
    first = found.sequences.shape[1] - len(found.scores)
    for step, scores in enumerate(found.scores):
        best = scores.topk(2).values
        going = ~torch.isin(found.sequences[:, first : first + step], ends).any(dim=1)
        margin = float((best[:, 0] - best[:, 1])[going].min())
        if margin < SMALLEST_MARGIN:
            raise ValueError(
                f"two logits are only {margin:.1e} apart: change the seed in seeded.py"
            )
    return found.sequences.numpy()


def _factors(layer, name):
    if name not in layer.lora_A:
        return None
    magnitude = None
    if name in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[name].weight.detach()
    return Factors(
        layer.lora_A[name].weight.detach(),
        layer.lora_B[name].weight.detach(),
        layer.scaling[name],
        magnitude,
    )


def read_pool(base, folder, names):
    """Return the factors of every adapted matrix as PEFT reads them, by path, in the order of the base's modules."""
    order = [name for name, _ in base.named_modules()]
    model = peft.PeftModel.from_pretrained(
        base, folder / "adapters" / names[0], adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(folder / "adapters" / name, adapter_name=name)
    pool = {}
    for path in order:
        layer = model.base_model.model.get_submodule(path) if path else None
        if layer is None or not hasattr(layer, "lora_A"):
            continue
        pool[path] = [_factors(layer, name) for name in names]
    model.unload()
    return pool


def column(path, config):
    """Return the block of a matrix: a T5's encoder first, then its decoder."""
    number = int(path.split(".")[2])
    return number + (config.num_layers if path.startswith("decoder") else 0)


def fused(model, pool, coefficients, magnitudes, *, mix):
    """Return the weights of a fusion by its definition."""
    own = dict(model.named_parameters())
    weights = {}
    for number, (path, adapters) in enumerate(pool.items()):
        c = coefficients[:, column(path, model.config)]
        if mix:
            # Ranks and scalings are the same for all.
            b = sum((w * f[1] for w, f in zip(c, adapters, strict=True)))
            a = sum((w * f[0] for w, f in zip(c, adapters, strict=True)))
            delta = adapters[0].scaling * b @ a
        else:  # an adapter need not have every matrix
            delta = sum(
                w * f.scaling * f.b @ f.a
                for w, f in zip(c, adapters, strict=True)
                if f is not None
            )
        weight = own[f"{path}.weight"].detach() + delta
        if magnitudes is not None:
            norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True).detach()
            weight = magnitudes[number][:, None] * weight / norm
        weights[f"{path}.weight"] = weight
    return weights


def start_magnitudes(model, pool):
    """Return a DoRA adapter's own magnitudes, else the norms of the base's rows."""
    own = dict(model.named_parameters())
    return [
        torch.linalg.vector_norm(own[f"{path}.weight"].detach(), dim=1)
        if adapters[0] is None or adapters[0].magnitude is None
        else adapters[0].magnitude.clone()
        for path, adapters in pool.items()
    ]


def fusion(texts, pool, start, *, mix, magnitudes):
    """Return logits, loss and gradients at the start, Adam's steps, and logits at the end, all positions of each."""
    model = texts.model
    c = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    m = None
    groups = [{"params": [c], "lr": LR_COEFFICIENTS, "weight_decay": L2}]
    if magnitudes:
        m = [row.requires_grad_() for row in start_magnitudes(model, pool)]
        groups.append({"params": m, "lr": LR_MAGNITUDES})

    def weights():
        return fused(model, pool, c, m, mix=mix)

    def loss_of(batch):
        output = texts.run(batch, weights())
        return output.loss / len(output.logits)

    first = texts.run(0, weights())
    loss = loss_of(0)
    gradients = torch.autograd.grad(loss, [c, *(m or [])])
    found = {
        "logits": first.logits,
        "loss_mean_ce": first.loss,
        "loss": loss,
        "grad_coeff": gradients[0],
        "logits_batch1": texts.run(1, weights()).logits,
        "greedy_init": texts.greedy(weights()),
    }
    if m is not None:
        found |= {
            "mag0": torch.stack(m).clone(),
            "grad_mag": torch.stack(gradients[1:]),
        }
    # Batches 0 and 1 in turns.
    adam = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8)
    steps = {"traj_loss": [], "traj_l1": [], "traj_coeff": [c.detach().clone()]}
    moved = []
    for step in range(STEPS):
        loss = loss_of(step % 2)
        l1 = L1 * c.abs().mean()
        adam.zero_grad()
        (loss + l1).backward()
        adam.step()
        for name, value in (("traj_loss", loss), ("traj_l1", l1), ("traj_coeff", c)):
            steps[name].append(value.detach().clone())
        if m is not None and step + 1 in MAGNITUDE_STEPS:
            moved.append(torch.stack(m).detach().clone())
    found |= {name: torch.stack(values) for name, values in steps.items()}
    if moved:
        found["traj_mag"] = torch.stack(moved)
    return found | {
        "logits_final": texts.run(0, weights()).logits,
        "greedy_final": texts.greedy(weights()),
    }


def single(folder, name, arrays):
    """Return what PEFT computes for one adapter, and after merging it."""
    adapter = folder / "adapters" / name
    model = peft.PeftModel.from_pretrained(load(folder), adapter).eval()
    texts = Texts(model, arrays)
    first = texts.run(0)
    found = {
        "logits": first.logits,
        "loss_mean_ce": first.loss,
        "logits_batch1": texts.run(1).logits,
        "greedy": texts.greedy(),
    }
    merged = Texts(model.merge_and_unload().eval(), arrays)
    return found | {"logits_merged": merged.run(0).logits}


def make(kind, folder, target):
    """Write the arrays of one model."""
    arrays = inputs(kind)
    model = load(folder)
    texts = Texts(model, arrays)
    positions = POSITIONS[model.config.model_type]
    base = texts.run(0)
    found = {
        "base_logits_0": base.logits,
        "base_loss_mean_ce_0": base.loss,
        "base_greedy_0": texts.greedy(),
    }
    write(
        target / "inputs.npz",
        found,
        positions,
        arrays | {"positions": np.array(positions)},
    )
    alone = {name: single(folder, name, arrays) for name in SINGLES[kind]}
    for name, found in alone.items():
        write(target / f"single_{name}.npz", found, positions)
    blocks = len(
        {column(path, model.config) for path in read_pool(model, folder, ("lora_0",))}
    )
    for file, names, mix, magnitudes in FUSIONS[kind]:
        pool = read_pool(model, folder, names)
        start = seeded.normal(f"{kind}/{file}/coefficients", (len(names), blocks), 0.4)
        start = np.ones_like(start) if len(names) == 1 else start
        found = fusion(texts, pool, start, mix=mix, magnitudes=magnitudes)
        paths = (
            {
                "modules": np.array(list(pool)),
                "magnitude_steps": np.array(MAGNITUDE_STEPS),
            }
            if magnitudes
            else {}
        )
        write(target / f"{file}.npz", found, positions, paths)
    for name, found in alone.items():
        pool = read_pool(model, folder, (name,))
        m = start_magnitudes(model, pool) if name == "dora" else None
        ours = texts.run(
            0, fused(model, pool, torch.ones(1, blocks), m, mix=False)
        ).logits
        difference = float((ours - found["logits"]).abs().max())
        print(
            f"{kind} {name}: the definition and PEFT differ by {difference:.1e} in logits"
        )
        if difference > 2e-4:
            raise ValueError(
                f"{kind} {name}: the definition and PEFT differ by {difference}"
            )


def write(path, found, positions, more=None):
    """Write arrays in a file, logits at some positions only."""
    arrays = {
        name: x.detach().numpy() if isinstance(x, torch.Tensor) else x
        for name, x in found.items()
    }
    arrays = {
        name: x[:, list(positions)] if "logits" in name else x
        for name, x in arrays.items()
    }
    np.savez_compressed(path, **arrays, **(more or {}))


def write_bin():
    """Write lora_0's tensors as PyTorch pickles them."""
    folder = seeded.HERE / "fusion" / "t5a"
    config = json.loads((folder / "adapters/lora_0/adapter_config.json").read_text())
    base = json.loads((folder / "base/config.json").read_text())
    tensors = seeded.adapter("fusion/t5a/lora_0", config, seeded.matrices(base))
    tensors = {name: torch.from_numpy(x) for name, x in tensors.items()}
    torch.save(tensors, folder / "adapters" / "lora_0_bin" / "adapter_model.bin")


def main():
    """Write the arrays of all models in `fusion/`."""
    out = seeded.target(seeded.HERE / "fusion")
    torch.set_num_threads(1)
    write_bin()
    with tempfile.TemporaryDirectory() as temporary:
        folder = seeded.unfold(Path(temporary)) / "fusion"
        for kind in FUSIONS:
            (out / kind).mkdir(parents=True, exist_ok=True)
            make(kind, folder / kind, out / kind)


if __name__ == "__main__":
    main()
