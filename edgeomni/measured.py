"""What `edgeomni profile` measured on this machine, kept for the choice of engines and for the price of another one.

One small file per bundle, set of engines and kind of question in `~/.cache/edgeomni/profiles` (or below
XDG_CACHE_HOME). A file of another machine, of another version of an engine, or that is no such file, is left aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from .errors import UsageError
from .hardware import cores, cpu_name, gpu_name
from .outputs import user_cache, write_file

SCHEMA = 1
MOST_BYTES = 1 << 16
MOST_FILES = 200
"""Of one bundle; more are not read."""
STAGE = {"encoder": "encoder", "llm": "frame", "codec": "codec"}
"""Component -> the stage of a profile that tells its price."""
UNIT = {"encoder": "the encoder", "llm": "a frame", "codec": "a push of the codec"}
"""Component -> what that stage's time is of."""


@dataclass(frozen=True)
class Run:
    """One profile. `ways`: component -> engine, device and precision in words (runtimes/choice.py).

    `question`: what was asked, so that only like is compared with like. `stages`: stage -> median in ms. `ttfa` in
    seconds, `rtf`: processing time over audio time; None for an answer without sound.
    """

    bundle: str
    machine: list[str]
    threads: int | None
    question: dict[str, str | float | int | bool | None]
    ways: dict[str, str]
    versions: dict[str, str]
    date: str
    stages: dict[str, float]
    ttfa: float | None = None
    rtf: float | None = None
    schema: int = SCHEMA

    @property
    def cost(self) -> tuple[bool, float]:
        """Less is better. What keeps up with its own sound comes first, then what speaks sooner; without sound, what
        takes less time per frame."""
        if self.ttfa is None or self.rtf is None:
            return False, self.stages.get("frame", 0.0)
        return self.rtf >= 1, self.rtf if self.rtf >= 1 else self.ttfa

    @property
    def words(self) -> str:
        """What the choice between runs rests on."""
        if self.ttfa is None or self.rtf is None:
            return f"{self.stages.get('frame', 0.0):.1f} ms per frame"
        return f"first audio after {self.ttfa:.2f} s, RTF {self.rtf:.2f}"


def this_machine() -> list[str]:
    return [cpu_name(), str(cores()), gpu_name()]


def remember(run: Run) -> Path | None:
    """Keeps a profile in place of an older one of the same kind. None where the cache cannot be written."""
    key = [run.machine, run.threads, sorted(run.question.items()), sorted(run.ways.items())]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = _folder(run.bundle) / f"{name}.json"
    with contextlib.suppress(OSError, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(asdict(run), indent=1, sort_keys=True) + "\n").encode(), force=True)
        return path
    return None


def runs(bundle: str, threads: int | None = None) -> list[Run]:
    """This machine's profiles of the bundle of that digest with so many threads, the newest first."""
    with contextlib.suppress(OSError):
        found = (_read(path) for path in sorted(_folder(bundle).glob("*.json"))[:MOST_FILES])
        mine = [
            run for run in found if run and (run.bundle, run.machine, run.threads) == (bundle, this_machine(), threads)
        ]
        return sorted(mine, key=lambda run: run.date, reverse=True)
    return []


def better_than(ways: Mapping[str, str], known: Iterable[Run]) -> list[Run]:
    """The runs that were faster than that of `ways`, the fastest first: of the question that was asked of both last.

    Empty where `ways` itself was not measured: then nothing is known of it.
    """
    known = list(known)
    for own in known:
        if own.ways == dict(ways):
            same = [run for run in known if run.question == own.question and run.ways != own.ways]
            if same:
                return sorted((run for run in same if run.cost < own.cost), key=lambda run: run.cost)
    return []


def price(component: str, wanted: str, instead: str, known: Iterable[Run]) -> str:
    """What it costs to run a component `instead` of as `wanted`, in milliseconds, as far as profiles tell; else ""."""
    known, stage = list(known), STAGE[component]
    times = [
        min(
            (run.stages[stage] for run in known if run.ways.get(component) == way and stage in run.stages), default=None
        )
        for way in (wanted, instead)
    ]
    before, after = times
    if before is not None and after is not None:
        return f"{UNIT[component]} then takes {after:.1f} ms instead of {before:.1f}: {after - before:+.1f} ms"
    return f"{UNIT[component]} then takes {after:.1f} ms" if after is not None else ""


def folder() -> Path:
    """Where profiles are kept."""
    return user_cache() / "profiles"


def _folder(bundle: str) -> Path:
    return folder() / bundle[:32]


def _read(path: Path) -> Run | None:
    with contextlib.suppress(OSError, ValueError, RecursionError, msgspec.MsgspecError):
        if path.is_file() and path.stat().st_size <= MOST_BYTES:
            run = msgspec.json.decode(path.read_bytes(), type=Run)
            return run if run.schema == SCHEMA else None
    return None
