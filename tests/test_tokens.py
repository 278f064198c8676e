"""Layouts and pure token functions, against hand-written facts of the published model."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import small_spec
from hypothesis import given
from hypothesis import strategies as st

from edgeomni.errors import SpecError
from edgeomni.spec import CodecSpec, OmniSpec, TokenLayout
from edgeomni.tokens import codes_to_frames, delay, frames_to_codes, shift_audio, undelay

MINI_OMNI = TokenLayout(152000, 4160, 4096, 7)
SNAC_24K = CodecSpec("snac", 24000, 4096, (4, 2, 1), 512)


def test_published_ids() -> None:
    assert MINI_OMNI.joint_vocab == 181120
    assert (MINI_OMNI.eot, MINI_OMNI.pad_t, MINI_OMNI.input_t, MINI_OMNI.answer_t, MINI_OMNI.asr) == tuple(
        range(151936, 151941)
    )
    assert (MINI_OMNI.eoa, MINI_OMNI.pad_a, MINI_OMNI.input_a, MINI_OMNI.answer_a) == (4096, 4097, 4098, 4099)
    assert shift_audio(MINI_OMNI, np.zeros(7, np.int32)).tolist() == [152000 + 4160 * k for k in range(7)]


@pytest.mark.parametrize(
    ("strides", "levels"),
    [
        ((4, 2, 1), [0, 1, 2, 2, 1, 2, 2]),
        ((8, 4, 2, 1), [0, 1, 2, 3, 3, 2, 3, 3, 1, 2, 3, 3, 2, 3, 3]),
        ((1,) * 8, list(range(8))),
    ],
)
def test_stream_order_is_the_published_one(strides: tuple[int, ...], levels: list[int]) -> None:
    assert list(CodecSpec("snac", 24000, 16, strides, 4).level_of_stream) == levels


def test_codec_frame_figures() -> None:
    assert (SNAC_24K.streams, SNAC_24K.frame_samples) == (7, 2048)
    assert round(SNAC_24K.frame_samples / SNAC_24K.sample_rate * 1000, 1) == 85.3
    codes = frames_to_codes(np.arange(7)[None], SNAC_24K)
    assert [c.tolist() for c in codes] == [[0], [1, 4], [2, 3, 5, 6]]


@given(st.integers(1, 12), st.sampled_from([(4, 2, 1), (8, 4, 2, 1), (1, 1, 1), (6, 3, 1)]))
def test_delay_and_codes_undo_themselves(frames: int, strides: tuple[int, ...]) -> None:
    codec = CodecSpec("snac", 24000, 4096, strides, 4)
    ids = np.random.default_rng(frames).integers(0, 4096, (frames, codec.streams))
    np.testing.assert_array_equal(codes_to_frames(frames_to_codes(ids, codec), codec), ids)
    np.testing.assert_array_equal(undelay(delay(ids, pad=4097)), ids)


def test_spec_survives_json_and_names_what_is_wrong() -> None:
    spec = small_spec()
    assert OmniSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(SpecError, match=r"spec: unknown key.*\$\.body\.layerz"):
        OmniSpec.from_dict({**spec.to_dict(), "body": {**spec.to_dict()["body"], "layerz": 3}})
    with pytest.raises(SpecError, match=r"spec: \$: .*missing required field `codec`"):
        OmniSpec.from_dict({k: v for k, v in spec.to_dict().items() if k != "codec"})
    with pytest.raises(SpecError, match="no room for the 4 audio specials"):
        TokenLayout(100, 34, 32, 7, 8)
    with pytest.raises(SpecError, match="7 audio streams, the codec 15"):
        small_spec(codec=CodecSpec("snac", 24000, 32, (8, 4, 2, 1), 16))
