"""`edgeomni export`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from ..engines import COMPONENTS
from ..errors import UsageError
from ..hardware import HardwareProfile, load_profile
from ..printing import show
from .bundles import gate_table
from .common import console, force_option, options
from .evaluate import recogniser_option, unreadable
from .init import check_preset, random_source

if TYPE_CHECKING:
    from ..calibration import CalibrationData
    from ..evaluate.lost import JudgeData

component_options = options(
    click.option("--format", "target", default="onnx", show_default=True, help="Format of what is not named below."),
    click.option(
        "--precision",
        metavar="PRECISION",
        help="Of all components, none below its floor: fp32, fp16, int8, int4; for TensorRT also bf16, "
        "int8w, fp8, nvfp4; for GGUF f16, bf16, q8_0, q4_0 ... "
        "[default: what --profile chooses, else int4; GGUF q4_0].",
    ),
    click.option("--encoder", metavar="FORMAT:PRECISION", help="onnx:int8, for instance."),
    click.option("--llm", metavar="FORMAT:PRECISION", help="onnx:int4, for instance."),
    click.option("--codec", metavar="FORMAT:PRECISION", help="onnx:fp32, for instance."),
    click.option(
        "--flavour",
        type=click.Choice(["ort", "portable"]),
        default="ort",
        show_default=True,
        help="ONNX Runtime's fused operators, or standard ones.",
    ),
    click.option("--block", type=click.IntRange(1), help="Inputs per scale in the LLM's blocks."),
    click.option("--fast", is_flag=True, help="OpenVINO: what this CPU has beside float32, if the gate holds."),
    click.option("--heads", metavar="PRECISION", help="Of the LLM's heads and embedding in GGUF: q8_0, for instance."),
    click.option("--imatrix", metavar="FILE", help="llama.cpp's importance matrix, for the LLM's blocks in GGUF."),
    click.option("--target", "gpus", metavar="SM,...", help="GPUs that TensorRT builds engines for: sm_89,sm_120."),
    click.option("--cache", type=click.IntRange(1), help="Frames in TensorRT's KV cache [default: all the model has]."),
    click.option("--threads", type=click.IntRange(1), help="Threads for the gate [default: all cores]."),
)
gate_options = options(
    click.option("--gate", multiple=True, metavar="NAME=VALUE", help="Change a threshold (llm.top1=0.99). Repeatable."),
    click.option("--no-gate", is_flag=True, help="Tell what was missed, and go on."),
)
judge_options = options(
    click.option("--judge", metavar="DATA", help="Also judge by this test set: points lost against the checkpoint."),
    click.option("--judge-format", metavar="F", help="Its format [default: told by what it is]."),
    click.option("--judge-limit", type=click.IntRange(1), metavar="N", help="Samples of each task at most."),
    recogniser_option,
)
calibrate_options = options(
    click.option(
        "--calibrate",
        metavar="DATA",
        help="Choose the LLM's integer codes by what it computes on these questions, and measure on them the ranges "
        "of inputs that TensorRT rounds.",
    ),
    click.option("--calibrate-format", metavar="F", help="Its format [default: told by what it is]."),
    click.option(
        "--calibrate-limit",
        type=click.IntRange(1),
        metavar="N",
        help="Questions of each task at most [default: 16].",
    ),
)


@click.command("export")
@click.argument("checkpoint", required=False)
@random_source
@click.option("-o", "--output", required=True, help="Bundle directory to write.")
@component_options
@gate_options
@judge_options
@calibrate_options
@click.option("--profile", "profile_name", help="Hardware profile: its precisions, its budget for the size.")
@force_option
def export_(checkpoint: str | None, output: str, profile_name: str | None, **how: Any) -> None:
    """Make a bundle of CHECKPOINT, judged by the gate before it gets its name.

    \b
    edgeomni export ckpt -o bundle --precision int4
    edgeomni export ckpt -o bundle --encoder onnx:int8 --llm onnx:int4 --codec onnx:fp32
    edgeomni export --preset tiny --random --seed 0 -o bundle
    edgeomni export ckpt -o bundle --judge test.jsonl --recogniser pocketsphinx
    edgeomni export ckpt -o bundle --calibrate train.jsonl --judge test.jsonl
    """
    profile = load_profile(profile_name) if profile_name else None
    request = _request(how, profile)
    source = _source(checkpoint, how)
    from .. import export

    request["judge"] = judge = _judge(how)
    request["calibrate"] = _calibrate(how)
    with export.console_progress(steps=export.STEPS + (export.JUDGE_STEPS if judge else 0)) as progress:
        bundle = export.export_bundle(source, output, **request, progress=progress, on_gate=_show)
    click.echo(f"{output}: {bundle.size / 1e6:.1f} MB, digest {bundle.digest[:12]}")
    if profile:
        profile.judge({"bundle_mb": bundle.size / 1e6})


def _source(checkpoint: str | None, how: dict[str, Any]) -> Any:
    """A checkpoint's path, or the random model asked for in its place. Raises UsageError unless it is one of them."""
    check_preset(how["preset"], how["random"])
    if (checkpoint is None) == (how["preset"] is None):
        raise UsageError("give CHECKPOINT or --preset mini-omni|nano|tiny --random, not both")
    if checkpoint is not None:
        return checkpoint
    from ..model import checkpoints

    return checkpoints.preset(how["preset"], how["seed"])


def _request(how: dict[str, Any], profile: HardwareProfile | None) -> dict[str, Any]:
    """Options -> arguments of export_bundle. What is spelled out wins; --precision wins over the profile's choices."""
    from ..export import choices
    from ..gate.judge import GateOptions, parse_limit

    precision = how["precision"] or {"gguf": "q4_0"}.get(how["target"], "int4")
    formats = profile.choices() if profile and not how["precision"] else dict.fromkeys(COMPONENTS, how["target"])
    formats.update({name: how[name] for name in COMPONENTS if how[name]})
    own = {"onnx": {k: how[k] for k in ("flavour", "block")}, "gguf": {k: how[k] for k in ("heads", "imatrix")}}
    own["openvino"] = {k: how[k] for k in ("block", "fast")}
    own["tensorrt"] = {"target": how["gpus"] or "", "cache": how["cache"], "block": how["block"]}
    choices(precision, formats, own)
    gate = GateOptions(dict(parse_limit(text) for text in how["gate"]), enforce=not how["no_gate"])
    same = {k: how[k] for k in ("threads", "force")}
    return {**same, "precision": precision, "formats": formats, "options": own, "gate": gate}


def _judge(how: dict[str, Any]) -> JudgeData | None:
    """Raises UsageError for options that need --judge, DataError for data that cannot be read."""
    if how["judge"] is None:
        if given := [name for name in ("judge_format", "judge_limit", "recogniser") if how[name] is not None]:
            raise UsageError(f"--{given[0].replace('_', '-')} belongs to --judge DATA; give that too, or leave it out")
        return None
    from ..data.readers import read_data
    from ..evaluate.lost import JudgeData

    data = read_data(how["judge"], how["judge_format"])
    own = {"recogniser": how["recogniser"], "limit": how["judge_limit"]}
    return JudgeData(data.samples, unreadable=unreadable(data), **own)


def _calibrate(how: dict[str, Any]) -> CalibrationData | None:
    """Raises UsageError for options that need --calibrate and for the test set, DataError for unreadable data."""
    data = how["calibrate"]
    if data is None:
        if given := [name for name in ("calibrate_format", "calibrate_limit") if how[name] is not None]:
            raise UsageError(f"--{given[0].replace('_', '-')} belongs to --calibrate DATA; give that, or leave it out")
        return None
    if how["judge"] is not None and os.path.realpath(data) == os.path.realpath(how["judge"]):
        raise UsageError(f"--calibrate and --judge name the same data, {data}: an export is judged by other questions")
    from ..calibration import CalibrationData
    from ..data.readers import read_data

    limit = {} if how["calibrate_limit"] is None else {"limit": how["calibrate_limit"]}
    return CalibrationData(read_data(data, how["calibrate_format"]).samples, **limit)


def _show(gate: dict[str, Any]) -> None:
    show(console(), gate_table(gate))
