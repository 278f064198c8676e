"""The streaming codec in OpenVINO against the offline decode of the original packages, sample by sample."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_models import offline, pushes, random_codes, stream
from numpy.testing import assert_allclose, assert_array_equal
from test_codec_streams import CODECS, model_of, noise_for, reference

if find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from edgeomni.components import SetsThreads
from edgeomni.exporters import exporter_of
from edgeomni.hardware import cores
from edgeomni.model.codec_reader import halved, read_plan
from edgeomni.runtimes.openvino.codec import OvCodec
from edgeomni.runtimes.openvino.models import Model, ModelFactory
from edgeomni.runtimes.torch.codec import TorchCodec
from edgeomni.spans import Spans
from edgeomni.streaming import AudioStream


def decoder_of(model: Any, root: Path, precision: str = "fp32", threads: int = 1, device: str = "cpu") -> OvCodec:
    component = exporter_of("openvino").export(model, "codec", root, precision)
    assert exporter_of("openvino").altered(model, component, root) == []
    return OvCodec(root, component, model.spec, ModelFactory(threads, device))


@pytest.mark.parametrize("name", CODECS)
def test_joined_pushes_equal_the_offline_decode(name: str, tmp_path: Path) -> None:
    codec, spec = reference(name)
    decoder = decoder_of(model_of(codec, spec), tmp_path)
    # Mimi's keys and values grow with the stream, so that only its first push has a length known beforehand.
    assert len(decoder._all.fixed) == (1 if name.startswith("mimi") else 2)
    first, step = decoder.first_push, decoder.push_multiple
    steady = [first, step, 2 * step, 4 * step, 4 * step, 4 * step, 1]  # as an answer is streamed
    for sizes, empty_end in ((steady, False), ([1], True), ([2, 1], False), (pushes(first + 9, first, seed=1), True)):
        frames = sum(sizes)
        codes = random_codes(spec, frames, seed=frames)
        joined = np.concatenate(stream(decoder, codes, sizes, empty_end=empty_end))
        assert joined.shape == (frames * spec.frame_samples,)
        assert_allclose(joined, offline(codec, spec, codes), atol=1e-4, rtol=1e-5, err_msg=f"{sizes}")


def test_seeded_noise_equals_the_seeded_offline_decode(tmp_path: Path) -> None:
    codec, spec = reference("snac24")
    decoder = decoder_of(model_of(codec, spec), tmp_path)
    frames = decoder.first_push + 8
    codes, noise = random_codes(spec, frames), noise_for(decoder, frames, seed=11)
    joined = np.concatenate(stream(decoder, codes, [decoder.first_push, 4, 4], seed=11))
    assert_allclose(joined, offline(codec, spec, codes, noise), atol=1e-4)


def test_fp16_stores_half_and_computes_as_the_halved_plan(tmp_path: Path) -> None:
    codec, spec = reference("snac24")
    model = model_of(codec, spec)
    decoder = decoder_of(model, tmp_path, "fp16")
    whole = decoder_of(model, tmp_path / "whole")
    assert whole is not None
    sizes = [(root / "codec/codec.bin").stat().st_size for root in (tmp_path, tmp_path / "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    codes = random_codes(spec, 9)
    twin = TorchCodec(model, halved(read_plan(codec, spec)))
    expected = twin.decode(codes, twin.open(), True)
    assert_allclose(np.concatenate(stream(decoder, codes, [3, 4, 2])), expected, atol=1e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OvCodec:
    """Opened with three threads."""
    return decoder_of(model_of(*reference("snac24")), tmp_path_factory.mktemp("codec"), threads=3)


def test_any_threads_give_the_same_to_the_bit_also_within_a_stream(small: OvCodec) -> None:
    assert isinstance(small, SetsThreads)
    sizes = [small.first_push, 1, 2, 4, 4, 4, 3]
    codes = random_codes(small.spec, sum(sizes))

    def decoded(threads: list[int]) -> np.ndarray:
        state, out, at = small.open(), [], 0
        for n, frames in enumerate(sizes):
            small.set_threads(threads[n % len(threads)])
            part = [ids[at * k : (at + frames) * k] for ids, k in zip(codes, small.spec.ids_per_level, strict=True)]
            out.append(small.decode(part, state, n == len(sizes) - 1))
            at += frames
        return np.concatenate(out)

    alone = decoded([3])
    for threads in ([1], [2], [1, 3, 2], [3, 1]):
        assert_array_equal(decoded(threads), alone)


def test_the_codec_computes_with_the_threads_that_are_set(small: OvCodec) -> None:
    """Never with more than it was opened with; fewer are compiled once, and for the push that repeats.

    OpenVINO itself takes no more threads than there are cores.
    """
    steady = next(push for push in small._all.fixed if not push[0])
    seen = []
    for asked in (3, 1, 2, 1, 3, 8):
        small.set_threads(asked)
        now = small._now
        first = next(model for push, (model, _) in now.fixed.items() if push[0])
        models = now.any_push, now.fixed[steady][0], first
        seen.append([int(model.compiled.get_property("INFERENCE_NUM_THREADS")) for model in models])
        assert (now is small._all) == (asked >= 3)
    wanted = [[3, 3, 3], [3, 1, 3], [3, 2, 3], [3, 1, 3], [3, 3, 3], [3, 3, 3]]
    assert seen == [[min(n, cores()) for n in row] for row in wanted]
    assert small._with_fewer.keys() == {1, 2}
    small.set_threads(1)
    once = small._now
    small.set_threads(2)
    small.set_threads(1)
    assert small._now is once


def test_the_pushes_that_an_answers_sound_waits_for_have_models_of_their_own(
    small: OvCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which model each push of a long answer runs on. With the noise on, none has a known length."""
    small.set_threads(3)
    models = {id(model): "first" if push[0] else "repeated" for push, (model, _) in small._all.fixed.items()}
    ran, run = list[str](), Model.run

    def recorded(self: Model, *given: Any) -> Any:
        ran.append(models.get(id(self), "any"))
        return run(self, *given)

    monkeypatch.setattr(Model, "run", recorded)
    for seed, expected in ((None, ["first", "any", "any", "repeated", "repeated", "any"]), (1, ["any"] * 6)):
        stream = AudioStream(small, small.spec, Spans(), noise_seed=seed)
        ran.clear()
        while len(ran) < 5:
            stream.add(np.zeros(small.spec.streams, np.int64))
        stream.finish()
        assert ran == expected


def test_no_number_of_threads_means_all_cores(tmp_path: Path, small: OvCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(small, "_factory", ModelFactory())
    monkeypatch.setattr(small, "_compiled_for", lambda factory: asked.append(factory.threads))
    monkeypatch.setattr(small, "_with_fewer", {})
    monkeypatch.setattr(small, "_now", small._all)
    for threads in (cores() + 1, cores(), cores() - 1):
        small.set_threads(threads)
    assert asked == [cores() - 1]


def test_a_codec_without_known_lengths_computes_all_pushes_with_the_threads_that_are_set(tmp_path: Path) -> None:
    """Mimi: keys and values grow, so that the push that repeats has the model of any."""
    codec, spec = reference("mimi")
    decoder = decoder_of(model_of(codec, spec), tmp_path, threads=2)
    decoder.set_threads(1)
    assert decoder._now.any_push.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    codes = random_codes(spec, 9)
    joined = np.concatenate(stream(decoder, codes, [decoder.first_push, 9 - decoder.first_push]))
    assert_allclose(joined, offline(codec, spec, codes), atol=1e-4, rtol=1e-5)


def test_a_device_that_is_no_cpu_keeps_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are not the ones that the LLM computes with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decoder = decoder_of(model_of(*reference("snac24")), tmp_path, threads=2, device="auto")
    before = decoder._now
    decoder.set_threads(1)
    assert decoder._now is before and not decoder._with_fewer
