"""Prompts and answers as one text: their tokens, chat templates, conversations, and text that comes token by token."""

from dataclasses import replace

import pretrained
import pytest
import small_llama
from hypothesis import given, settings, strategies as st
from json_files import read_json, write_rows
from refusals import refused
from small_llama import BOS, END, EOS, START
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafusion_jax.io import open_base
from lorafusion_jax.loading import load_texts
from lorafusion_jax.tasks import (
    SEPARATE_TEXTS,
    Example,
    TextFormat,
    decode,
    encode,
    few_shot,
    load_task,
    stream_text,
)

_PLAIN = TextFormat(ends=(END, EOS))
_CHAT = replace(_PLAIN, chat=True)
# Begins every conversation with the system's message, strips what is said, and adds to the assistant's answer.
_OTHER = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}-> {% endif %}{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return small_llama.make_tokenizer()


def _tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "answer", "completion"),
    [
        ("Q: hot\nA:", "cold", " cold"),
        ("Q: hot\nA: ", "cold", "cold"),
        ("Q: hot\nA:", " cold", " cold"),
        ("東京は", "日本 é", " 日本 é"),
    ],
)
def test_an_answer_follows_its_prompt_after_white_space_and_ends(
    tokenizer, prompt, answer, completion
):
    # The tokenizer puts <s> before a text and </s> behind it; the answer ends with the first of the end tokens.
    encoded = encode(tokenizer, [Example(prompt, answer)], _PLAIN)
    assert encoded.inputs[0].tolist() == [BOS, *_tokens(tokenizer, prompt)]
    assert encoded.labels[0].tolist() == [*_tokens(tokenizer, completion), END]


def test_a_prompt_alone_and_an_end_within_an_answer(tokenizer):
    rows = [Example("Q: hot\nA:", ""), Example("say</s>", "cold</s> gold")]
    encoded = encode(tokenizer, rows, _PLAIN)
    assert encoded.labels[0].tolist() == [END]
    assert encoded.inputs[1].tolist() == [BOS, *_tokens(tokenizer, "say"), EOS]
    assert encoded.labels[1].tolist() == [*_tokens(tokenizer, " cold"), EOS]
    assert len(encode(tokenizer, [], _PLAIN)) == 0


def test_an_answer_gets_no_second_space_from_a_tokenizer_that_begins_texts_with_one():
    """As Llama 2's does: alone, " cold" is a space and "cold" with a space before it."""
    words = ["<unk>", "</s>", "▁", "▁hot", "▁cold", "▁A:"]
    raw = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>"
    )
    assert _tokens(tokenizer, " cold") == [2, 4]
    encoded = encode(tokenizer, [Example("hot A:", "cold")], TextFormat(ends=(1,)))
    assert (encoded.inputs[0].tolist(), encoded.labels[0].tolist()) == ([3, 5], [4, 1])


@pytest.mark.parametrize("template", [small_llama.CHATML, _OTHER])
@pytest.mark.parametrize(
    ("history", "answer"),
    [
        ((), "the cold gold"),
        ((("user", "tall"), ("assistant", "short")), " 東京 is\n\nold"),
    ],
)
def test_prompt_and_answer_are_the_rendered_conversation_token_by_token(
    template, history, answer
):
    tokenizer = small_llama.make_tokenizer(chat_template=template)
    encoded = encode(tokenizer, [Example("hot bold", answer, history)], _CHAT)
    messages = [
        {"role": role, "content": content}
        for role, content in (*history, ("user", "hot bold"))
    ]
    asked = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    answered = [*messages, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert encoded.inputs[0].tolist() == asked
    # All that is behind the prompt, but for a line break behind the token that ends the answer.
    end = max(place for place, token in enumerate(whole) if token in _CHAT.ends)
    assert encoded.labels[0].tolist() == whole[len(asked) : end + 1]
    assert tokenizer.decode(whole[end + 1 :]) == (
        "\n" if template == small_llama.CHATML else ""
    )
    assert answer.strip() in tokenizer.decode(encoded.labels[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>{% endif %}",
            r"renders 'hot' with its answer as 'user: hotassistant: cold', which does not begin with the prompt for "
            r"the answer, 'user: hot<\|im_start\|>': leave out --chat, and write the format into --prompt",
        ),
        (
            "{% for m in messages if m['role'] == 'assistant' %}{{ raise_exception('no assistant') }}{% endfor %}x",
            "the chat template rejects messages of user, assistant: no assistant",
        ),
        ("{{ nothing.at.all }}", "the chat template rejects messages of user: "),
    ],
)
def test_templates_that_cannot_tell_an_answer_from_its_prompt(template, message):
    tokenizer = small_llama.make_tokenizer(chat_template=template)
    with refused(message):
        encode(tokenizer, [Example("hot", "cold")], _CHAT)


def test_rows_that_the_context_does_not_hold(tokenizer):
    rows = [Example("hot", "cold"), Example("the cold bold gold is old, " * 20, "cold")]
    tokens = len(encode(tokenizer, rows, _PLAIN).inputs[1])
    fits = replace(_PLAIN, context=tokens + 8)
    assert len(encode(tokenizer, rows, fits, new_tokens=8)) == 2
    with refused(
        rf"row 2, 'the cold bold gold is old, the cold bold\.\.\.', has {tokens} tokens, and {tokens + 9} "
        rf"with its answer of up to 9: the model's context holds {tokens + 8}. Shorten the row or take it out"
    ):
        encode(tokenizer, rows, fits, new_tokens=9)
    with refused(
        "row 1, 'hot', .* with its answer of up to 65: the model's context holds 20"
    ):
        encode(
            tokenizer,
            [Example("hot", "é" * 64)],
            replace(_PLAIN, context=20),
        )


def test_tokens_that_the_model_lacks(tokenizer):
    rows = [Example("hot", "cold"), Example("the [new] gold", "old")]
    kept = len(tokenizer)
    more = small_llama.make_tokenizer()
    more.add_special_tokens(
        {"additional_special_tokens": ["[new]"]}, replace_extra_special_tokens=False
    )
    assert more.convert_tokens_to_ids("[new]") == kept
    for text_format in (_PLAIN, SEPARATE_TEXTS):
        fits = replace(text_format, vocabulary=kept + 1)
        lacks = replace(text_format, vocabulary=kept)
        assert len(encode(more, rows, fits)) == len(encode(more, rows[:1], lacks)) + 1
        for row in (rows[1], Example("hot", "old [new]")):
            with refused(
                rf"row 2, '.*', has the token '\[new\]', number {kept}, and the model's embedding holds"
            ):
                encode(more, [rows[0], row], lacks)


@pytest.mark.parametrize("text_format", [SEPARATE_TEXTS, _PLAIN])
def test_an_answer_without_tokens_is_refused(text_format):
    raw = Tokenizer(models.WordLevel({"hot": 0, "<unk>": 1}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    with refused(r"the tokenizer makes no tokens of '\\n': take the row out"):
        encode(tokenizer, [Example("hot", "\n")], text_format)
    with refused("the tokenizer makes no tokens of ''"):
        encode(tokenizer, [Example("", "")], text_format)


def test_chats_have_the_goldens_tokens(goldens):
    """Conversations as SmolLM2's own tokenizer reads them."""
    texts = load_texts(open_base(pretrained.smollm2_file()), chat=True)
    asked = [
        chat
        for chat in read_json(goldens / "smollm2" / "tokenizer_cases.json")["chats"]
        if chat["add_generation_prompt"] and chat["messages"][-1]["role"] == "user"
    ]
    assert len(asked) == 6
    for chat in asked:
        *history, (_, question) = [
            (message["role"], message["content"]) for message in chat["messages"]
        ]
        encoded = encode(
            texts.tokenizer, [Example(question, "", tuple(history))], texts.text_format
        )
        assert encoded.inputs[0].tolist() == chat["ids"]


# Conversations as rows.


def _row(*messages, **more):
    return {
        "messages": [{"role": role, "content": content} for role, content in messages],
        **more,
    }


_TALK = (
    ("system", "be old"),
    ("user", "tall"),
    ("assistant", "short"),
    ("user", "hot"),
    ("assistant", "cold"),
)


def test_conversations_are_read_with_the_last_answer_as_target(tmp_path):
    rows = [_row(*_TALK), _row(*_TALK[3:]), {"input": "bold", "target": "gold"}]
    write_rows(tmp_path / "test.jsonl", rows)
    task = load_task(tmp_path, chat=True, prompt="Q: {input}", need=["test"])
    assert task.test == (
        Example(
            "Q: hot",
            "cold",
            (("system", "be old"), ("user", "tall"), ("assistant", "short")),
        ),
        Example("Q: hot", "cold"),
        Example("Q: bold", "gold"),
    )
    with refused(
        r"test.jsonl, line 1 is a conversation, .* chat template: give --chat"
    ):
        load_task(tmp_path, need=["test"])


def test_what_was_said_before_counts_as_part_of_a_row(tmp_path):
    for part, rows in (
        ("train", [_row(*_TALK)]),
        ("test", [_row(*_TALK), _row(*_TALK[3:])]),
    ):
        write_rows(tmp_path / f"{part}.jsonl", rows)
    task = load_task(tmp_path, chat=True)
    alone = replace(task, test=(Example("hot", "cold"),) * 2)
    assert alone.sha256 != task.sha256
    shown = few_shot(task, 1, 0)
    assert [example.input for example in shown.test] == ["hot cold\n\nhot"] * 2
    assert [example.history for example in shown.test] == [
        example.history for example in task.test
    ]


# Text that comes token by token.


def test_a_character_waits_for_all_of_its_bytes(tokenizer):
    ids = tokenizer("é 東京🙂!", add_special_tokens=False)["input_ids"]
    pieces = list(stream_text(tokenizer, [*ids, END, START], _PLAIN))
    assert "".join(pieces) == "é 東京🙂!" and pieces[0] == "é" and len(pieces) >= 4
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # An answer that ends within a character.
    assert "".join(stream_text(tokenizer, ids[:-2], _PLAIN)) == tokenizer.decode(
        ids[:-2]
    )


@pytest.fixture(scope="module")
def cleaning():
    """A tokenizer whose texts lose spaces before punctuation, which only a later word shows."""
    words = ["do", "n't", "'", "s", ".", ",", "we", "'ve", "!", "a", "<unk>"]
    raw = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate([*small_llama.SPECIAL, *words])}, "<unk>"
        )
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", clean_up_tokenization_spaces=True
    )


@given(
    byte_ids=st.lists(st.integers(0, 312), max_size=12),
    word_ids=st.lists(st.integers(4, 13), max_size=9),
)
@settings(max_examples=100)
def test_pieces_add_up_to_the_decoded_text(tokenizer, cleaning, byte_ids, word_ids):
    for reader, ids in ((tokenizer, byte_ids), (cleaning, word_ids)):
        assert (
            "".join(stream_text(reader, ids, _PLAIN))
            == decode(reader, [ids], _PLAIN)[0]
        )


def test_spaces_that_are_cleaned_up_are_not_said(cleaning):
    ids = cleaning.convert_tokens_to_ids(["we", "'ve", "a", ",", "do", "n't", "!"])
    pieces = list(stream_text(cleaning, ids, _PLAIN))
    assert "".join(pieces) == "we've a, don't!" and len(pieces) > 2
