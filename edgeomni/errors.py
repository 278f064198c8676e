"""Every error that EdgeOmni raises on purpose.

    EdgeOmniError
    ├── UsageError        the request makes no sense as spelled            (exit 2)
    ├── SpecError         sizes that contradict each other
    ├── CheckpointError   a checkpoint that cannot be read or does not fit
    ├── BundleError       a bundle that is incomplete, altered or foreign
    ├── ExportError       an export that could not be written
    ├── GateError         a quality or latency gate was missed             (exit 3)
    ├── EngineError       an engine is missing or failed; says what to install
    │   └── EngineUnavailable   it cannot even be opened here: another one may (`--engine auto`)
    ├── AudioError        audio that cannot be used as a question
    │   └── SilenceError  audio in which nothing is heard
    ├── PromptError       a prompt that does not fit the model
    ├── DataError         training or test data that cannot be used
    ├── TrainError        a training run that cannot begin or go on
    └── ProfileError      a hardware profile that cannot be read

Messages say what was wrong, with the value, and what to do next.
"""

from __future__ import annotations

from typing import Literal

WhyUnavailable = Literal["package", "device", "target", "version", "damaged", "memory", "graph", "strict"]
"""Not installed; no such device here; built for another device; by another version; files cut or altered; too little
memory; a graph that the engine refuses; the one wanted cannot be opened, and no other one was allowed."""


class EdgeOmniError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the CLI returns."""

    exit_code = 1


class UsageError(EdgeOmniError):
    exit_code = 2


class SpecError(EdgeOmniError):
    pass


class CheckpointError(EdgeOmniError):
    pass


class BundleError(EdgeOmniError):
    pass


class ExportError(EdgeOmniError):
    pass


class GateError(EdgeOmniError):
    exit_code = 3


class EngineError(EdgeOmniError):
    pass


class EngineUnavailable(EngineError):
    """An engine that cannot run here what it is asked to.

    `kind` says why in one word, for programs; the message says it for people, and what to do.
    """

    def __init__(self, kind: WhyUnavailable, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class AudioError(EdgeOmniError):
    pass


class SilenceError(AudioError):
    pass


class PromptError(EdgeOmniError):
    pass


class DataError(EdgeOmniError):
    pass


class TrainError(EdgeOmniError):
    pass


class ProfileError(EdgeOmniError):
    pass
