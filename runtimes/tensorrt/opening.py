"""What all adapters open a component with: the device, the engines of its graphs, and scratch memory for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edgeomni.errors import EngineError
from edgeomni.runtimes.tensorrt.device import Facts, acquire, release
from edgeomni.runtimes.tensorrt.engine import Engine
from edgeomni.runtimes.tensorrt.kernels import Kernels
from edgeomni.runtimes.tensorrt.library import Library
from edgeomni.runtimes.tensorrt.memory import Arena

_SPOKEN = {"llm": "LLM"}


class Serialized(NamedTuple):
    """An engine's bytes, the package that reads them, and where what it compiles is kept."""

    library: Library
    data: Any
    kernels: Path | None = None


class Engines:
    """The engines of one component, all closed together. `find` gives the bytes of each role's engine for this GPU.

    Raises EngineError where there is no device, and what `find` raises.
    """

    def __init__(self, name: str, find: Callable[[Facts], Mapping[str, Serialized]]) -> None:
        self._name = name
        self.device = acquire()
        self.arena = Arena(self.device)
        self.arena.keep(lambda device=self.device: release(device))  # type: ignore[misc]
        self._engines: list[Engine] = []
        try:
            self._found = find(self.device.facts)
        except BaseException:
            self.arena.close()
            raise

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Holds the device's lock. Compiled kernels are kept at the end; all is given back where the block fails."""
        with self.device.lock:
            try:
                yield
                self.device.synchronize()
                for engine in self._engines:
                    engine.save_kernels()
            except BaseException:
                self.close()
                raise

    def open(self, role: str) -> Engine:
        """The engine of that role. Raises EngineError where it cannot be found, built or read."""
        found = self._found[role]
        kernels = Kernels(found.kernels) if found.kernels is not None else None
        engine = Engine(found.library, self.device, found.data, f"{self._name}/{role}", kernels)
        self.arena.keep(engine.close)
        self._engines.append(engine)
        return engine

    def scratch(self) -> tuple[int, int]:
        """Address and size of memory in which any of the engines opened so far can run, one at a time."""
        size = max((engine.scratch for engine in self._engines), default=0)
        return (self.arena.array(size), size) if size else (0, 0)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Holds the device's lock. Raises EngineError where all was given back: addresses and graphs are no more."""
        with self.device.lock:
            if self.closed:
                raise EngineError(f"this {_SPOKEN.get(self._name, self._name)} is closed; open it again")
            yield

    @property
    def closed(self) -> bool:
        return self.arena.closed

    def close(self) -> None:
        self._engines.clear()
        self.arena.close()
