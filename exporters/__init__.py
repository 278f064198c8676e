"""Writers of bundle components, one folder per format, imported only when asked for.

`Exporter` is what export.py and the gate use, so that they need not know which format it is. A format's folder offers:

    __init__.py      PRECISIONS, Options, schemes_for; importing it imports neither torch nor a format's library. Where
                     there is something to say of an export, notes; where files are not all written by
    encoder.py, llm.py, codec.py
                     export(model, directory, root, precision, options), write
    reread.py        altered
    imitation.py     as_exported, rounds_inputs and, where its codecs need it, codec_as_exported
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeomni.bundle import Component
from edgeomni.engines import FORMATS
from edgeomni.errors import UsageError
from edgeomni.exporters import stored

if TYPE_CHECKING:
    from edgeomni.model.codec_plan import CodecPlan
    from edgeomni.model.omni import OmniModel
    from edgeomni.quantize.schemes import Scheme


@dataclass(frozen=True)
class Exporter:
    """Writes components in one format, re-reads them, and has torch compute as they should. Made by `exporter_of`.

    torch and the library of the format are imported by the methods that need them.
    """

    format: str

    @property
    def precisions(self) -> tuple[str, ...]:
        """The names of the precisions that it offers."""
        return cast(tuple[str, ...], self._module().PRECISIONS)

    @property
    def options(self) -> type[Any]:
        """Its own options: a frozen dataclass that checks them."""
        return cast(type[Any], self._module().Options)

    def schemes_for(self, component: str, precision: str, options: Any = None) -> dict[str, Scheme]:
        """Tensor group -> scheme. Raises UsageError for names that do not exist and for what is not offered."""
        return cast("dict[str, Scheme]", self._module().schemes_for(component, precision, options))

    def export(
        self,
        model: OmniModel,
        component: str,
        out: Path,
        precision: str,
        options: Any = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Component:
        """Writes `component` (encoder, llm or codec) into out/<component>/ and returns its manifest entry.

        Paths in the entry are relative to `out`. `progress` is told the steps that take minutes. Raises UsageError for
        names that do not exist and for a model that the format cannot hold, EngineError where the format's library is
        not installed, ExportError where it fails, and OSError for a directory that cannot be written.
        """
        options = options or self.options()
        self.schemes_for(component, precision, options)  # refuses a name before a directory of that name is made
        directory = out / component
        directory.mkdir(parents=True, exist_ok=True)
        write = getattr(self._module(), "write", self._write)
        return cast(Component, write(model, component, directory, out, precision, options, progress))

    def notes(self, components: Sequence[str], options: Any) -> list[str]:
        """What is to be said once about an export of `components` in this format; mostly nothing."""
        own = getattr(self._module(), "notes", None)
        return [] if own is None else cast(list[str], own(components, options))

    def altered(self, model: OmniModel, component: Component, root: Path) -> list[str]:
        """Names of the component's stored tensors under `root` that are not what `model`'s weights give."""
        return cast(list[str], self._module("reread").altered(model, component, root))

    def as_exported(
        self, model: OmniModel, component: Component, *, exact: bool, root: Path | None = None
    ) -> AbstractContextManager[None]:
        """Within the context `model`'s encoder or LLM computes as `component` should.

        `exact`: as it should in the engine's exact mode. `root`: where the export lies, for formats that read of it how
        they stored.
        """
        context = self._module("imitation").as_exported(model, component, exact=exact, root=root)
        return cast(AbstractContextManager[None], context)

    def rounds_inputs(self, component: Component) -> bool:
        """Whether the transformer blocks' kernels round their inputs, so that the exact mode differs."""
        return cast(bool, self._module("imitation").rounds_inputs(component))

    def codec_as_exported(self, model: OmniModel, component: Component) -> CodecPlan | None:
        """The codec decoder's plan holding its weights as stored; None where they are stored as they are."""
        own = getattr(self._module("imitation"), "codec_as_exported", stored.codec_as_exported)
        return cast("CodecPlan | None", own(model, component))

    def stored_schemes(self, component: Component) -> Mapping[str, Scheme]:
        """Tensor group, or single parameter -> scheme, as the manifest states them."""
        self._module()  # makes the format's own kinds known
        return stored.schemes(component)

    def _write(
        self, model: Any, component: str, directory: Path, root: Path, precision: str, options: Any, progress: Any
    ) -> Any:
        """By the builder of its kind, which tells no steps."""
        return self._module(component).export(model, directory, root, precision, options)

    def _module(self, name: str = "") -> Any:
        return import_module(f".{self.format}.{name}".rstrip("."), __name__)


def exporter_of(format: str) -> Exporter:
    """The exporter of a format. Raises UsageError that lists the known ones."""
    if format not in FORMATS:
        raise UsageError(f"unknown export format {format!r}; known are {', '.join(FORMATS)}")
    return Exporter(format)


def options_of(format: str, given: Mapping[str, Any]) -> Any:
    """A format's own options, from their names and values. Raises UsageError for names and values that do not exist."""
    kind = exporter_of(format).options
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"format {format} has no option {', '.join(unknown)}; known are {', '.join(known)}")
    return kind(**given)
