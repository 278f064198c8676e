"""`overlap="auto"`: is this machine faster with this bundle's codec beside its LLM? Timed once, then remembered.

What is timed is an answer of forced frames: its loop with the codec after each frame, and with the codec beside it,
while two rows run and after one of them was dropped. Nobody hears it.

A choice is remembered for the machine, the bundle, its engines and the threads in `~/.cache/edgeomni/overlap` (or
below XDG_CACHE_HOME), one small file each. EDGEOMNI_OVERLAP_CACHE=0 leaves these files alone: then each process times
for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import numpy as np

from . import prompts
from .bundle import Bundle
from .components import Components, Features, OpenOptions
from .errors import EdgeOmniError, UsageError
from .generate import Forced, Frame, Options, generate
from .hardware import cores, cpu_name
from .outputs import user_cache, write_file
from .overlap import Overlap, OverlapMode
from .runtimes import chosen, versions_of
from .runtimes.choice import Way, engines_used
from .sampling import Sampling
from .spans import Spans
from .spec import AUDIO_OUT, OmniSpec
from .streaming import GROWTH

logger = logging.getLogger("edgeomni")

SCHEMA = 1
"""Of the remembered files. Another one is timed anew."""
BUDGET_S = 1.0
"""No further pair of answers is timed after so many seconds. At Mini-Omni's size the first one takes longer."""
PAIRS = 3
"""Answers of each kind at most; the fastest counts, since all that disturbs makes them slower."""
GAIN = 0.05
"""Less than this is not worth a second thread."""
AFTER_WEIGHT = 2.0
"""Text ends after about a third of an answer's frames, so what comes after it counts twice."""
MOST_BYTES = 1 << 16
"""Of a remembered file, which has 1 KB."""
QUESTION = 4
"""Features, or text ids, of the question."""
VARIABLE = "EDGEOMNI_OVERLAP_CACHE"

Seconds = dict[str, dict[str, float]]
"""Mode ("off", "on") -> stretch ("text", "after") -> seconds."""
_chosen: dict[str, OverlapMode] = {}
"""Of this process, by the name of the file."""


def fastest(
    bundle: Bundle, components: Components, options: OpenOptions, ways: Mapping[str, Way] | None = None
) -> OverlapMode:
    """The fastest mode on this machine of `components`, which were opened of `bundle`: remembered, or timed now.

    `ways`: how each of them runs; by default as `runtimes.chosen` has it.
    """
    ways = ways or chosen(bundle, device=options.device).first
    if mode := remembered(bundle, options, ways):
        return mode
    key = _key(bundle, options, ways)
    path, seconds = _path(key), Seconds()
    try:
        seconds = timed(components, bundle.spec, key["threads"])
    except EdgeOmniError as exc:  # whoever asks this bundle a question will hear of it
        logger.info("codec beside LLM could not be timed: %s", exc)
    mode = best_of(seconds)
    logger.info("codec beside LLM timed: %s", _told(seconds))
    if seconds and _keeps():
        _remember(path, {"key": key, "mode": mode, "seconds": seconds})
    return _chosen.setdefault(path.name, mode)


def remembered(bundle: Bundle, options: OpenOptions, ways: Mapping[str, Way]) -> OverlapMode | None:
    """The fastest mode as far as it is known without timing: to this process, or from the file of another one.

    "off" with one thread, for a model that does not speak, and on a GPU, which is no pool of threads to share.
    """
    on_cpu = all(way.device == "cpu" for way in ways.values())
    if (options.threads or cores()) < 2 or not on_cpu or not AUDIO_OUT & set(bundle.spec.tasks):
        return "off"
    key = _key(bundle, options, ways)
    return _chosen.get(_path(key).name) or (_read(_path(key), key) if _keeps() else None)


def _key(bundle: Bundle, options: OpenOptions, ways: Mapping[str, Way]) -> dict[str, Any]:
    """All that the choice depends on."""
    return {
        "schema": SCHEMA,
        "machine": [cpu_name(), cores()],
        "threads": options.threads or cores(),
        "bundle": bundle.digest,
        "engines": {name: way.engine.name for name, way in ways.items()},
        "formats": {name: way.component.format for name, way in ways.items()},
        "versions": versions_of(engines_used(ways)),
    }


def _path(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return user_cache() / "overlap" / f"{digest}.json"


def _keeps() -> bool:
    return os.environ.get(VARIABLE) != "0"


def best_of(seconds: Seconds) -> OverlapMode:
    """The mode that takes the least of these `seconds`; "off" where nothing was timed."""
    if not seconds:
        return "off"
    off, on = seconds["off"], seconds["on"]
    costs: dict[OverlapMode, float] = {
        "off": off["text"] + AFTER_WEIGHT * off["after"],
        "after-text": off["text"] + AFTER_WEIGHT * on["after"],
        "on": on["text"] + AFTER_WEIGHT * on["after"],
    }
    best = min(costs, key=lambda mode: costs[mode])
    return best if costs[best] < (1 - GAIN) * costs["off"] else "off"


def timed(components: Components, spec: OmniSpec, threads: int) -> Seconds:
    """Seconds of the loop as `best_of` takes them; empty where the context is too short for such an answer.

    Two stretches of as many LLM frames, each with the same pushes of the codec: while text runs, and after its end.
    """
    plan = _Stretches(spec.layout.streams, components.codec.first_push, components.codec.push_multiple)
    if _question(spec)[0].length + plan.end + 1 > spec.context:
        return {}
    began, best = perf_counter(), Seconds()
    _frame_times(components, spec, Overlap("on", threads), plan, plan.text)  # what only the first answer takes
    for _ in range(PAIRS):
        for mode in ("off", "on"):
            at = _frame_times(components, spec, Overlap(mode, threads), plan, plan.end)
            seen = {"text": at[plan.text_end] - at[plan.text], "after": at[plan.end] - at[plan.after]}
            best[mode] = {name: min(s, best.get(mode, seen)[name]) for name, s in seen.items()}
        if perf_counter() - began > BUDGET_S:
            break
    return best


class _Stretches:
    """LLM frames, counted from 0, at which the stretches begin and end: each time a chunk of the largest size is full.

    LLM frame K + n completes codec frame n.
    """

    def __init__(self, streams: int, first_push: int, multiple: int) -> None:
        first = -(-first_push // multiple) * multiple
        chunk = GROWTH[-1] * multiple
        length = chunk * max(1, -(-12 // chunk))
        self.text = streams - 1 + first + sum(GROWTH[:-1]) * multiple
        self.text_end = self.text + length
        self.after = self.text_end + chunk
        self.end = self.after + length


def _frame_times(components: Components, spec: OmniSpec, overlap: Overlap, plan: _Stretches, last: int) -> list[float]:
    """The perf_counter at which each frame, 0 to `last`, came out of an answer."""
    codes = np.random.default_rng(0).integers(0, spec.codec.codebook_size, (plan.end + 1, spec.codec.streams))
    prompt, features = _question(spec)
    options = Options(
        Sampling(greedy=True),
        max_length=prompt.length + plan.end + 1,
        forced=Forced(codes, plan.text_end + 1),
        overlap=overlap,
    )
    task = "aa" if features else "ta"
    events = generate(components, spec, task, prompt, features, options, Spans())
    times: list[float] = []
    with closing(events):
        for event in events:
            if isinstance(event, Frame):
                times.append(perf_counter())
            if len(times) > last:
                break
    return times


def _question(spec: OmniSpec) -> tuple[prompts.Prompt, tuple[Features, ...]]:
    if "aa" not in spec.tasks:
        return prompts.build(spec, "ta", text_ids=[0] * QUESTION), ()
    prompt = prompts.build(spec, "aa", features=QUESTION, two_row=True)
    return prompt, (Features(prompt.feature_start, np.zeros((QUESTION, spec.body.width), np.float32)),)


def _read(path: Path, key: dict[str, Any]) -> OverlapMode | None:
    """What the file says, if it is one of ours and about this key."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        data = json.loads(path.read_bytes())
        if isinstance(data, dict) and data.get("key") == key and data.get("mode") in get_args(OverlapMode):
            mode: OverlapMode = data["mode"]
            return mode
    return None


def _remember(path: Path, data: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, UsageError):  # a read-only home: the next process times again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode(), force=True)


def _told(seconds: Seconds) -> str:
    def lines() -> Iterator[str]:
        for stretch in ("text", "after"):
            off, on = (seconds[mode][stretch] * 1e3 for mode in ("off", "on"))
            yield f"{stretch}: {off:.1f} ms without, {on:.1f} ms with"

    return "; ".join(lines()) if seconds else "not at all"
