"""ONNX Runtime: the encoder, the LLM and the codec decoder of ONNX bundles, on the CPU or a CUDA device.

It also runs the graphs of TensorRT bundles: the gate judges them so, and so they run where TensorRT cannot.

See edgeomni/runtimes/__init__.py for what these functions promise. ONNX Runtime itself is imported when one of them is
called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeomni.bundle import Bundle, Component
from edgeomni.components import OpenOptions
from edgeomni.engines import ENGINES

if TYPE_CHECKING:
    from edgeomni.runtimes.onnxruntime.sessions import HalfMode


def open_component(bundle: Bundle, name: str, options: OpenOptions) -> Any:
    """Opens one component. Raises EngineError where ONNX Runtime is missing or cannot load a graph."""
    return _open(bundle, name, options, exact=False)


def open_exact(bundle: Bundle, name: str, options: OpenOptions) -> Any | None:
    """The LLM with float activations in its transformer blocks; other components round nothing that matters."""
    return _open(bundle, name, options, exact=True) if name == "llm" else None


def wrong_kernels(bundle: Bundle, name: str) -> int | None:
    """Linear layers of a fused graph that ONNX Runtime would not run on the integer kernel of their precision.

    None for the codec and for portable graphs, which ask for no kernel of their own.
    """
    from edgeomni.runtimes.onnxruntime import kernel_check

    return kernel_check.wrong_kernels(bundle, bundle.manifest.components[name])


def problem(device: str) -> str:
    """Why ONNX Runtime cannot compute on that device here, and what to do; "" where it can."""
    try:
        from edgeomni.runtimes.onnxruntime import providers
    except ImportError as exc:
        return f"onnxruntime is not installed or cannot be loaded ({exc}); {ENGINES['onnxruntime'].install}"
    return providers.problem(device)


def version() -> str:
    """The version of the installed ONNX Runtime."""
    return ENGINES["onnxruntime"].version


def _open(bundle: Bundle, name: str, options: OpenOptions, *, exact: bool) -> Any:
    from edgeomni.runtimes.onnxruntime.codec import OrtCodec
    from edgeomni.runtimes.onnxruntime.encoder import OrtEncoder
    from edgeomni.runtimes.onnxruntime.llm import OrtLanguageModel
    from edgeomni.runtimes.onnxruntime.sessions import SessionFactory
    from edgeomni.runtimes.onnxruntime.static_codec import OrtStaticCodec

    component = bundle.manifest.components[name]
    graphs = [bundle.file(component.graphs[role].path) for role in ("body", "tts") if role in component.graphs]
    sessions = SessionFactory(
        options.threads,
        options.device,
        exact=graphs if exact else (),
        side_by_side=options.side_by_side,
        **_narrow(bundle, component, options, exact=exact),
    )
    codec = OrtStaticCodec if component.format == "tensorrt" else OrtCodec
    adapters: dict[str, Any] = {"encoder": OrtEncoder, "llm": OrtLanguageModel, "codec": codec}
    return adapters[name](bundle.path, component, bundle.spec, sessions)


def _narrow(bundle: Bundle, component: Component, options: OpenOptions, *, exact: bool) -> dict[str, Any]:
    """How the graphs of a TensorRT bundle, which compute in narrow types, are opened."""
    if component.format != "tensorrt":
        return {}
    files = {role: bundle.file(graph.path) for role, graph in component.graphs.items()}
    blocks = [path for role, path in files.items() if not role.endswith("_head")]
    kinds = set(component.scheme.values())
    return {
        "half": _half_mode(options, exact=exact),
        "foreign": blocks if kinds & {"bf16", "nvfp4"} else (),
        "folded": blocks if any(kind.startswith(("int8_static", "fp8")) for kind in kinds) else (),
    }


def _half_mode(options: OpenOptions, *, exact: bool) -> HalfMode:
    if exact:
        return "widened"
    return "rounding" if options.as_on_target else "free"
