"""ONNX Runtime sessions as EdgeOmni wants them: spinning stopped between runs, low memory, errors translated."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.hardware import check_threads, detect
from edgeomni.install_hint import install_command
from edgeomni.interrupt import Interrupt, Interrupted

try:
    import onnxruntime as ort
except ImportError as exc:
    raise EngineUnavailable(
        "package", f"the onnxruntime engine is not installed or cannot be loaded ({exc}); {install_command()}"
    ) from exc

from edgeomni.runtimes.onnxruntime import opsets, providers

_LOAD_REMEDY = "verify the bundle with `edgeomni verify`, export it again, or update ONNX Runtime"
_MEMORY_REMEDY = "close what else uses the device's memory, take a smaller precision, or use --device cpu"
_NO_MEMORY = ("out of memory", "failed to allocate memory", "bad_alloc", "cudaerrormemoryallocation")
"""How ONNX Runtime's arena, the C++ library and CUDA say that there is no memory left."""
SPIN_US = 20
"""Microseconds: frames of an LLM alone take as long as without a limit, those beside a codec take a fifth less."""
HalfMode = Literal["free", "rounding", "widened"]
"""free: as ONNX Runtime likes, which on a CPU is float32 between the weights. rounding: wherever a GPU would. widened:
in float32, caches included. The last two need the package onnx, and are for the gate."""
_QUIET = 3
"""ONNX Runtime's log level for errors only."""


class SessionFactory:
    """Opens every session of a process alike.

    `threads` is what one session computes with (None: all physical cores). Only one session of an answer runs at a
    time, so each may use them all; but idle pools that spin would steal 40 % from the one that works, therefore
    spinning stops with each run (session.force_spinning_stop). Where two do run `side_by_side`, a thread also stops
    waiting actively within a run, after SPIN_US: just long enough to meet the next operator. On a CPU all sessions
    draw on one memory arena, so that what the encoder needs for a moment serves the codec later. The graphs in `exact`
    compute with float activations where their kernels would round them to 8 bits (MatMulNBits): much slower, for the
    gate alone. `half` tells that the graphs are those of a TensorRT bundle, and how their half precision is computed.
    Raises EngineError for a device that is not there, UsageError for a number of threads out of range.
    """

    def __init__(
        self,
        threads: int | None = None,
        device: str = "cpu",
        *,
        exact: Collection[Path] = (),
        side_by_side: bool = False,
        half: HalfMode | None = None,
        foreign: Collection[Path] = (),
        folded: Collection[Path] = (),
    ) -> None:
        check_threads(threads)
        self._half, self._foreign, self._folded = half, foreign, folded
        self.threads, self.device, self._exact, self._side_by_side = threads, device, exact, side_by_side
        self._providers = providers.usable(device)
        self.memory = providers.MEMORY[device]

    def with_threads(self, threads: int) -> SessionFactory:
        """The same, but for the number of threads."""
        same = {"exact": self._exact, "foreign": self._foreign, "folded": self._folded}
        return SessionFactory(threads, self.device, side_by_side=self._side_by_side, half=self._half, **same)

    def open(self, path: Path, *, dynamic: bool = False, records: bool = False) -> ort.InferenceSession:
        """A session on the graph at `path`; `dynamic`: with DynamicQuantizeMatMul. Raises EngineError with the file.

        `records`: it records CUDA graphs (captured.py).

        x86 without VNNI adds up u8 x s8 products in 16 bits, which overflows: there `dynamic` makes the weights u8,
        which is exact (and with VNNI would cost 50 %).
        """
        with opsets.demanded(path), translated(f"{path.name} cannot be loaded", _LOAD_REMEDY):
            options = self._options()
            if self._half is not None:
                return self._open_half(path, options, self._half, records)
            options.add_session_config_entry("session.x64quantprecision", str(int(dynamic and _u8s8_overflows())))
            if path not in self._exact:
                return self._session(_existing(path), options, records)
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            return self._session(_with_float_activations(_existing(path)), options)

    def _session(self, graph: str | bytes, options: ort.SessionOptions, records: bool = False) -> ort.InferenceSession:
        """Raises EngineUnavailable where ONNX Runtime would quietly compute on the CPU instead of the device."""
        chosen = providers.recording(self._providers) if records else self._providers
        session = ort.InferenceSession(graph, options, providers=chosen, enable_fallback=0)
        providers.demand(self.device, session)
        return session

    def _open_half(
        self, path: Path, options: ort.SessionOptions, mode: HalfMode, records: bool
    ) -> ort.InferenceSession:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if path in self._folded or (mode == "rounding" and path in self._foreign):
            # fused, products of 8 bits overflow on x86 without VNNI; unfolded, E2M1 would be unpacked in every run
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if mode == "free" and path not in self._foreign:
            return self._session(_existing(path), options, records)
        half = _rewriting(path)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        graph, constants = (half.rounding if mode == "rounding" else half.widened)(_existing(path))
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in constants.values()]
        options.add_external_initializers(list(constants), values)
        return self._session(graph, options, records and mode == "free")

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = self.threads or 0
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._side_by_side:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        if self.device == "cpu":
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.enable_mem_pattern = False  # a plan per input shape would keep a block for each
        return options


def _rewriting(path: Path) -> Any:
    """The module that rewrites graphs. Raises EngineUnavailable where the package onnx is missing."""
    try:
        from edgeomni.runtimes.onnxruntime import half
    except ImportError as exc:
        raise EngineUnavailable(
            "package",
            f"{path.name} holds bfloat16 or FP4, which ONNX Runtime does not compute, and making them float32 needs "
            f"the package onnx ({exc}): {install_command('export')}, or take a bundle in fp16, int8 or int4",
        ) from exc
    return half


@cache
def _share_arena() -> None:
    """One CPU arena for all sessions of the process, growing as ONNX Runtime's own would."""
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(0, -1, -1, -1))


def optimized_ops(path: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime's CPU provider really runs it, after its own optimisations.

    Keys are operator names; MatMulNBits carries its bits and accuracy level: "MatMulNBits:bits=4:acc=4". A plain
    MatMul or Gemm whose weight is a constant counts as "MatMul:constant". Raises EngineError.
    """
    import onnx  # the check belongs to exporting, and so may need what a device does not have

    with tempfile.TemporaryDirectory(prefix="edgeomni-") as scratch:
        target = Path(scratch) / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.optimized_model_filepath = os.fspath(target)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.disable_prepacking", "1")
        with translated(f"{path.name} cannot be optimised", "export the checkpoint again"):
            ort.InferenceSession(_existing(path), options, providers=[providers.NAMES["cpu"]])
        graph = onnx.load(target, load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    return Counter(_describe(node, constants) for node in graph.node)


def _with_float_activations(path: str) -> bytes:
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return bytes(model.SerializeToString())


def _describe(node: Any, constants: set[str]) -> str:
    values = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMulNBits":
        return f"MatMulNBits:bits={values.get('bits', 4)}:acc={values.get('accuracy_level', 0)}"
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul") and constants & set(node.input[:2]):
        return "MatMul:constant"
    return str(node.op_type)


@contextmanager
def translated(what: str, remedy: str) -> Iterator[None]:
    """Turns ONNX Runtime's own exceptions into EngineError "<what>: <first line>; <remedy>", the cause kept."""
    try:
        yield
    except EngineError:
        raise
    except _FOREIGN as exc:
        reason = str(exc).strip().partition("\n")[0] or type(exc).__name__
        if isinstance(exc, MemoryError) or any(words in str(exc).lower() for words in _NO_MEMORY):
            raise EngineUnavailable("memory", f"{what}: too little memory ({reason}); {_MEMORY_REMEDY}") from exc
        raise EngineError(f"{what}: {reason}; {remedy}") from exc


@contextmanager
def interruptible(interrupt: Interrupt | None, what: str, remedy: str) -> Iterator[ort.RunOptions]:
    """RunOptions for one run, which setting `interrupt` ends after the operator that it is in, with Interrupted.

    ONNX Runtime's other exceptions become EngineError, as in `translated`.
    """
    options, interrupt = ort.RunOptions(), interrupt or Interrupt()
    try:
        with interrupt.stopping(lambda: setattr(options, "terminate", True)), translated(what, remedy):
            yield options
    except EngineError as exc:
        if interrupt.is_set():  # ONNX Runtime reports a run that was terminated as one that failed
            raise Interrupted from exc
        raise


def _ort_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail",
        "EngineError",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "ModelLoaded",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    return (RuntimeError, ValueError, MemoryError, *(getattr(state, n) for n in names if hasattr(state, n)))


_FOREIGN = _ort_errors()


@cache
def _u8s8_overflows() -> bool:
    isa = set(detect().isa)
    return "avx2" in isa and not isa & {"avx_vnni", "avx512_vnni"}


def _existing(path: Path) -> str:
    if not path.is_file():
        raise EngineError(f"{path.name} is missing from {path.parent}; copy the bundle again, whole")
    return os.fspath(path)
