"""Layouts and pure token functions, against hand-written facts of the published model."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import small_spec
from hypothesis import given
from hypothesis import strategies as st

from edgeomni.errors import SpecError
from edgeomni.spec import CodecSpec, OmniSpec, TokenLayout
from edgeomni.tokens import (
    audio_constant,
    codes_to_frames,
    complete_frames,
    delay,
    frames_to_codes,
    shift_audio,
    undelay,
)

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


def test_shifting_keeps_the_other_axes() -> None:
    layout = TokenLayout(100, 18, 10, 3, 8)
    shifted = shift_audio(layout, np.array([[0, 1], [0, 1], [9, 17]]))
    assert shifted.tolist() == [[100, 101], [118, 119], [145, 153]] and shifted.dtype == np.int32
    assert audio_constant(layout, 11).tolist() == [[111], [129], [147]]
    constant = audio_constant(layout, 0, 2)
    assert constant.tolist() == [[100, 100], [118, 118], [136, 136]] and constant.dtype == np.int32
    assert audio_constant(layout, 0, 0).shape == (3, 0)


def test_the_delay_pattern_written_out() -> None:
    """Codec frames [a, b, c], [d, e, f]: stream 0 starts one frame late, stream 2 three."""
    a, b, c, d, e, f, x = 1, 2, 3, 4, 5, 6, 99
    streams = [[x, a, d, x, x], [x, x, b, e, x], [x, x, x, c, f]]
    frames = np.array([[a, b, c], [d, e, f]])
    assert delay(frames, x).tolist() == streams
    assert delay(frames, x, 6).tolist() == [[*row, x] for row in streams]
    assert delay(frames, x, 4).tolist() == [row[:4] for row in streams]
    assert undelay(np.array(streams)).tolist() == frames.tolist()
    assert undelay(np.array(streams)).dtype == delay(frames, x).dtype == np.int64
    assert undelay(np.array(streams)[:, :4]).tolist() == [[a, b, c]]
    for short in range(4):
        assert undelay(np.array(streams)[:, :short]).shape == (0, 3)


def test_complete_codec_frames() -> None:
    assert [complete_frames(n, 7) for n in (0, 6, 7, 8, 20)] == [0, 0, 0, 1, 13]


def test_codes_by_level_written_out() -> None:
    """Two frames of strides 4, 2, 1; the tree of a frame is walked depth first."""
    frames = np.arange(14).reshape(2, 7)
    codes = frames_to_codes(frames, SNAC_24K)
    assert [level.tolist() for level in codes] == [[0, 7], [1, 4, 8, 11], [2, 3, 5, 6, 9, 10, 12, 13]]
    assert all(level.dtype == np.int64 and level.flags.c_contiguous for level in codes)
    assert codes_to_frames(codes, SNAC_24K).tolist() == frames.tolist()
    assert [level.shape for level in frames_to_codes(frames[:0], SNAC_24K)] == [(0,)] * 3


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
