"""Codec frames to audio chunks: what is pushed when, ids that are no codec entries, and where the silence falls.

The codec of these tests gives frame f the constant wave f + 1, 16 * 4 = 64 samples long, and stays `lag` samples
behind what it was pushed, as a non-causal codec does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from fakes import small_spec

from edgeomni.errors import EngineError
from edgeomni.spans import Spans
from edgeomni.spec import CodecSpec
from edgeomni.streaming import AudioStream

SPEC = small_spec().codec
HOP = 64


class CountingCodec:
    def __init__(self, lag: int = 40, first_push: int = 3, push_multiple: int = 1) -> None:
        self.lag, self.first_push, self.push_multiple = lag, first_push, push_multiple
        self.pushed: list[list[np.ndarray]] = []
        self.lasts: list[bool] = []
        self.seeds: list[int | None] = []
        self.given = 0

    def open(self, noise_seed: int | None = None) -> object:
        self.seeds.append(noise_seed)
        return self

    def decode(self, codes: Sequence[np.ndarray], state: object, last: bool) -> np.ndarray:
        assert state is self, "the stream's own state comes back"
        self.pushed.append(list(codes))
        self.lasts.append(last)
        frames = sum(len(push[0]) for push in self.pushed)
        wave = np.repeat(np.arange(1, frames + 1, dtype=np.float32), HOP)
        until = len(wave) - (0 if last else min(self.lag, len(wave)))
        start, self.given = self.given, until
        return wave[start:until].copy()

    def close(self) -> None: ...

    @property
    def sizes(self) -> list[int]:
        return [len(push[0]) for push in self.pushed]


def good(index: int = 0) -> np.ndarray:
    return np.arange(7, dtype=np.int64) + index


def spoilt(stream: int = 3, value: int = 32) -> np.ndarray:
    """A frame with one id that is no codec entry: by default eoa, the first id beyond the codebook of 32."""
    frame = good()
    frame[stream] = value
    return frame


def stream(codec: CountingCodec, *, spec: CodecSpec = SPEC, **how: bool) -> AudioStream:
    return AudioStream(codec, spec, Spans(), **how)


def spoken(audio: AudioStream, frames: Sequence[np.ndarray]) -> np.ndarray:
    """All samples of an answer of these codec frames."""
    chunks = [audio.add(frame) for frame in frames]
    return np.concatenate([c for c in [*chunks, audio.finish()] if c is not None])


@pytest.mark.parametrize(
    ("first_push", "multiple", "frames", "sizes"),
    [
        (3, 1, 3, [3, 0]),  # one push is full, and the end brings nothing but its tail
        (3, 1, 2, [2]),
        (3, 1, 4, [3, 1, 0]),
        (3, 1, 15, [3, 1, 2, 4, 4, 1]),
        (1, 1, 9, [1, 1, 2, 4, 1]),
        (5, 4, 8, [8, 0]),  # the first push is a whole multiple too
        (4, 4, 30, [4, 4, 8, 14]),
        (4, 4, 40, [4, 4, 8, 16, 8]),
    ],
)
def test_pushes_grow_and_are_multiples(first_push: int, multiple: int, frames: int, sizes: list[int]) -> None:
    codec = CountingCodec(first_push=first_push, push_multiple=multiple)
    audio = stream(codec)
    wave = spoken(audio, [good(i % 20) for i in range(frames)])
    assert codec.sizes == sizes
    assert codec.lasts == [False] * (len(sizes) - 1) + [True]
    np.testing.assert_array_equal(wave, np.repeat(np.arange(1, frames + 1), HOP))
    assert audio.samples == frames * HOP


def test_a_chunk_that_is_not_full_gives_nothing_yet() -> None:
    audio = stream(CountingCodec())
    assert audio.add(good()) is None and audio.add(good()) is None and audio.samples == 0
    chunk = audio.add(good())
    assert chunk is not None and len(chunk) == audio.samples == 3 * HOP - 40


def test_codes_reach_the_codec_by_level() -> None:
    codec = CountingCodec()
    spoken(stream(codec), [np.array([1, 2, 3, 4, 5, 6, 7]), np.array([11, 12, 13, 14, 15, 16, 17])])
    by_level = [level.tolist() for level in codec.pushed[0]]
    assert by_level == [[1, 11], [2, 5, 12, 15], [3, 4, 6, 7, 13, 14, 16, 17]]


def test_an_answer_without_frames_never_asks_the_codec() -> None:
    codec = CountingCodec()
    audio = stream(codec)
    rest = audio.finish()
    assert rest.shape == (0,) and rest.dtype == np.float32 and codec.sizes == []


def test_the_noise_seed_reaches_the_codec() -> None:
    codec = CountingCodec()
    stream(codec)
    AudioStream(codec, SPEC, Spans(), noise_seed=5)
    assert codec.seeds == [None, 5]


def test_each_push_is_one_codec_span() -> None:
    spans = Spans()
    spoken(AudioStream(CountingCodec(), SPEC, spans), [good()] * 4)
    assert {name: len(times) for name, times in spans.records.items()} == {"codec": 3}


@pytest.mark.parametrize("value", [32, 33, 35, 39, -1])
def test_ids_outside_the_codebook_are_no_codec_entries(value: int) -> None:
    for at in (0, 3, 6):
        codec = CountingCodec()
        audio = stream(codec)
        wave = spoken(audio, [good(1), spoilt(at, value), good(2)]).reshape(3, HOP)
        assert audio.silent_frames == 1
        assert wave[:, 0].tolist() == [1, 0, 3]
        pushed = [level.tolist() for level in codec.pushed[0]]
        frame = [0 if i == at else i for i in range(7)]
        assert pushed[0][1] == frame[0] and pushed[1][2:4] == [frame[1], frame[4]], "only the bad id is replaced, by 0"


@pytest.mark.parametrize("value", [0, 31])
def test_the_codebook_s_first_and_last_entry_are_sound(value: int) -> None:
    audio = stream(CountingCodec(), strict=True)
    assert spoken(audio, [np.full(7, value)] * 3).all() and audio.silent_frames == 0


@pytest.mark.parametrize("lag", [0, 1, 40, 63, 64, 100])
@pytest.mark.parametrize("silent", [[0], [2], [3], [8], [0, 1, 2], [2, 3], [1, 3, 5, 7], [0, 4, 8], list(range(9))])
def test_exactly_the_silent_frames_are_silent_wherever_chunks_end(silent: list[int], lag: int) -> None:
    """Pushes of 3, 1, 2, 3 frames; with its lag, a frame's samples come in one chunk, in two, or after its push."""
    audio = stream(CountingCodec(lag))
    wave = spoken(audio, [spoilt() if i in silent else good() for i in range(9)])
    expected = np.repeat([0 if i in silent else i + 1 for i in range(9)], HOP)
    np.testing.assert_array_equal(wave, expected)
    assert audio.silent_frames == len(silent)


def test_strict_refuses_the_first_such_frame_by_its_number() -> None:
    audio = stream(CountingCodec(), strict=True)
    audio.add(good())
    audio.add(good())
    with pytest.raises(EngineError, match=r"codec frame 2 holds ids \[0, 1, 2, 32, 4, 5, 6\].*codebook's 32"):
        audio.add(spoilt())


def test_frames_of_another_layout() -> None:
    spec = CodecSpec("mimi", 24000, 32, (1, 1), 64)
    codec = CountingCodec(first_push=1)
    wave = spoken(stream(codec, spec=spec), [np.array([1, 2]), np.array([3, 4])])
    assert [[level.tolist() for level in push] for push in codec.pushed] == [[[1], [2]], [[3], [4]], [[], []]]
    assert wave.reshape(2, HOP)[:, 0].tolist() == [1, 2]
