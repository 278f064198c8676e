"""Text head and audio head as engines: one row of hidden in, logits out, and where the engine has them, chosen ids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeomni.arrays import F32, I64
from edgeomni.runtimes.tensorrt.engine import Engine, Repeated
from edgeomni.runtimes.tensorrt.memory import Arena, Block

IDS = "ids"


class Head:
    """`staged` is where the body leaves the row that is likely asked for next, so that it need not come to the host.

    `fresh` says that what lies there is the body's; computing for another row overwrites it.
    """

    def __init__(self, engine: Engine, arena: Arena, scratch: tuple[int, int], width: int, rows: int) -> None:
        self._device, self.fresh = arena.device, False
        engine.need_shapes({"hidden": (1, 1, width), "logits": (1, 1, rows)})
        tensors = engine.tensors
        self._input = Block(arena, {"hidden": ((1, 1, width), tensors["hidden"].raw)})
        self._logits = Block(arena, {"logits": ((1, 1, rows), tensors["logits"].numbers)})
        self._ids = None
        shapes = {"hidden": (1, 1, width)} if -1 in tensors["hidden"].shape else {}
        context = engine.context(arena, scratch, shapes, fixed=True)
        context.bind("hidden", self._input.address("hidden"))
        context.bind("logits", self._logits.address("logits"))
        if IDS in tensors:
            self._ids = Block(arena, {IDS: (tensors[IDS].shape, tensors[IDS].numbers)})
            context.bind(IDS, self._ids.address(IDS))
        self._repeated = Repeated(arena, (context,), context.enqueue)

    @property
    def size(self) -> int:
        """Bytes of a row of hidden."""
        return self._input.host["hidden"].nbytes

    @property
    def staged(self) -> int:
        return self._input.address("hidden")

    @property
    def chooses(self) -> bool:
        """Whether the engine puts out the likeliest ids."""
        return self._ids is not None

    def logits(self, hidden: NDArray[np.generic] | None) -> F32:
        """[V] of `hidden` [D] in the engine's type, None for what is staged. The caller may keep the array."""
        self._run(hidden, self._logits)
        return self._logits.host["logits"].reshape(-1).astype(np.float32)

    def ids(self, hidden: NDArray[np.generic] | None) -> I64:
        """The likeliest id of each stream, unshifted [K]; the logits stay on the device."""
        assert self._ids is not None
        self._run(hidden, self._ids)
        return self._ids.host[IDS].reshape(-1).astype(np.int64)

    def _run(self, hidden: NDArray[np.generic] | None, wanted: Block) -> None:
        if hidden is not None:
            self.fresh = False
            self._device.synchronize()
            self._input.host["hidden"][0, 0] = hidden
            self._input.upload()
        self._repeated.run()
        wanted.download()
        self._device.synchronize()
