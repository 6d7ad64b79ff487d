"""Adapters in PEFT, merged models in transformers."""

import peft
import reader
import torch
import transformers


@torch.no_grad()
def _read(case):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=torch.float32
    ).eval()
    if "adapter" in case:
        model = peft.PeftModel.from_pretrained(model, case["adapter"]).eval()

    def logits(prompt, answer):
        return (
            model(torch.tensor([prompt + answer]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
            .numpy()
        )

    # The most likely tokens behind our answer's: they are the answer if ours is.
    pairs = zip(case["prompts"], case["answers"], strict=True)
    return [logits(*pair).argmax(-1).tolist() for pair in pairs], reader.logits_of(
        case, logits
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    reader.main(_read)
