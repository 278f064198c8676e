"""OpenVINO's runtime beyond the contract that all engines share: cancel, threads, devices, mixing, and no telemetry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines_here import exported_openvino, matches, random_features, random_ids, truth

if find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from edgeomni import Session, TurnEnd
from edgeomni.bundle import Bundle
from edgeomni.cli.opening import open_apart
from edgeomni.components import Components, Features, OpenOptions
from edgeomni.errors import BundleError, EngineError
from edgeomni.export import export_bundle
from edgeomni.exporters import exporter_of
from edgeomni.gate.judge import GateOptions
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import openvino as folder
from edgeomni.runtimes.openvino.encoder import OvEncoder
from edgeomni.runtimes.openvino.models import ModelFactory
from edgeomni.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def parts(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Components:
    return exported_openvino(tiny_model, tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="module")
def bundles(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The tiny model as OpenVINO int8, and with OpenVINO's encoder and ONNX for the rest, in float32."""
    root = tmp_path_factory.mktemp("bundles")
    ours = dict.fromkeys(("encoder", "llm", "codec"), "openvino")
    formats = {"int8": ("int8", ours), "mixed": ("fp32", {"encoder": "openvino"}), "onnx": ("fp32", {})}
    return {
        name: export_bundle(tiny_model, root / name, precision=precision, formats=kinds, threads=1)
        for name, (precision, kinds) in formats.items()
    }


def mel_of(model: OmniModel, t: int) -> np.ndarray:
    return np.random.default_rng(t).standard_normal((model.spec.front_end.n_mels, t)).astype(np.float32)


def test_the_gate_passes_and_proves_the_integer_kernels(bundles: dict[str, Bundle]) -> None:
    gate = bundles["int8"].manifest.gate
    assert gate["passed"] and gate["engines"] == {"openvino": folder.version()}
    fidelity = {name: figure["value"] for name, figure in gate["fidelity"].items()}
    assert fidelity["llm.top1"] == 1 and fidelity["llm.error"] < 1e-4 and fidelity["encoder.cosine"] > 0.99999
    assert fidelity["encoder.wrong_kernels"] == fidelity["llm.wrong_kernels"] == 0


def test_an_encoder_of_one_engine_with_the_rest_of_another(bundles: dict[str, Bundle]) -> None:
    """The same greedy answer to the last token, on one session per bundle."""
    question = np.random.default_rng(3).standard_normal(16000).astype(np.float32) * 0.1
    tokens = []
    for name in ("mixed", "onnx"):
        with Session.open(bundles[name], threads=1) as session:
            *_, end = session.respond("aa", question, sampling=Sampling(greedy=True), max_length=90)
        assert isinstance(end, TurnEnd)
        tokens.append(end.tokens)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert [bundles["mixed"].manifest.components[n].engine for n in ("encoder", "llm")] == ["openvino", "onnxruntime"]


def test_attention_that_sees_one_position_first(tiny_model: OmniModel, tmp_path: Path) -> None:
    """A fresh encoder whose caller begins with the shortest window."""
    component = exporter_of("openvino").export(tiny_model, "encoder", tmp_path, "fp32")
    encoder = OvEncoder(tmp_path, component, tiny_model.spec, ModelFactory(1))
    for t in (2, 64):
        with torch.no_grad():
            expected = tiny_model.encode(torch.from_numpy(mel_of(tiny_model, t))[None])[0].numpy()
        np.testing.assert_allclose(encoder.encode(mel_of(tiny_model, t)), expected, atol=1e-4)


def test_an_interrupt_ends_a_call_and_leaves_the_engine_usable(parts: Components, tiny_model: OmniModel) -> None:
    interrupt, ids = Interrupt(), random_ids(tiny_model, 64)
    interrupt.set()
    state = parts.llm.start(1, 64)
    for call in (
        lambda: parts.encoder.encode(mel_of(tiny_model, 3000), None, interrupt),
        lambda: parts.llm.forward(ids, (), state, interrupt),
    ):
        with pytest.raises(Interrupted):
            call()
    assert len(parts.encoder.encode(mel_of(tiny_model, 3000), None, Interrupt())) == 1500
    matches(parts.llm, parts.llm.forward(ids, (), parts.llm.start(1, 64), Interrupt()), 0, truth(tiny_model, ids))


def test_an_interrupt_from_another_thread_ends_a_call_under_way(parts: Components, tiny_model: OmniModel) -> None:
    """Calls go on, one after the other, until the one that was under way or about to begin is ended."""
    interrupt = Interrupt()
    timer = threading.Timer(0.3, interrupt.set)
    timer.start()
    with pytest.raises(Interrupted):
        for _ in range(10_000):
            parts.encoder.encode(mel_of(tiny_model, 3000), None, interrupt)
    timer.join()


def test_threads_share_the_components(parts: Components, tiny_model: OmniModel) -> None:
    """Turns of four threads at once on the same components: heads and codec run in requests of their own."""
    ids = [random_ids(tiny_model, 12, seed) for seed in range(4)]
    codec = tiny_model.spec.codec
    codes = [np.random.default_rng(1).integers(0, codec.codebook_size, 7 * n) for n in codec.ids_per_level]
    wave = parts.codec.decode(codes, parts.codec.open(), True)
    texts: dict[int, list[np.ndarray]] = {i: [] for i in range(4)}
    waves, faults = [], []

    def answer(i: int) -> None:
        try:
            state = parts.llm.start(1, 12)
            for at in range(12):
                hidden = parts.llm.forward(np.ascontiguousarray(ids[i][:, :, at : at + 1]), (), state)
                texts[i].append(parts.llm.text_logits(hidden, 0))
            waves.append(parts.codec.decode(codes, parts.codec.open(), True))
        except Exception as exc:
            faults.append(exc)

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(waves) == 4
    for i in range(4):
        np.testing.assert_allclose(np.stack(texts[i]), truth(tiny_model, ids[i])[0], atol=1e-4)
        np.testing.assert_array_equal(waves[i], wave)


def test_features_of_another_width_are_refused(parts: Components, tiny_model: OmniModel) -> None:
    given = [Features(0, random_features(tiny_model, 2)[:, :-1])]
    with pytest.raises(EngineError, match="do not fit 4 positions"):
        parts.llm.forward(random_ids(tiny_model, 4), given, parts.llm.start(1, 8))


@pytest.mark.parametrize(
    ("device", "match"),
    [("gpu", "finds no GPU here"), ("npu", "finds no NPU here"), ("cuda", "unknown device 'cuda'; known are cpu, gpu")],
)
def test_devices_that_are_not_there(device: str, match: str) -> None:
    from edgeomni.runtimes.openvino.models import core

    if any(name.lower().startswith(device) for name in core().available_devices):
        assert ModelFactory(device=device).device == device.upper()
        return
    with pytest.raises(EngineError, match=match):
        ModelFactory(device=device)


def test_auto_chooses_the_cpu_where_there_is_nothing_else(
    bundles: dict[str, Bundle], tiny_model: OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled models are kept there, as on any device but a CPU that was asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoder = folder.open_component(bundles["int8"], "encoder", OpenOptions(1, "auto"))
    again = folder.open_component(bundles["int8"], "encoder", OpenOptions(1))
    mel = mel_of(tiny_model, 40)
    np.testing.assert_allclose(encoder.encode(mel), again.encode(mel), atol=1e-4)
    assert list((tmp_path / "edgeomni" / "openvino").iterdir())


def test_a_weights_file_that_the_manifest_does_not_list(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    root = Path(shutil.copytree(bundles["mixed"].path, tmp_path / "b"))
    manifest = json.loads((root / "bundle.json").read_text())
    part = manifest["components"]["encoder"]
    part["files"] = [entry for entry in part["files"] if not entry["path"].endswith(".bin")]
    (root / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="encoder/encoder.*reads .encoder.bin., which is not among the listed"):
        Bundle.open(root, hashes=True)


def test_graphs_open_in_a_process_of_their_own(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = bundles["int8"].file("llm/text_head.xml")
    assert open_apart("openvino", path) == ""
    broken = tmp_path / "text_head.xml"
    broken.write_bytes(path.read_bytes()[:300])
    broken.with_suffix(".bin").write_bytes(b"")
    assert "text_head.xml cannot be loaded" in open_apart("openvino", broken)


def test_a_missed_gate_leaves_nothing(tiny_model: OmniModel, tmp_path: Path) -> None:
    ours: dict[str, Any] = {"formats": dict.fromkeys(("encoder", "llm", "codec"), "openvino"), "threads": 1}
    with pytest.raises(Exception, match=r"llm\.top1 is 1, wanted ≥ 1\.5"):
        export_bundle(tiny_model, tmp_path / "b", precision="fp32", gate=GateOptions({"llm.top1": 1.5}), **ours)
    assert list(tmp_path.iterdir()) == []


def test_importing_openvino_tells_nobody(tmp_path: Path) -> None:
    """Its telemetry would make ~/intel and send an event. Hidden only while it is imported: others may import it."""
    code = (
        "import sys; from edgeomni.openvino_library import ov; "
        "assert not any(name.startswith('openvino_telemetry') for name in sys.modules); ov.Core(); "
        "from importlib.util import find_spec; find_spec('openvino_telemetry')"
    )
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists()


def test_an_installation_without_openvino_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from edgeomni.errors import EngineError\n"
        "try:\n    import edgeomni.openvino_library\n"
        "except EngineError as exc: print(exc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "openvino engine is not installed" in done.stdout and "[openvino]" in done.stdout, done.stderr
