"""The C interface of ggml (ggml.h, ggml-backend.h, ggml-alloc.h, ggml-cpu.h of ggml-org/llama.cpp), by ctypes.

ggml ends the whole process where it finds something wrong (GGML_ASSERT). So nothing here is called before types, shapes
and sizes have been checked on this side, and before `library` has made sure that the library's structures are the
declared ones.
"""

from __future__ import annotations

import ctypes as c
import logging
import os
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

from edgeomni.engines import ENGINES
from edgeomni.errors import EngineUnavailable
from edgeomni.runtimes.ggml.functions import BASE, CPU, REGISTRY, InitParams, LogCallback, Tensor

F32, F16, I32 = 0, 1, 26
"""enum ggml_type of what graphs compute with; weights have other types besides."""
TYPES = {"F32": F32, "F16": F16, "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "I32": I32, "BF16": 30}
"""GGML's types by their names: those that EdgeOmni stores or computes with."""
GPU, IGPU = 1, 2
"""enum ggml_backend_dev_type."""
ABORTED = 1
"""GGML_STATUS_ABORTED, of enum ggml_status: a graph's run was ended on request."""
_OBJECT_SIZE = 32
"""sizeof(struct ggml_object), which ggml_tensor_overhead counts beside a tensor."""
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
"""enum ggml_log_level; what ggml calls information is detail to us."""
_SPINS = "10000"
"""How often a thread of libgomp looks whether the others are done before it sleeps (its own default: 300,000). Beside
another busy process frames came twice as fast as with the default, and alone no slower (benchmarks/LOG.md)."""
_log = logging.getLogger("edgeomni.ggml")


@lru_cache(maxsize=1)
def library() -> Any:
    """Every declared function by its name. Raises EngineError where the libraries are missing or are other ones."""
    set_up_process()
    found: Any = _Functions()
    folder = _folder()
    for stem, declared in (("ggml-base", BASE), ("ggml-cpu", CPU), ("ggml", REGISTRY)):
        loaded = _load(folder, stem)
        for name, (result, *arguments) in declared.items():
            found.add(name, loaded, result, arguments)
    found.ggml_log_set(_said, None)
    _check_layout(found, folder)
    return found


def set_up_process() -> None:
    """Sets what ggml and its OpenMP read from the environment once, when they are loaded; what is set already stays."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a failed assertion would start a debugger otherwise
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def version() -> str:
    """ggml's own version."""
    return str(library().ggml_version().decode("ascii", "replace"))


class _Functions:
    def add(self, name: str, loaded: c.CDLL, result: Any, arguments: list[Any]) -> None:
        try:
            function = getattr(loaded, name)
        except AttributeError as exc:
            said = f"this llama-cpp-python has no {name}; update it: {ENGINES['llama.cpp'].install}"
            raise EngineUnavailable("version", said) from exc
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)


@LogCallback
def _said(level: int, text: bytes, _: Any) -> None:
    if said := (text or b"").decode("utf-8", "replace").strip():
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", said)


def _check_layout(found: Any, folder: Path) -> None:
    """Raises EngineError unless a tensor that the library makes reads as declared here, field by field."""
    here, theirs = c.sizeof(Tensor), found.ggml_tensor_overhead() - _OBJECT_SIZE
    wrong = "" if here == theirs else f"tensors of {theirs} bytes, and EdgeOmni knows those of {here}"
    wrong = wrong or _misread(found)
    if wrong:
        raise EngineUnavailable(
            "version",
            f"the ggml {found.ggml_version().decode('ascii', 'replace')} in {folder} has {wrong}; install the "
            f"llama-cpp-python that this EdgeOmni was made with: {ENGINES['llama.cpp'].install}",
        )


def _misread(found: Any) -> str:
    """What of a few tensors and types is not where it should be, "" for nothing."""
    for name, number in TYPES.items():
        if (found.ggml_type_name(number) or b"").decode("ascii", "replace").upper() != name:
            return f"another type {number} than {name}"
    context = found.ggml_init(InitParams(8 * found.ggml_tensor_overhead(), None, True))
    try:
        a = found.ggml_new_tensor_4d(context, F16, 2, 3, 5, 7)
        x = found.ggml_new_tensor_4d(context, F32, 2, 11, 5, 7)
        view, product = found.ggml_view_1d(context, a, 4, 12), found.ggml_mul_mat(context, a, x)
        found.ggml_set_name(a, b"a name")
        made, viewed, multiplied = (Tensor.from_address(t) for t in (a, view, product))
        seen = (made.type, list(made.ne), list(made.nb), made.op, made.name, made.data, made.view_src, made.extra)
        if seen != (F16, [2, 3, 5, 7], [2, 4, 12, 60], 0, b"a name", None, None, None):
            return "tensors with other fields"
        if (viewed.view_src, viewed.view_offs, viewed.ne[0]) != (a, 12, 4) or viewed.op == 0:
            return "views with other fields"
        if list(multiplied.src[:3]) != [a, x, None] or list(multiplied.ne) != [3, 11, 5, 7]:
            return "operations with other fields"
        return ""
    finally:
        found.ggml_free(context)


def _folder() -> Path:
    """Where llama-cpp-python keeps its libraries; LLAMA_CPP_LIB_PATH names others, as it does for llama_cpp itself."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    spec = util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineUnavailable("package", f"llama-cpp-python is not installed; {ENGINES['llama.cpp'].install}")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def _load(folder: Path, stem: str) -> c.CDLL:
    names = [f"lib{stem}.so", f"lib{stem}.dylib", f"{stem}.dll"]
    for name in names:
        if (path := folder / name).is_file():
            try:
                return c.CDLL(str(path))
            except OSError as exc:
                said = f"{path} cannot be loaded ({exc}); install llama-cpp-python again"
                raise EngineUnavailable("package", said) from exc
    said = f"{folder} holds none of {', '.join(names)}; install llama-cpp-python again"
    raise EngineUnavailable("package", said)
