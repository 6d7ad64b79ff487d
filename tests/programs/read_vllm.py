"""Adapters and merged models in vLLM."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # one process, 1 GB

import reader
import vllm
from vllm.lora.request import LoRARequest


def _read(case):
    adapted = "adapter" in case
    limits = {
        "max_model_len": 128,
        "max_num_seqs": 4,
        "enable_lora": adapted,
        "max_lora_rank": 8,
    }
    model = vllm.LLM(case["model"], dtype="float32", enforce_eager=True, **limits)
    how = vllm.SamplingParams(temperature=0, max_tokens=case["tokens"])
    lora = LoRARequest("fused", 1, case["adapter"]) if adapted else None
    prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    return [
        list(found.outputs[0].token_ids)
        for found in model.generate(prompts, how, lora_request=lora)
    ], None


if __name__ == "__main__":
    reader.main(_read)
