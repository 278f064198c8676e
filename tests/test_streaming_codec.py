"""What every streaming codec shares, on a toy engine that can be computed by hand.

The toy's spec: two levels of strides 2 and 1, so a codec frame is ids [a], [b, c] and two latents of 4 samples, 8
samples in all. Sample s of the answer is 1000 * a + b (or c) of its latent; the engine stays `lag` samples behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgeomni.errors import EngineError
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing, noise_generator
from edgeomni.spec import CodecSpec

SPEC = CodecSpec("snac", 8000, 100, (2, 1), 4)
NOISE = ((1, 0), (4, 3))
"""Block 0 asks for one value a latent, block 1 for four and stays 3 behind."""


class Toy(StreamingCodec[Any]):
    """Its state is how many latents and samples went through; pushes are recorded."""

    def __init__(self, first_push: int = 1, push_multiple: int = 1, lag: int = 5) -> None:
        super().__init__(SPEC, Timing(first_push, push_multiple, lag, NOISE))
        self.frames: list[int] = []
        self.lasts: list[bool] = []
        self.noise: list[list[np.ndarray]] = [[], []]

    def _start(self) -> Any:
        return np.zeros(0, np.float32)

    def _push(self, codes: Sequence[Any], kept: Any, last: bool, noise: Any) -> tuple[Any, Any]:
        assert len(codes[1]) == 2 * len(codes[0])
        self.frames.append(len(codes[0]))
        self.lasts.append(last)
        if noise is not None:
            for heard, values in zip(self.noise, noise, strict=True):
                heard.append(values)
        behind = np.concatenate([kept, samples_of(codes)])
        ready = len(behind) - (0 if last else self.timing.lag_samples)
        return behind[:ready], behind[ready:]


def samples_of(codes: Sequence[np.ndarray]) -> np.ndarray:
    return np.repeat(1000 * np.repeat(codes[0], 2) + codes[1], 4).astype(np.float32)


def random_codes(frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(frames)
    return [rng.integers(0, 100, frames * n) for n in (1, 2)]


def decoded(codec: Toy, codes: list[np.ndarray], sizes: list[int], seed: int | None = None) -> list[np.ndarray]:
    """What each push of so many frames gives; the last one says so."""
    state, at, out = codec.open(seed), 0, []
    for i, n in enumerate(sizes):
        part = [codes[0][at : at + n], codes[1][2 * at : 2 * (at + n)]]
        out.append(codec.decode(part, state, i == len(sizes) - 1))
        at += n
    assert at == len(codes[0])
    return out


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1, 1, 1], [2, 0, 3, 0], [4, 1], [0, 5], [5, 0]])
@pytest.mark.parametrize(("first_push", "multiple"), [(1, 1), (3, 1), (4, 2), (2, 4), (9, 3)])
def test_joined_pushes_are_the_answer(sizes: list[int], first_push: int, multiple: int) -> None:
    codec, codes = Toy(first_push, multiple), random_codes(5)
    np.testing.assert_array_equal(np.concatenate(decoded(codec, codes, sizes)), samples_of(codes))
    assert codec.lasts == [False] * (len(codec.lasts) - 1) + [True]
    assert all(n % multiple == 0 for n in codec.frames), "the end is padded to whole windows as well"
    assert codec.frames[0] >= min(first_push, sum(codec.frames)) and sum(codec.frames) == -(-5 // multiple) * multiple


def test_what_is_too_short_to_start_with_is_held() -> None:
    codec = Toy(first_push=3)
    lengths = [len(p) for p in decoded(codec, random_codes(6), [1, 1, 1, 1, 2])]
    assert codec.frames == [3, 1, 2]
    assert lengths == [0, 0, 3 * 8 - 5, 8, 16 + 5]


def test_what_is_no_whole_window_is_held() -> None:
    codec = Toy(first_push=2, push_multiple=2)
    lengths = [len(p) for p in decoded(codec, random_codes(7), [1, 2, 2, 1, 1])]
    assert codec.frames == [2, 2, 2, 2], "the seventh frame is padded to a window, then cropped"
    assert lengths == [0, 16 - 5, 16, 16, 8 + 5]


def test_the_end_alone_brings_the_tail() -> None:
    codec = Toy()
    assert [len(p) for p in decoded(codec, random_codes(2), [2, 0])] == [16 - 5, 5]
    assert codec.frames == [2, 0] and codec.lasts == [False, True]


def test_without_a_lag_the_end_has_nothing_to_bring() -> None:
    codec = Toy(lag=0)
    assert [len(p) for p in decoded(codec, random_codes(2), [2, 0])] == [16, 0] and codec.frames == [2]


def test_a_block_that_is_far_behind_asks_for_no_noise_at_first() -> None:
    """It stays 5 latents behind: two pushes of 2 latents reach nothing of it, and the end brings all."""
    codec = Toy()
    codec.timing = Timing(1, 1, 5, ((1, 5), (4, 0)))
    decoded(codec, random_codes(4), [1, 1, 1, 1], seed=3)
    assert [len(values) for values in codec.noise[0]] == [0, 0, 1, 7]
    assert [len(values) for values in codec.noise[1]] == [8, 8, 8, 8]
    whole = np.concatenate(codec.noise[0])
    np.testing.assert_array_equal(whole, noise_generator(3, 0).standard_normal(8, np.float32))


def test_an_answer_of_no_frames_is_empty() -> None:
    codec = Toy()
    (wave,) = decoded(codec, random_codes(0), [0])
    assert wave.shape == (0,) and wave.dtype == np.float32 and codec.frames == []


def test_long_pushes_run_in_pieces_of_8192_samples() -> None:
    """1024 frames of 8 samples; with windows of 3 frames 1023, and the first piece is never below the first push."""
    for codec, total, pieces in (
        (Toy(), 2500, [1024, 1024, 452]),
        (Toy(), 1024, [1024]),
        (Toy(push_multiple=3), 2500, [1023, 1023, 456]),
        (Toy(first_push=1500), 3000, [1500, 1024, 476]),
        (Toy(push_multiple=2048), 5000, [2048, 2048, 2048]),
    ):
        codes = random_codes(total)
        np.testing.assert_array_equal(np.concatenate(decoded(codec, codes, [total])), samples_of(codes))
        assert codec.frames == pieces and codec.lasts == [False] * (len(pieces) - 1) + [True]


def test_a_first_piece_counts_for_the_first_push_alone() -> None:
    codec = Toy(first_push=1500)
    decoded(codec, random_codes(3600), [1500, 2100])
    assert codec.frames == [1500, 1024, 1024, 52]


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [3, 6, 0]])
def test_noise_belongs_to_samples_whatever_the_pushes(sizes: list[int]) -> None:
    codec = Toy(first_push=2)
    decoded(codec, random_codes(9), sizes, seed=7)
    for block, (scale, _) in enumerate(NOISE):
        whole = noise_generator(7, block).standard_normal(18 * scale, np.float32)
        np.testing.assert_array_equal(np.concatenate(codec.noise[block]), whole)


def test_noise_lags_as_its_block_does() -> None:
    """Pushes of 2, 1 and 1 frames are 4, 2 and 2 latents."""
    codec = Toy()
    decoded(codec, random_codes(4), [2, 1, 1], seed=7)
    assert [[len(values) for values in block] for block in codec.noise] == [[4, 2, 2], [16 - 3, 8, 8 + 3]]


def test_no_noise_without_a_seed_and_each_block_its_own() -> None:
    codec = Toy()
    decoded(codec, random_codes(3), [3])
    assert codec.noise == [[], []]
    drawn = {noise_generator(seed, block).standard_normal() for seed in (0, 1) for block in (0, 1)}
    assert len(drawn) == 4


def test_a_seed_of_0_is_a_seed() -> None:
    codec = Toy()
    decoded(codec, random_codes(3), [3], seed=0)
    assert len(codec.noise[0]) == 1


def test_misuse_is_refused() -> None:
    codec, codes = Toy(), random_codes(3)
    for wrong in (
        [codes[0], codes[1][:-1]],
        [codes[0][:-1], codes[1]],
        codes[:1],
        [*codes, codes[1]],
    ):
        with pytest.raises(EngineError, match=r"ids per level; a codec frame has \(1, 2\)"):
            codec.decode(wrong, codec.open(), False)
    state = codec.open()
    codec.decode(codes, state, False)
    codec.decode(random_codes(0), state, True)
    for last in (False, True):
        with pytest.raises(EngineError, match="has ended"):
            codec.decode(codes, state, last)


def test_streams_have_their_own_state() -> None:
    codec, codes = Toy(first_push=2), [random_codes(4), random_codes(6)]
    states, heard = [codec.open(), codec.open()], [[], []]  # type: ignore[var-annotated]
    for at in range(4):
        for i in (0, 1):
            stop = len(codes[i][0]) if at == 3 else at + 1
            part = [codes[i][0][at:stop], codes[i][1][2 * at : 2 * stop]]
            heard[i].append(codec.decode(part, states[i], at == 3))
    for i in (0, 1):
        np.testing.assert_array_equal(np.concatenate(heard[i]), samples_of(codes[i]))
