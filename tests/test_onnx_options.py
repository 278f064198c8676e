"""What the ONNX format can be asked for: precisions, flavours, blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeomni import export
from edgeomni.errors import UsageError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.exporters.onnx.options import OnnxOptions
from edgeomni.exporters.onnx.precisions import schemes_for


def names(component: str, precision: str, **options: Any) -> dict[str, str]:
    return {group: str(s) for group, s in schemes_for(component, precision, OnnxOptions(**options)).items()}


def llm(blocks: str, rest: str) -> dict[str, str]:
    heads = dict.fromkeys(("text_head", "audio_head", "embedding"), rest)
    return {"body.linear": blocks, "tts.linear": blocks, **heads}


def encoder(linear: str, proj: str) -> dict[str, str]:
    return {"encoder.linear": linear, "adapter.linear": linear, "adapter.proj": proj}


@pytest.mark.parametrize(
    ("component", "precision", "options", "expected"),
    [
        ("llm", "fp32", {}, llm("fp32", "fp32")),
        ("llm", "fp16", {"block": 32}, llm("fp16", "fp16")),
        ("llm", "int8", {}, llm("int8_b128", "int8_b128")),
        ("llm", "int4", {}, llm("int4_b128", "int8_b128")),  # 8 bits where 4 do harm
        ("llm", "int4", {"block": 32}, llm("int4_b32", "int8_b128")),
        ("llm", "int8", {"block": 16, "flavour": "portable"}, llm("int8s_b16", "int8s_b128")),
        ("encoder", "fp32", {}, encoder("fp32", "fp32")),
        ("encoder", "fp16", {"flavour": "portable"}, encoder("fp16", "fp16")),
        ("encoder", "int8", {"block": 32}, encoder("int8_dynamic", "int8_b128")),
        ("encoder", "int8", {"flavour": "portable"}, encoder("int8_dynamic", "int8s_b128")),
        ("codec", "fp32", {}, {"codec": "fp32"}),
        ("codec", "fp16", {"flavour": "portable"}, {"codec": "fp16"}),
    ],
)
def test_schemes_of_a_precision(component: str, precision: str, options: Any, expected: dict[str, str]) -> None:
    assert names(component, precision, **options) == expected


def test_the_four_precisions() -> None:
    assert exporter_of("onnx").precisions == ("fp32", "fp16", "int8", "int4")
    assert schemes_for("llm", "int4") == schemes_for("llm", "int4", OnnxOptions("ort", None))


@pytest.mark.parametrize(
    ("component", "precision", "word"),
    [
        ("codec", "int8", "codec:int8 is not offered.*use codec fp32 or fp16"),
        ("codec", "int4", "codec:int4"),
        ("encoder", "int4", "use encoder int8"),
        ("llm", "q4_k_m", "llm: unknown ONNX precision 'q4_k_m'; known are fp32, fp16, int8, int4"),
        ("codec", "bf16", "'bf16'"),
        ("decoder", "int8", "'decoder'; known are encoder, llm, codec"),
    ],
)
def test_what_is_not_offered_is_refused_with_a_way_out(component: str, precision: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        schemes_for(component, precision)


@pytest.mark.parametrize("block", [0, 1, 24, 512, -32, "32"])
def test_a_block_that_no_kernel_takes_is_refused(block: Any) -> None:
    with pytest.raises(UsageError, match=f"block {block!r} is not offered; known are 16, 32, 64, 128, 256"):
        OnnxOptions(block=block)


def test_the_blocks_and_flavours_that_exist() -> None:
    for block in (None, 16, 32, 64, 128, 256):
        for flavour in ("ort", "portable"):
            options = options_of("onnx", {"flavour": flavour, "block": block})
            assert (options.flavour, options.block) == (flavour, block)
    assert options_of("onnx", {}) == OnnxOptions() == OnnxOptions(flavour="ort", block=None)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown ONNX flavour 'other'; known are ort and portable"):
        options_of("onnx", {"flavour": "other"})
    with pytest.raises(UsageError, match="onnx has no option colour, size; known are flavour, block"):
        options_of("onnx", {"size": 1, "flavour": "ort", "colour": "red"})
    with pytest.raises(UsageError, match="unknown export format 'abacus'; known are onnx"):
        exporter_of("abacus")


def test_a_wrong_component_leaves_no_directory_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="brain"):
        exporter_of("onnx").export(None, "brain", tmp_path, "fp32", OnnxOptions())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_exports_choices_are_checked_with_its_options() -> None:
    chosen = export.choices("int4", {"codec": "onnx:fp16"}, {"onnx": {"block": 32}})
    assert chosen == {"encoder": ("onnx", "int8"), "llm": ("onnx", "int4"), "codec": ("onnx", "fp16")}
    for options, word in (
        ({"onnx": {"block": 24}}, "block 24"),
        ({"onnx": {"flavor": "ort"}}, "no option flavor"),
        ({"abacus": {}}, "'abacus'"),
    ):
        with pytest.raises(UsageError, match=word):
            export.choices("int4", {}, options)
    with pytest.raises(UsageError, match="unknown ONNX precision 'bf16'"):
        export.choices("bf16", {})
