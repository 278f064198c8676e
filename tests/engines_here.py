"""The engines that run here on one tiny model, and random input for them: what their contract tests share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import script

from edgeomni.components import Components, Features
from edgeomni.exporters import exporter_of, options_of
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import fake
from edgeomni.runtimes.ggml.codec import GgmlCodec
from edgeomni.runtimes.ggml.encoder import GgmlEncoder
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel
from edgeomni.runtimes.onnxruntime.codec import OrtCodec
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory
from edgeomni.runtimes.onnxruntime.static_codec import OrtStaticCodec
from edgeomni.runtimes.torch import components_of

OPENVINO = ["openvino"] if find_spec("openvino") else []
ENGINES = ["torch", "ort", "portable", "tensorrt", "llamacpp", *OPENVINO]
WITH_FAKE = [*ENGINES, "fake"]


def open_all(model: OmniModel, root: Path) -> dict[str, Components]:
    """Each engine's components by name; exports go to `root`."""
    return {
        "torch": components_of(model),
        "ort": exported(model, root / "ort", "ort"),
        "portable": exported(model, root / "portable", "portable"),
        "tensorrt": exported_tensorrt(model, root / "tensorrt"),
        "llamacpp": Components(
            exported_gguf_part(model, "encoder", root / "gguf"),
            exported_gguf(model, root / "gguf"),
            exported_gguf_part(model, "codec", root / "gguf"),
        ),
        "fake": fake.components(model.spec, script(model.spec, 60)),
        **{name: exported_openvino(model, root / name) for name in OPENVINO},
    }


def exported(model: OmniModel, out: Path, flavour: str, threads: int = 1) -> Components:
    def opened(name: str, adapter: Any) -> Any:
        component = exporter_of("onnx").export(model, name, out, "fp32", options_of("onnx", {"flavour": flavour}))
        return adapter(out, component, model.spec, SessionFactory(threads))

    return Components(opened("encoder", OrtEncoder), opened("llm", OrtLanguageModel), opened("codec", OrtCodec))


def exported_tensorrt(model: OmniModel, out: Path, precision: str = "fp32", **options: Any) -> Components:
    """The graphs that TensorRT builds from, on ONNX Runtime."""

    def opened(name: str, adapter: Any) -> Any:
        component = exporter_of("tensorrt").export(model, name, out, precision, options_of("tensorrt", options))
        return adapter(out, component, model.spec, SessionFactory(1, half="free"))

    return Components(opened("encoder", OrtEncoder), opened("llm", OrtLanguageModel), opened("codec", OrtStaticCodec))


def exported_gguf(model: OmniModel, out: Path, precision: str = "fp32", **options: str) -> LlamaLanguageModel:
    component = exporter_of("gguf").export(model, "llm", out, precision, options_of("gguf", options))
    return LlamaLanguageModel(out, component, model.spec, 1)


def exported_gguf_part(model: OmniModel, name: str, out: Path, precision: str = "fp32") -> Any:
    """The encoder or the codec on ggml."""
    out.mkdir(exist_ok=True, parents=True)
    component = exporter_of("gguf").export(model, name, out, precision)
    return {"encoder": GgmlEncoder, "codec": GgmlCodec}[name](out, component, model.spec, 1)


def exported_openvino(model: OmniModel, out: Path, precision: str = "fp32") -> Components:
    """All components, float32 in the codec."""
    from edgeomni.runtimes.openvino.codec import OvCodec
    from edgeomni.runtimes.openvino.encoder import OvEncoder
    from edgeomni.runtimes.openvino.llm import OvLanguageModel
    from edgeomni.runtimes.openvino.models import ModelFactory

    def opened(name: str, adapter: Any, precision: str) -> Any:
        component = exporter_of("openvino").export(model, name, out, precision)
        return adapter(out, component, model.spec, ModelFactory(1))

    return Components(
        opened("encoder", OvEncoder, precision),
        opened("llm", OvLanguageModel, precision),
        opened("codec", OvCodec, "fp32"),
    )


def every(part: str, engines: Sequence[str] | None = None) -> Any:
    """Parametrizes a test over engines (all that run the part), through the fixture of that component's name."""
    return pytest.mark.parametrize(part, engines or ENGINES, indirect=True)


def random_ids(model: OmniModel, frames: int, seed: int = 0, rows: int = 1) -> np.ndarray:
    rng, layout = np.random.default_rng(seed), model.spec.layout
    audio = [rng.integers(0, layout.audio_vocab, (rows, frames)) + layout.shift(k) for k in range(layout.streams)]
    return np.stack([*audio, rng.integers(0, layout.text_vocab, (rows, frames))], 1).astype(np.int32)


def random_features(model: OmniModel, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, model.spec.body.width)).astype(np.float32)


def truth(model: OmniModel, ids: np.ndarray, features: Sequence[Features] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Text logits [T, text_vocab] and audio logits [T, K, audio_vocab] of one row, all positions at once."""
    given = [(f.start, torch.from_numpy(f.values)) for f in features]
    with torch.no_grad():
        text, audio = model(torch.from_numpy(ids).long(), given)
    return text[0].numpy(), audio[0].numpy()


def matches(llm: Any, hidden: Any, row: int, expected: tuple[np.ndarray, np.ndarray], at: int = -1) -> None:
    """The hidden's logits of that row are those of position `at` of the truth."""
    np.testing.assert_allclose(llm.text_logits(hidden, row), expected[0][at], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(llm.audio_logits(hidden, row), expected[1][at], atol=1e-4, rtol=1e-4)
