"""Make `smollm2/` or `gemma3/` again: what transformers computes with a language model from a GGUF file.

    PYTHONPATH=tests python tests/goldens/make_language_model.py smollm2     # extra `peft`, the model's packages

transformers dequantises the weights. Prompts, strings and conversations are taken as they are stored.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import make_fusion
import numpy as np
import pretrained
import seeded
import torch
import transformers
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NEW_TOKENS = {"smollm2": 24, "gemma3": 16}


def tokenizer_of_smollm2(path):
    """Return the tokenizer that the file describes: SmolLM's, which splits digits first (AutoTokenizer does not)."""
    fields = GGUFReader(path).fields
    tokens = fields[f"tokenizer.{'ggml.tokens'}"].contents()
    merges = fields[f"tokenizer.{'ggml.merges'}"].contents()
    kinds = fields[f"tokenizer.{'ggml.token_type'}"].contents()
    template = fields[f"tokenizer.{'chat_template'}"].contents()
    found = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(m.split(" ")) for m in merges],
        )
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    control = 3  # of the kinds of tokens of a GGUF file
    found.add_special_tokens(
        [
            AddedToken(t, special=True)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    special = {
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "pad_token": tokens[2],
        "unk_token": tokens[0],
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, chat_template=template, **special
    )


def write_tokens(encoder, target):
    """Write the ids of the strings and conversations of `tokenizer_cases.json`."""
    cases = json.loads((seeded.HERE / "smollm2" / "tokenizer_cases.json").read_text())
    for case in cases["strings"]:
        ids = encoder(case["text"])["input_ids"]
        kept = {"ids": ids, "decoded": encoder.decode(ids)}
        case |= kept | {
            "decoded_skip_special": encoder.decode(ids, skip_special_tokens=True)
        }
    for case in cases["chats"]:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        case["text"] = encoder.apply_chat_template(
            case["messages"], tokenize=False, **options
        )
        case["ids"] = encoder.apply_chat_template(
            case["messages"], return_dict=False, **options
        )
    special = json.dumps({"special": cases["special"]})[:-1]
    rows = {
        kind: ",\n".join(map(json.dumps, cases[kind])) for kind in ("strings", "chats")
    }
    text = f'{special},\n"strings": [\n{rows["strings"]}\n],\n"chats": [\n{rows["chats"]}\n]}}\n'
    (target / "tokenizer_cases.json").write_text(text)


def write_tensors(model, target):
    """Write shape and sha256 of every tensor."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # the embedding
            data = np.ascontiguousarray(tensor.numpy(), "<f4").tobytes()
            tensors[name] = {
                "shape": [*tensor.shape],
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    (target / "base").mkdir(exist_ok=True)
    (target / "base" / "tensors.json").write_text(json.dumps(tensors, indent=0) + "\n")


def write_texts(model, encoder, name, target):
    """Write prompts with their ids, logits at some positions, and greedily generated ids."""
    prompts = json.loads((seeded.HERE / name / "texts.json").read_text())["prompts"]
    probes = seeded.integers(
        f"{name}/probes", (64,), 0, model.config.vocab_size
    ).astype(np.int32)
    rows = {"prompts": prompts, "ids": [], "greedy": []}
    arrays = {"probe_ids": probes}
    for number, prompt in enumerate(prompts):
        ids = encoder(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        positions = [0, len(logits) // 2, len(logits) - 1]
        best = logits[positions].topk(8)
        arrays |= {
            f"{number}_lse": torch.logsumexp(logits, dim=-1).numpy(),
            f"{number}_positions": np.array(positions),
            f"{number}_top_id": best.indices.numpy().astype(np.int32),
            f"{number}_top_val": best.values.numpy(),
            f"{number}_probe_val": logits[positions][:, probes].numpy(),
        }
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer = make_fusion.greedy(model, asked, NEW_TOKENS[name])[0, ids.shape[1] :]
        rows["ids"].append(ids[0].tolist())
        rows["greedy"].append(answer.tolist())
        print(repr(prompt), encoder.decode(answer), sep="\n  ")
    np.savez_compressed(target / "logits.npz", **arrays)
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(values)}" for key, values in rows.items()
    )
    (target / "texts.json").write_text(f"{{\n{lines}\n}}\n")


def main():
    """Write the folder of one of the models."""
    parser = argparse.ArgumentParser(
        description="Make the goldens of a language model again."
    )
    parser.add_argument("name", choices=[*NEW_TOKENS])
    parser.add_argument("--out", type=Path, help="folder to write in")
    given = parser.parse_args()
    out = given.out or seeded.HERE / given.name
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = (
            pretrained.smollm2_file()
            if given.name == "smollm2"
            else pretrained.gemma_file(Path(folder))
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        if given.name == "smollm2":
            encoder = tokenizer_of_smollm2(file)
            write_tokens(encoder, out)
            write_tensors(model, out)
        else:
            encoder = transformers.AutoTokenizer.from_pretrained(
                folder, gguf_file=file.name
            )
        write_texts(model, encoder, given.name, out)


if __name__ == "__main__":
    main()
