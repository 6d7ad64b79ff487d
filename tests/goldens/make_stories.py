"""Make the numbers of `stories260k/` again: a small trained Llama with adapters of PEFT, alone and added.

python tests/goldens/make_stories.py      # with the extra `peft`; seconds
"""

import json

import make_fusion
import numpy as np
import peft
import seeded
import torch
import transformers

FOLDER = seeded.HERE / "stories260k"
NEW_TOKENS = 60
ADAPTERS = {"A": "A_robot_r8_qv", "B": "B_quiz_r4_all"}
# Sums of products, by PEFT's `cat`.
SUMS = {"cat_0.7_-0.3": (0.7, -0.3), "cat_1_1": (1.0, 1.0)}


def outputs(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """Return logits in the middle and at the end of every prompt, and greedily generated ids."""
    logits, answers = {}, []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0]
        logits[str(number)] = found[[len(prompt) // 2, len(prompt) - 1]].numpy()
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers.append(make_fusion.greedy(model, asked, NEW_TOKENS)[0, len(prompt) :].tolist())
    return logits, answers


def main() -> None:
    """Write the logits and the answers of all models."""
    out = seeded.target(FOLDER)
    torch.set_num_threads(1)
    prompts = json.loads((FOLDER / "prompts.json").read_text())["prompts"]
    base = transformers.LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()
    base.generation_config.eos_token_id = [1, 2]
    found = {"base": outputs(base, prompts)}
    model = peft.PeftModel.from_pretrained(base, FOLDER / "adapters" / ADAPTERS["A"], adapter_name="A")
    model.load_adapter(FOLDER / "adapters" / ADAPTERS["B"], adapter_name="B")
    for name, weights in SUMS.items():
        name = name.replace(".", "_")  # PEFT takes no dots
        model.add_weighted_adapter(["A", "B"], list(weights), name, combination_type="cat")
    for name in (*ADAPTERS, *SUMS):
        model.set_adapter(name.replace(".", "_"))
        found[name] = outputs(model.eval(), prompts)
    arrays = {f"{name}.{number}": x for name, (logits, _) in found.items() for number, x in logits.items()}
    np.savez_compressed(out / "logits.npz", **arrays)
    seeded.write_answers(out / "greedy.json", {name: answers for name, (_, answers) in found.items()})


if __name__ == "__main__":
    main()
