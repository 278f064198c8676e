"""TensorRT's engines of one LLM must fit together: what links them, and how many frames go in at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeomni.errors import EngineError
from edgeomni.runtimes.tensorrt import engine as engines
from edgeomni.runtimes.tensorrt.llm import _check_types
from edgeomni.runtimes.tensorrt.stacks import Stack

HALF, FULL, WHOLE = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int64)


def engine_with(what: str, **types: np.dtype[Any] | None) -> engines.Engine:
    """As far as its tensors go."""
    made = object.__new__(engines.Engine)
    made.what = what
    made.tensors = {n: engines.Tensor(n, (1,), t, t.itemsize if t else 2, True) for n, t in types.items()}
    return made


def family(**changed: dict[str, np.dtype[Any] | None]) -> dict[str, engines.Engine]:
    """A body, a TTS adapter and two heads that fit together, but for what is changed."""
    ports: dict[str, dict[str, np.dtype[Any] | None]] = {
        "body": {"hidden": HALF, "body_out": FULL, "position_ids": WHOLE, "write_indices": WHOLE},
        "tts": {"hidden": FULL, "inputs_embeds": FULL, "position_ids": WHOLE, "write_indices": WHOLE},
        "text_head": {"hidden": HALF},
        "audio_head": {"hidden": FULL},
    }
    return {role: engine_with(f"llm/{role}", **{**own, **changed.get(role, {})}) for role, own in ports.items()}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"text_head": {"hidden": FULL}}, "body gives hidden in another type than text_head takes"),
        ({"text_head": {"hidden": None}}, "body gives hidden in another type"),
        ({"audio_head": {"hidden": HALF}}, "tts gives hidden in another type than audio_head takes"),
        ({"tts": {"inputs_embeds": HALF}}, "body gives body_out in another type than tts takes"),
        ({"tts": {"write_indices": np.dtype(np.int32)}}, "body gives write_indices in another type than tts takes"),
    ],
)
def test_engines_that_would_read_each_other_s_numbers_as_another_type(changed: Any, told: str) -> None:
    _check_types(family())
    with pytest.raises(EngineError, match=told):
        _check_types(family(**changed))


@pytest.mark.parametrize(("role", "name"), [("body", "body_out"), ("tts", "inputs_embeds"), ("audio_head", "hidden")])
def test_engines_that_lack_what_links_them(role: str, name: str) -> None:
    opened = family()
    del opened[role].tensors[name]
    with pytest.raises(EngineError, match=f"llm/{role}: the engine has no tensor {name}"):
        _check_types(opened)


def test_without_a_tts_adapter_the_body_feeds_both_heads() -> None:
    opened = family(audio_head={"hidden": HALF})
    del opened["tts"], opened["body"].tensors["body_out"]
    _check_types(opened)
    with pytest.raises(EngineError, match="body gives hidden in another type than audio_head takes"):
        _check_types({**opened, "audio_head": engine_with("llm/audio_head", hidden=FULL)})


@pytest.mark.parametrize(("prefill", "most"), [(64, 64), (128, 128), (512, 128), (1, 1)])
def test_a_prompt_goes_in_by_pieces_as_large_as_the_engine_takes(prefill: int, most: int) -> None:
    stack = object.__new__(Stack)
    stack.engine, stack.width = engine_with("llm/body"), 8
    stack.engine.profiles = [
        {"inputs_embeds": ((1, 1, 8), (1, 1, 8), (1, prefill, 8))},
        {"inputs_embeds": ((2, 1, 8), (2, 1, 8), (2, 600, 8))},
    ]
    assert stack.most_frames == most
