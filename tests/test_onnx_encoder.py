"""The exported encoder against the torch model, in both flavours, at every precision and several windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgeomni.errors import EngineError, UsageError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.onnx import imitation, reread, schemes_for
from edgeomni.exporters.onnx.options import OnnxOptions
from edgeomni.gate.metrics import cosine
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.model.encoders import build_adapter
from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory
from edgeomni.spec import AdapterSpec, FrontEndSpec, OmniSpec

WINDOWS = (2, 120, 1000)


def mel_of(spec: OmniSpec, t: int) -> np.ndarray:
    return np.random.default_rng(t).standard_normal((spec.front_end.n_mels, t)).astype(np.float32)


def exported(model: Any, out: Path, precision: str, flavour: str = "ort") -> OrtEncoder:
    component = exporter_of("onnx").export(model, "encoder", out, precision, options_of("onnx", {"flavour": flavour}))
    return OrtEncoder(out, component, model.spec, SessionFactory(1))


def reference(model: Any, mel: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.encode(torch.from_numpy(mel)[None])[0].numpy())


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_float_export_is_the_torch_encoder(tiny_model: Any, tmp_path: Path, flavour: str) -> None:
    encoder = exported(tiny_model, tmp_path, "fp32", flavour)
    for t in (*WINDOWS, 2 * tiny_model.spec.encoder.context):
        mel = mel_of(tiny_model.spec, t)
        np.testing.assert_allclose(encoder.encode(mel), reference(tiny_model, mel), atol=1e-4)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("wanted", [1, 37, 60, 99])
def test_only_the_wanted_features_are_computed(tiny_model: Any, tmp_path: Path, flavour: str, wanted: int) -> None:
    encoder, mel = exported(tiny_model, tmp_path, "fp32", flavour), mel_of(tiny_model.spec, 120)
    got = encoder.encode(mel, wanted)
    assert len(got) == min(wanted, 60)
    np.testing.assert_allclose(got, reference(tiny_model, mel)[:wanted], atol=1e-4)


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("int8", 0.999)])
@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_reduced_export_is_close(tiny_model: Any, tmp_path: Path, flavour: str, precision: str, least: float) -> None:
    encoder = exported(tiny_model, tmp_path, precision, flavour)
    for t in WINDOWS:
        mel = mel_of(tiny_model.spec, t)
        assert cosine(encoder.encode(mel), reference(tiny_model, mel)) >= least


def test_int8_computes_what_the_stand_in_computes(tiny_model: Any, tmp_path: Path) -> None:
    """Stored weights and the kernel's activation quantization, imitated in torch, give the same features."""
    component = exporter_of("onnx").export(tiny_model, "encoder", tmp_path, "int8")
    encoder = OrtEncoder(tmp_path, component, tiny_model.spec, SessionFactory(1))
    mel = mel_of(tiny_model.spec, 400)
    before = reference(tiny_model, mel)
    with imitation.as_exported(tiny_model, component, exact=False):
        imitated = reference(tiny_model, mel)
    assert cosine(encoder.encode(mel), imitated) >= 0.99999
    np.testing.assert_array_equal(reference(tiny_model, mel), before)  # the model is as it was
    assert not np.array_equal(imitated, before)


@pytest.mark.parametrize("adapter", [AdapterSpec("linear", bias=True), AdapterSpec("swiglu", hidden=48, bias=True)])
@pytest.mark.parametrize("n_mels", [80, 128])
def test_other_adapters_and_mel_bands(tiny_model: Any, tmp_path: Path, adapter: AdapterSpec, n_mels: int) -> None:
    model = Variant(tiny_model, adapter, n_mels)
    component = exporter_of("onnx").export(model, "encoder", tmp_path, "fp32")
    mel = mel_of(model.spec, 60)
    got = OrtEncoder(tmp_path, component, model.spec, SessionFactory(1)).encode(mel)
    np.testing.assert_allclose(got, reference(model, mel), atol=1e-4)
    assert reread.altered(model, component, tmp_path) == []  # type: ignore[arg-type]


class Variant(torch.nn.Module):
    """An encoder of the tiny model's sizes with other mel bands, and another adapter behind it."""

    def __init__(self, tiny: Any, adapter: AdapterSpec, n_mels: int) -> None:
        from dataclasses import replace

        from edgeomni.model import encoders

        super().__init__()
        torch.manual_seed(0)
        self.chosen_codes = self.recorded = None
        self.spec = replace(tiny.spec, front_end=FrontEndSpec(n_mels=n_mels), adapter=adapter)
        self.encoder = encoders.build(self.spec.encoder, n_mels).eval()
        self.adapter = build_adapter(adapter, self.spec.encoder.width, self.spec.body.width)

    def encode(self, mel: torch.Tensor) -> torch.Tensor:
        from edgeomni.model import encoders

        return self.adapter(encoders.encode(self.encoder, mel))  # type: ignore[no-any-return]


def test_every_stored_tensor_is_accounted_for(tiny_model: Any, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16", "int8"):
        component = exporter_of("onnx").export(tiny_model, "encoder", tmp_path / precision, precision)
        path = tmp_path / precision / component.graphs["encoder"].path
        expected = reread._Expected(tiny_model, schemes_for("encoder", precision))
        unknown = [n for n, found in reread.tensors(path) if found.nbytes > 64 and not expected.bytes_of(n)]
        assert unknown == []
        assert reread.altered(tiny_model, component, tmp_path / precision) == []


def test_exporting_twice_gives_the_same_bytes(tiny_model: Any, tmp_path: Path) -> None:
    first, second = (exporter_of("onnx").export(tiny_model, "encoder", tmp_path / n, "int8") for n in ("a", "b"))
    assert first.files == second.files


def test_portable_flavour_uses_standard_operators_only(tiny_model: Any, tmp_path: Path) -> None:
    component = exporter_of("onnx").export(tiny_model, "encoder", tmp_path, "int8", OnnxOptions("portable"))
    model = onnx.load(tmp_path / component.graphs["encoder"].path)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model)


@pytest.mark.parametrize("shape", [(80, 3), (80, 0), (79, 10), (80, 3002), (80,)])
def test_other_shapes_are_refused_by_name(tiny_model: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    encoder = exported(tiny_model, tmp_path, "fp32")
    with pytest.raises(EngineError, match="t even"):
        encoder.encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize("arguments", [("encoder", "int4"), ("encoder", "int5"), ("brain", "fp32")])
def test_what_is_not_offered_is_a_usage_error(tiny_model: Any, tmp_path: Path, arguments: tuple[str, str]) -> None:
    with pytest.raises(UsageError):
        exporter_of("onnx").export(tiny_model, arguments[0], tmp_path, arguments[1])


def test_unknown_format_and_flavour(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known are onnx"):
        exporter_of("abacus")
    with pytest.raises(UsageError, match="ort and portable"):
        exporter_of("onnx").export(tiny_model, "encoder", tmp_path, "fp32", OnnxOptions("other"))  # type: ignore[arg-type]


def test_an_interrupted_run_ends_and_leaves_the_encoder_usable(tiny_model: Any, tmp_path: Path) -> None:
    encoder, mel = exported(tiny_model, tmp_path, "fp32"), mel_of(tiny_model.spec, 200)
    features = encoder.encode(mel, None, Interrupt())
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(Interrupted):
        encoder.encode(mel, None, interrupt)
    np.testing.assert_array_equal(encoder.encode(mel), features)


class StoppableRun:
    """Stands for a session in whose run another thread sets the interrupt: what ONNX Runtime does is up to `after`."""

    def __init__(self, interrupt: Interrupt, after: Callable[[Any], Any]) -> None:
        self.interrupt, self.after = interrupt, after

    def run(self, outputs: Any, feed: Any, options: Any) -> Any:
        assert not options.terminate
        self.interrupt.set()
        return self.after(options)


def test_a_run_under_way_is_told_to_stop_and_other_failures_stay_failures(tiny_model: Any, tmp_path: Path) -> None:
    encoder, mel = exported(tiny_model, tmp_path, "fp32"), mel_of(tiny_model.spec, 200)
    told: list[bool] = []

    def terminated(options: Any) -> Any:
        told.append(options.terminate)
        raise RuntimeError("Exiting due to terminate flag being set to true.")

    interrupt = Interrupt()
    encoder._session = StoppableRun(interrupt, terminated)
    with pytest.raises(Interrupted):
        encoder.encode(mel, None, interrupt)
    assert told == [True]
    encoder._session = StoppableRun(Interrupt(), terminated)
    with pytest.raises(EngineError, match="the encoder failed"):
        encoder.encode(mel, None, Interrupt())
