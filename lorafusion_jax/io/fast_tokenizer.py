"""A tokenizer of the library `tokenizers` alone: transformers takes a second to import, and three next to PyTorch."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers
    import transformers

# In transformers' order.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class FastTokenizer:
    """The methods of transformers' tokenizer that runs use; any other one loads transformers.

    Args:
      backend: the tokenizer; special tokens that it lacks are added.
      special: texts of the special tokens by transformers' names, such as `eos_token`.
      chat_template: the template, or None.
      name: the base, for messages.
      whole: function that returns transformers' tokenizer.
    """

    clean_up_tokenization_spaces = False

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        special: Mapping[str, str | None],
        chat_template: str | None,
        name: str,
        load_tokenizer: Callable[[], "transformers.PreTrainedTokenizerBase"],
    ):
        from tokenizers import AddedToken

        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.name_or_path = name
        self.special_tokens_map = {
            key: special[key] for key in _SPECIAL if special.get(key) is not None
        }
        self._load = load_tokenizer
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        missing = [
            text for text in self.special_tokens_map.values() if text not in added
        ]
        backend.add_tokens(
            [AddedToken(text, special=True) for text in dict.fromkeys(missing)]
        )
        backend.no_padding()

    def __call__(
        self,
        texts: str | list[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_special_tokens_mask: bool = True,
        verbose: bool = False,
    ) -> dict[str, Any]:
        if truncation and max_length is not None:
            self.backend_tokenizer.enable_truncation(max_length)
        else:
            self.backend_tokenizer.no_truncation()
        is_single = isinstance(texts, str)
        rows = self.backend_tokenizer.encode_batch(
            [texts] if is_single else texts, add_special_tokens=add_special_tokens
        )
        encoded = {"input_ids": [row.ids for row in rows]}
        encoded["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        return (
            {key: values[0] for key, values in encoded.items()}
            if is_single
            else encoded
        )

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def __getattr__(self, name: str) -> Any:
        if (
            name.startswith("__") or name == "whole"
        ):  # else an error of `whole` would come here again
            raise AttributeError(name)
        if name.endswith("_token_id") and name.removesuffix("_id") in _SPECIAL:
            text = self.special_tokens_map.get(name.removesuffix("_id"))
            return None if text is None else self.backend_tokenizer.token_to_id(text)
        if name in _SPECIAL:
            return self.special_tokens_map.get(name)
        return getattr(self.whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SPECIAL:
            self.special_tokens_map[name] = value
            if "whole" in vars(self):
                setattr(self.whole, name, value)
        else:
            super().__setattr__(name, value)

    @functools.cached_property
    def whole(self) -> "transformers.PreTrainedTokenizerBase":
        """The tokenizer as transformers loads it."""
        made = self._load()
        for name, text in self.special_tokens_map.items():
            setattr(made, name, text)
        made.name_or_path = self.name_or_path
        return made

    def batch_decode(
        self, rows: Iterable[Iterable[Any]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the texts of rows of tokens."""
        return self.backend_tokenizer.decode_batch(
            [[*map(int, row)] for row in rows], skip_special_tokens
        )

    def convert_ids_to_tokens(self, number: int) -> str | None:
        """Return the text of a token, as the vocabulary spells it."""
        return self.backend_tokenizer.id_to_token(number)

    def get_chat_template(self) -> str:
        """Return the chat template."""
        if self.chat_template is None:
            return self.whole.get_chat_template()
        return self.chat_template
