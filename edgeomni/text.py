"""Text in and out: the checkpoint's tokenizer, and ids -> text as they come."""

from __future__ import annotations

from typing import Any

from .errors import CheckpointError, PromptError
from .schema import short
from .spec import TokenLayout

_UNFINISHED = "\ufffd"
"""What a tokenizer decodes half a UTF-8 sequence to."""


class Tokenizer:
    """tokenizer.json (Hugging Face format) with the layout's specials left out. Loaded at first use."""

    def __init__(self, tokenizer_json: str | None, layout: TokenLayout) -> None:
        self._json, self._layout = tokenizer_json, layout
        self._tokenizer: Any = None

    def encode(self, text: str) -> list[int]:
        """Raises PromptError for empty text, CheckpointError where the checkpoint has no tokenizer."""
        if not text.strip():
            raise PromptError("the question's text is empty; give some")
        ids: list[int] = self._load().encode(text).ids
        if not ids:
            raise PromptError(f"the tokenizer makes no ids of {text[:40]!r}; write it otherwise")
        return ids

    def id_of(self, word: str) -> int:
        """The one id that stands for `word`.

        Raises CheckpointError where the vocabulary has no such entry, or the checkpoint no tokenizer.
        """
        ids: list[int] = self._load().encode(word, add_special_tokens=False).ids
        if len(ids) != 1 or str(self._load().decode(ids, skip_special_tokens=False)).strip() != word.strip():
            raise CheckpointError(
                f"the stop word {short(word)} is not one entry of the tokenizer's vocabulary (its ids: {ids[:10]}); "
                "set chat.stop_words in config.json to words that are, such as <|im_end|>"
            )
        return ids[0]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; without a tokenizer the ids themselves, as <id>."""
        if self._json is None:
            return "".join(f"<{i}>" for i in ids)
        return str(self._load().decode(ids))

    def _load(self) -> Any:
        if self._json is None:
            raise CheckpointError("this checkpoint has no tokenizer.json, so it takes no text; put one beside it")
        if self._tokenizer is None:
            from tokenizers import Tokenizer as Loaded

            try:
                self._tokenizer = Loaded.from_str(self._json)
            except Exception as exc:  # tokenizers raises bare Exception
                raise CheckpointError(f"tokenizer.json cannot be read ({exc}); replace it") from exc
        return self._tokenizer

    def is_text(self, token: int) -> bool:
        return token < self._layout.eot

    def ends(self, token: int) -> bool:
        return token == self._layout.eot


class TextStream:
    """Decodes ids as they come; holds back what may still change (half a character)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._kept = 0
        self._ended = False
        self.text = ""
        """All text given out so far."""

    def add(self, token: int) -> str:
        """Takes one id of the text stream; returns the text that became final, perhaps none."""
        self._ended = self._ended or self._tokenizer.ends(token)
        if self._ended or not self._tokenizer.is_text(token):
            return ""
        self._ids.append(token)
        whole = self._tail()
        return "" if whole.endswith(_UNFINISHED) else self._give(whole)

    def finish(self) -> str:
        return self._give(self._tail())

    def _tail(self) -> str:
        """Text since the last cut, decoded with the id before it, so that a leading space survives."""
        start = max(0, self._kept - 1)
        before = self._tokenizer.decode(self._ids[start : self._kept])
        return self._tokenizer.decode(self._ids[start:])[len(before) :]

    def _give(self, text: str) -> str:
        if not self.text:
            text = text.lstrip()
        self._kept = len(self._ids)
        self.text += text
        return text
