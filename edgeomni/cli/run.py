"""`edgeomni run`: one question answered, text to the terminal and audio to a file as they come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from ..sampling import Sampling
from ..session import AudioChunk, Event, Session, TextDelta, TurnEnd
from ..spec import AUDIO_OUT, TASKS
from .common import engine_options, force_option, options
from .sinks import Sinks, check_outputs, save_tokens
from .turn import sampling_of, task_of, window_of

question_options = options(
    click.option("--task", type=click.Choice(TASKS), help="What goes in and comes out [default: aa; ta with --text]."),
    click.option("--text", help="The question, for tt and ta."),
    click.option("--channel", type=click.IntRange(0), help="Channel of the sound file to hear, from 0."),
    click.option("--encoder-window", default=None, help="auto, or seconds [default: what the model was trained on]."),
    click.option(
        "--long",
        "long_audio",
        type=click.Choice(["refuse", "split"]),
        default="refuse",
        show_default=True,
        help="Audio beyond the encoder's window.",
    ),
)
output_options = options(
    click.option(
        "-o", "--output", help="Sound file to write (.wav .flac .ogg .mp3); - writes raw PCM (s16le) to stdout."
    ),
    click.option("--play", is_flag=True, help="Play the answer (needs sounddevice)."),
    click.option("--tokens-out", help="Write the answer's ids to this .npz (array `tokens`)."),
)
answer_options = options(
    click.option("--greedy", is_flag=True, help="Always the likeliest id."),
    click.option("--temperature", type=float, help="Sampling temperature [default: 0.9; alone it lifts top-k 1]."),
    click.option("--top-k", type=int, help="Keep the k likeliest ids, 0 keeps all [default: 1, as published]."),
    click.option("--top-p", type=float, help="Keep the likeliest ids that make up this probability."),
    click.option("--repetition-penalty", type=float, help="Above 1 the text repeats itself less."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--max-length", type=click.IntRange(1), help="Frames at most, prompt counted in."),
    click.option("--two-row/--one-row", default=True, show_default=True, help="aa: text from a row of its own."),
    click.option("--strict", is_flag=True, help="Ids that are no codec entries are an error, not silence."),
    click.option("--codec-noise", type=int, metavar="SEED", help="Switch the codec's noise on, seeded."),
)


@click.command("run")
@click.argument("source")
@click.argument("question", required=False)
@question_options
@output_options
@answer_options
@engine_options
@force_option
def run_(source: str, question: str | None, output: str | None, play: bool, tokens_out: str | None, **how: Any) -> None:
    """Ask SOURCE (a bundle, or a checkpoint directory) the spoken QUESTION, or --text.

    \b
    edgeomni run bundle --task aa question.wav -o answer.wav
    edgeomni run bundle --task ta --text "How are you?" -o - | aplay -f S16_LE -r 24000
    """
    task = task_of(how["task"], question, how["text"])
    speaks = check_outputs(task in AUDIO_OUT, output, play, tokens_out, how["force"])
    request = _request(how)
    session = Session.open(source, threads=how["threads"], device=how["device"], engine=how["engine"])
    events = session.respond(task, question, how["text"], **request)
    with Sinks(output if speaks else None, play and speaks, session.spec.codec.sample_rate, how["force"]) as sinks:
        end = consume(events, sinks)
    if tokens_out:
        save_tokens(tokens_out, end.tokens, task, how["force"])
    click.echo(summary(end), err=True)


def _request(how: dict[str, Any]) -> dict[str, Any]:
    """Options -> arguments of Session.respond. Raises UsageError."""
    sampling: Sampling = sampling_of(how)
    window = window_of(how["encoder_window"])
    same = {k: how[k] for k in ("max_length", "two_row", "strict", "long_audio", "channel")}
    return {**same, "sampling": sampling, "encoder_window": window, "noise_seed": how["codec_noise"]}


def consume(events: Iterable[Event], sinks: Sinks) -> TurnEnd:
    """Text and audio out as they come; returns the turn's end."""
    for event in events:
        if isinstance(event, TextDelta):
            sinks.text(event.text)
        elif isinstance(event, AudioChunk):
            sinks.audio(event.samples)
        else:
            sinks.text("\n")
            return event
    raise AssertionError("a turn ends with TurnEnd")


def summary(end: TurnEnd) -> str:
    """One line: why it ended, how much came, how fast."""
    times = end.timings
    parts = [f"{end.reason}: {end.tokens.shape[-1]} frames in {times['total']:.2f} s"]
    if audio := times.get("audio"):
        parts.append(f"{audio:.2f} s of audio, first after {times['ttfa']:.2f} s, RTF {times['rtf']:.3f}")
    if end.silent_frames:
        parts.append(f"{end.silent_frames} silent frames")
    return "; ".join(parts)
