"""Adapters and merged models in the `hf` model of lm-evaluation-harness, which gets and gives texts."""

import reader
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def _read(case):
    model = HFLM(
        case["model"],
        peft=case.get("adapter"),
        device="cpu",
        dtype="float32",
        batch_size=8,
    )
    how = {"until": [], "max_gen_toks": case["tokens"]}
    requests = [
        Instance("generate_until", {}, (text, how), number)
        for number, text in enumerate(case["texts"])
    ]
    return model.generate_until(requests, disable_tqdm=True), None


if __name__ == "__main__":
    reader.main(_read)
