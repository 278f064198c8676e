"""Chat templates: the texts they make, and prompts with a system prompt, each id written out by hand.

The layout is that of test_prompts.py: three audio streams of 18 ids each behind 100 text ids. The tokenizer has a
word per id: see WORDS; <|im_start|> is 9 and <|im_end|> is 10, which it finds in any text.
"""

from __future__ import annotations

from typing import Any

import pytest
from fakes import small_spec
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, pre_tokenizers

from edgeomni import prompts
from edgeomni.chat import ChatSpec
from edgeomni.errors import CheckpointError, PromptError, SpecError
from edgeomni.spec import OmniSpec
from edgeomni.text import Tokenizer

WORDS = ["<unk>", "system", "be", "short", "hi", "you", "stop", "user", "no"]
EOT, PAD_T, INPUT_T, ANSWER_T = 92, 93, 94, 95
EOA, PAD, INPUT, ANSWER = 110, 111, 112, 113


def word_tokenizer() -> str:
    hf = HfTokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return str(hf.to_str())


def spec_with(**chat: Any) -> OmniSpec:
    return small_spec(strides=(2, 1), codebook=10, history_turns=2, chat=ChatSpec(**chat))


def tokenizer_of(spec: OmniSpec) -> Tokenizer:
    return Tokenizer(word_tokenizer(), spec.layout)


def rows(audio: list[int], text: list[int]) -> list[list[int]]:
    return [audio, [i + 18 for i in audio], [i + 36 for i in audio], text]


SPEC = spec_with()


# --- texts


def test_by_default_the_template_is_chatml_and_nothing_is_added() -> None:
    chat = ChatSpec()
    assert chat.system() == "" and chat.question("hi {system} {") == "hi {system} {"
    assert chat.system("be {short}") == "<|im_start|>system\nbe {short}<|im_end|>\n"
    assert chat.stop_words == ()


def test_a_checkpoint_s_own_system_prompt_stands_where_none_is_given() -> None:
    chat = ChatSpec("[{system}]", "Q: {question}?", "be short", ("stop",))
    assert chat.system() == chat.system(None) == "[be short]"
    assert chat.system("no") == "[no]"
    assert chat.system("") == chat.system(" \n") == ""
    assert (chat.question("hi"), chat.question(" ")) == ("Q: hi?", "")


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ({"system_format": "system"}, r"chat\.system_format must be a text that holds {system} once, not 'system'"),
        ({"system_format": "{system}{system}"}, r"chat\.system_format must be"),
        ({"system_format": 3}, r"chat\.system_format must be a text"),
        ({"question_format": "{system}"}, r"chat\.question_format must be a text that holds {question} once"),
        ({"default_system": None}, r"chat\.default_system must be a text, not None"),
        ({"stop_words": "stop"}, r"chat\.stop_words must be a list of words, not the text 'stop'"),
        ({"stop_words": ["a", ""]}, r"chat\.stop_words holds ''; each must be a text that is not empty"),
        ({"stop_words": [5]}, r"chat\.stop_words holds 5"),
    ],
)
def test_templates_that_make_no_sense(chat: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ChatSpec(**chat)


# --- prompts by hand


def test_a_system_prompt_stands_before_a_spoken_question() -> None:
    prompt = prompts.build(SPEC, "aa", features=2, system_ids=[7, 8, 9], two_row=True)
    text = [7, 8, 9, INPUT_T, PAD_T, PAD_T, EOT, ANSWER_T]
    assert prompt.ids.tolist() == [
        rows([PAD, PAD, PAD, INPUT, PAD, PAD, EOA, ANSWER], text),
        rows([PAD, PAD, PAD, INPUT, PAD, PAD, EOA, PAD], text),
    ]
    assert (prompt.feature_start, prompt.length) == (4, 8)


def test_a_system_prompt_stands_before_earlier_turns_too() -> None:
    prompt = prompts.build(SPEC, "ta", text_ids=[4], system_ids=[7], history=[([1], [2, 3])])
    text = [7, INPUT_T, 1, EOT, ANSWER_T, 2, 3, EOT, INPUT_T, 4, EOT, ANSWER_T]
    assert prompt.ids.tolist() == [rows([PAD] * 11 + [ANSWER], text)]
    spoken = prompts.build(SPEC, "asr", features=1, system_ids=[7], history=[([1], [2, 3])])
    assert spoken.feature_start == 9


def test_ids_of_a_system_prompt_are_checked() -> None:
    with pytest.raises(PromptError, match=r"text ids \[100\] lie outside the text vocabulary of 100"):
        prompts.build(SPEC, "aa", features=2, system_ids=[1, 100])


# --- prompts from texts


def test_a_system_prompt_is_tokenised_within_chatml() -> None:
    tokenizer = tokenizer_of(SPEC)
    assert prompts.system_ids(SPEC, tokenizer, "be short") == [9, 1, 2, 3, 10]
    assert prompts.system_ids(SPEC, tokenizer) == [] == prompts.system_ids(SPEC, tokenizer, "")


def test_question_and_history_go_through_the_question_s_format_and_answers_do_not() -> None:
    spec = spec_with(question_format="<|im_start|>user {question}<|im_end|>", default_system="no")
    prompt = prompts.from_texts(spec, tokenizer_of(spec), "tt", text="hi you", history=[("stop", "be")])
    past = [INPUT_T, 9, 7, 6, 10, EOT, ANSWER_T, 2, EOT]
    text = [9, 1, 8, 10, *past, INPUT_T, 9, 7, 4, 5, 10, EOT, ANSWER_T]
    assert prompt.ids.tolist() == [rows([PAD] * len(text), text)]
    silent = prompts.from_texts(spec, tokenizer_of(spec), "tt", text="hi you", system="")
    assert silent.ids[0, -1].tolist() == [INPUT_T, 9, 7, 4, 5, 10, EOT, ANSWER_T]


def test_a_blank_question_stays_an_error_within_a_format() -> None:
    spec = spec_with(question_format="user {question}")
    for blank in ("", "  "):
        with pytest.raises(PromptError, match="text is empty"):
            prompts.from_texts(spec, tokenizer_of(spec), "tt", text=blank)


def test_a_system_prompt_needs_a_tokenizer_and_none_needs_none() -> None:
    spec = spec_with(default_system="be short")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        prompts.from_texts(spec, Tokenizer(None, spec.layout), "at", features=1)
    assert prompts.from_texts(spec, Tokenizer(None, spec.layout), "at", features=1, system="").length == 4
