"""ONNX Runtime's execution providers: which one a device means, whether it works here, and why not.

The GPU's providers are in every onnxruntime-gpu, also where there is no GPU, no driver, or a CUDA of another version.
ONNX Runtime then computes on the CPU and only says so in its log. Here that is an error, found out on a graph of one
operator before a model is loaded.
"""

from __future__ import annotations

import contextlib
import io
from functools import cache
from typing import Any

import onnxruntime as ort

from edgeomni.errors import EngineUnavailable
from edgeomni.hardware import has_nvidia_gpu
from edgeomni.install_hint import install_command, replacing_command
from edgeomni.outputs import user_cache

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Device -> provider."""
MEMORY = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
"""Device -> what ONNX Runtime calls its memory."""
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX graph of one Identity, float [1], opset 13: what a device without the package onnx cannot write itself."""
_FATAL_ONLY = 4
"""ONNX Runtime's log level: it would print what `problem` says better."""
GPU_PACKAGE = "onnxruntime-gpu"
REINSTALL = (
    f"{install_command('cuda')} && {replacing_command(GPU_PACKAGE)} (the CPU's package writes the same "
    "folder, so that the GPU's has to come last)"
)

Provider = str | tuple[str, dict[str, str]]


def usable(device: str) -> list[Provider]:
    """What a session on that device is opened with. Raises EngineUnavailable where the device cannot be used here."""
    if said := problem(device):
        raise EngineUnavailable("device", said)
    cpu = NAMES["cpu"]
    if device == "cpu":
        return [cpu]
    cuda = (NAMES["cuda"], _CUDA_OPTIONS)
    return [cuda, cpu] if device == "cuda" else [(NAMES["tensorrt"], _tensorrt_options()), cuda, cpu]


def recording(providers: list[Provider]) -> list[Provider]:
    """The same with a CUDA provider that records graphs."""
    name = NAMES["cuda"]
    return [(name, {**_CUDA_OPTIONS, "enable_cuda_graph": "1"}) if p[0] == name else p for p in providers]


def demand(device: str, session: ort.InferenceSession) -> None:
    """Raises EngineUnavailable unless the session has the device's provider."""
    if NAMES[device] not in session.get_providers():
        raise EngineUnavailable("device", _does_not_start(device))


def problem(device: str) -> str:
    """Why this ONNX Runtime cannot compute on the device; "" where it can."""
    if device not in NAMES:
        return f"onnxruntime: unknown device {device!r}; known are {', '.join(NAMES)}"
    if device == "cpu":
        return ""
    if NAMES[device] not in (offered := ort.get_available_providers()):
        return (
            f"this onnxruntime {ort.__version__} has no {NAMES[device]} (it has {', '.join(offered)}); install "
            f"{GPU_PACKAGE}: {REINSTALL}; or use --device cpu"
        )
    return "" if _starts(device) else _does_not_start(device)


_CUDA_OPTIONS = {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC"}
"""By default every convolution algorithm is tried at each new length. Some pushes of the codec took 80 ms on an H200
that otherwise took 4, which this search may explain; that HEURISTIC mends it is untested on a GPU."""


def _tensorrt_options() -> dict[str, str]:
    folder = user_cache() / "onnxruntime-tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    caches = {"trt_engine_cache_enable": "True", "trt_timing_cache_enable": "True"}
    places = {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}
    return {"device_id": "0", **caches, **places}


@cache
def _load_libraries() -> str:
    """Loads CUDA and cuDNN from wheels that were installed; returns what was missing.

    ONNX Runtime prints that, and standard output may be carrying sound.
    """
    said = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said), contextlib.suppress(Exception):
            ort.preload_dlls()
    failed = [line for line in said.getvalue().splitlines() if line.startswith("Failed to load")]
    return failed[0] if failed else ""


def _starts(device: str) -> bool:
    _load_libraries()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        with _silent():
            session = ort.InferenceSession(IDENTITY, options, providers=[NAMES[device]], enable_fallback=0)
    except Exception:  # whatever it is, the device is of no use then
        return False
    return NAMES[device] in session.get_providers()


@contextlib.contextmanager
def _silent() -> Any:
    """ONNX Runtime's own log, which reports a provider that cannot start before any session's options are read."""
    ort.set_default_logger_severity(_FATAL_ONLY)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def _does_not_start(device: str) -> str:
    if not has_nvidia_gpu():
        reason = "this machine shows no GPU of NVIDIA"
    else:
        reason = _load_libraries() or "the driver finds no GPU, or none that this build was made for"
    cuda = getattr(ort, "cuda_version", "") or "unknown"
    return (
        f"{NAMES[device]} of onnxruntime {ort.__version__} (built with CUDA {cuda}) does not start here: {reason}; "
        f"check `nvidia-smi`, install the libraries with {install_command('cuda')}"
        f"{' and TensorRT' if device == 'tensorrt' else ''}, or use --device cpu"
    )
