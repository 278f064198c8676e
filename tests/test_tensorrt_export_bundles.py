"""TensorRT bundles as wholes: what the gate says, what the manifest holds, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeomni import Session, TurnEnd
from edgeomni.bundle import Bundle
from edgeomni.engines import COMPONENTS
from edgeomni.errors import BundleError, ExportError, UsageError
from edgeomni.export import choices, export_bundle
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.tensorrt.precisions import block_for, schemes_for
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.schemes import Scheme, parse
from edgeomni.spec import AdapterSpec
from edgeomni.tensorrt_builder import installed

FORMATS: dict[str, str] = dict.fromkeys(map(str, COMPONENTS), "tensorrt")
CACHE = 256


@pytest.fixture(scope="module")
def bundle(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int4 with the gate on and an engine for sm_89, sm_120 where TensorRT-RTX is installed; do not change it."""
    target = "sm_87,sm_89,sm_120" if "tensorrt_rtx" in installed() else "sm_87"
    own = {"tensorrt": {"target": target, "cache": CACHE}}
    return export_bundle(
        tiny_model, tmp_path_factory.mktemp("trt") / "b", precision="int4", formats=FORMATS, options=own, threads=1
    )


def test_the_gate_judges_the_graphs(bundle: Bundle) -> None:
    """With half rounded as a GPU rounds, and the exact mode in float32, which leaves nothing but float32's rounding."""
    gate = bundle.manifest.gate
    assert gate["passed"] is True
    assert gate["fidelity"]["llm.error"]["value"] < 1e-5
    assert 0 < gate["fidelity"]["llm.excess"]["value"] < 2
    assert 45 < gate["fidelity"]["codec.si_sdr"]["value"] < 80  # were it not rounded, it would be over 100
    assert set(gate["engines"]) == {"onnxruntime"}


def test_the_manifest_says_what_was_built_and_how_to_build_it(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path, hashes=True)
    llm = again.manifest.components["llm"]
    assert (llm.format, llm.engine, again.manifest.components["codec"].precision) == ("tensorrt", "tensorrt", "fp16")
    roles = {"body", "text_head", "audio_head"}
    assert set(llm.graphs) == set(llm.meta["recipes"]) == roles
    prefill, decode = llm.meta["recipes"]["body"]["profiles"]
    width = again.spec.body.width
    assert prefill["inputs_embeds"] == [[1, 1, width], [1, 128, width], [1, CACHE, width]]
    assert decode["position_ids"] == [[1, 1], [2, 1], [2, 1]]
    assert set(decode) >= {
        port.name for port in llm.graphs["body"].inputs if any(isinstance(d, str) for d in port.shape)
    }
    built = {engine["role"]: engine for engine in llm.meta["engines"]}
    if "tensorrt_rtx" in installed():
        assert set(built) == roles and built["body"]["path"] == "llm/body.sm_89-sm_120.engine"
        assert built["body"]["targets"] == ["sm_89", "sm_120"] and built["body"]["package"] == "tensorrt_rtx"
        assert again.file(built["body"]["path"]).stat().st_size > 100_000
    else:
        assert not built
    assert "--target sm_87" in again.manifest.provenance["command"]


def test_the_bundle_speaks_on_onnx_runtime(bundle: Bundle) -> None:
    """What a machine without TensorRT does with it."""
    end = list(Session.open(bundle.path).respond("ta", text="w1 w2 w3", max_length=30))[-1]
    assert isinstance(end, TurnEnd) and np.asarray(end.tokens).shape[1] > 5


@pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt-rtx is not installed")
def test_a_truncated_engine_is_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    engine = copy / "llm" / "body.sm_89-sm_120.engine"
    engine.write_bytes(engine.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"llm/body\.sm_89-sm_120\.engine has \d+ bytes instead of"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["engines"].append(dict.fromkeys(("role", "path", "version"), "../x")), "engines"),
        (lambda meta: meta["recipes"]["body"]["profiles"][0].update(x=[[1], [1]]), "profiles"),
        (lambda meta: meta.update(context=0), "context"),
        (lambda meta: meta.update(kv="float64"), "kv"),
    ],
)
def test_a_manifest_with_another_meta_is_refused(change: Any, message: str, bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    data = json.loads((copy / "bundle.json").read_bytes())
    change(data["components"]["llm"]["meta"])
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_a_target_that_is_not_built_here_is_said_once(
    tiny_model: OmniModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise ExportError("enough")

    monkeypatch.setattr("edgeomni.export._manifest", stop)
    formats = {"encoder": "tensorrt", "llm": "onnx:fp32", "codec": "tensorrt"}
    own = {"tensorrt": {"target": "sm_87,sm_90"}}
    with caplog.at_level(logging.WARNING, "edgeomni"), pytest.raises(ExportError, match="enough"):
        export_bundle(tiny_model, tmp_path / "b", precision="fp16", formats=formats, options=own)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "sm_87 (Jetson Orin), sm_90 (H100, H200)" in said[0]
    assert "of encoder, codec the bundle" in said[0] and "first run there builds" in said[0]


def test_nothing_is_said_of_targets_that_are_built_here() -> None:
    exporter = exporter_of("tensorrt")
    assert exporter.notes(["llm"], options_of("tensorrt", {"target": "sm_89,sm_120"})) == []
    assert exporter.notes(["llm"], options_of("tensorrt", {})) == []
    assert len(exporter.notes(["llm"], options_of("tensorrt", {"target": "sm_87,sm_120"}))) == 1


def test_targets_that_are_not_built_here_get_a_recipe_alone(tiny_model: OmniModel, tmp_path: Path) -> None:
    options = options_of("tensorrt", {"target": "sm_87,sm_90"})
    component = exporter_of("tensorrt").export(tiny_model, "encoder", tmp_path, "fp16", options)
    assert component.meta["engines"] == [] and component.meta["targets"] == ["sm_87", "sm_90"]


def test_a_failed_build_leaves_no_bundle(
    tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeomni.tensorrt_builder.installed", lambda: ())
    own = {"tensorrt": {"target": "sm_89", "cache": 64}}
    with pytest.raises(ExportError, match=r"tensorrt-rtx, which is not installed: pip install"):
        export_bundle(tiny_model, tmp_path / "b", precision="fp16", formats=FORMATS, options=own)
    assert not list(tmp_path.iterdir())


# --- what is refused


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int4", {"target": "sm_75"}, "sm_75 .* does not compute int4"),
        ("int4", {"target": "sm_99"}, "unknown target 'sm_99'; known are sm_75"),
        ("int4", {"block": 48}, "block 48 is not offered"),
        ("int4", {"cache": 8}, "cache of 8 frames is not offered"),
        (
            "fp8",
            {"target": "sm_86,sm_89"},
            "sm_86 .* does not compute fp8, which begins with sm_89; use int4 or int8 or fp16",
        ),
        ("fp8", {"target": "sm_87"}, r"sm_87 \(Jetson Orin\) does not compute fp8"),
        ("nvfp4", {"target": "sm_89"}, "sm_89 .* does not compute (fp8|nvfp4)"),
        ("fp32", {"target": "sm_75,sm_80"}, "sm_75 .* does not compute fp32, which begins with sm_80; use fp16 for"),
        ("bf16", {"target": "sm_75"}, "sm_75 .* does not compute bf16, which begins with sm_80; use int8 or fp16 for"),
        ("q8_0", {}, "unknown TensorRT precision 'q8_0'"),
    ],
)
def test_requests_that_make_no_sense_are_refused(precision: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choices(precision, FORMATS, {"tensorrt": options})


def test_the_precision_of_each_component_is_chosen() -> None:
    assert choices("int4", FORMATS) == {
        "encoder": ("tensorrt", "int8"),
        "llm": ("tensorrt", "int4"),
        "codec": ("tensorrt", "fp16"),
    }
    assert choices("fp32", FORMATS)["codec"] == ("tensorrt", "fp32")
    for component, precision in (("codec", "int8"), ("encoder", "int4")):
        with pytest.raises(UsageError, match=f"{component}:{precision} is not offered"):
            choices("fp16", {component: f"tensorrt:{precision}"})


def test_a_block_must_divide_the_widths(tiny_model: OmniModel) -> None:
    spec, options = tiny_model.spec, options_of("tensorrt", {})
    assert block_for("llm", spec, options) == 128  # widths 128 and 256
    assert block_for("llm", spec, options_of("tensorrt", {"block": 32})) == 32
    narrow = replace(spec, body=replace(spec.body, ffn=192))
    with pytest.raises(UsageError, match="block 128 does not divide all of the widths 128, 192; use block 64"):
        block_for("llm", narrow, options_of("tensorrt", {"block": 128}))
    odd = replace(spec, body=replace(spec.body, ffn=100))
    with pytest.raises(UsageError, match="no block that TensorRT takes divides all of the widths 100, 128; use fp16"):
        block_for("llm", odd, options)
    assert Scheme("int4_f16", 64) == parse("int4_f16_b64")


def test_the_encoders_adapter_has_its_own_width(tiny_model: OmniModel) -> None:
    spec, options = tiny_model.spec, options_of("tensorrt", {})
    wide = replace(spec, encoder=replace(spec.encoder, width=128, ffn=512))
    for adapter, block in ((AdapterSpec("swiglu", 96), 32), (AdapterSpec("linear"), 128)):
        assert block_for("encoder", replace(wide, adapter=adapter), options) == block


@pytest.mark.parametrize(
    ("precision", "linear", "rest", "encoder"),
    [
        ("fp32", "fp32", "fp32", "fp32"),
        ("fp16", "fp16", "fp16", "fp16"),
        ("bf16", "bf16", "fp16", "bf16"),
        ("int8", "int8_static", "int8_f16_b128", "int8_static"),
        ("int8w", "int8_f16_b128", "int8_f16_b128", "int8_f16_b128"),
        ("int4", "int4_f16_b128", "int8_f16_b128", ""),
        ("fp8", "fp8_b32", "int8_f16_b128", "fp8_static"),
        ("nvfp4", "nvfp4", "int8_f16_b128", ""),
    ],
)
def test_tensors_have_the_schemes_of_the_documents_table(precision: str, linear: str, rest: str, encoder: str) -> None:
    """docs/tensorrt.md, "Precisions"."""
    blocks = dict.fromkeys(("body.linear", "tts.linear"), linear)
    heads = dict.fromkeys(("text_head", "audio_head", "embedding"), rest)
    assert {group: str(scheme) for group, scheme in schemes_for("llm", precision).items()} == {**blocks, **heads}
    if encoder:
        assert {str(scheme) for scheme in schemes_for("encoder", precision).values()} == {encoder}


@pytest.mark.parametrize(("block", "fp8"), [(16, "fp8_b16"), (64, "fp8_b32")])
def test_a_block_asked_for_comes_before_the_one_that_fits(block: int, fp8: str) -> None:
    """E4M3 has no blocks of more than 32 inputs."""
    schemes = schemes_for("llm", "fp8", options_of("tensorrt", {"block": block}), 32)
    assert (str(schemes["body.linear"]), str(schemes["text_head"])) == (fp8, f"int8_f16_b{block}")
    assert str(schemes_for("llm", "int4", None, 32)["body.linear"]) == "int4_f16_b32"


def test_options_are_refused_as_they_are_given() -> None:
    with pytest.raises(UsageError, match="unknown target 'sm_88'"):
        options_of("tensorrt", {"target": "sm_88"})
    for frames in (16, 65536):
        assert options_of("tensorrt", {"cache": frames}).cache == frames
    for frames in (15, 65537):
        with pytest.raises(UsageError, match=f"cache of {frames} frames is not offered; take 16 to 65536"):
            options_of("tensorrt", {"cache": frames})
