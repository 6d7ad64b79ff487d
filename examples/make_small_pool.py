"""Make the embedded small pool: a T5 trained on string tasks, 28 PEFT adapters, and tasks to fuse them for.

    python examples/make_small_pool.py --out examples/small

Everything is written as the Hugging Face hub has it: the base as a transformers folder with its tokenizer,
adapters as PEFT folders, tasks as JSONL.
"""

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array
from safetensors.numpy import load_file, save_file
from string_tasks import (
    CHARACTER_OPS,
    LETTERS,
    MAX_LETTERS,
    MAX_OUTPUT,
    POSITION_OPS,
    Task,
    draw,
    split,
)
from tqdm import tqdm

from lorafusion_jax import LowRank, generate, save_base
from lorafusion_jax.io import new_folder, write_adapter
from lorafusion_jax.models import T5, T5Config, decoder_inputs
from lorafusion_jax.tasks import IGNORED
from lorafusion_jax.training import cross_entropy as of_logits, standard_promotion

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    ":",
    "then",
    *POSITION_OPS,
    *CHARACTER_OPS,
    *LETTERS,
    *"0123456789*-",
]
CONFIG = T5Config(
    vocab_size=len(WORDS), d_model=96, d_kv=24, d_ff=256, num_heads=4, num_layers=2, num_decoder_layers=2,
    unroll=True,
)  # fmt: skip
RANK = 16
ALPHA = 32
TARGETS = ("q", "v")
PEFT_CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "target_modules": list(TARGETS),
    "task_type": "SEQ_2_SEQ_LM",
    "use_dora": False,
    "use_rslora": False,
    # The rest of what PEFT 0.21 writes, at its defaults.
    "ensure_weight_tying": False,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_qalora": False,
    **dict.fromkeys(
        "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules kasa_config "
        "layer_replication layers_pattern layers_to_transform lora_ga_config megatron_config monteclora_config "
        "revision target_parameters trainable_token_indices use_bdlora velora_config".split()
    ),
}

# Fewer steps than the base could use: it leaves the adapters, and then their fusion, something to learn.
BASE_STEPS = 1800
BASE_BATCH = 64
BASE_RATE = 1.5e-3
POOL_STEPS = 250
POOL_BATCH = 16
POOL_RATE = 4e-3
WARM_UP_STEPS = 50
STEPS_PER_CALL = 25
TRAIN_ROWS = 100
TEST_ROWS = 200
# Many adapters on the hub are in PEFT's older format: so are the first two of the pool, if PyTorch is there.
BIN_ADAPTERS = 2 if importlib.util.find_spec("torch") else 0
SOURCE_LENGTH = 5 + MAX_LETTERS
TARGET_LENGTH = 1 + MAX_OUTPUT

# The parts of the seed: one for every kind of draw.
TRAIN, TEST, ORDER, BASE_INIT, POOL_INIT = range(5)


class Factors(NamedTuple):
    """LoRA's factors at one site as they are trained and written: A [L, N, d_in, r], B [L, N, r, d_out]."""

    A: Array
    B: Array


class Batches(NamedTuple):
    """Padded token ids, source [..., S] and target [..., T]; NumPy as made, JAX arrays under `jit`."""

    source: Any
    target: Any


def main(out: Path, seed: int = 0) -> None:
    """Train the small base and its adapters and write them, with the tasks, to a new folder.

    Args:
      out: the folder to make; it must not exist.
      seed: of every random draw.
    """
    if out.exists():
        raise SystemExit(
            f"{out} exists: give --out a new folder, or remove this one first"
        )
    start = time.perf_counter()
    tokenizer = make_tokenizer()
    tasks = split()
    state, base_accuracy = train_base(tokenizer, tasks.base, seed)
    loras, pool_accuracies = train_pool(tokenizer, state, tasks.pool, seed)
    for_fusion = [*tasks.tuning, *tasks.unseen, tasks.out_of_reach]
    zero_shot = accuracies(tokenizer, state, None, for_fusion, seed)
    with new_folder(out) as folder:
        write_base(folder / "base", tokenizer, state)
        for i, task in enumerate(tasks.pool):
            lora = jax.tree.map(lambda a, i=i: np.asarray(a[:, i]), loras)
            write_lora(
                folder / "adapters" / task.name,
                lora,
                base=out / "base",
                as_bin=i < BIN_ADAPTERS,
            )
        for task in for_fusion:
            write_task(folder / "tasks" / task.name, task, seed)
        minutes = (time.perf_counter() - start) / 60
        (folder / "README.md").write_text(
            readme(base_accuracy, pool_accuracies, zero_shot, seed, minutes)
        )
    print(f"wrote {out} in {minutes:.1f} minutes")


def train_base(
    tokenizer: Any, mixture: list[Task], seed: int
) -> tuple[nnx.State, float]:
    """Return the state of a T5 trained on the mixture, in float16's values, and its mean accuracy there."""
    graph, state = nnx.split(
        T5(CONFIG, rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(seed), BASE_INIT)))
    )
    rows_per_task = -(-BASE_STEPS * BASE_BATCH // len(mixture))
    data = [
        encode(tokenizer, train_rows(task, rows_per_task, seed)) for task in mixture
    ]
    order = np.random.default_rng((seed, ORDER)).permutation(
        rows_per_task * len(mixture)
    )
    order = order[: BASE_STEPS * BASE_BATCH]
    batches = jax.tree.map(
        lambda *a: np.concatenate(a)[order].reshape(BASE_STEPS, BASE_BATCH, -1), *data
    )

    def objective(state: nnx.State, batch: Batches) -> Array:
        return cross_entropy(nnx.merge(graph, state), None, batch)

    state = as_float16(fit(objective, state, batches, BASE_RATE, "base"))
    scores = accuracies(tokenizer, state, None, mixture, seed)
    return state, float(np.mean(list(scores.values())))


def train_pool(
    tokenizer: Any, state: nnx.State, tasks: list[Task], seed: int
) -> tuple[dict[str, Factors], dict[Task, float]]:
    """Return the adapters of all tasks, leaves [L, N, ...] in float16's values, and their accuracies."""
    rows = [train_rows(task, POOL_STEPS * POOL_BATCH, seed) for task in tasks]
    loras = train_loras(
        tokenizer, state, rows, jax.random.fold_in(jax.random.key(seed), POOL_INIT)
    )
    return loras, accuracies(tokenizer, state, loras, tasks, seed)


def train_loras(
    tokenizer: Any,
    state: nnx.State,
    rows: list[list[dict[str, str]]],
    key: Array,
    target_length: int = TARGET_LENGTH,
) -> dict[str, Factors]:
    """Return an adapter for each list of POOL_STEPS * POOL_BATCH rows, leaves [L, N, ...] in float16's values."""
    graph = nnx.graphdef(abstract_model())
    data = [encode(tokenizer, own, target_length) for own in rows]
    batches = jax.tree.map(
        lambda *a: np.stack([x.reshape(POOL_STEPS, POOL_BATCH, -1) for x in a], axis=1),
        *data,
    )

    def objective(loras: dict[str, Factors], batch: Batches) -> Array:
        def of_one(lora: dict[str, Factors], batch: Batches) -> Array:
            return cross_entropy(nnx.merge(graph, state), lora, batch)

        # Adam works entry by entry, so the gradient of the sum trains every adapter on its own.
        return jnp.sum(jax.vmap(of_one, in_axes=(1, 0))(loras, batch))

    return as_float16(
        fit(objective, initial_loras(len(rows), key), batches, POOL_RATE, "pool")
    )


def initial_loras(count: int, key: Array) -> dict[str, Factors]:
    """Return LoRA's start for every adapted site: A uniform within 1 / sqrt(d_in) as PEFT's, B zero."""
    adapted = {
        name: site
        for name, site in CONFIG.sites.items()
        if name.rpartition(".")[2] in TARGETS
    }
    keys = dict(zip(adapted, jax.random.split(key, len(adapted)), strict=True))
    loras = {}
    for name, site in adapted.items():
        bound = site.d_in**-0.5
        A = jax.random.uniform(
            keys[name],
            (site.layers, count, site.d_in, RANK),
            jnp.float32,
            -bound,
            bound,
        )
        B = jnp.zeros((site.layers, count, RANK, site.d_out))
        loras[name] = Factors(A, B)
    return loras


def fit(
    objective: Callable[[Any, Batches], Array],
    params: Any,
    batches: Batches,
    rate: float,
    label: str,
) -> Any:
    """Return `params` after one Adam step for each of the batches, the rate rising, then falling to zero."""
    steps = len(batches.source)
    optimiser = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, rate, WARM_UP_STEPS, steps)
    )

    def step(carry: tuple[Any, Any], batch: Batches) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params, batch)
        with standard_promotion():
            updates, state = optimiser.update(grads, state)
            params = optax.apply_updates(params, updates)
        return (params, state), value

    run = jax.jit(
        lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0
    )
    carry = jax.tree.map(jnp.copy, (params, optimiser.init(params)))
    with tqdm(total=steps, desc=label, disable=not sys.stderr.isatty()) as bar:
        for first in range(0, steps, STEPS_PER_CALL):
            chunk = jax.tree.map(lambda a, f=first: a[f : f + STEPS_PER_CALL], batches)
            carry, values = run(carry, chunk)
            bar.set_postfix(loss=f"{float(values[-1]):.3f}")
            bar.update(len(chunk.source))
    return carry[0]


def cross_entropy(model: T5, lora: dict[str, Factors] | None, batch: Batches) -> Array:
    """Return the mean cross-entropy of the target's tokens, padding left out."""
    pad_id = CONFIG.pad_id
    labels = jnp.where(batch.target == pad_id, IGNORED, batch.target)
    decoder_ids = decoder_inputs(labels, start_id=CONFIG.start_id, pad_id=pad_id)
    logits = model(batch.source, batch.source != pad_id, decoder_ids, adapters(lora))
    return of_logits(logits, labels)


def adapters(lora: dict[str, Factors] | None) -> dict[str, LowRank]:
    return {
        site: LowRank(A, B * (ALPHA / RANK)) for site, (A, B) in (lora or {}).items()
    }


def accuracies(
    tokenizer: Any,
    state: nnx.State,
    loras: dict[str, Factors] | None,
    tasks: list[Task],
    seed: int,
) -> dict[Task, float]:
    """Return the exact match of greedy generation on the test rows of each task, with the adapter of its index."""
    graph = nnx.graphdef(abstract_model())
    rows = [test_rows(task, seed) for task in tasks]
    sources = jnp.stack([encode(tokenizer, r).source for r in rows])

    def answer(
        state: nnx.State, lora: dict[str, Factors] | None, source: Array
    ) -> Array:
        model = nnx.merge(graph, state)
        return generate(
            model,
            source,
            source != CONFIG.pad_id,
            adapters(lora),
            max_new_tokens=TARGET_LENGTH,
        )

    axis = None if loras is None else 1
    answers = np.asarray(
        jax.jit(jax.vmap(answer, in_axes=(None, axis, 0)))(state, loras, sources)
    )
    scores = {}
    for task, task_rows, ids in zip(tasks, rows, answers, strict=True):
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores[task] = float(
            np.mean(
                [t == r["completion"] for t, r in zip(texts, task_rows, strict=True)]
            )
        )
    return scores


def train_rows(task: Task, count: int, seed: int) -> list[dict[str, str]]:
    """Return rows that are not test rows."""
    kept_back = {row["context"] for row in test_rows(task, seed)}
    return draw(task, count, (seed, TRAIN), exclude=kept_back)


def test_rows(task: Task, seed: int) -> list[dict[str, str]]:
    return draw(task, TEST_ROWS, (seed, TEST))


def abstract_model() -> T5:
    return nnx.eval_shape(lambda: T5(CONFIG, rngs=nnx.Rngs(0)))


def encode(
    tokenizer: Any, rows: list[dict[str, str]], target_length: int = TARGET_LENGTH
) -> Batches:
    """Return the padded token ids of rows with context and completion."""

    def ids(key: str, length: int) -> np.ndarray:
        texts = [row[key] for row in rows]
        return tokenizer(
            texts, padding="max_length", max_length=length, return_tensors="np"
        )["input_ids"].astype(np.int32)

    return Batches(ids("context", SOURCE_LENGTH), ids("completion", target_length))


def as_float16(tree: Any) -> Any:
    """Return the tree rounded to the values that are written, so that what is measured is what is shipped."""
    return jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), tree)


def make_tokenizer() -> Any:
    """Return a tokenizer of words and letters; letters may stand together, and `</s>` is added at the end."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "|".join([*POSITION_OPS, *CHARACTER_OPS, "then"])
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(rf"^(?:{words})$|."), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def write_base(folder: Path, tokenizer: Any, state: nnx.State) -> None:
    """Write a transformers folder: configuration, tokenizer and weights in float16."""
    ids = {
        "decoder_start_token_id": CONFIG.start_id,
        "eos_token_id": CONFIG.eos_id,
        "pad_token_id": CONFIG.pad_id,
    }
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": CONFIG.d_ff,
        "d_kv": CONFIG.d_kv,
        "d_model": CONFIG.d_model,
        "dropout_rate": 0.0,
        "dtype": "float32",  # to compute in, whatever the weights are stored in
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": CONFIG.eps,
        "model_type": "t5",
        "num_decoder_layers": CONFIG.num_decoder_layers,
        "num_heads": CONFIG.num_heads,
        "num_layers": CONFIG.num_layers,
        "relative_attention_max_distance": CONFIG.max_distance,
        "relative_attention_num_buckets": CONFIG.buckets,
        "tie_word_embeddings": False,
        "vocab_size": CONFIG.vocab_size,
        **ids,
    }
    with tempfile.TemporaryDirectory() as template:
        tokenizer.save_pretrained(template)
        tokenizer_config = json.loads(
            Path(template, "tokenizer_config.json").read_text()
        )
        # The name that transformers 4 knows it by as well.
        tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(Path(template, "tokenizer_config.json"), tokenizer_config)
        write_json(Path(template, "config.json"), config)
        write_json(Path(template, "generation_config.json"), ids)
        save_base(nnx.merge(nnx.graphdef(abstract_model()), state), folder, template)
    weights = folder / "model.safetensors"
    halves = {
        name: tensor.astype(np.float16) for name, tensor in load_file(weights).items()
    }
    save_file(halves, weights, metadata={"format": "pt"})


def write_lora(
    folder: Path, lora: dict[str, Factors], *, base: Path, as_bin: bool
) -> None:
    """Write a PEFT folder; `as_bin` as PEFT did before safetensors."""
    tensors = {}
    for site, factors in lora.items():
        for layer, (A, B) in enumerate(zip(factors.A, factors.B, strict=True)):
            prefix = f"base_model.model.{CONFIG.sites[site].path_of(layer)}"
            tensors[f"{prefix}.lora_A.weight"] = A.T.astype(np.float16)
            tensors[f"{prefix}.lora_B.weight"] = B.T.astype(np.float16)
    write_adapter(
        folder, PEFT_CONFIG | {"base_model_name_or_path": base.as_posix()}, tensors
    )
    if as_bin:
        torch = importlib.import_module("torch")
        copies = {
            key: torch.from_numpy(np.ascontiguousarray(tensor))
            for key, tensor in tensors.items()
        }
        torch.save(copies, folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()


def write_task(folder: Path, task: Task, seed: int) -> None:
    """Write rows to fuse with and rows to measure on."""
    folder.mkdir(parents=True)
    parts = {"train": train_rows(task, TRAIN_ROWS, seed), "test": test_rows(task, seed)}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def readme(
    base: float,
    pool: dict[Task, float],
    zero_shot: dict[Task, float],
    seed: int,
    minutes: float,
) -> str:
    """Return the page on how the pool was made and how accurate it is."""
    tasks = split()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model())))
    use = dict.fromkeys(tasks.tuning, "tuning") | dict.fromkeys(
        tasks.unseen, "measurement"
    )
    lines = [
        "# The embedded small pool",
        "",
        "A small T5, 28 LoRA adapters of it as PEFT folders, and string tasks to fuse them for. Each task is an",
        "operation on positions and one on characters (`../string_tasks.py`). It is meant to be small and quick;",
        "it is not FLAN-T5, and the tasks are not BIG-Bench Hard.",
        "",
        f"Made in {minutes:.1f} minutes on {os.cpu_count()} CPU cores by",
        "",
        f"    python examples/make_small_pool.py --out examples/small --seed {seed}",
        "",
        f"* `base/`: T5 1.1, {CONFIG.num_layers} + {CONFIG.num_decoder_layers} blocks, width {CONFIG.d_model}, "
        f"{parameters:,} parameters in float16.",
        f"  Trained for {BASE_STEPS:,} steps of {BASE_BATCH} rows on {len(tasks.base)} tasks, 20 single "
        "operations and 12 pairs,",
        f"  and stopped early. It answers {base:.1%} of their test rows.",
        f"* `adapters/`: rank {RANK} on q and v, alpha {ALPHA}, trained for {POOL_STEPS} steps of {POOL_BATCH} rows "
        "each, on",
        f"  other pairs; the first {BIN_ADAPTERS} as `adapter_model.bin`, the others as `adapter_model.safetensors`.",
        f"* `tasks/`: further pairs, with {TRAIN_ROWS} rows to fuse with and {TEST_ROWS} to measure on. Their "
        "operations all occur",
        "  in the pool, except `mirror`, on which neither the base nor any adapter was trained.",
        "",
        f"Exact match of greedy generation on {TEST_ROWS} test rows. The base alone, on the tasks to fuse for:",
        "",
        "| task | for | base alone |",
        "|---|---|---|",
        *(
            f"| {task.name} | {use.get(task, 'out of reach')} | {value:.1%} |"
            for task, value in zero_shot.items()
        ),
        "",
        "The base with each adapter, on the adapter's task:",
        "",
        "| adapter | on its own task |",
        "|---|---|",
        *(f"| {task.name} | {value:.1%} |" for task, value in pool.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
