"""The overlapped mode as applications meet it: sessions on scripted parts, and on torch and ONNX Runtime."""

from __future__ import annotations

import contextlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from engines_here import exported
from fakes import ended, script, small_spec
from overlapped import Codec, Door, no_thread_is_left

import edgeomni
from edgeomni import AudioChunk, Bundle, Sampling, Session, TextDelta, TurnEnd, load, overlap_choice
from edgeomni.cli import main
from edgeomni.components import Components, SetsThreads
from edgeomni.errors import EngineError, UsageError
from edgeomni.overlap import Overlap
from edgeomni.profiling import measure
from edgeomni.runtimes import fake

SPEC = small_spec()
ON = Overlap("on", 2)
NOISE = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
QUESTION = (0.2 * np.sin(np.arange(24000) * 0.05) * np.sin(np.arange(24000) * 0.0007)).astype(np.float32)
MODES: list[Any] = ["off", "on", "after-text"]


def scripted(overlap: Overlap = ON, codec: Codec | None = None, text: list[int] | None = None) -> Session:
    llm = fake.FakeLanguageModel(SPEC, script(SPEC, 30, text))
    return Session(Components(fake.FakeEncoder(SPEC), llm, codec or Codec(SPEC)), SPEC, None, overlap)


def sound(events: list[Any]) -> list[tuple[float, list[float]]]:
    return [(e.start_s, e.samples.tolist()) for e in events if isinstance(e, AudioChunk)]


def told(end: Any) -> tuple[Any, ...]:
    """What TurnEnd says but for its times."""
    assert isinstance(end, TurnEnd)
    same = ("audio", "frames")
    return end.reason, end.text, end.tokens.tolist(), end.silent_frames, [end.timings[name] for name in same]


# --- scripted parts


@pytest.mark.parametrize("mode", ["on", "after-text"])
@pytest.mark.parametrize(
    "how",
    [{}, {"max_seconds": 0.03}, {"max_length": 30}, {"two_row": False}, {"noise_seed": 5}, {"max_seconds": 0.003}],
)
def test_events_are_those_of_a_sequential_turn(mode: Any, how: dict[str, Any]) -> None:
    sequential, beside = scripted(Overlap()), scripted(Overlap(mode, 2))
    with no_thread_is_left():
        plain, events = (list(s.respond("aa", NOISE[:1600], **how)) for s in (sequential, beside))
    assert sound(events) == sound(plain) and told(events[-1]) == told(plain[-1])
    seeds = [s.components.codec.seeds for s in (sequential, beside)]  # type: ignore[attr-defined]
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("task", ["asr", "at"])
def test_text_alone_needs_no_thread(task: Any) -> None:
    s = scripted(codec=(codec := Codec(SPEC)))
    assert ended(s.respond(task, NOISE[:1600])).reason == "eot" and not codec.given_threads


def test_a_session_answers_on_after_the_codec_failed_in_its_thread() -> None:
    def fail(push: int) -> None:
        if push == 1:
            raise EngineError("the codec failed")

    s = scripted(codec=Codec(SPEC, fail))
    turn = s.respond("aa", NOISE[:1600])
    with no_thread_is_left(), pytest.raises(EngineError, match="the codec failed"):
        list(turn)
    assert turn.finished
    assert sound(list(s.respond("aa", NOISE[:1600]))) == sound(list(scripted(Overlap()).respond("aa", NOISE[:1600])))


def test_cancel_from_another_thread_while_a_push_runs() -> None:
    """Each frame has its text. With the frame after the first sound's, the second push has begun."""
    door = Door()
    s = scripted(codec=(codec := Codec(SPEC, door.pass_)), text=[3] * 29)
    turn, seen = s.respond("aa", NOISE[:1600]), []
    for event in turn:
        seen.append(event)
        if isinstance(event, TextDelta) and any(isinstance(e, AudioChunk) for e in seen):
            break
    assert door.reached.wait(20)
    thread = threading.Thread(target=s.cancel)
    thread.start()
    thread.join()
    door.open()
    (end,) = turn
    assert isinstance(end, TurnEnd) and end.reason == "cancelled"
    heard = sum(len(e.samples) for e in seen if isinstance(e, AudioChunk))
    assert end.timings["audio"] == heard / SPEC.codec.sample_rate and not codec.unfinished
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


@pytest.mark.parametrize("how", ["close", "with", "del"])
def test_who_stops_early_leaves_neither_thread_nor_turn_behind(how: str) -> None:
    s = scripted(codec=(codec := Codec(SPEC)))
    with no_thread_is_left():
        turn = s.respond("aa", NOISE[:1600])
        for _ in turn:
            if codec.aside:
                break
        if how == "close":
            turn.close()
        elif how == "with":
            with turn:
                pass
        else:
            del turn, _
        assert not codec.unfinished
    assert ended(s.respond("aa", NOISE[:1600])).reason == "eoa"


def test_two_sessions_on_the_same_parts_answer_side_by_side() -> None:
    first = scripted(codec=Codec(SPEC))
    second = Session(first.components, SPEC, None, Overlap("after-text", 2))
    first.components.codec.set_threads = lambda threads: None  # type: ignore[attr-defined]
    alone = [sound(list(s.respond("aa", NOISE[:1600]))) for s in (first, second)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            jobs = [pool.submit(lambda s: sound(list(s.respond("aa", NOISE[:1600]))), s) for s in (first, second)]
            assert [job.result() for job in jobs] == alone


def test_a_session_prepares_parts_only_where_it_overlaps() -> None:
    asked: list[int] = []
    codec = Codec(SPEC)
    codec.set_threads = asked.append  # type: ignore[method-assign, assignment]
    scripted(Overlap("off", 8), codec)
    assert asked == []
    scripted(Overlap("after-text", 8), codec)
    assert asked == [4, 8]


def test_what_overlap_may_be(tmp_path: Path) -> None:
    for opening in (Session.open, load):
        with pytest.raises(UsageError, match="overlap must be auto, on, off, not 'sometimes'"):
            opening(tmp_path, overlap="sometimes")  # type: ignore[arg-type]
    assert scripted().overlap == "on" and scripted(Overlap()).overlap == "off"


# --- engines


@pytest.fixture(scope="module")
def parts(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Components:
    """The tiny preset on ONNX Runtime, three threads."""
    return exported(tiny_model, tmp_path_factory.mktemp("overlap"), "ort", threads=3)


def answer(session: Session, **how: Any) -> list[Any]:
    codes = np.random.default_rng(5).integers(0, session.spec.codec.codebook_size, (21, 7))
    return list(session.respond("aa", QUESTION, forced_codes=codes, forced_text_end=9, **how))


@pytest.mark.parametrize("noise_seed", [None, 3])
def test_onnx_runtime_says_the_same_to_the_bit(parts: Components, tiny_model: Any, noise_seed: int | None) -> None:
    with no_thread_is_left():
        turns = [
            answer(Session(parts, tiny_model.spec, None, Overlap(mode, 3)), noise_seed=noise_seed) for mode in MODES
        ]
    for events in turns[1:]:
        assert sound(events) == sound(turns[0]) and told(events[-1]) == told(turns[0][-1])
    assert len(sound(turns[0])) > 4


def test_the_shipped_bundle_says_the_same_to_the_bit() -> None:
    how = Sampling(temperature=1.0, top_k=20, seed=1)
    turns = []
    for overlap in ("off", "on"):
        with load("nano", threads=2, overlap=overlap) as session:  # type: ignore[arg-type]
            assert session.overlap == overlap
            turns.append(list(session.respond("aa", QUESTION, sampling=how, max_seconds=2.0)))
    assert sound(turns[1]) == sound(turns[0]) and told(turns[1][-1]) == told(turns[0][-1])


def test_auto_times_once_and_opens_as_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of one Bundle object share its weights whatever was chosen; another one is opened for what is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(overlap_choice, "_chosen", {})
    timed, times, seconds = overlap_choice.timed, list[int](), dict[str, Any]()

    def counted(parts: Any, spec: Any, threads: int) -> Any:
        times.append(threads)
        seconds.update(seconds or timed(parts, spec, threads))  # in earnest the first time
        return seconds

    monkeypatch.setattr(overlap_choice, "timed", counted)
    for mode in ("off", "on", "after-text"):
        monkeypatch.setattr(overlap_choice, "best_of", lambda seconds, mode=mode: mode)
        monkeypatch.setattr(overlap_choice, "_chosen", {})
        bundle = Bundle.open(NANO)
        first, second = Session.open(bundle, threads=2), Session.open(bundle, threads=2)
        assert first.overlap == second.overlap == mode and first.components is second.components
        again = Session.open(Bundle.open(NANO), threads=2)
        assert again.overlap == mode and len(times) == 1
        assert [waits_long(s) for s in (first, again)] == [False, mode == "off"]
        times.clear()
        shutil.rmtree(tmp_path / "edgeomni" / "overlap")


NANO = Path(edgeomni.__file__).parent / "nano" / "bundle"


def waits_long(session: Session) -> bool:
    """Whether threads of its LLM wait actively for each other without a limit."""
    llm: Any = session.components.llm
    with contextlib.suppress(RuntimeError):  # no such entry
        return not llm._text_head.get_session_options().get_session_config_entry("session.intra_op.spin_duration_us")
    return True


def test_torch_says_the_same_to_the_bit(tiny_dir: Path) -> None:
    turns = []
    for overlap in ("auto", "off", "on"):
        with Session.open(tiny_dir, overlap=overlap) as session:  # type: ignore[arg-type]
            assert session.overlap == ("on" if overlap == "on" else "off"), "a checkpoint is never timed"
            turns.append(answer(session))
    for events in turns[1:]:
        assert sound(events) == sound(turns[0]) and told(events[-1]) == told(turns[0][-1])


def test_the_onnx_codec_gives_the_same_with_any_threads_also_within_a_stream(
    parts: Components, tiny_model: Any
) -> None:
    codec, spec = parts.codec, tiny_model.spec.codec
    assert isinstance(codec, SetsThreads)
    rng = np.random.default_rng(0)
    pushes = [
        [rng.integers(0, spec.codebook_size, n * frames) for n in spec.ids_per_level] for frames in (3, 1, 2, 4, 4)
    ]

    def decoded(threads: list[int]) -> np.ndarray:
        state, out = codec.open(), []
        for n, codes in enumerate(pushes):
            codec.set_threads(threads[n % len(threads)])
            out.append(codec.decode(codes, state, n == len(pushes) - 1))
        return np.concatenate(out)

    alone = decoded([3])
    for threads in ([1], [2], [1, 3, 2], [3, 1]):
        np.testing.assert_array_equal(decoded(threads), alone)


def test_the_onnx_codec_computes_with_the_threads_that_are_set(parts: Components) -> None:
    codec: Any = parts.codec
    codec.set_threads(3)

    def threads() -> int:
        return int(codec._session.get_session_options().intra_op_num_threads)

    seen = [threads()]
    for n in (1, 2, 1, 3, 8):
        codec.set_threads(n)
        seen.append(threads())
    assert seen == [3, 1, 2, 1, 3, 3], "never more than it was opened with"


# --- commands


@pytest.mark.parametrize("asked", ["on", None])
@pytest.mark.parametrize("command", ["run", "profile", "evaluate"])
def test_commands_hand_the_choice_on(
    command: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_(source: Any, **how: Any) -> Session:
        opened.append(how["overlap"])
        return scripted(Overlap())

    monkeypatch.setattr(Session, "open", open_)
    monkeypatch.setattr(measure, "measure_apart", measure.measure)
    soundfile.write(tmp_path / "q.wav", NOISE[:1600], 16000)
    (tmp_path / "d.jsonl").write_text('{"audio": "q.wav", "text": "a"}\n')
    rest = {
        "run": ["b", str(tmp_path / "q.wav"), "-q"],
        "profile": ["b", "--seconds", "0.1", "--turns", "1", "--warmup", "0"],
        "evaluate": ["b", "--data", str(tmp_path / "d.jsonl"), "--task", "asr"],
    }[command]
    result = CliRunner().invoke(main, [command, *rest, *(["--overlap", asked] if asked else [])])
    assert result.exit_code == 0, result.output
    assert opened == [asked or "auto"]
    wrong = CliRunner().invoke(main, [command, *rest, "--overlap", "after-text"])
    assert wrong.exit_code == 2 and "'auto', 'on', 'off'" in wrong.output
