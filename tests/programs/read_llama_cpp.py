"""GGUF files in llama.cpp."""

import json
import urllib.request

import numpy as np
import reader
import xllamacpp


def _server(case):
    params = xllamacpp.CommonParams()
    params.model.path = case["model"]
    if "adapter" in case:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path = case["adapter"]
        lora.scale = 1.0
        params.lora_adapters = [lora]
    params.n_ctx = 128
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.verbosity = 0
    # The default cache and attention round to float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = (
        xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    return xllamacpp.Server(params)


def _read(case):
    server = _server(case)

    def said(prompt, **how):
        body = {
            "prompt": prompt,
            "temperature": 0,
            "return_tokens": True,
            "cache_prompt": False,
        } | how
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), kind
        )
        return json.load(urllib.request.urlopen(request))

    answers = [
        said(prompt, n_predict=case["tokens"])["tokens"] for prompt in case["prompts"]
    ]

    def logits(prompt, answer):
        found = np.full((len(answer), case["vocabulary"]), np.nan)
        for place, row in enumerate(found):
            # The server has none for a token that is a part of a character.
            here = said(prompt + answer[:place], n_predict=1, n_probs=len(row))
            for token in here.get("completion_probabilities", []):
                for entry in token["top_logprobs"]:
                    row[entry["id"]] = entry["logprob"]
        return found

    return answers, reader.logits_of(case, logits)


if __name__ == "__main__":
    reader.main(_read)
