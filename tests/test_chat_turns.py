"""Turns with a system prompt or stop words, on scripted components: what the LLM is fed, and where the text ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from fakes import ended, script
from test_chat import ANSWER_T, EOT, INPUT_T, PAD_T, WORDS, spec_with, word_tokenizer
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.processors import TemplateProcessing

from edgeomni import Session, TextDelta, TurnEnd, prompts
from edgeomni.cli import main
from edgeomni.errors import CheckpointError
from edgeomni.runtimes import fake
from edgeomni.spec import OmniSpec
from edgeomni.text import Tokenizer

NOISE = np.random.default_rng(0).standard_normal(1600).astype(np.float32) * 0.1
"""A tenth of a second: six features."""


def session_of(spec: OmniSpec, text: list[int], frames: int = 8) -> Session:
    return Session(fake.components(spec, script(spec, frames, text)), spec, word_tokenizer())


def fed(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The states of the turns that begin from now on."""
    states, start = [], session.components.llm.start

    def kept(rows: int, frames: int) -> Any:
        states.append(start(rows, frames))
        return states[-1]

    monkeypatch.setattr(session.components.llm, "start", kept)
    return states


@pytest.mark.parametrize(
    ("own", "given", "ids"),
    [("be short", None, [9, 1, 2, 3, 10]), ("be short", "no", [9, 1, 8, 10]), ("be short", "", []), ("", None, [])],
)
def test_the_llm_hears_the_system_prompt_before_the_question(
    own: str, given: str | None, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(spec_with(default_system=own), [4])
    states = fed(session, monkeypatch)
    ended(session.respond("aa", NOISE, system=given))
    (state,) = states
    prefill = np.concatenate([piece[0, -1] for piece in state.fed])
    question = [INPUT_T, *[PAD_T] * 6, EOT, ANSWER_T]
    assert prefill[: len(ids) + 9].tolist() == [*ids, *question]
    (heard,) = state.features[0]
    assert (heard.start, len(heard.values)) == (len(ids) + 1, 6)


def test_serving_feeds_what_the_shared_function_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer takes its prompts from prompts.from_texts."""
    spec = spec_with(question_format="user {question}")
    session = session_of(spec, [4])
    states = fed(session, monkeypatch)
    asked: dict[str, Any] = {"text": "hi you", "system": "be short", "history": [("hi", "no")]}
    ended(session.respond("ta", **asked))
    prompt = prompts.from_texts(spec, Tokenizer(word_tokenizer(), spec.layout), "ta", **asked)
    np.testing.assert_array_equal(np.concatenate(states[0].fed, axis=2)[:, :, : prompt.length], prompt.ids)


def test_a_cancelled_turn_with_a_system_prompt_leaves_nothing_behind() -> None:
    session = session_of(spec_with(), [4, 5])
    whole = ended(session.respond("aa", NOISE, system="be short"))
    events = session.respond("aa", NOISE, system="be short")
    next(events)
    session.cancel()
    assert ended(events).reason == "cancelled"
    again = ended(session.respond("aa", NOISE, system="be short"))
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    assert again.text == whole.text == "hi you"


def test_a_system_prompt_counts_towards_the_length() -> None:
    session = session_of(spec_with(), [4, 5])
    lengths = [ended(session.respond("aa", NOISE, system=s, max_length=15)).tokens.shape[1] for s in (None, "no")]
    assert lengths == [6, 2], "9 frames of question, and 4 of system prompt"


# --- stop words


@pytest.mark.parametrize("task", ["tt", "at"])
def test_a_stop_word_ends_an_answer_in_text_as_eot_does(task: str) -> None:
    asked: dict[str, Any] = {"text": "hi"} if task == "tt" else {"audio": NOISE}
    stopped = session_of(spec_with(stop_words=("stop",)), [4, 5, 6, 2, 3])
    end = ended(stopped.respond(task, **asked))  # type: ignore[arg-type]
    assert (end.reason, end.text, end.tokens[-1].tolist()) == ("eot", "hi you", [4, 5])
    through = ended(session_of(spec_with(), [4, 5, 6, 2, 3]).respond(task, **asked))  # type: ignore[arg-type]
    assert through.text == "hi you stop be short"


@pytest.mark.parametrize("two_row", [True, False])
def test_a_stop_word_ends_the_text_and_the_sound_goes_on(two_row: bool) -> None:
    session = session_of(spec_with(stop_words=("user", "<|im_end|>")), [4, 5, 10, 2, 3])
    events = list(session.respond("aa", NOISE, two_row=two_row))
    end = events[-1]
    assert isinstance(end, TurnEnd)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == end.text == "hi you"
    assert end.tokens[-1].tolist() == [4, 5, EOT, *[PAD_T] * 5] and end.reason == "eoa"


@pytest.mark.parametrize("word", ["be short", "unheard", "<|im_start|>be"])
def test_a_stop_word_that_is_no_entry_of_the_vocabulary_is_refused_when_the_session_opens(word: str) -> None:
    assert word not in WORDS
    with pytest.raises(CheckpointError, match=r"stop word .* is not one entry of the tokenizer's vocabulary"):
        session_of(spec_with(stop_words=("stop", word)), [4])


def test_a_tokenizer_that_opens_every_text_with_a_token_of_its_own_has_stop_words_too() -> None:
    hf = HfTokenizer.from_str(word_tokenizer())
    hf.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 9)])
    spec = spec_with(stop_words=("stop",))
    session = Session(fake.components(spec, script(spec, 8, [4, 6, 5])), spec, hf.to_str())
    assert ended(session.respond("at", NOISE)).text == "hi"


def test_stop_words_need_a_tokenizer() -> None:
    spec = spec_with(stop_words=("stop",))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Session(fake.components(spec, script(spec, 4)), spec, None)


# --- the command line


def test_run_passes_the_system_prompt_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = session_of(spec_with(default_system="no"), [4, 5])
    states = fed(session, monkeypatch)
    monkeypatch.setattr(Session, "open", lambda *_, **__: session)
    soundfile.write(tmp_path / "q.wav", NOISE, 16000)
    for given in (["--system", "be short"], ["--system", ""], []):
        result = CliRunner().invoke(main, ["run", "bundle", str(tmp_path / "q.wav"), "--task", "at", *given])
        assert result.exit_code == 0, result.output
    began = [state.fed[0][0, -1, :5].tolist() for state in states]
    assert began == [[9, 1, 2, 3, 10], [INPUT_T, *[PAD_T] * 4], [9, 1, 8, 10, INPUT_T]]
