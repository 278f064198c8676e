"""Engines built on the device that they run on, and kept there: a stale or foreign one is never loaded.

The first run on a device is played with a TensorRT that can be installed: a folder of two small packages, whose engines
are the recorder's, also in the child process that builds.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_recorder import Recorder
from tensorrt_parts import VERSION, with_engines, write_bundle

from edgeomni.bundle import Bundle
from edgeomni.components import OpenOptions
from edgeomni.errors import EngineUnavailable
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import tensorrt as runtime
from edgeomni.runtimes.tensorrt import cache, device

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def graphs_alone(tiny_model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """As exported for a GPU that cannot be built for here."""
    return write_bundle(tiny_model, tmp_path_factory.mktemp("tensorrt") / "graphs", sms=())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which tensorrt_rtx is installed, in this process and in its children."""
    site = tmp_path / "site"
    (site / "tensorrt_rtx").mkdir(parents=True)
    (site / "tensorrt_rtx" / "__init__.py").write_text(
        "import sys\nfrom tensorrt_recorder import package\nsys.modules[__name__] = package(__name__)\n"
    )
    facts = site / f"tensorrt_rtx-{VERSION}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-rtx\nVersion: {VERSION}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT / "tests"), str(ROOT)]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield site
    sys.modules.pop("tensorrt_rtx", None)


@pytest.fixture
def first_run(cuda: Recorder, installed: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A device with a GPU and the installed TensorRT. Opening works as it does for users."""
    cuda.install(monkeypatch)
    monkeypatch.setattr(device, "_shared", None)
    monkeypatch.setattr("tensorrt_recorder.CURRENT", cuda)
    return cuda


def opened(bundle: Bundle, name: str) -> Any:
    return runtime.open_component(bundle, name, OpenOptions())


def built(records: list[logging.LogRecord]) -> list[str]:
    return [r.getMessage() for r in records if r.getMessage().startswith("building")]


# --- building on the device


def test_the_first_run_builds_and_the_second_finds(
    graphs_alone: Bundle, first_run: Recorder, tiny_model: OmniModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edgeomni")
    mel = np.random.default_rng(0).standard_normal((tiny_model.spec.front_end.n_mels, 50)).astype(np.float32)
    first = opened(graphs_alone, "encoder")
    features = first.encode(mel)
    first.close()
    assert built(caplog.records) == [
        "building the engine of encoder/encoder (1 of 1 of the encoder) for NVIDIA Recorder, once for this machine, "
        "with about 0.5 GB of memory: the bundle brings none"
    ]
    assert "built the engine of encoder/encoder in" in caplog.text and "step 2 of 2" in caplog.text
    caplog.clear()
    second = opened(graphs_alone, "encoder")
    np.testing.assert_array_equal(second.encode(mel), features)
    second.close()
    assert built(caplog.records) == []


def test_what_tensorrt_compiled_is_kept_for_the_next_process(
    graphs_alone: Bundle, first_run: Recorder, tmp_path: Path
) -> None:
    def compiled() -> int:
        first_run.taken()
        opened(graphs_alone, "encoder").close()
        return first_run.taken().count("compile")

    assert compiled() == 1
    assert compiled() == 0
    (kept,) = (tmp_path / "cache" / "edgeomni" / "engines" / "kernels").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert compiled() == 1, "a file that is cut is not read"
    assert compiled() == 0


def test_a_device_builds_without_torch_and_onnx(graphs_alone: Bundle, first_run: Recorder, tmp_path: Path) -> None:
    """Neither this process nor the child needs them: the child would fail to import them."""
    for name in ("torch", "onnx"):
        (tmp_path / "site" / f"{name}.py").write_text("raise ImportError('no such package on a device')")
    opened(graphs_alone, "encoder").close()


@pytest.mark.parametrize(
    ("sms", "version", "why"),
    [
        (("sm_86", "sm_120"), VERSION, "is for sm_86, sm_120, and this GPU is sm_89"),
        (("sm_89",), "1.6.0.1", f"is of tensorrt_rtx 1.6.0.1, and here is {VERSION}"),
    ],
)
def test_a_foreign_or_stale_engine_is_not_loaded_but_built_anew(
    graphs_alone: Bundle,
    first_run: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sms: tuple[str, ...],
    version: str,
    why: str,
) -> None:
    part = graphs_alone.manifest.components["encoder"]
    foreign = with_engines(part, graphs_alone.path, sms, version)
    parts = {**graphs_alone.manifest.components, "encoder": foreign}
    bundle = Bundle(graphs_alone.path, replace(graphs_alone.manifest, components=parts))
    opened(bundle, "encoder").close()
    assert why in built(caplog.records)[0]
    assert [c for c in first_run.taken() if c == "deserialize_cuda_engine"] == ["deserialize_cuda_engine"]


def test_what_the_builder_refuses_is_told(
    graphs_alone: Bundle, first_run: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECORDED_BUILDER", "refuses")
    with pytest.raises(
        EngineUnavailable, match="encoder/encoder cannot be built for NVIDIA Recorder: .*no kernel"
    ) as e:
        opened(graphs_alone, "encoder")
    assert e.value.kind == "graph"
    monkeypatch.setenv("RECORDED_BUILDER", "crashes")
    with pytest.raises(EngineUnavailable, match="crashed"):
        opened(graphs_alone, "encoder")
    assert list((tmp_path / "cache").rglob("engine")) == []


def test_a_cache_that_cannot_be_written_is_told(
    graphs_alone: Bundle, first_run: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineUnavailable, match="XDG_CACHE_HOME"):
        opened(graphs_alone, "encoder")


# --- the cache


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cache.Key:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    key = cache.Key("GPU", "sm_87", "12060 540.4.0", "tensorrt", "10.7", "d" * 64, "llm", "body", "int4")
    with cache.storing(key) as path:
        path.write_bytes(b"an engine")
    return key


def test_an_engine_is_found_for_its_own_key_alone(key: cache.Key) -> None:
    path = cache.find(key)
    assert path is not None and path.read_bytes() == b"an engine"
    for name in cache.Key.__dataclass_fields__:
        assert cache.find(replace(key, **{name: "other"})) is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "engine").write_bytes(b"an eng"), "has 6 bytes instead of 9"),
        (lambda f: (f / "engine").write_bytes(b"another e"), "differs from what was built"),
        (lambda f: (f / "engine").unlink(), "cannot be read"),
        (lambda f: (f / "engine.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "engine.json").write_text('{"size": 9}'), "cannot be read"),
        (lambda f: change_record(f, "sm", "sm_89"), "was built for something else"),
    ],
)
def test_a_damaged_entry_counts_as_missing_and_is_replaced(
    key: cache.Key, damage: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(key.folder)
    assert cache.find(key) is None
    assert told in caplog.text and "built again" in caplog.text
    with cache.storing(key) as path:
        path.write_bytes(b"built anew")
    found = cache.find(key)
    assert found is not None and found.read_bytes() == b"built anew"


def change_record(folder: Path, name: str, value: str) -> None:
    record = json.loads((folder / "engine.json").read_text())
    record["key"][name] = value
    (folder / "engine.json").write_text(json.dumps(record))


def test_a_build_that_fails_leaves_what_was_there(key: cache.Key) -> None:
    with pytest.raises(ZeroDivisionError), cache.storing(key) as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    found = cache.find(key)
    assert found is not None and found.read_bytes() == b"an engine"


def test_a_new_version_s_engine_replaces_the_old_one_s(key: cache.Key) -> None:
    others = [replace(key, role="tts"), replace(key, bundle="e" * 64), replace(key, gpu="GPU 2")]
    newer = replace(key, version="10.8", driver="13000 580.1")
    for each in (*others, newer):
        with cache.storing(each) as path:
            path.write_bytes(b"engine")
    assert not key.folder.exists()
    assert all(cache.find(each) is not None for each in (*others, newer))
