"""llama.cpp's own library, through llama-cpp-python: loaded, checked, its messages sent to logging."""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from typing import Any

from edgeomni.engines import ENGINES
from edgeomni.errors import EngineUnavailable
from edgeomni.install_hint import build_command
from edgeomni.runtimes.ggml.library import set_up_process

_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.DEBUG, 4: logging.ERROR}
"""enum ggml_log_level. What llama.cpp calls information is detail to us, and its warnings are about what we choose."""
_DEFAULTS = {
    "n_ctx": 512,
    "n_seq_max": 1,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "samplers": None,
    "kv_unified": False,
}
"""Of llama_context_params, in llama_context_default_params of src/llama-context.cpp: read through a structure that is
declared otherwise than the library's, these come out as something else."""
_log = logging.getLogger("edgeomni.llamacpp")


@lru_cache(maxsize=1)
def llama() -> Any:
    """The module llama_cpp, its backend initialized.

    Raises EngineError where it is missing, cannot be loaded, or declares other structures than its library has.
    """
    set_up_process()
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as exc:
        said = f"llama-cpp-python cannot be loaded ({exc}); {ENGINES['llama.cpp'].install}"
        raise EngineUnavailable("package", said) from exc
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    _check_structures(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


def use_device(device: str) -> int:
    """How many layers go to the GPU: none on the CPU, all (-1) on "cuda". Raises EngineError where there is none."""
    if device == "cpu":
        return 0
    if not llama().llama_supports_gpu_offload():
        raise EngineUnavailable(
            "device",
            "this llama-cpp-python was built without a GPU backend; build it with CUDA: "
            f"{build_command('llama-cpp-python', '-DGGML_CUDA=on')} (needs nvcc and a C++ compiler), or use device cpu",
        )
    return -1


def has_vnni() -> bool:
    """Whether this machine's CPU, and the build, multiply and add bytes in one instruction (AVX-VNNI, AVX512-VNNI)."""
    told = llama().llama_print_system_info().decode("ascii", "replace")
    return "VNNI = 1" in told


def _check_structures(llama_cpp: Any) -> None:
    try:
        params, model = llama_cpp.llama_context_default_params(), llama_cpp.llama_model_default_params()
        found = {name: getattr(params, name) for name in _DEFAULTS}
        found["samplers"] = getattr(params, "samplers", None) or None
        loading = model.use_extra_bufts, model.load_mode
    except AttributeError as exc:
        said = f"llama-cpp-python {_version(llama_cpp)} is too old ({exc}); {_REMEDY}"
        raise EngineUnavailable("version", said) from exc
    if wrong := [name for name, value in _DEFAULTS.items() if found[name] != value] or loading != (True, -1):
        raise EngineUnavailable(
            "version",
            f"llama-cpp-python {_version(llama_cpp)} and its library do not fit together ({wrong}): is "
            f"LLAMA_CPP_LIB_PATH set? {_REMEDY}",
        )


_REMEDY = f"install the one that this EdgeOmni was made with: {ENGINES['llama.cpp'].install}"


def _version(llama_cpp: Any) -> str:
    return str(getattr(llama_cpp, "__version__", "of no version"))


@lru_cache(maxsize=1)
def _log_callback(llama_cpp: Any) -> Any:
    def said(level: int, text: bytes, _: Any) -> None:
        if line := (text or b"").decode("utf-8", "replace").rstrip():
            _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)

    return llama_cpp.llama_log_callback(said)
