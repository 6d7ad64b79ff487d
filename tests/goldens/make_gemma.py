"""Make `gemma3/` again: logits and greedy ids of Gemma-3-270M by transformers, from its GGUF file.

    PYTHONPATH=tests python tests/goldens/make_gemma.py      # extra `peft`, packages of `make test-gemma`; a minute

transformers dequantises the weights; ids are those of the tokenizer that it builds from the same file.
"""

import tempfile
from pathlib import Path

import gemma
import make_fusion
import numpy as np
import seeded
import torch
import transformers

PROMPTS = (
    "The capital of France is",
    "Question: Which animal says moo?\nAnswer:",
    "été: summer\n冬: winter\n夏:",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
)
NEW_TOKENS = 16


def main() -> None:
    """Write prompts with their ids, logits at some positions, and greedily generated ids."""
    out = seeded.target(seeded.HERE / "gemma3")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = gemma.gguf_file(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    model.eval()
    probes = seeded.integers("gemma3/probes", (64,), 0, model.config.vocab_size).astype(np.int32)
    rows, arrays = {"prompts": [], "ids": [], "greedy": []}, {"probe_ids": probes}
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
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
        answer = make_fusion.greedy(model, asked, NEW_TOKENS)[0, ids.shape[1] :]
        for name, value in {"prompts": prompt, "ids": ids[0].tolist(), "greedy": answer.tolist()}.items():
            rows[name].append(value)
        print(repr(prompt), tokenizer.decode(answer), sep="\n  ")
    np.savez_compressed(out / "logits.npz", **arrays)
    seeded.write_answers(out / "texts.json", rows)


if __name__ == "__main__":
    main()
