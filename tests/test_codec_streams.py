"""Streaming codec decoders against the offline decode of the original packages, sample by sample."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from codec_models import LAYOUTS, Codec, mimi, offline, pushes, random_codes, saved_snac, snac, snac_spec, stream
from numpy.testing import assert_allclose

from edgeomni.arrays import F32
from edgeomni.bundle import Component
from edgeomni.errors import EngineError, UsageError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.gguf import codec as gguf_exporter
from edgeomni.exporters.onnx import codec as codec_exporter
from edgeomni.model.codec_reader import halved, read_plan
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, noise_generator
from edgeomni.runtimes.ggml.codec import GgmlCodec
from edgeomni.runtimes.onnxruntime.codec import OrtCodec
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory
from edgeomni.runtimes.onnxruntime.static_codec import OrtStaticCodec
from edgeomni.runtimes.torch.codec import TorchCodec
from edgeomni.spec import CodecSpec

Load = Callable[[str, str], tuple[Codec, CodecSpec, StreamingCodec[Any]]]

MIMI_VARIANTS: dict[str, dict[str, Any]] = {
    "mimi": {},
    "mimi_shortcut": {"use_conv_shortcut": True, "num_residual_layers": 2, "num_key_value_heads": 2},
    "mimi_dense_up": {"upsample_groups": 8, "attention_bias": True, "head_dim": 6},
}
CODECS = [*LAYOUTS, *MIMI_VARIANTS]
ENGINES = ["torch", "ort", "portable", "tensorrt", "ggml"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """(codec, spec, decoder) by codec name and engine, made once."""
    made: dict[tuple[str, str], tuple[Codec, CodecSpec, StreamingCodec[Any]]] = {}

    def load(name: str, engine: str) -> tuple[Codec, CodecSpec, StreamingCodec[Any]]:
        if (name, engine) not in made:
            codec, spec = reference(name)
            made[name, engine] = codec, spec, decoder_of(codec, spec, engine, tmp_path_factory.mktemp(engine))
        return made[name, engine]

    return load


def reference(name: str) -> tuple[Codec, CodecSpec]:
    if name in MIMI_VARIANTS:
        return mimi(**MIMI_VARIANTS[name])
    codec = snac(name, decoder_dim=128)
    return codec, snac_spec(codec)


def decoder_of(codec: Codec, spec: CodecSpec, engine: str, root: Path) -> StreamingCodec[Any]:
    if engine == "torch":
        return TorchCodec(model_of(codec, spec))
    if engine == "ggml":
        return ggml_codec(codec, spec, root, "fp32")
    if engine == "tensorrt":
        return tensorrt_codec(codec, spec, root, "fp32")
    component = exported(codec, spec, root, flavour=engine)
    return OrtCodec(root, component, model_of(codec, spec).spec, SessionFactory(1))


def model_of(codec: Codec, spec: CodecSpec) -> Any:
    spec_of = types.SimpleNamespace(codec=spec)
    return types.SimpleNamespace(codec=codec, spec=spec_of, provenance={}, licences={})


def tensorrt_codec(codec: Codec, spec: CodecSpec, root: Path, precision: str) -> OrtStaticCodec:
    """TensorRT's graph, whose states have fixed sizes, on ONNX Runtime."""
    component = exporter_of("tensorrt").export(model_of(codec, spec), "codec", root, precision)
    component.meta = json.loads(json.dumps(component.meta))
    return OrtStaticCodec(root, component, model_of(codec, spec).spec, SessionFactory(1, half="free"))


def ggml_codec(codec: Codec, spec: CodecSpec, root: Path, precision: str) -> GgmlCodec:
    """Opened from what a manifest would hold, read back from JSON."""
    component = gguf_exporter.export(model_of(codec, spec), root, root, precision)
    component.meta = json.loads(json.dumps(component.meta))
    return GgmlCodec(root, component, model_of(codec, spec).spec, 1)


def exported(codec: Codec, spec: CodecSpec, root: Path, precision: str = "fp32", flavour: str = "ort") -> Component:
    (root / "codec").mkdir()
    return codec_exporter.export(
        model_of(codec, spec), root / "codec", root, precision, options_of("onnx", {"flavour": flavour})
    )


def noise_for(decoder: StreamingCodec[Any], frames: int, seed: int) -> list[F32]:
    """The whole stream's noise at once, attention windows' padding included."""
    latents = -(-frames // decoder.push_multiple) * decoder.push_multiple * decoder.spec.vq_strides[0]
    return [
        noise_generator(seed, i).standard_normal(latents * scale, np.float32)
        for i, (scale, _) in enumerate(decoder.timing.noise)
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CODECS)
def test_joined_pushes_equal_the_offline_decode(loaded: Load, name: str, engine: str) -> None:
    codec, spec, decoder = loaded(name, engine)
    for frames in (1, 2, 3, decoder.first_push, decoder.first_push + 15):
        codes = random_codes(spec, frames, seed=frames)
        expected = offline(codec, spec, codes)
        for first in {1, decoder.first_push, frames}:
            sizes = pushes(frames, first, seed=frames)
            for empty_end in (False, True):
                joined = np.concatenate(stream(decoder, codes, sizes, empty_end=empty_end))
                assert joined.shape == (frames * spec.frame_samples,)
                assert_allclose(joined, expected, atol=1e-4, rtol=1e-5, err_msg=f"{sizes}")


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_come_as_soon_as_they_are_final(loaded: Load, engine: str) -> None:
    """After each push from the first on, all but the receptive field's right side has been given."""
    _, spec, decoder = loaded("snac24", engine)
    lengths = [len(c) for c in stream(decoder, random_codes(spec, 9), [3, 1, 2, 3], empty_end=True)]
    assert np.cumsum(lengths).tolist() == [6144 - 4757, 8192 - 4757, 12288 - 4757, 18432 - 4757, 18432]
    assert decoder.timing.lag_samples == 4757


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_streams_in_whole_windows(loaded: Load, engine: str) -> None:
    _, spec, decoder = loaded("snac32", engine)
    chunks = stream(decoder, random_codes(spec, 16), [7, 1, 3, 1, 4], empty_end=True)
    assert [len(c) > 0 for c in chunks] == [False, True, False, True, True, True]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["snac24", "snac44"])
def test_seeded_noise_equals_the_seeded_offline_decode(loaded: Load, name: str, engine: str) -> None:
    codec, spec, decoder = loaded(name, engine)
    frames = decoder.first_push + 5
    codes = random_codes(spec, frames)
    noise = noise_for(decoder, frames, seed=11)
    expected = offline(codec, spec, codes, noise)
    assert np.abs(expected - offline(codec, spec, codes)).max() > 1e-3
    for sizes in ([frames], pushes(frames, decoder.first_push, seed=1)):
        joined = np.concatenate(stream(decoder, codes, sizes, seed=11, empty_end=True))
        assert_allclose(joined, expected, atol=1e-4)


def test_streams_do_not_disturb_each_other(loaded: Load) -> None:
    for engine in ENGINES:
        codec, spec, decoder = loaded("snac24", engine)
        answers = [random_codes(spec, 6, seed=s) for s in (1, 2)]
        states = [decoder.open(), decoder.open()]
        chunks: list[list[F32]] = [[], []]
        for at in (0, 3):
            for i in (0, 1):
                part = [c[at * n : (at + 3) * n] for c, n in zip(answers[i], spec.ids_per_level, strict=True)]
                chunks[i].append(decoder.decode(part, states[i], last=at == 3))
        for i in (0, 1):
            assert_allclose(np.concatenate(chunks[i]), offline(codec, spec, answers[i]), atol=1e-4)


def test_end_without_codes_is_silence_of_no_length(loaded: Load) -> None:
    for engine in ENGINES:
        _, spec, decoder = loaded("snac24", engine)
        assert stream(decoder, random_codes(spec, 0), [0])[0].shape == (0,)


def test_misuse_is_refused(loaded: Load) -> None:
    _, spec, decoder = loaded("snac24", "torch")
    state = decoder.open()
    with pytest.raises(EngineError, match=r"\[1, 2, 3\] ids per level; a codec frame has \(1, 2, 4\)"):
        decoder.decode([np.zeros(n, np.int64) for n in (1, 2, 3)], state, last=False)
    decoder.decode(random_codes(spec, 1), state, last=True)
    with pytest.raises(EngineError, match="has ended"):
        decoder.decode(random_codes(spec, 1), state, last=True)


@pytest.mark.parametrize("name", ["snac24", "snac32", "mimi"])
def test_fp16_stores_half_and_computes_as_the_halved_plan(name: str, tmp_path: Path) -> None:
    codec, spec = reference(name)
    sizes = {}
    for precision in ("fp32", "fp16"):
        (tmp_path / precision).mkdir()
        component = exported(codec, spec, tmp_path / precision, precision)
        sizes[precision] = sum(tensor_bytes(tmp_path / precision / component.graphs["codec"].path))
    decoder = OrtCodec(tmp_path / "fp16", component, model_of(codec, spec).spec, SessionFactory(1))
    codes = random_codes(spec, 9)
    joined = np.concatenate(stream(decoder, codes, [9]))
    same_weights = TorchCodec(None, halved(read_plan(codec, spec)))
    assert_allclose(joined, np.concatenate(stream(same_weights, codes, [9])), atol=1e-4, rtol=1e-5)
    assert np.abs(joined - offline(codec, spec, codes)).max() > 1e-6
    assert sizes["fp16"] < 0.62 * sizes["fp32"]  # tiny sizes: biases and gains, kept in float, weigh more


def tensor_bytes(path: Path) -> list[int]:
    graph = onnx.load(path).graph
    return [len(t.raw_data) for t in graph.initializer]


def test_integer_precisions_are_refused(tmp_path: Path) -> None:
    codec, spec = reference("snac24")
    with pytest.raises(UsageError, match="codec:int8 is not offered"):
        exported(codec, spec, tmp_path, "int8")


def test_exporting_twice_gives_the_same_files(tmp_path: Path) -> None:
    codec, spec = reference("snac24")
    hashes = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        hashes.append([(f.path, f.sha256) for f in exported(codec, spec, folder).files])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


def test_portable_graph_has_standard_operators_only(tmp_path: Path) -> None:
    for name in ("snac24", "snac32", "mimi"):
        codec, spec = reference(name)
        (tmp_path / name).mkdir()
        component = exported(codec, spec, tmp_path / name, flavour="portable")
        graph = onnx.load(tmp_path / name / component.graphs["codec"].path).graph
        assert {node.domain for node in graph.node} == {""}


@pytest.mark.parametrize("alphas", [(1e-3, 3e-2), (3.0, 20.0), (-1.0, 1.0), (0.0, 0.0)])
def test_snakes_of_any_alpha(alphas: tuple[float, float], tmp_path: Path) -> None:
    """The polynomial in place of Sin: near zero (where 1 / alpha grows), steep, negative and zero alphas."""
    codec = snac("snac24", decoder_dim=32)
    for name, parameter in codec.named_parameters():
        if name.endswith("alpha"):
            parameter.data.uniform_(*alphas)
    spec = snac_spec(codec)
    codes = random_codes(spec, 4)
    for engine in ("ort", "ggml"):
        (tmp_path / engine).mkdir()
        decoder = decoder_of(codec, spec, engine, tmp_path / engine)
        assert_allclose(np.concatenate(stream(decoder, codes, [4])), offline(codec, spec, codes), atol=1e-4)


def test_published_decode(golden: Any, tmp_path: Path) -> None:
    """Codes that the published code made of the golden model, and its waveform of them.

    That codec's random weights multiply rounding errors by up to 1e5: the original in double precision, or with
    another number of threads, differs by 0.02 in single samples. So the measure is the noise that float32 itself has.
    """
    codec = saved_snac(golden.path / "snac")
    spec = snac_spec(codec)
    codes = [golden[f"AA_codes{level}"].reshape(-1).astype(np.int64) for level in range(len(spec.vq_strides))]
    frames = len(codes[0]) // spec.ids_per_level[0]
    published = golden["AA_wave"].reshape(-1)
    rounding = snr(published, offline(codec.double(), spec, codes))
    for engine in ENGINES:
        (tmp_path / engine).mkdir()
        decoder = decoder_of(codec.float(), spec, engine, tmp_path / engine)
        joined = np.concatenate(stream(decoder, codes, pushes(frames, decoder.first_push, seed=0)))
        assert snr(published, joined) > min(60, rounding - 6), engine


def snr(signal: F32, other: F32) -> float:
    """Signal-to-noise ratio in dB."""
    return float(10 * np.log10(np.square(signal).sum() / np.square(signal - other).sum()))
