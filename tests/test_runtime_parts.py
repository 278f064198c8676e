"""What edgeomni/components.py promises of an encoder and of a codec, asked of every engine that runs here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines_here import WITH_FAKE, every

from edgeomni.components import Components
from edgeomni.errors import EdgeOmniError, EngineError
from edgeomni.model.omni import OmniModel


@pytest.fixture
def encoder(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].encoder


@pytest.fixture
def codec(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].codec


# --- the encoder


def random_mel(model: OmniModel, t: int) -> np.ndarray:
    return np.random.default_rng(t).standard_normal((model.spec.front_end.n_mels, t)).astype(np.float32)


@every("encoder")
@pytest.mark.parametrize("t", [2, 64, 300])
def test_one_feature_for_two_mel_frames(encoder: Any, tiny_model: OmniModel, t: int) -> None:
    mel = random_mel(tiny_model, t)
    with torch.no_grad():
        expected = tiny_model.encode(torch.from_numpy(mel)[None])[0].numpy()
    got = encoder.encode(mel)
    assert got.shape == (t // 2, tiny_model.spec.body.width) and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    for wanted in (1, t // 2, t // 2 + 5):
        np.testing.assert_allclose(encoder.encode(mel, wanted), expected[:wanted], atol=1e-4, rtol=1e-4)


@every("encoder")
def test_features_may_be_kept(encoder: Any, tiny_model: OmniModel) -> None:
    mel = random_mel(tiny_model, 20)
    first = encoder.encode(mel)
    copy = first.copy()
    assert not np.array_equal(encoder.encode(-mel), copy)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(mel, random_mel(tiny_model, 20))


@every("encoder")
def test_windows_that_do_not_fit_are_refused(encoder: Any, tiny_model: OmniModel) -> None:
    for t in (0, 3, 2 * tiny_model.spec.encoder.context + 2):
        with pytest.raises(EdgeOmniError):
            encoder.encode(random_mel(tiny_model, t))


# --- the codec


def random_codes(model: OmniModel, frames: int, seed: int = 0) -> list[np.ndarray]:
    rng, spec = np.random.default_rng(seed), model.spec.codec
    return [rng.integers(0, spec.codebook_size, frames * n) for n in spec.ids_per_level]


def part(model: OmniModel, codes: list[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
    return [c[start * n : stop * n] for c, n in zip(codes, model.spec.codec.ids_per_level, strict=True)]


def offline(model: OmniModel, codes: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.decode_codes([torch.from_numpy(c)[None] for c in codes]))


@every("codec")
@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 0), (3, 1, 2, 4), (3, 1, 1, 1, 0), (9,)])
def test_joined_pushes_are_the_offline_decode(codec: Any, tiny_model: OmniModel, sizes: tuple[int, ...]) -> None:
    assert (codec.first_push, codec.push_multiple) == (3, 1)
    total = sum(sizes)
    codes, state, at = random_codes(tiny_model, total, total), codec.open(), 0
    pieces = []
    for i, n in enumerate(sizes):
        pieces.append(codec.decode(part(tiny_model, codes, at, at + n), state, i == len(sizes) - 1))
        at += n
        assert pieces[-1].dtype == np.float32 and pieces[-1].ndim == 1 and pieces[-1].flags.writeable
    assert sum(map(len, pieces)) == total * tiny_model.spec.codec.frame_samples
    np.testing.assert_allclose(np.concatenate(pieces), offline(tiny_model, codes), atol=1e-4, rtol=1e-4)


@every("codec")
def test_streams_do_not_meet_and_samples_may_be_kept(codec: Any, tiny_model: OmniModel) -> None:
    """The listener may even write on them, as silence is written on them."""
    codes = [random_codes(tiny_model, 7, seed) for seed in (1, 2)]
    states, heard, copies = [codec.open(), codec.open()], [[], []], [[], []]  # type: ignore[var-annotated]
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        for i in (0, 1):
            samples = codec.decode(part(tiny_model, codes[i], start, stop), states[i], stop == 7)
            heard[i].append(samples)
            copies[i].append(samples.copy())
    for i in (0, 1):
        np.testing.assert_array_equal(np.concatenate(heard[i]), np.concatenate(copies[i]))
        np.testing.assert_allclose(np.concatenate(heard[i]), offline(tiny_model, codes[i]), atol=1e-4, rtol=1e-4)
    samples[:] = 0
    again = codec.decode(codes[1], codec.open(), True)
    np.testing.assert_allclose(again, offline(tiny_model, codes[1]), atol=1e-4, rtol=1e-4)


@every("codec")
def test_noise_is_off_unless_seeded_and_the_same_for_a_seed(codec: Any, tiny_model: OmniModel) -> None:
    codes = random_codes(tiny_model, 5)
    clean, one, again, two = (codec.decode(codes, codec.open(seed), True) for seed in (None, 1, 1, 2))
    np.testing.assert_allclose(clean, offline(tiny_model, codes), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(one, again)
    assert len({a.tobytes() for a in (clean, one, two)}) == 3
    state = codec.open(1)
    pieces = [codec.decode(part(tiny_model, codes, a, b), state, b == 5) for a, b in ((0, 3), (3, 5))]
    np.testing.assert_allclose(np.concatenate(pieces), one, atol=1e-4, rtol=1e-4)


@every("codec", WITH_FAKE)
def test_a_stream_that_has_ended_takes_nothing_more(codec: Any, tiny_model: OmniModel) -> None:
    codes, state = random_codes(tiny_model, 3), codec.open()
    codec.decode(codes, state, True)
    for last in (False, True):
        with pytest.raises(EngineError):
            codec.decode(codes, state, last)
    with pytest.raises(EngineError):
        codec.decode(part(tiny_model, codes, 0, 0), state, True)


@every("codec", WITH_FAKE)
def test_levels_that_do_not_fit_together_are_refused(codec: Any, tiny_model: OmniModel) -> None:
    codes = random_codes(tiny_model, 3)
    for level in range(3):
        wrong = [c[:-1] if i == level else c for i, c in enumerate(codes)]
        with pytest.raises(EngineError):
            codec.decode(wrong, codec.open(), True)
    for wrong in (codes[:-1], [*codes, codes[0]]):
        with pytest.raises(EngineError):
            codec.decode(wrong, codec.open(), True)
