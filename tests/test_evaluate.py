"""Test sets answered by scripted sessions: what is scored, and what happens to samples that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from answering import RATE, Ear, answering, tone

from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import DataError, UsageError
from edgeomni.evaluate import evaluate
from edgeomni.evaluate.recognisers import Hearings
from edgeomni.evaluate.result import Unusable
from edgeomni.evaluate.run import Asking, deranged

ANSWERS = ["it is red", "it is green", "it is blue", "it is white"]


@pytest.fixture
def question(tmp_path: Path) -> Clip:
    soundfile.write(tmp_path / "question.wav", np.sin(np.arange(8000) / 5).astype(np.float32) * 0.3, 16000)
    return Clip.of(tmp_path / "question.wav")


def reference(folder: Path, index: int) -> Clip:
    """A recording of `tone(index)`."""
    path = folder / f"answer{index}.wav"
    soundfile.write(path, tone(index), RATE, subtype="FLOAT")
    return Clip.of(path)


def written(answers: list[str] = ANSWERS, **more: Any) -> list[Sample]:
    return [Sample(f"t.jsonl:{i + 1}", "tt", text="which", answer=a, **more) for i, a in enumerate(answers)]


def spoken(folder: Path, wrong: dict[int, int] | None = None) -> list[Sample]:
    """ta samples whose reference says their answer, but those of `wrong`, which say another one's."""
    said = {i: (wrong or {}).get(i, i) for i in range(len(ANSWERS))}
    return [
        Sample(f"t.jsonl:{i + 1}", "ta", text="which", answer=answer, answer_audio=reference(folder, said[i]))
        for i, answer in enumerate(ANSWERS)
    ]


def values(evaluation: Any, task: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in evaluation.metrics(task).items()}


def test_written_answers() -> None:
    session = answering(["it is red", "It is GREEN", "it is", "black"], words=["which"])
    found = evaluate(session, written())
    assert values(found, "tt") == {"exact": 0.5, "f1": pytest.approx((1 + 1 + 0.8 + 0) / 4)}
    assert [row.text for row in found.rows] == ["it is red", "It is GREEN", "it is", "black"]
    assert [(row.index, row.where, row.ended) for row in found.rows][3] == (3, "t.jsonl:4", "eot")
    assert found.tasks == ("tt",) and found.unusable == () and found.recogniser == ""


def test_transcripts_are_scored_by_what_was_said(question: Clip) -> None:
    samples = [
        Sample("x:1", "asr", (question,), text="one two three four", answer="no matter"),
        Sample("x:2", "asr", (question,), text="five"),
    ]
    found = evaluate(answering(["one too three", "five"]), samples)
    assert values(found, "asr") == {"wer": 2 / 5, "cer": pytest.approx((1 + 4) / (15 + 4))}
    assert found.rows[0].reference == "one two three four"


@pytest.mark.parametrize("task", ["at", "aa"])
def test_spoken_questions_are_heard_in_full(task: Any, question: Clip) -> None:
    session = answering(["it is red"])
    llm = session.components.llm
    sample = Sample("x:1", task, (question, question), answer="it is red", answer_codes=np.zeros((9, 7), np.int64))
    fed: list[Any] = []
    forward = llm.forward

    def noted(ids: Any, parts: Any, *rest: Any) -> Any:
        fed.extend(parts)
        return forward(ids, parts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "forward", noted)
        assert values(evaluate(session, [sample]), task)["exact"] == 1
    assert sum(len(part.values) for part in fed) == 51, "half a second, twice: int(1000 / 20) + 1 features"


def test_the_answer_the_ceiling_and_the_floor(tmp_path: Path) -> None:
    """The model writes all answers and says the first three; of the references the second one is misread."""
    session = answering(ANSWERS, [tone(0), tone(1), tone(2), tone(0)], ["which"])
    ear = Ear(ANSWERS)
    found = evaluate(session, spoken(tmp_path, {1: 3}), recogniser=ear)
    figures = values(found, "ta")
    assert figures["exact"] == figures["f1"] == 1
    assert (figures["heard_exact"], figures["ceiling_exact"]) == (0.75, 0.75)
    assert (figures["heard_wer"], figures["ceiling_wer"]) == (1 / 12, 1 / 12), "one word of twelve"
    assert [row.heard for row in found.rows] == [ANSWERS[i] for i in (0, 1, 2, 0)]
    assert [row.heard_reference for row in found.rows] == [ANSWERS[i] for i in (0, 3, 2, 3)]
    assert all(row.shuffled != row.reference for row in found.rows), "no row keeps its own reference"
    assert sorted(row.shuffled or "" for row in found.rows) == sorted(ANSWERS)
    hits = sum(row.heard == row.shuffled for row in found.rows)
    assert figures["floor_exact"] == hits / 4 and figures["floor_wer"] == (4 - hits) / 12
    assert found.recogniser == "ear"


def test_the_floor_is_seeded(tmp_path: Path) -> None:
    def shuffled(seed: int) -> list[str | None]:
        session = answering(ANSWERS, [tone(i) for i in range(4)], ["which"])
        return [r.shuffled for r in evaluate(session, spoken(tmp_path), recogniser=Ear(ANSWERS), seed=seed).rows]

    assert shuffled(3) == shuffled(3)
    assert len({tuple(shuffled(seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_a_derangement_leaves_nothing_in_its_place(count: int) -> None:
    for seed in range(20):
        places = deranged(count, seed)
        assert sorted(places) == list(range(count)) and all(i != place for i, place in enumerate(places))


def test_one_answer_has_no_floor(tmp_path: Path) -> None:
    found = evaluate(answering(["it is red"], [tone(0)], ["which"]), spoken(tmp_path)[:1], recogniser=Ear(ANSWERS))
    assert values(found, "ta")["heard_exact"] == 1 and "floor_exact" not in values(found, "ta")
    assert deranged(1, 0) == deranged(0, 0) == []


def test_codes_stand_in_for_a_recording(tmp_path: Path) -> None:
    """The session's own codec speaks them, in the order of its streams."""
    session = answering(["it is red"], words=["which"])
    codes = np.full((9, 7), 3)
    heard = []

    class Listener(Ear):
        def hear(self, samples: Any) -> str:
            heard.append(float(samples[len(samples) // 2]))
            return "it is red"

    sample = Sample("x:1", "ta", text="which", answer="it is red", answer_codes=codes)
    found = evaluate(session, [sample], recogniser=Listener(ANSWERS))
    assert values(found, "ta")["ceiling_exact"] == 1
    assert heard[0] == pytest.approx(3, rel=0.01), "the fake codec gives the mean of the ids"


@pytest.mark.parametrize("codes", [np.zeros((9, 6)), np.zeros((0, 7)), np.full((9, 7), 32), np.full((9, 7), -1)])
def test_codes_of_another_codec_are_refused(codes: Any) -> None:
    sample = Sample("x:1", "ta", text="which", answer="it is red", answer_codes=codes.astype(np.int64))
    with pytest.raises(DataError, match=r"x:1: its answer_codes are no frames .*\[frames, 7\], ids under 32"):
        evaluate(answering(["it is red"], words=["which"]), [sample], recogniser=Ear(ANSWERS))


def test_a_missing_spoken_reference_costs_the_ceiling_only() -> None:
    samples = [Sample("x:1", "ta", text="which", answer="it is red"), Sample("x:2", text="which", answer="it is green")]
    session = answering(ANSWERS[:2], [tone(0), tone(1)], ["which"])
    found = evaluate(session, samples, tasks=["ta"], recogniser=Ear(ANSWERS))
    figures = values(found, "ta")
    assert figures["heard_exact"] == 1 and not [name for name in figures if name.startswith("ceiling")]
    assert [row.task for row in evaluate(answering(ANSWERS[:2], words=["which"]), samples).rows] == ["tt", "ta"]


def test_a_figure_tells_of_how_many_samples_it_is(tmp_path: Path) -> None:
    samples = [*spoken(tmp_path)[:3], Sample("t.jsonl:4", "ta", text="which", answer=ANSWERS[3])]
    session = answering(ANSWERS, [tone(i) for i in range(4)], ["which"])
    figures = evaluate(session, samples, recogniser=Ear(ANSWERS)).metrics("ta")
    assert (figures["heard_exact"].samples, figures["ceiling_exact"].samples) == (4, 3)
    assert figures["ceiling_exact"].value == 1


def test_an_answer_without_sound_is_heard_as_nothing(tmp_path: Path) -> None:
    silent = [np.zeros(0, np.float32), np.full(99, np.nan, np.float32), tone(2), tone(3)]
    ear = Ear(ANSWERS)
    found = evaluate(answering(ANSWERS, silent, ["which"]), spoken(tmp_path), recogniser=ear)
    assert [row.heard for row in found.rows] == ["", "", ANSWERS[2], ANSWERS[3]]
    assert values(found, "ta")["heard_exact"] == 0.5


def test_what_was_heard_once_is_not_heard_again(tmp_path: Path) -> None:
    ear = Ear(ANSWERS)
    hearings = Hearings(ear)
    sounds = [tone(i) for i in range(4)]
    for _ in range(2):
        evaluate(answering(ANSWERS, sounds, ["which"]), spoken(tmp_path), recogniser=hearings)
    assert ear.calls == 4, "both sources say what the references say"


def test_without_a_recogniser_only_the_text_of_speech_is_judged(tmp_path: Path) -> None:
    found = evaluate(answering(ANSWERS, [tone(0)], ["which"]), spoken(tmp_path))
    assert list(values(found, "ta")) == ["exact", "f1"] and found.rows[0].heard is None


# --- samples that cannot be used


def test_a_bad_recording_is_told_and_the_others_count(
    tmp_path: Path, question: Clip, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    clips = [question, Clip.of(tmp_path / "bad.wav"), question]
    samples = [Sample(f"d.jsonl:{i + 1}", "at", (clip,), answer="it is red") for i, clip in enumerate(clips)]
    found = evaluate(answering(["it is red"]), samples)
    assert [row.where for row in found.rows] == ["d.jsonl:1", "d.jsonl:3"] and values(found, "at")["exact"] == 1
    assert [(entry.where, entry.task) for entry in found.unusable] == [("d.jsonl:2", "at")]
    assert "bad.wav" in found.unusable[0].why
    assert [r.getMessage() for r in caplog.records if "d.jsonl:2: cannot be used for at" in r.getMessage()]
    with pytest.raises(DataError, match=r"1 sample.s. cannot be used, and at most 0 .*d\.jsonl:2"):
        evaluate(answering(["it is red"]), samples, max_bad=0)


def test_a_reference_without_words_and_a_text_that_does_not_fit_are_unusable() -> None:
    samples = [*written(["...", "it is red"]), Sample("t.jsonl:3", "tt", text="which " * 700, answer="it is red")]
    found = evaluate(answering(["it is red"], words=["which"]), samples)
    assert [entry.where for entry in found.unusable] == ["t.jsonl:1", "t.jsonl:3"] and len(found.rows) == 1


def test_the_limit_counts_samples_and_those_that_were_unreadable_before(question: Clip) -> None:
    """One sample that fails in two tasks is one."""
    bad = Sample("x:1", audio=(Clip.of("gone.wav"),), text="which", answer="it is red")
    samples = [bad, *written()]
    session = answering(["it is red"], words=["which"])
    found = evaluate(session, samples, tasks=["asr", "at", "tt"], max_bad=1)
    assert [entry.task for entry in found.unusable] == ["asr", "at"] and len(found.rows) == 5
    before = [Unusable("x:9", "", "is no JSON")]
    assert evaluate(session, samples, tasks=["at", "tt"], max_bad=2, unreadable=before).unusable[0] == before[0]
    with pytest.raises(DataError, match=r"2 sample\(s\) cannot be used"):
        evaluate(session, samples, tasks=["at", "tt"], max_bad=1, unreadable=before)


def test_a_test_set_of_which_nothing_can_be_used_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no sample could be used; the first is t\.jsonl:1"):
        evaluate(answering(["it is red"], words=["which"]), written(["...", "?"]))


class Prepared:
    features = (5,)

    def windows(self) -> list[Any]:
        raise AssertionError("a session takes sound")


def test_only_a_prepared_spectrum_is_no_question() -> None:
    sample = Sample("x:1", "at", answer="it is red", mel=Prepared())
    with pytest.raises(DataError, match="no recording"):
        evaluate(answering(["it is red"]), [sample])


# --- which samples are asked


def test_tasks_limits_and_progress(question: Clip) -> None:
    samples = [Sample(f"x:{i}", audio=(question,), text="which", answer="it is red") for i in range(3)]
    steps: list[tuple[str, int, int]] = []
    session = answering(["it is red"], words=["which"])
    found = evaluate(session, samples, limit=2, progress=lambda *step: steps.append(step))
    assert [(row.task, row.index) for row in found.rows] == [(t, i) for t in ("asr", "at", "tt") for i in (0, 1)]
    assert steps[:3] == [("asr", 0, 2), ("asr", 1, 2), ("asr", 2, 2)] and steps[-1] == ("tt", 2, 2)
    assert evaluate(session, samples, tasks=["tt"]).tasks == ("tt",)


def test_a_task_that_does_not_exist_or_is_not_there_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    session = answering(["it is red"], words=["which"], tasks=("tt",))
    with pytest.raises(UsageError, match="unknown task.*sing; known are"):
        evaluate(session, written(), tasks=["sing"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"no task ta; it has tt"):
        evaluate(session, written(), tasks=["ta", "tt"])
    with pytest.raises(UsageError, match=r"none of 4 sample\(s\) is for task asr"):
        evaluate(answering(["x"]), written(), tasks=["asr"])
    foreign = Sample("x:5", "ta", text="which", answer="it is red")
    assert len(evaluate(session, [*written(), foreign]).rows) == 4
    assert "samples for ta are not asked" in caplog.text


def test_a_sample_without_what_its_task_needs_is_unusable() -> None:
    samples = [*written(), Sample("x:5", "at", answer="it is red"), Sample("x:6", text="which")]
    found = evaluate(answering(["it is red"], words=["which"]), samples)
    assert [(e.where, e.why) for e in found.unusable] == [
        ("x:5", "task at needs audio"),
        ("x:6", "its fields are too few for any task"),
    ]


def test_answers_are_bounded_and_those_cut_off_are_counted() -> None:
    session = answering(["it is red"], words=["which"])
    samples = [Sample("x:1", "ta", text="which", answer="it is red")]
    cut = evaluate(session, samples, asking=Asking(max_seconds=0.003)).rows[0]
    assert cut.ended == "length" and cut.timings["audio"] <= 0.003
    assert evaluate(session, samples).to_dict()["tasks"]["ta"]["cut_off"] == 0


def test_times_are_medians() -> None:
    found = evaluate(answering(ANSWERS, words=["which"]), written())
    totals = sorted(row.timings["total"] for row in found.rows)
    assert found.timings("tt")["total"] == (totals[1] + totals[2]) / 2
    assert "ttfa" not in found.timings("tt")
