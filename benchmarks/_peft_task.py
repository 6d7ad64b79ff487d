"""The peer of whole_task.py as a process, which prints its result as JSON.

    python benchmarks/_peft_task.py FOLDER FORM PRODUCTS WEIGHTS

It loads the base and the modules, trains on rows sorted by length, merges the mix, and evaluates. Only training is
compiled: graphs of the few batches of evaluation would not pay.
"""

import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from _mix import Mix, Site, compiled, lines, with_adapter
from safetensors.torch import load_file

_EVAL_BATCH = 64  # as of `lorafusion fuse`
Row = tuple[list[int], list[int]]


def main(folder: Path, form: str, weights: str) -> None:
    """Fuse and evaluate; the printed times are those at which each stage ended."""
    times = [time.time()]
    job = json.loads((folder / "job.json").read_text())
    base = folder.parent / "base"
    adapters = sorted((folder.parent / "adapters").iterdir())
    config: Any = peft.LoraConfig.from_pretrained(str(adapters[0]))
    causal = config.task_type == "CAUSAL_LM"
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        base, padding_side="left" if causal else "right"
    )
    kind = (
        transformers.AutoModelForCausalLM
        if causal
        else transformers.AutoModelForSeq2SeqLM
    )
    model = kind.from_pretrained(base, dtype=getattr(torch, weights)).requires_grad_(
        False
    )
    model = with_adapter(
        model, config.task_type, config.r, config.target_modules, dora=True
    )
    recipe = job["recipe"]
    mix = Mix(model, _sites(model, adapters), recipe)
    parts = {
        part: _encoded(tokenizer, rows, causal) for part, rows in job["rows"].items()
    }
    train = _batches(parts["train"], recipe["batch_size"], causal)
    validation = _batches(parts["validation"], _EVAL_BATCH, causal)
    test = _batches(parts["test"], _EVAL_BATCH, causal)
    mix.model = compiled(model) if form == "compile" else model
    times.append(time.time())
    steps = []
    draw = random.Random(1)
    for _ in range(recipe["epochs"]):
        for batch in draw.sample(train, len(train)):
            began = time.time()
            mix(batch)
            steps.append(time.time() - began)
        mix.write()
        with torch.no_grad():
            _loss(model, validation)
    times.append(time.time())
    merged = model.merge_and_unload()
    with torch.no_grad():
        loss = _loss(merged, test)
        answers = _answers(
            merged, tokenizer, parts["test"], recipe["max_new_tokens"], causal
        )
    compilation = steps[0] - float(np.median(steps))
    found = {
        "loss": loss,
        "answers": answers,
        "compilation": compilation if form == "compile" else 0.0,
    }
    print(json.dumps(found | {"times": [*times, time.time()]}))


def _sites(model: Any, adapters: list[Path]) -> list[Site]:
    tensors = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    layers = dict(model.named_modules())
    columns = dict[str, int]()
    sites = []
    for name in [
        name.removesuffix(".lora_A.weight")
        for name in tensors[0]
        if name.endswith(".lora_A.weight")
    ]:
        block = re.findall(r".*?\.\d+", name)[0]
        A = torch.stack([of[f"{name}.lora_A.weight"].flatten() for of in tensors])
        B = torch.stack([of[f"{name}.lora_B.weight"].flatten() for of in tensors])
        sites.append((layers[name], columns.setdefault(block, len(columns)), A, B))
    return sites


def _encoded(tokenizer: Any, rows: list[tuple[str, str]], causal: bool) -> list[Row]:
    """Return the tokens of prompts and answers, by length."""
    inputs = tokenizer([row[0] for row in rows]).input_ids
    answers = tokenizer([" " * causal + row[1] for row in rows]).input_ids
    ends = [tokenizer.eos_token_id] * causal
    pairs = [
        (source, [*answer, *ends])
        for source, answer in zip(inputs, answers, strict=True)
    ]
    return sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))


def _batches(rows: list[Row], size: int, causal: bool) -> list[dict[str, torch.Tensor]]:
    batches = (
        lines(rows[i : i + size], causal=causal) for i in range(0, len(rows), size)
    )
    return [
        {name: torch.tensor(array) for name, array in batch.items()}
        for batch in batches
    ]


def _loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss of all targets, in nats per token."""
    counts = [int((batch["labels"] >= 0).sum()) for batch in batches]
    losses = [model(**batch).loss.item() for batch in batches]
    return float(np.average(losses, weights=counts))


def _answers(
    model: Any, tokenizer: Any, rows: list[Row], new_tokens: int, causal: bool
) -> dict[str, str]:
    """Return greedy answers by their prompts' texts."""
    said = {}
    for i in range(0, len(rows), _EVAL_BATCH):
        prompts = [source for source, _ in rows[i : i + _EVAL_BATCH]]
        padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        ids = model.generate(**padded, max_new_tokens=new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(
            ids[:, padded["input_ids"].shape[1] * causal :], skip_special_tokens=True
        )
        said |= zip(
            tokenizer.batch_decode(prompts, skip_special_tokens=True),
            texts,
            strict=True,
        )
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, form, products, weights = sys.argv[1:]
    with torch.autocast("cpu", torch.bfloat16, enabled=products != weights):
        main(Path(folder), form, weights)
