"""Quality along the original's own answers, against a second computation: whole sequences through torch, no cache."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from edgeomni.errors import GateError
from edgeomni.gate import answers
from edgeomni.model import checkpoints
from edgeomni.prompts import from_texts
from edgeomni.question import Question
from edgeomni.runtimes.torch import TorchEncoder, TorchLanguageModel
from edgeomni.text import Tokenizer

FRAMES = 12
QUESTIONS = [Question("tt", text="the of and"), Question("ta", text="you that it")]


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoints.preset("tiny", 3)


@pytest.fixture(scope="module")
def other(model: Any) -> Any:
    """The same model with one layer's weights half as large again."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter("body.layers.1.mlp.down_proj.weight").mul_(1.5)
    return changed


def side(model: Any) -> answers.Side:
    return answers.Side(TorchEncoder(model), TorchLanguageModel(model))


def tokenizer_of(model: Any) -> Tokenizer:
    return Tokenizer(model.tokenizer_json, model.spec.layout)


def greedy(model: Any, other: Any, question: Question) -> tuple[list[Any], list[Any]]:
    """Logits (text or None, audio or None) of `model` along its own greedy answer, and of `other` along the same."""
    layout, speaks = model.spec.layout, question.task == "ta"
    prompt = from_texts(model.spec, tokenizer_of(model), question.task, text=question.text)
    ids = torch.from_numpy(prompt.ids[:1]).long()
    both: tuple[list[Any], list[Any]] = ([], [])
    ended = False
    for _ in range(FRAMES):
        for which, found in zip((model, other), both, strict=True):
            with torch.no_grad():
                text, audio = (logits[0, -1].numpy() for logits in which(ids))
            found.append((None if ended else text, audio if speaks else None))
        text_id = layout.pad_t if ended else int(both[0][-1][0].argmax())
        spoken = both[0][-1][1].argmax(-1) if speaks else np.full(layout.streams, layout.pad_a)
        frame = [int(spoken[k]) + layout.shift(k) for k in range(layout.streams)] + [text_id]
        ids = torch.cat([ids, torch.tensor(frame)[None, :, None]], dim=2)
        ended = ended or text_id == layout.eot
        if (spoken[-1] == layout.eoa) if speaks else ended:
            break
    return both


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    a, b = (np.exp(x.astype(np.float64) - x.max()) for x in (p, q))
    a, b = a / a.sum(), b / b.sum()
    return float((a * np.log(a / b)).sum())


def test_figures_are_those_of_whole_sequences(model: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LONGEST", FRAMES)
    found, details = answers.measure(side(model), side(other), model.spec, tokenizer_of(model), QUESTIONS)
    walked = [greedy(model, other, question) for question in QUESTIONS]
    rows = [(a, b) for mine, theirs in walked for a, b in zip(mine, theirs, strict=True)]
    heads = {"text": [(a[0], b[0]) for a, b in rows if a[0] is not None]}
    for k in range(model.spec.layout.streams):
        heads[f"audio{k}"] = [(a[1][k], b[1][k]) for a, b in rows if a[1] is not None]
    wanted = {name: float(np.mean([divergence(a, b) for a, b in pairs])) for name, pairs in heads.items()}
    assert {name: head["kl"] for name, head in details["heads"].items()} == pytest.approx(wanted, rel=1e-3)
    same = {name: float(np.mean([a.argmax() == b.argmax() for a, b in pairs])) for name, pairs in heads.items()}
    assert {name: head["top1"] for name, head in details["heads"].items()} == pytest.approx(same)
    assert found == {"answers.kl": pytest.approx(max(wanted.values()), rel=1e-3), "answers.top1": min(same.values())}
    assert details["questions"] == len(QUESTIONS) and found["answers.kl"] > 1e-3


def test_the_same_model_loses_nothing_and_speech_is_heard_by_either_encoder(model: Any, other: Any) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    asked = [Question("asr", audio=sound)]
    found, details = answers.measure(side(model), side(model), model.spec, tokenizer_of(model), asked)
    assert found == {"answers.kl": pytest.approx(0, abs=1e-9), "answers.top1": 1.0}
    assert list(details["heads"]) == ["text"], "what does not speak has no figures of audio heads"
    deaf = copy.deepcopy(model)
    with torch.no_grad():
        deaf.encoder.conv1.weight.mul_(0.0)
    mixed = answers.Side(TorchEncoder(deaf), TorchLanguageModel(model))
    found, _ = answers.measure(side(model), mixed, model.spec, tokenizer_of(model), asked)
    assert found["answers.kl"] > 1e-4


def test_questions_that_cannot_be_asked_are_left_out(model: Any) -> None:
    blank, good = Question("tt", text=" "), Question("tt", text="the of")
    _, details = answers.measure(side(model), side(model), model.spec, tokenizer_of(model), [blank, good])
    assert details["questions"] == 1
    with pytest.raises(GateError, match="can be asked"):
        answers.measure(side(model), side(model), model.spec, tokenizer_of(model), [blank])
