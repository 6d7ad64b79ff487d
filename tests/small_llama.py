"""A small Llama with random weights and a byte-level BPE tokenizer that adds a first token and has a chat template."""

import shutil

from flax import nnx
from json_files import write_json

from lorafusion_jax import read_config, save_base
from lorafusion_jax.models.registry import family_of

BOS, EOS, START, END = range(4)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXTS = (
    "Q: hot\nA: cold\n\n",
    "Q: tall\nA: short\n\n",
    "the cold bold gold is old",
    "user assistant system 東京 日本 é",
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
    "bos_token_id": BOS,
    "eos_token_id": [EOS, END],
    "tie_word_embeddings": True,
}

# A Qwen 3.5 instead: two groups of three layers.
QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 6,
    "layer_types": 2 * ["linear_attention", "linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
# A Gemma 4: two groups of three layers, of which the second shares keys and values.
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 3,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 40,
}


def make_tokenizer(*, chat_template=CHATML, eos=SPECIAL[END]):
    """A tokenizer with <s> before and </s> behind every text, as some are set up, and no token for padding."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(_TEXTS * 3, trainer)
    ends = [(SPECIAL[BOS], BOS), (SPECIAL[EOS], EOS)]
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[BOS], eos_token=eos
    )
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    found.chat_template = chat_template
    return found


def make(folder, *, chat_template=CHATML, **config):
    """Write the base, which must not be there yet, and return its folder."""
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir(parents=True)
    tokenizer = make_tokenizer(chat_template=chat_template)
    write_json(source / "config.json", CONFIG | {"vocab_size": len(tokenizer)} | config)
    tokenizer.save_pretrained(source)
    structure = read_config(source)
    save_base(family_of(structure).model(structure, rngs=nnx.Rngs(0)), folder, source)
    if (template := source / "chat_template.jinja").is_file():
        shutil.copyfile(template, folder / template.name)
    shutil.rmtree(source)
    return folder
