"""RUN/log.jsonl: one JSON object per logged step, written line by line, so that a run that is killed keeps its log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from ..errors import TrainError
from ..outputs import write_file
from ..schema import Source, parse_json, read_bytes

SECONDS = "seconds"
"""What every line says beside its figures: seconds since its process opened the log. It begins again on resume."""
MOST_BYTES = 1 << 30
"""A log larger than this is refused; a million steps take about 300 MB."""


class RunLog:
    """The log of a run, at `path`. Lines are added to what is there; `trim` it first where a run goes on."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._started = perf_counter()

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line {"step": ..., "loss": ..., ...}; NaN and infinities become null.

        The line outlives this process once this returns. Raises TrainError where it cannot be written.
        """
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        known[SECONDS] = round(perf_counter() - self._started, 3)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known) + "\n")
        except OSError as exc:
            raise TrainError(
                f"{self.path}: cannot be written ({exc.strerror or exc}); make room, then --resume"
            ) from exc

    def trim(self, step: int) -> None:
        """Drops the lines beyond `step`, from which a run goes on, and a last line that was cut off."""
        if self.path.exists():
            kept = [line for line in read(self.path) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_file(self.path, text.encode(), force=True)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that was cut off. Raises TrainError that names the line at fault."""
    source = Source(str(path), TrainError, "it is no log of a training run, or was damaged; restore it")
    whole, _, _cut_off = read_bytes(Path(path), source, MOST_BYTES).rpartition(b"\n")
    lines = enumerate(whole.split(b"\n"), start=1) if whole else ()
    return [_line(raw, Source(f"{path}:{number}", TrainError, source.remedy)) for number, raw in lines]


def _line(raw: bytes, source: Source) -> dict[str, Any]:
    line = parse_json(raw, source)
    if type(line.get("step")) is not int:
        raise source.fault("has no step", "$.step")
    return line
