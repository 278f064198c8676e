"""How long an answer takes to end after `Session.cancel()`, at every stage, on a bundle of your own.

    python benchmarks/cancel.py BUNDLE [--turns 40]

Cancels each turn from another thread at a random moment between the call of `respond` and the middle of the answer,
and measures until its TurnEnd is there. Prints the times by the stage that was interrupted; the last line is one JSON
object. Goal: 100 ms at Mini-Omni's size on two cores.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections import defaultdict
from time import perf_counter, sleep
from typing import Any

import numpy as np
from measure import question

from edgeomni import Session, TurnEnd

STAGES = ("mel", "encoder", "prefill", "frame")


def stage_of(end: TurnEnd) -> str:
    """The stage in which the turn ended: the last one that it reached."""
    done = [stage for stage in STAGES if end.spans.records.get(stage)]
    return done[-1] if done else "load"


def cancelled_turn(session: Session, samples: Any, after_s: float) -> tuple[str, float]:
    """(stage, seconds from the cancel to TurnEnd) of a turn that is cancelled `after_s` seconds after its call."""
    when: list[float] = []

    def stop() -> None:
        sleep(after_s)
        when.append(perf_counter())
        session.cancel()

    turn = session.respond("aa", samples, max_length=session.spec.context)
    thread = threading.Thread(target=stop)
    thread.start()
    *_, end = turn
    ended = perf_counter()
    thread.join()
    assert isinstance(end, TurnEnd)
    return (stage_of(end), ended - when[0]) if end.reason == "cancelled" else ("ended before", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--turns", type=int, default=40)
    given = parser.parse_args()
    samples, by_stage = question(), defaultdict(list)
    with Session.open(given.bundle) as session:
        *_, whole = session.respond("aa", samples, max_length=300)
        assert isinstance(whole, TurnEnd)
        rng = np.random.default_rng(0)
        for after in rng.uniform(0.0, whole.timings["prefill"] * 1.3, given.turns):
            stage, seconds = cancelled_turn(session, samples, float(after))
            by_stage[stage].append(seconds * 1e3)
    figures = {
        stage: {"n": len(ms), "median_ms": float(np.median(ms)), "max_ms": max(ms)} for stage, ms in by_stage.items()
    }
    for stage, row in figures.items():
        print(f"{stage:14s} {row['n']:3d} turns, median {row['median_ms']:6.1f} ms, longest {row['max_ms']:6.1f} ms")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
