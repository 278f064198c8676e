"""Small specs and scripted answers shared by the tests that need no model."""

from __future__ import annotations

import dataclasses
import sys
from time import perf_counter
from typing import Any

import pytest

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


class Clock:
    """A clock that moves only when it is told to, in place of `perf_counter` in every edgeomni module."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = [m for name, m in list(sys.modules.items()) if name.startswith("edgeomni")]
        for module in modules:
            if getattr(module, "perf_counter", None) is perf_counter:
                monkeypatch.setattr(module, "perf_counter", self)

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """From now on each call of owner.name takes that long."""
        original = getattr(owner, name)

        def timed(*args: Any, **how: Any) -> Any:
            self.advance(seconds)
            return original(*args, **how)

        monkeypatch.setattr(owner, name, timed)
