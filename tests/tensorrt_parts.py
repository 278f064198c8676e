"""TensorRT bundles of tiny models, with engines of the recorder, and their components opened on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cuda_recorder import Recorder
from tensorrt_building import engine_bytes
from tensorrt_recorder import TensorRT

from edgeomni.bundle import Bundle, describe_files, write_manifest
from edgeomni.components import OpenOptions
from edgeomni.engines import COMPONENTS
from edgeomni.exporters import exporter_of
from edgeomni.manifest import Component, Manifest
from edgeomni.runtimes import onnxruntime
from edgeomni.runtimes import tensorrt as runtime
from edgeomni.runtimes.tensorrt import device, library, sources

VERSION = "1.7.1.116"


@dataclass(frozen=True)
class Machine:
    """A recorded machine: its CUDA, and the TensorRT that is installed on it."""

    cuda: Recorder
    tensorrt: TensorRT

    def open(self, bundle: Bundle, name: str) -> Any:
        return runtime.open_component(bundle, name, OpenOptions())


@contextmanager
def machine(cuda: Recorder | None = None, package: str = "tensorrt_rtx", version: str = VERSION) -> Iterator[Machine]:
    """Within the block CUDA and TensorRT are recorded ones. What was opened in it goes on working afterwards."""
    cuda = cuda or Recorder()
    tensorrt = TensorRT(cuda, package, version)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        cuda.install(patch)
        tensorrt.install(patch)
        patch.setattr(device, "_shared", None)
        patch.setenv("XDG_CACHE_HOME", root)
        patch.setattr(sources, "version_of", lambda name: version if name == package else "")
        for user in (sources, library):
            patch.setattr(user, "installed", lambda names=(package,): [name for name in names if name == package])
        yield Machine(cuda, tensorrt)


def write_bundle(
    model: Any, root: Path, precision: str = "fp32", sms: Sequence[str] = ("sm_89",), version: str = VERSION
) -> Bundle:
    """A TensorRT bundle of the model, whose engines are recorded ones for `sms`; none where there are none."""
    root.mkdir(parents=True, exist_ok=True)
    exporter = exporter_of("tensorrt")
    parts: dict[str, Component] = {
        name: exporter.export(model, name, root, precision if name != "codec" else "fp32") for name in COMPONENTS
    }
    if sms:
        parts = {name: with_engines(part, root, sms, version) for name, part in parts.items()}
    write_manifest(root, Manifest(model.spec, parts, None, {"weights": "random"}, {}, gate={}))
    return Bundle.open(root, hashes=False)


def with_engines(part: Component, root: Path, sms: Sequence[str], version: str) -> Component:
    entries, files = [], []
    for role, graph in part.graphs.items():
        path = (root / graph.path).with_name(f"{role}.{'-'.join(sms)}.engine")
        path.write_bytes(
            engine_bytes(root / graph.path, part.meta["recipes"][role]["profiles"], sms=sms, version=version)
        )
        files.append(path)
        entry = {"role": role, "path": path.relative_to(root).as_posix(), "targets": list(sms)}
        entries.append({**entry, "package": "tensorrt_rtx", "version": version})
    return replace(part, meta={**part.meta, "engines": entries}, files=[*part.files, *describe_files(root, files)])


def with_ort(bundle: Bundle, name: str) -> Any:
    """A component of the bundle on ONNX Runtime, which runs the graphs that engines are built from."""
    return onnxruntime.open_component(bundle, name, OpenOptions(threads=1))
