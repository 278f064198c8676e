"""Every engine that EdgeOmni can run components on, one line each. Data only: nothing here imports an engine.

A new engine is one folder in runtimes/ and one line in `ENGINES`; a new format is one folder in exporters/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from .errors import EngineError, UsageError
from .install_hint import install_command
from .onnx_files import NEW_OPSET_NEEDS

ComponentName = Literal["encoder", "llm", "codec"]
COMPONENTS: tuple[ComponentName, ...] = ("encoder", "llm", "codec")
Device = Literal["auto", "cpu", "cuda", "tensorrt", "gpu", "npu"]
"""tensorrt is a way of ONNX Runtime to use a GPU of NVIDIA, through its TensorRT provider; gpu and npu are Intel's."""
EngineName = Literal["auto", "onnxruntime", "llama.cpp", "openvino", "tensorrt", "torch"]
AUTO = "auto"
"""As an engine: the best that the bundle and this machine have. As a device: what this machine has."""
EngineChoice = EngineName | Mapping[str, str] | None
"""What may be asked for: an engine for all components, one for each of some ("auto" for the rest), None for "auto"."""
CHECKPOINT = "checkpoint"
"""The format of what has not been exported: it runs on torch and is in no bundle."""


@dataclass(frozen=True)
class Engine:
    """What an engine runs, and what to install for it.

    `folder` is its sub-package of edgeomni.runtimes. `formats` are the formats it runs, its own first, `components`
    those that it can run of them. `extra` is the extra of the edgeomni distribution that brings it ("" = every install
    has it), `distributions` the installed packages that provide it, any of which is enough. `untested` are the devices
    on which nobody has run it yet.
    """

    name: str
    folder: str
    formats: tuple[str, ...]
    devices: tuple[str, ...]
    extra: str
    distributions: tuple[str, ...]
    components: tuple[str, ...] = COMPONENTS
    untested: tuple[str, ...] = ()
    all_from: tuple[int, ...] = ()
    """The first version that opens every bundle in its formats; older ones open some. Empty: the oldest taken does."""
    exclusive: bool = False
    """Whether the distributions write the same files, so that the one installed last is the one that runs."""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return install_command(self.extra)

    @property
    def version(self) -> str:
        """The version of the library that is installed; "unknown" where none of its distributions is."""
        return installed_version(self.distributions) or "unknown"


def installed_version(distributions: Iterable[str]) -> str:
    """The version of the first of some distributions that is installed; "" for none. Nothing is imported."""
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "onnxruntime",
            "onnxruntime",
            ("onnx", "tensorrt"),
            ("cpu", "cuda", "tensorrt"),
            "",
            ("onnxruntime", "onnxruntime-gpu"),
            untested=("tensorrt",),
            all_from=NEW_OPSET_NEEDS,
            exclusive=True,
        ),
        Engine("llama.cpp", "llamacpp", ("gguf",), ("cpu", "cuda"), "gguf", ("llama-cpp-python",)),
        Engine(
            "openvino",
            "openvino",
            ("openvino",),
            ("cpu", "gpu", "npu", "auto"),
            "openvino",
            ("openvino",),
            untested=("gpu", "npu"),
        ),
        Engine(
            "tensorrt",
            "tensorrt",
            ("tensorrt",),
            ("cuda",),
            "tensorrt",
            ("tensorrt-rtx", "tensorrt"),
            untested=("cuda",),
        ),
        Engine("torch", "torch", (CHECKPOINT,), ("cpu", "cuda"), "export", ("torch",)),
    )
}
"""In order of preference: the first that can run a component does, unless another is asked for."""

FORMATS = tuple(dict.fromkeys(f for engine in ENGINES.values() for f in engine.formats if f != CHECKPOINT))
"""What `export` writes; each is a folder of exporters/."""


def engine_of(name: str) -> Engine:
    """The engine of that name. Raises UsageError that lists the known ones."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; known are {', '.join(ENGINES)}")
    return ENGINES[name]


def engines_for(format_: str, component: str) -> tuple[Engine, ...]:
    """Engines that run this component of this format, the preferred one first. Raises EngineError for none."""
    found = tuple(e for e in ENGINES.values() if format_ in e.formats and component in e.components)
    if not found:
        raise EngineError(
            f"no engine of this EdgeOmni runs a {component} in format {format_!r}; formats known are "
            f"{', '.join(FORMATS)}. Export the checkpoint again, or update EdgeOmni"
        )
    return found


def wanted_engine(choice: EngineChoice, component: str) -> Engine | None:
    """The engine that `choice` insists on for a component; None where it leaves that open.

    Raises UsageError for an engine or a component that does not exist.
    """
    if isinstance(choice, Mapping):
        if unknown := sorted(set(choice) - set(COMPONENTS)):
            raise UsageError(f"unknown component(s) {', '.join(unknown)}; known are {', '.join(COMPONENTS)}")
        choice = choice.get(component)  # type: ignore[assignment]
    return None if choice is None or choice == AUTO else engine_of(str(choice))


def parse_engine(text: str) -> str | dict[str, str]:
    """What --engine was given: "onnxruntime", or "encoder=openvino,llm=onnxruntime". Raises UsageError."""
    if "=" not in text:
        if text != AUTO:
            engine_of(text)
        return text
    chosen: dict[str, str] = {}
    for pair in text.split(","):
        component, _, name = (part.strip() for part in pair.partition("="))
        if component in chosen:
            raise UsageError(f"--engine {text}: {component} is there twice; give each component once")
        chosen[component] = name
    for component in chosen:
        wanted_engine(chosen, component)
    return chosen


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a library's version, to compare: "1.23.2" -> (1, 23)."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
