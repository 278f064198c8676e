"""OpenVINO's arithmetic beside float32: what a CPU has is judged by the gate, recorded, and used where it is there."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

if find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from edgeomni import hardware
from edgeomni.bundle import Bundle, Manifest
from edgeomni.cli import main
from edgeomni.component_meta import OpenVinoArithmetic
from edgeomni.components import OpenOptions
from edgeomni.errors import BundleError, UsageError
from edgeomni.export import export_bundle
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.openvino import fast
from edgeomni.model.omni import OmniModel
from edgeomni.openvino_library import ov
from edgeomni.runtimes import openvino as folder
from edgeomni.runtimes.openvino.models import ModelFactory

FAST = OpenVinoArithmetic(compute="bf16", int8_inputs=True)
OURS = {"encoder": "openvino:fp32", "llm": "openvino:int8", "codec": "openvino:fp32"}


@pytest.fixture(scope="module")
def bundle(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exported with --fast by a machine that has bfloat16 and VNNI, as far as the exporter can tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "of_this_cpu", lambda: FAST)
        out = tmp_path_factory.mktemp("fast") / "b"
        return export_bundle(tiny_model, out, formats=OURS, options={"openvino": {"fast": True}}, threads=1)


def asked(model: Any) -> tuple[str, int]:
    """What the properties of a factory ask OpenVINO for: the type between layers, the group of rounded inputs."""
    properties = model.properties
    return properties["INFERENCE_PRECISION_HINT"], properties.get("DYNAMIC_QUANTIZATION_GROUP_SIZE", 32)


@pytest.mark.parametrize(
    ("capabilities", "isa", "expected"),
    [
        (["FP32", "INT8", "BIN"], ("avx2",), OpenVinoArithmetic()),
        (["FP32", "INT8"], ("avx2", "avx_vnni"), OpenVinoArithmetic(int8_inputs=True)),
        (["FP32", "BF16"], ("avx512f", "avx512_vnni"), FAST),
        (["BF16", "FP32", "FP16"], ("neon",), OpenVinoArithmetic(compute="f16")),
    ],
)
def test_what_a_cpu_has(
    capabilities: list[str], isa: tuple[str, ...], expected: OpenVinoArithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ov, "Core", lambda: SimpleNamespace(get_property=lambda *_: capabilities))
    monkeypatch.setattr(hardware, "detect", lambda: SimpleNamespace(isa=isa))
    assert fast.of_this_cpu() == expected
    if expected == OpenVinoArithmetic():
        with pytest.raises(UsageError, match="has no bfloat16, float16 or VNNI .* export on a machine that has"):
            options_of("openvino", {"fast": True})
    else:
        assert options_of("openvino", {"fast": True}).fast


def test_openvino_says_of_itself_what_this_cpu_has() -> None:
    """What a compiled model reports when it is asked for each type, against the list of capabilities."""
    x = ov.opset13.parameter([1, 64], np.float32)
    y = ov.opset13.matmul(x, ov.opset13.constant(np.ones((64, 64), np.float32)), False, True)
    model, has = ov.Model([y], [x], "one layer"), set()
    for short in ("f16", "bf16"):
        hint = {"INFERENCE_PRECISION_HINT": short}
        if ov.Core().compile_model(model, "CPU", hint).get_property("INFERENCE_PRECISION_HINT").to_string() == short:
            has.add(short)
    best = "f16" if "f16" in has else "bf16" if "bf16" in has else "f32"
    assert fast.of_this_cpu().compute == best


def test_the_command_refuses_it_where_there_is_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fast, "of_this_cpu", OpenVinoArithmetic)
    given = ["export", "--preset", "tiny", "--random", "-o", str(tmp_path / "b"), "--format", "openvino", "--fast"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 2 and "--fast: this CPU" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_records_what_was_judged(bundle: Bundle) -> None:
    parts = bundle.manifest.components
    recorded = {name: [part.meta.get(k) for k in ("compute", "int8_inputs")] for name, part in parts.items()}
    # No weights of a float32 encoder are compressed; the codec is not asked.
    assert recorded == {"encoder": ["bf16", False], "llm": ["bf16", True], "codec": [None, None]}
    assert bundle.manifest.gate["passed"]
    # Rounded inputs are not imitated, so that there is nothing to compare them with layer by layer.
    assert "llm.top1" in bundle.manifest.gate["fidelity"] and "llm.excess" not in bundle.manifest.gate["fidelity"]
    command = bundle.manifest.provenance["command"]
    assert command.endswith(" --fast"), command


def test_only_what_was_judged_is_asked_for(
    bundle: Bundle, tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, ModelFactory] = {}
    keep = ModelFactory.__init__

    def kept(self: ModelFactory, *args: Any) -> None:
        keep(self, *args)
        seen["last"] = self

    def after(opened: Any) -> tuple[str, int]:
        assert opened is not None
        return asked(seen["last"])

    monkeypatch.setattr(ModelFactory, "__init__", kept)
    llm = exporter_of("openvino").export(tiny_model, "llm", tmp_path, "int8")
    slow = Bundle(tmp_path, Manifest(tiny_model.spec, {"llm": llm}, None, {}, {}, {}))
    assert after(folder.open_component(bundle, "encoder", OpenOptions(1))) == ("bf16", 0)
    assert after(folder.open_component(bundle, "llm", OpenOptions(1))) == ("bf16", 32)
    assert after(folder.open_exact(bundle, "llm", OpenOptions(1))) == ("f32", 0)
    assert after(folder.open_component(bundle, "codec", OpenOptions(1))) == ("f32", 0)
    assert after(folder.open_component(slow, "llm", OpenOptions(1))) == ("f32", 0)
    assert folder.open_exact(slow, "llm", OpenOptions(1)) is None, "it is opened once: float32 is all that it knows"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder.open_component(bundle, "llm", OpenOptions(1, "auto"))
    assert seen["last"].properties["DEVICE_PROPERTIES"]["CPU"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_a_cpu_that_lacks_it_computes_in_float32(bundle: Bundle, tmp_path: Path) -> None:
    """The same files, with and without the record. A CPU that has what is recorded gives nearly the same."""
    root = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    data = json.loads((root / "bundle.json").read_text())
    for part in data["components"].values():
        part["meta"].pop("compute", None), part["meta"].pop("int8_inputs", None)
    (root / "bundle.json").write_text(json.dumps(data))
    mel = np.random.default_rng(0).standard_normal((bundle.spec.front_end.n_mels, 64)).astype(np.float32)
    ours, plain = (
        folder.open_component(b, "encoder", OpenOptions(1)).encode(mel)
        for b in (bundle, Bundle.open(root, hashes=False))
    )
    if fast.of_this_cpu().compute == "f32":
        np.testing.assert_array_equal(ours, plain)
    else:
        np.testing.assert_allclose(ours, plain, atol=0.05)


def test_a_manifest_that_asks_for_anything_else_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    root = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    data = json.loads((root / "bundle.json").read_text())
    data["components"]["llm"]["meta"]["compute"] = "u4"
    (root / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"llm.*compute"):
        Bundle.open(root)
