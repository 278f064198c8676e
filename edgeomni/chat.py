"""How a checkpoint is spoken to: its chat template, its own system prompt, and the words that end a text answer."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SpecError
from .schema import short

SYSTEM_SLOT, QUESTION_SLOT = "{system}", "{question}"


@dataclass(frozen=True)
class ChatSpec:
    """Text around a turn. As it stands by default, a prompt has the published model's form: no system prompt.

    `system_format` is what a system prompt is put into (by default ChatML, as Qwen2 and others were trained with),
    `question_format` what a written question is put into. `default_system`: the system prompt of a turn that gives
    none. `stop_words`: each ends the text of an answer as eot does; each is one entry of the vocabulary.
    """

    system_format: str = "<|im_start|>system\n{system}<|im_end|>\n"
    question_format: str = "{question}"
    default_system: str = ""
    stop_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop_words, str):
            raise SpecError(f"chat.stop_words must be a list of words, not the text {short(self.stop_words)}")
        object.__setattr__(self, "stop_words", tuple(self.stop_words))
        _check_format("system_format", self.system_format, SYSTEM_SLOT)
        _check_format("question_format", self.question_format, QUESTION_SLOT)
        if not isinstance(self.default_system, str):
            raise SpecError(f"chat.default_system must be a text, not {short(self.default_system)}")
        if bad := [w for w in self.stop_words if not isinstance(w, str) or not w]:
            raise SpecError(f"chat.stop_words holds {short(bad[0])}; each must be a text that is not empty")

    def system(self, text: str | None = None) -> str:
        """The system prompt `text` (None: the checkpoint's own) within its format; "" where there is none."""
        text = self.default_system if text is None else text
        return self.system_format.replace(SYSTEM_SLOT, text) if text.strip() else ""

    def question(self, text: str) -> str:
        """A written question within its format; "" for one that is empty."""
        return self.question_format.replace(QUESTION_SLOT, text) if text.strip() else ""


def _check_format(name: str, text: str, slot: str) -> None:
    if not isinstance(text, str) or text.count(slot) != 1:
        raise SpecError(f"chat.{name} must be a text that holds {slot} once, not {short(text)}")
