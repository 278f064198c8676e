"""Sizes that cannot be are refused by name, whichever way a spec is made."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fakes import small_spec

from edgeomni.errors import SpecError
from edgeomni.limits import LARGEST, positive, sized
from edgeomni.spec import CodecSpec, OmniSpec, TokenLayout

WHOLE: dict[str, Any] = small_spec().to_dict()
SIZES = [(s, key) for s in WHOLE if isinstance(WHOLE[s], dict) for key, v in WHOLE[s].items() if type(v) is int]
SIZES += [("codec", "attn_window"), ("", "context"), ("", "tts_layers"), ("", "history_turns")]
SIZES.remove(("adapter", "hidden"))  # of a linear adapter it is nothing


def with_value(section: str, key: str, value: Any) -> dict[str, Any]:
    part = {**WHOLE[section], key: value}
    return {**WHOLE, section: part} if section else {**WHOLE, key: value}


@pytest.mark.parametrize(("section", "key"), SIZES)
@pytest.mark.parametrize("value", [10**12, 2**62, -1])
def test_every_size_has_a_bound(section: str, key: str, value: int) -> None:
    data = with_value(section, key, value) if section else {**WHOLE, key: value}
    with pytest.raises(SpecError, match=rf"{section or 'spec'}\.{key} "):
        OmniSpec.from_dict(data)


@pytest.mark.parametrize("value", [10**12, 0])
def test_the_adapters_width_has_a_bound(value: int) -> None:
    with pytest.raises(SpecError, match=r"\$\.adapter: adapter\.hidden "):
        OmniSpec.from_dict({**WHOLE, "adapter": {"kind": "swiglu", "hidden": value}})


@pytest.mark.parametrize("name", LARGEST)
def test_the_bound_itself_is_allowed(name: str) -> None:
    sized("x", **{name: LARGEST[name]})
    with pytest.raises(SpecError, match=rf"x\.{name} is {LARGEST[name] + 1}, but no model has more than"):
        sized("x", **{name: LARGEST[name] + 1})


@pytest.mark.parametrize("value", [0, -3, True, 2.0, "2", None, math.nan])
def test_a_size_is_a_whole_number_from_one_on(value: Any) -> None:
    with pytest.raises(SpecError, match=r"x\.width must be a whole number of at least 1"):
        sized("x", width=value)


def test_some_sizes_may_be_nothing() -> None:
    sized("x", least=0, width=0)
    with pytest.raises(SpecError, match="at least 0"):
        sized("x", least=0, width=-1)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_rates_are_finite_and_above_nothing(value: Any) -> None:
    positive("x", norm_eps=1e-300)
    with pytest.raises(SpecError, match=r"x\.norm_eps must be a finite number above 0"):
        positive("x", norm_eps=value)


@pytest.mark.parametrize("strides", [(), (0,), (2, 0, 1), (-1,), (2,), (3, 2, 1), (2048, 1), ("2", 1), (1.0,)])
def test_codec_strides_that_make_no_frame(strides: tuple[Any, ...]) -> None:
    with pytest.raises(SpecError, match=r"codec\.vq_strides"):
        CodecSpec("snac", 24000, 32, strides, 16)


def test_streams_and_rows_are_bounded_together() -> None:
    with pytest.raises(SpecError, match=r"codec\.streams is 1025"):
        CodecSpec("mimi", 24000, 32, (1,) * 1025, 16)
    CodecSpec("mimi", 24000, 32, (1,) * 1024, 16)
    TokenLayout(100, 1 << 15, 32, 1000)
    with pytest.raises(SpecError, match=r"layout\.joint_vocab is 33955432"):
        TokenLayout(1_187_432, 1 << 15, 32, 1000)
