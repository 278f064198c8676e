"""The C interface of ggml (ggml.h, ggml-backend.h, ggml-alloc.h, ggml-cpu.h of ggml-org/llama.cpp), by ctypes.

ggml ends the whole process where it finds something wrong (GGML_ASSERT). So nothing here is called before types, shapes
and sizes have been checked on this side, and before `library` has made sure that the library's structures are the
declared ones.
"""

from __future__ import annotations

import ctypes as c
import os
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

from edgeomni.engines import ENGINES
from edgeomni.errors import EngineError

MAX_DIMS, MAX_SOURCES, MAX_NAME, MAX_PARAMS = 4, 10, 64, 16
CPU = "cpu"
_POINTER, _INT, _LONG, _SIZE, _BOOL, _TEXT = c.c_void_p, c.c_int, c.c_int64, c.c_size_t, c.c_bool, c.c_char_p
_OBJECT_SIZE = 32
"""sizeof(struct ggml_object), which ggml_tensor_overhead counts beside a tensor."""


class InitParams(c.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", _BOOL)]


class Tensor(c.Structure):
    """struct ggml_tensor. `ne` counts elements from the fastest dimension on, `nb` is the stride in bytes."""

    _fields_ = [
        ("type", _INT),
        ("buffer", _POINTER),
        ("ne", _LONG * MAX_DIMS),
        ("nb", _SIZE * MAX_DIMS),
        ("op", _INT),
        ("op_params", c.c_int32 * MAX_PARAMS),
        ("flags", c.c_int32),
        ("src", _POINTER * MAX_SOURCES),
        ("view_src", _POINTER),
        ("view_offs", _SIZE),
        ("data", _POINTER),
        ("name", c.c_char * MAX_NAME),
        ("extra", _POINTER),
        ("padding", c.c_char * 8),
    ]


_BASE: dict[str, tuple[Any, ...]] = {
    "ggml_init": (_POINTER, InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead_custom": (_SIZE, _SIZE, _BOOL),
    "ggml_new_graph_custom": (_POINTER, _POINTER, _SIZE, _BOOL),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_nbytes": (_SIZE, _POINTER),
    "ggml_blck_size": (_LONG, _INT),
    "ggml_type_size": (_SIZE, _INT),
    "ggml_type_name": (_TEXT, _INT),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _LONG, _LONG),
    "ggml_new_tensor_1d": (_POINTER, _POINTER, _INT, _LONG),
    "ggml_set_input": (None, _POINTER),
    "ggml_set_output": (None, _POINTER),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_get_rows": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_gallocr_new": (_POINTER, _POINTER),
    "ggml_gallocr_alloc_graph": (_BOOL, _POINTER, _POINTER),
    "ggml_gallocr_free": (None, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_buffer_get_base": (_POINTER, _POINTER),
    "ggml_backend_tensor_alloc": (_INT, _POINTER, _POINTER, _POINTER),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
    "ggml_backend_free": (None, _POINTER),
}
_CPU: dict[str, tuple[Any, ...]] = {
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
}


@lru_cache(maxsize=1)
def library() -> Any:
    """Every declared function by its name. Raises EngineError where the libraries are missing or are other ones."""
    found = _Functions()
    folder = _folder()
    for stem, declared in (("ggml-base", _BASE), ("ggml-cpu", _CPU)):
        loaded = _load(folder, stem)
        for name, (result, *arguments) in declared.items():
            found.add(name, loaded, result, arguments)
    here, theirs = c.sizeof(Tensor), found.ggml_tensor_overhead() - _OBJECT_SIZE
    if here != theirs:
        raise EngineError(
            f"the ggml in {folder} has tensors of {theirs} bytes, and EdgeOmni knows those of {here}; install the "
            f"llama-cpp-python that this EdgeOmni was made with: {ENGINES['llama.cpp'].install}"
        )
    return found


class _Functions:
    def add(self, name: str, loaded: c.CDLL, result: Any, arguments: list[Any]) -> None:
        try:
            function = getattr(loaded, name)
        except AttributeError as exc:
            raise EngineError(
                f"this llama-cpp-python has no {name}; update it: {ENGINES['llama.cpp'].install}"
            ) from exc
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)


def _folder() -> Path:
    """Where llama-cpp-python keeps its libraries; LLAMA_CPP_LIB_PATH names others, as it does for llama_cpp itself."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    spec = util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(f"llama-cpp-python is not installed; {ENGINES['llama.cpp'].install}")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def _load(folder: Path, stem: str) -> c.CDLL:
    names = [f"lib{stem}.so", f"lib{stem}.dylib", f"{stem}.dll"]
    for name in names:
        if (path := folder / name).is_file():
            try:
                return c.CDLL(str(path), mode=c.RTLD_GLOBAL)
            except OSError as exc:
                raise EngineError(f"{path} cannot be loaded ({exc}); install llama-cpp-python again") from exc
    raise EngineError(f"{folder} holds none of {', '.join(names)}; install llama-cpp-python again")
