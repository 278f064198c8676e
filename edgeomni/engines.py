"""Every engine that EdgeOmni can run components on, one line each. Data only: nothing here imports an engine.

A new engine is one folder in runtimes/ and one line in `ENGINES`; a new format is one folder in exporters/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import EngineError, UsageError
from .install_hint import install_command

ComponentName = Literal["encoder", "llm", "codec"]
COMPONENTS: tuple[ComponentName, ...] = ("encoder", "llm", "codec")
Device = Literal["cpu", "cuda"]
EngineName = Literal["onnxruntime", "llama.cpp", "torch"]
CHECKPOINT = "checkpoint"
"""The format of what has not been exported: it runs on torch and is in no bundle."""


@dataclass(frozen=True)
class Engine:
    """What an engine runs, and what to install for it.

    `folder` is its sub-package of edgeomni.runtimes. `formats` are the formats it runs, `components` those that it
    can run of them. `extra` is the extra of the edgeomni distribution that brings it ("" = every install has it),
    `distributions` the installed packages that provide it, any of which is enough.
    """

    name: str
    folder: str
    formats: tuple[str, ...]
    devices: tuple[str, ...]
    extra: str
    distributions: tuple[str, ...]
    components: tuple[str, ...] = COMPONENTS

    @property
    def install(self) -> str:
        """The command that installs it."""
        return install_command(self.extra)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "onnxruntime", "onnxruntime", ("onnx", "tensorrt"), ("cpu", "cuda"), "", ("onnxruntime", "onnxruntime-gpu")
        ),
        Engine("llama.cpp", "llamacpp", ("gguf",), ("cpu", "cuda"), "gguf", ("llama-cpp-python",)),
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
