"""`export --calibrate`: turns from data, the same codes in every format, and answers nearer to the original's."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from edgeomni import export, exporters
from edgeomni.bundle import Bundle
from edgeomni.calibration import OF_A_TASK, CalibrationData, recorded
from edgeomni.cli import main
from edgeomni.cli.export import export_
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import DataError, GateError, UsageError
from edgeomni.exporters.onnx import reread
from edgeomni.exporters.openvino import files
from edgeomni.gate import answers
from edgeomni.gate.judge import GateOptions
from edgeomni.model import checkpoints, fake_quant
from edgeomni.prompts import from_texts
from edgeomni.quantize import calibrate
from edgeomni.quantize.schemes import Scheme, dequantize, parse, quantize, signed_codes
from edgeomni.question import Question
from edgeomni.runtimes.torch import TorchEncoder, TorchLanguageModel
from edgeomni.spec import Task
from edgeomni.text import Tokenizer

SAMPLES = [
    Sample(f"t:{i}", "tt", text=text) for i, text in enumerate(["the of and", "you that it", "he was for", "on"])
]
DATA = CalibrationData(SAMPLES)


def exported(model: Any, out: Path, format: str = "onnx", **how: Any) -> Bundle:
    formats = {"encoder": "onnx:fp32", "llm": f"{format}:int4", "codec": "onnx:fp32"}
    return export.export_bundle(model, out, formats=formats, threads=1, **{"calibrate": DATA, **how})


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LONGEST", 8)


# --- turns


def test_samples_are_spread_evenly_and_bounded_for_each_task() -> None:
    tt: tuple[Task, ...] = ("tt",)
    many = [Sample(f"m:{i}", None, text=str(i)) for i in range(10)] + [Sample("a", None, audio=(Clip.of("x.wav"),))]
    found = CalibrationData(many, limit=4).chosen(("asr", "at", "tt", "ta"))
    assert [s.text for s, t in found if t == "tt"] == ["0", "3", "6", "9"]
    assert [s.where for s, t in found if t == "at"] == ["a"]  # without sound nothing can be asked
    assert [s.where for s, t in found if t == "asr"] == ["a"]
    own = [*many, Sample("own", "ta", text="x"), Sample("blank", None, text=" ")]
    assert {
        (s.where, t) for s, t in CalibrationData(own).chosen(("tt", "ta", "aa")) if s.where in ("own", "blank")
    } == {("own", "ta")}
    assert [t for _, t in CalibrationData(many, tasks=["ta"], limit=4).chosen(("asr", "at", "tt", "ta"))] == ["ta"] * 4
    assert len(CalibrationData(many).chosen(tt)) == 10


def test_what_the_body_reads_is_recorded(tiny_model: Any) -> None:
    """Against one forward over the whole sequence of ids, which torch chose greedily."""
    turns = recorded(tiny_model, CalibrationData(SAMPLES[:1]))
    tokenizer = Tokenizer(tiny_model.tokenizer_json, tiny_model.spec.layout)
    side = answers.Side(TorchEncoder(tiny_model), TorchLanguageModel(tiny_model))
    ids, _ = answers.walk(side, tiny_model.spec, tokenizer, Question("tt", text=SAMPLES[0].text), None)
    layout = tiny_model.spec.layout
    prompt = from_texts(tiny_model.spec, tokenizer, "tt", text=SAMPLES[0].text)
    frames = [[*(int(f[k]) + layout.shift(k) for k in range(layout.streams)), int(f[-1])] for f in ids[:-1]]
    whole = np.concatenate([prompt.ids[0], np.array(frames, np.int32).reshape(-1, layout.streams + 1).T], axis=1)
    with torch.no_grad():
        expected = tiny_model.embed(torch.from_numpy(whole)[None])[0]
    torch.testing.assert_close(turns.inputs[0], expected)


def test_facts_tell_turns_positions_and_questions(tiny_model: Any) -> None:
    told: list[str] = []
    turns = recorded(tiny_model, DATA, told.append)
    facts = turns.facts(["gptq", "input ranges"])
    assert told == ["calibrate: answer question 1 of 4"]
    assert (facts["calibration"], facts["calibration_turns"]) == ("gptq, input ranges", 4)
    assert facts["calibration_positions"] == sum(len(x) for x in turns.inputs) > 4
    told_of = [json.dumps(["tt", s.text, [], None, 0]).encode() + b"\n" for s in SAMPLES]
    assert facts["calibration_questions"] == hashlib.sha256(b"".join(told_of)).hexdigest()


def test_questions_that_cannot_be_asked_are_left_out_and_none_is_an_error(tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    broken = Sample("b", "asr", audio=(Clip.of(tmp_path / "bad.wav"),))
    assert len(recorded(tiny_model, CalibrationData([broken, SAMPLES[0]])).inputs) == 1
    with pytest.raises(DataError, match=r"no question of the data .* can be asked \(.*bad.wav.*\); give other data"):
        recorded(tiny_model, CalibrationData([broken]))
    with pytest.raises(UsageError, match="holds no samples"):
        CalibrationData([])
    with pytest.raises(UsageError, match="at least 1 question of each task, not 0"):
        CalibrationData(SAMPLES, limit=0)
    mute = copy.copy(tiny_model)
    mute.tokenizer_json = None
    with pytest.raises(UsageError, match="no tokenizer"):
        recorded(mute, DATA)


# --- bundles


@pytest.fixture(scope="module")
def bundles(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "LONGEST", 8)
        made = {f: exported(tiny_model, root / f, f, options={f: {"block": 32}}) for f in ("onnx", "openvino")}
    return made


def nibbles(data: np.ndarray) -> np.ndarray:
    return np.stack([data & 15, data >> 4], axis=-1).reshape(-1).astype(int)


def body(bundle: Bundle) -> dict[str, tuple[np.ndarray, bytes]]:
    """Linear layer of the body -> its codes around 0, flat, and the bytes of its scales, read from the files."""
    path = bundle.file(bundle.manifest.components["llm"].graphs["body"].path)
    if path.suffix == ".onnx":
        raw = dict(reread.tensors(path))
    else:
        raw = {c.name: files.stored_bytes(path, c) for c in files.constants(path)}
    found = {}
    for name in (n.removesuffix(".codes") for n in raw if n.endswith(".codes")):
        codes = nibbles(raw[f"{name}.codes"])
        around = codes - 8 if path.suffix == ".onnx" else codes - 16 * (codes >= 8)
        found[name] = around, raw[f"{name}.scales"].tobytes()
    return found


def test_formats_hold_the_same_codes(tiny_model: Any, bundles: dict[str, Bundle]) -> None:
    onnx, openvino = body(bundles["onnx"]), body(bundles["openvino"])
    assert set(onnx) == set(openvino) and len(onnx) == 12
    for name, (codes, scales) in onnx.items():
        np.testing.assert_array_equal(codes, openvino[name][0])
        assert scales == openvino[name][1]
    down = tiny_model.get_parameter("body.layers.0.mlp.down_proj.weight").detach().numpy()
    nearest = signed_codes(quantize(down, Scheme("int4", 32)))
    assert 0.3 < np.mean(onnx["body.layers.0.mlp.down_proj"][0] == nearest.reshape(-1)) < 0.95


def test_codes_are_those_that_the_turns_choose(tiny_model: Any, bundles: dict[str, Bundle]) -> None:
    """Asked and chosen once more, the codes are the same: neither depends on what ran before."""
    found = calibrate.choose(tiny_model, recorded(tiny_model, DATA).inputs, Scheme("int4", 32))
    stored = body(bundles["onnx"])
    for name in (f"body.layers.{i}.{part}" for i in range(3) for part in ("self_attn.o_proj", "mlp.down_proj")):
        wanted = dequantize(found[f"{name}.weight"])
        codes, scales = stored[name]
        floats = (codes.reshape(-1, 32) * np.frombuffer(scales, np.float32)[:, None]).astype(np.float32)
        np.testing.assert_array_equal(floats.reshape(wanted.shape), wanted)


def test_the_gate_passes_and_the_manifest_tells(bundles: dict[str, Bundle]) -> None:
    for name in ("onnx", "openvino"):
        manifest = Bundle.open(bundles[name].path, hashes=True).manifest
        assert manifest.gate["passed"] is True
        assert manifest.gate["fidelity"]["llm.altered"]["value"] == 0
        assert manifest.provenance["calibration"] == "gptq" and manifest.provenance["calibration_turns"] == 4
        assert manifest.provenance["command"].endswith("--block 32 --calibrate DATA --calibrate-limit 16")


def test_the_gate_finds_codes_that_other_turns_chose(tiny_model: Any, bundles: dict[str, Bundle]) -> None:
    component = bundles["onnx"].manifest.components["llm"]
    wrong = reread.altered(tiny_model, component, bundles["onnx"].path)
    assert any(name.startswith("body:") and name.endswith(".codes") for name in wrong)
    assert not [name for name in wrong if not name.startswith("body:")]


@pytest.mark.parametrize("precision", ["int4", "int8w"])
def test_tensorrt_graphs_hold_chosen_codes_too(tiny_model: Any, tmp_path: Path, precision: str) -> None:
    exporter = exporters.exporter_of("tensorrt")
    turns = recorded(tiny_model, CalibrationData(SAMPLES[:1])).inputs
    with calibrate.choosing(tiny_model, turns):
        component = exporter.export(tiny_model, "llm", tmp_path, precision)
        assert exporter.altered(tiny_model, component, tmp_path) == []
    nearest = exporter.altered(tiny_model, component, tmp_path)
    assert nearest and all(name.startswith("body:") for name in nearest)
    scheme = parse(component.scheme["body.linear"])
    packed = calibrate.choose(tiny_model, turns, scheme)["body.layers.0.mlp.down_proj.weight"]
    stored = dict(reread.tensors(tmp_path / component.graphs["body"].path))
    expected = int_bytes(signed_codes(packed), int(scheme.bits))
    assert any(np.array_equal(data, layout) for data in stored.values() for layout in expected)


def int_bytes(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Bytes of codes [n, k] and of their transpose: one each, or two 4-bit ones, the low half first."""
    flat = [c.astype(np.int8).reshape(-1).view(np.uint8) for c in (codes, codes.T)]
    return flat if bits == 8 else [(c[0::2] & 15) | (c[1::2] << 4) for c in flat]


@pytest.mark.parametrize(
    ("llm", "hint"),
    [("onnx:fp16", "onnx:fp16"), ("gguf:q4_0", "for GGUF give --imatrix"), ("tensorrt:fp16", "of tensorrt")],
)
def test_precisions_without_codes_in_blocks_are_refused(llm: str, hint: str, tiny_model: Any, tmp_path: Path) -> None:
    formats = {"encoder": "onnx:fp32", "llm": llm, "codec": "onnx:fp32"}
    with pytest.raises(UsageError, match=f"calibrating would change nothing.*{hint}"):
        export.export_bundle(tiny_model, tmp_path / "out", formats=formats, calibrate=DATA)
    assert not list(tmp_path.iterdir())


def test_interrupted_while_choosing_leaves_nothing(tiny_model: Any, tmp_path: Path) -> None:
    def stop(step: str) -> None:
        if step == "calibrate: block 2 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(tiny_model, tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir()) and tiny_model.chosen_codes is None


def test_a_missed_gate_leaves_nothing_either(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        exported(tiny_model, tmp_path / "out", gate=GateOptions({"llm.error": 0.0}))
    assert not list(tmp_path.iterdir()) and tiny_model.chosen_codes is None


# --- the command line


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["export", *words], catch_exceptions=False)


def written(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"task": "tt", "text": t, "answer": "x"}) + "\n" for t in texts))
    return path


def test_the_command(tiny_dir: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "d.jsonl", ["the of", "you that"])
    words = ["--calibrate", str(data), "--calibrate-limit", "1", "--threads", "1"]
    result = run(str(tiny_dir), "-o", str(tmp_path / "out"), *words)
    assert result.exit_code == 0, result.output
    assert "export: calibrate: answer question 1 of 1" in result.output
    assert "export: calibrate: block 3 of 3" in result.output
    provenance = Bundle.open(tmp_path / "out").manifest.provenance
    assert provenance["calibration_turns"] == 1 and "--calibrate-limit 1" in provenance["command"]


def test_the_commands_refusals(tiny_dir: Path, tmp_path: Path) -> None:
    out, data = str(tmp_path / "out"), str(written(tmp_path / "d.jsonl", ["the of"]))
    result = run(str(tiny_dir), "-o", out, "--calibrate", str(tmp_path / "missing.jsonl"))
    assert result.exit_code == 1 and "missing.jsonl" in result.output
    result = run(str(tiny_dir), "-o", out, "--calibrate", data, "--judge", str(tmp_path / "." / "d.jsonl"))
    assert result.exit_code == 2 and "name the same data" in result.output
    for option, value in (("--calibrate-limit", "3"), ("--calibrate-format", "kaldi")):
        result = run(str(tiny_dir), "-o", out, option, value)
        assert result.exit_code == 2 and f"{option} belongs to --calibrate DATA" in result.output
    assert not (tmp_path / "out").exists()


def test_the_help_tells_the_default() -> None:
    texts = [p.help for p in export_.params if p.name == "calibrate_limit"]  # type: ignore[attr-defined]
    assert texts and f"[default: {OF_A_TASK}]" in str(texts[0])


# --- what it is good for


LEARN = [
    "what is two plus nine",
    "how much is eleven minus four",
    "which number follows twelve",
    "what color is coal",
    "what is the opposite of hot",
    "what day comes before monday",
    "which month follows july",
    "what is your name",
    "what season comes after summer",
    "what is the capital of spain",
    "what does the cat do",
    "count to five",
    "is three less than nine",
    "which is more two or ten",
    "what color is the sky",
    "how many legs has a spider",
]
ASKED = [
    "what is seven plus five", "what is the capital of japan", "what number comes after six", "what color is a banana",
    "what day comes after friday", "give me the opposite of old", "what month comes before may", "what do wolves do",
]  # fmt: skip


def divergence(model: Any, original: Any, questions: list[Question]) -> float:
    """Mean over the heads that answer, of `model` from `original` along the latter's answers."""
    mine, theirs = (answers.Side(TorchEncoder(original), TorchLanguageModel(m)) for m in (original, model))
    tokenizer = Tokenizer(original.tokenizer_json, original.spec.layout)
    _, details = answers.measure(mine, theirs, original.spec, tokenizer, questions)
    return float(np.mean([head["kl"] for head in details["heads"].values()]))


def test_nanos_answers_to_other_questions_are_nearer_to_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LONGEST", 24)
    original = checkpoints.load("nano")
    data = CalibrationData([Sample(text, None, text=text) for text in LEARN], tasks=["tt", "ta"])
    questions = [Question(task, text=text) for text in ASKED for task in ("tt", "ta")]
    schemes = {"body.linear": Scheme("int4", 128), "text_head": Scheme("fp32"), "audio_head": Scheme("fp32")}
    lost = {}
    turns = recorded(original, data)
    for name in ("nearest", "chosen"):
        model = copy.deepcopy(original)
        context = calibrate.choosing(model, turns.inputs) if name == "chosen" else contextlib.nullcontext()
        with context, fake_quant.holding_stored_weights(model, "llm", schemes):
            lost[name] = divergence(model, original, questions)
    assert lost["chosen"] < 0.75 * lost["nearest"], lost
