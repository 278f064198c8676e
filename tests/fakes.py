"""Small specs and scripted answers shared by the tests that need no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from edgeomni import Session, TurnEnd
from edgeomni.runtimes import fake
from edgeomni.spec import AdapterSpec, BodySpec, CodecSpec, EncoderSpec, FrontEndSpec, OmniSpec, TokenLayout


def small_spec(strides: tuple[int, ...] = (4, 2, 1), codebook: int = 32, **changes: Any) -> OmniSpec:
    codec = CodecSpec("snac", 24000, codebook, strides, 16)
    spec = OmniSpec(
        FrontEndSpec(),
        EncoderSpec(1, 16, 2, 32),
        AdapterSpec("linear"),
        BodySpec("qwen2", 1, 16, 2, 1, 16, 32),
        TokenLayout(100, codebook + 8, codebook, codec.streams, 8),
        codec,
        context=64,
    )
    return dataclasses.replace(spec, **changes)


def script(spec: OmniSpec, frames: int, text: list[int] | None = None, eoa: bool = True) -> list[list[int]]:
    """`frames` LLM frames of distinct audio ids, text ids then eot then pad, and a frame that ends the audio."""
    layout = spec.layout
    words = (text or [1, 2, 3]) + [layout.eot]
    out = []
    for i in range(frames):
        audio = [(3 * i + k) % layout.codebook_size for k in range(layout.streams)]
        out.append([*audio, words[i] if i < len(words) else 7])
    if eoa:
        out.append([*[0] * (layout.streams - 1), layout.eoa, 7])
    return out


def scripted_session(spec: OmniSpec | None = None, frames: int = 20, **how: Any) -> Session:
    """A session whose answer is `script(spec, frames)`."""
    spec = spec or small_spec()
    return Session(fake.components(spec, script(spec, frames, **how)), spec, None)


def ended(events: Iterable[Any]) -> TurnEnd:
    """The end of a turn, all else taken."""
    *_, end = events
    assert isinstance(end, TurnEnd)
    return end
