"""espeak-ng's voices: heard right by a recogniser, the same for the same arguments, refused where there are none."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pocketsphinx import Decoder, get_model_path

from edgeomni.arrays import F32
from edgeomni.data import espeak
from edgeomni.errors import AudioError, DataError, EngineError, UsageError

SENTENCE = "the answer is twelve"


def heard(samples: F32, tmp_path: Path) -> str:
    """What pocketsphinx hears of 16 kHz speech, under a grammar of many answers."""
    numbers = ["one", "two", "three", "four", "seven", "ten", "eleven", "twelve", "thirteen", "twenty", "thirty"]
    grammar = tmp_path / "answers.gram"
    grammar.write_text(
        "#JSGF V1.0;\ngrammar answers;\npublic <s> = (the answer is | it is not | the number after that is) "
        f"({' | '.join(numbers)});\n"
    )
    model = f"{get_model_path()}/en-us"
    decoder = Decoder(
        hmm=f"{model}/en-us", dict=f"{model}/cmudict-en-us.dict", jsgf=str(grammar), lm=None, loglevel="FATAL"
    )
    pcm = np.pad((samples * 32000).astype(np.int16), (1600, 3200))
    decoder.start_utt()
    decoder.process_raw(pcm.tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


@pytest.mark.parametrize("sentence", [SENTENCE, "the answer is three", "it is not seven"])
def test_the_speech_is_heard_as_what_was_said(sentence: str, tmp_path: Path) -> None:
    assert heard(espeak.say(sentence, "en-us+robosoft", rate_wpm=145, rate=16_000), tmp_path) == sentence


def test_the_same_arguments_give_the_same_samples_whatever_was_said_before() -> None:
    voices = ["en-us", "en-us+f2", "en-us+Reed", "en-us+whisper", "en-us+robosoft", "es+caleb"]
    first = {voice: espeak.say(SENTENCE, voice) for voice in voices}
    espeak.say("something else altogether", "de+m3", rate_wpm=250, pitch=80)
    for voice in reversed(voices):
        np.testing.assert_array_equal(espeak.say(SENTENCE, voice), first[voice])
    code = (
        "import sys, hashlib; from edgeomni.data import espeak\n"
        "espeak.say('a new process', 'en-us')\n"
        f"print(hashlib.md5(espeak.say({SENTENCE!r}, 'en-us+f2').tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert there == hashlib.md5(first["en-us+f2"].tobytes()).hexdigest()


def test_every_variant_that_is_offered_sounds_differently_from_the_plain_voice_and_from_each_other() -> None:
    voices = espeak.voices("en-us")
    assert voices[0] == "en-us" and len(voices) > 90 and "en-us+Mr serious" in voices
    spoken = {voice: espeak.say("hello", voice).tobytes() for voice in voices}
    assert len(set(spoken.values())) == len(voices)


def test_a_higher_rate_is_shorter_and_a_higher_pitch_is_higher() -> None:
    slow, middle, fast = (len(espeak.say(SENTENCE, "en-us", rate_wpm=rate)) for rate in (100, 160, 300))
    assert slow > 1.2 * middle > 1.2 * 1.2 * fast
    low, high = (fundamental_hz(espeak.say("aaaaah", "en-us", pitch=p, pitch_range=0)) for p in (20, 80))
    assert high > 1.3 * low


def fundamental_hz(samples: F32) -> float:
    """The pitch of the middle of the sound, by its autocorrelation between 60 and 400 Hz."""
    middle = samples[len(samples) // 2 - 1600 : len(samples) // 2 + 1600]
    lags = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return 16_000 / float(40 + np.argmax(lags[40:267]))


def test_a_wider_pitch_range_and_the_volume_change_the_sound() -> None:
    flat, wide = (espeak.say(SENTENCE, "en-us", pitch_range=r) for r in (0, 99))
    assert flat.shape != wide.shape or not np.array_equal(flat, wide)
    loud, quiet = (float(np.abs(espeak.say(SENTENCE, "en-us", volume=v)).max()) for v in (100, 25))
    assert quiet < 0.5 * loud


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000])
def test_speech_is_resampled_to_the_rate_asked_for(rate: int) -> None:
    samples = espeak.say(SENTENCE, "en-us", rate=rate)
    assert samples.dtype == np.float32 and samples.ndim == 1 and 0.1 < np.abs(samples).max() <= 1.2
    assert len(samples) / rate == pytest.approx(len(espeak.say(SENTENCE, "en-us")) / 16_000, abs=0.002)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("es", "la respuesta es doce"),
        ("cmn", "答案是十二"),
        ("zh", "答案是十二"),
        ("de", "Die Antwort ist zwölf."),
        ("fr-fr", "la réponse est douze"),
        ("en-gb", "the answer"),
    ],
)
def test_other_languages_speak(language: str, text: str) -> None:
    samples = espeak.say(text, language)
    assert 0.4 < len(samples) / 16_000 < 4 and float(np.abs(samples).max()) > 0.1
    assert language in espeak.languages()


def test_languages_have_their_own_pronunciation() -> None:
    assert espeak.say("amigo", "es").tobytes() != espeak.say("amigo", "en-us").tobytes()


@pytest.mark.parametrize(
    ("voice", "named"),
    [
        ("en-us+nosuch", "no variant 'nosuch'"),
        ("en-us+robosofd", "close to it are robosoft"),
        ("en-us+Robosoft", "close to it are robosoft"),
        ("en-us+", "no variant ''"),
        ("en-us+f2+f3", "no variant 'f2+f3'"),
        ("en_us", "close to it are en-us"),
        ("xx", "no language 'xx'"),
        ("", "no language ''"),
        ("en-us+../f2", "no variant '../f2'"),
    ],
)
def test_unknown_voices_are_refused_by_name(voice: str, named: str) -> None:
    with pytest.raises(UsageError, match="espeak-ng has no") as caught:
        espeak.say(SENTENCE, voice)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no text"),
        (" \n ", "no text"),
        ("...", "no sound"),
        ("a\0b", r"'\\x00'"),
        ("bell\x07", r"'\\x07'"),
        ("half \ud800", r"ud800"),
        ("long " * 2000, "10000 characters"),
    ],
)
def test_text_that_cannot_be_spoken_is_refused(text: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        espeak.say(text, "en-us")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate_wpm": 79},
        {"rate_wpm": 451},
        {"pitch": -1},
        {"pitch": 100},
        {"pitch_range": 100},
        {"volume": 4},
        {"volume": 101},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))} is outside"):
        espeak.say(SENTENCE, "en-us", **wrong)


def test_values_at_the_ends_of_their_ranges_are_taken_and_the_defaults_are_as_told() -> None:
    assert len(espeak.say("hello", "en-us", rate_wpm=450)) < len(espeak.say("hello", "en-us", rate_wpm=80)) / 2
    assert len(espeak.say("hello", "en-us", pitch=0, pitch_range=99, volume=5))
    explicit = espeak.say(SENTENCE, "en-us", rate_wpm=160, pitch=50, pitch_range=50, volume=100, rate=16_000)
    np.testing.assert_array_equal(espeak.say(SENTENCE, "en-us"), explicit)


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(AudioError, match="sample rate 10 Hz"):
        espeak.say(SENTENCE, "en-us", rate=10)


def test_a_missing_package_and_a_missing_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: "/nowhere/libespeak-ng.so")
    with pytest.raises(EngineError, match=r"/nowhere/libespeak-ng.so: cannot be loaded .*\[synth\]"):
        espeak.say(SENTENCE, "en-us")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(EngineError, match=r"not installed .*pip install .*\[synth\]"):
        espeak.say(SENTENCE, "en-us")


def test_missing_data_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(EngineError, match="cannot read its data"):
        espeak.say(SENTENCE, "en-us")
    monkeypatch.undo()
    assert len(espeak.say(SENTENCE, "en-us"))


def test_the_library_is_not_shared_with_other_code() -> None:
    import ctypes

    import espeakng_loader

    other = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        with pytest.raises(EngineError, match="other code in this process"):
            espeak.say(SENTENCE, "en-us")
    finally:
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(other._handle))
    assert len(espeak.say(SENTENCE, "en-us"))
