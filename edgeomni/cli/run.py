"""`edgeomni run`: one question answered, text to the terminal and audio to a file as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from ..arrays import F32
from ..errors import UsageError
from ..sampling import Sampling
from ..session import AudioChunk, Event, Session, TextDelta, TurnEnd
from ..shipped import sample_question
from ..spec import AUDIO_OUT, TASKS
from . import answer
from .answer import Limits, reason
from .common import engine_options, force_option, options, overlap_option, verbosity, verbosity_options
from .sinks import STDOUT, Sinks, check_outputs, save_tokens
from .stdin import STDIN, check_stdin, read_stdin, stdin_options
from .turn import MAX_SECONDS, max_seconds_of, sampling_of, task_of, window_of

NOT_KEPT = "note: the answer's sound is not kept; add -o answer.wav to keep it, or --play to hear it"

question_options = options(
    click.option("--model", metavar="SOURCE", help="Another way to give SOURCE; the one argument is then QUESTION."),
    click.option("--task", type=click.Choice(TASKS), help="What goes in and comes out [default: aa; ta with --text]."),
    click.option("--text", help="The question, for tt and ta."),
    click.option("--system", help='System prompt; "" for none [default: the checkpoint\'s own].'),
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
    click.option("--json", "as_json", is_flag=True, help="At the end one JSON object on stdout; text goes to stderr."),
)
answer_options = options(
    click.option("--greedy", is_flag=True, help="Always the likeliest id."),
    click.option("--temperature", type=float, help="Sampling temperature [default: 0.9; alone it lifts top-k 1]."),
    click.option("--top-k", type=int, help="Keep the k likeliest ids, 0 keeps all [default: 1, as published]."),
    click.option("--top-p", type=float, help="Keep the likeliest ids that make up this probability."),
    click.option("--repetition-penalty", type=float, help="Above 1 the text repeats itself less."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--max-length", type=click.IntRange(1), help="Frames at most, prompt counted in."),
    click.option(
        "--max-seconds", type=float, metavar="SECONDS", help=f"Sound at most [default: {MAX_SECONDS:g} for aa and ta]."
    ),
    click.option("--two-row/--one-row", default=True, show_default=True, help="aa: text from a row of its own."),
    click.option("--codec-noise", type=int, metavar="SEED", help="Switch the codec's noise on, seeded."),
)


@click.command("run")
@click.argument("source", required=False)
@click.argument("question", required=False)
@question_options
@stdin_options
@output_options
@answer_options
@engine_options
@overlap_option
@verbosity_options
@force_option
def run_(
    source: str | None,
    question: str | None,
    model: str | None,
    output: str | None,
    play: bool,
    tokens_out: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Ask SOURCE (a bundle, or a checkpoint directory) the spoken QUESTION (a sound file, - for stdin), or --text.

    SOURCE nano is the small model that EdgeOmni brings. Without a question it is asked its own sample question.

    \b
    edgeomni run nano question.wav -o answer.wav
    edgeomni run bundle --task aa question.wav -o answer.wav
    edgeomni run bundle --task ta --text "How are you?" -o - | aplay -f S16_LE -r 24000
    arecord -d 5 -f S16_LE -r 16000 | edgeomni run bundle - -o answer.wav
    """
    _check_display(as_json, output, how)
    click.get_current_context().with_resource(verbosity(how["quiet"], how["verbose"]))
    source, question = _named(source, question, model)
    sample = sample_question(source) if question is None and how["text"] is None else None
    question = str(sample.path) if sample else question
    task = task_of(how["task"], question, how["text"])
    speaks = check_outputs(task in AUDIO_OUT, output, play, tokens_out, how["force"])
    limits = Limits(how["max_length"], max_seconds_of(task, how["max_seconds"]))
    check_stdin(question, how["stdin_format"], how["stdin_rate"], how["channel"])
    request = _request(how, limits)
    if question == STDIN:  # before the model is loaded: a recorder at the other end does not wait that long
        audio, rate = read_stdin(how["stdin_format"], how["stdin_rate"], how["channel"])
        request |= {"audio": audio, "sample_rate": rate, "channel": None}
    else:
        request["audio"] = question
    session = Session.open(source, **{k: how[k] for k in ("threads", "device", "engine", "overlap", "strict")})
    events = session.respond(task, **request)
    if sample and not how["quiet"]:
        click.echo(f"no question given, so {source} is asked its own sample: {sample.text}", err=True)
    if speaks and not output and not play and not how["quiet"]:
        click.echo(NOT_KEPT, err=True)
    sound, rate = (output if speaks else None), session.spec.codec.sample_rate
    with Sinks(sound, play and speaks, rate, how["force"]) as sinks:
        end = consume(events, sinks.audio, _text_to(sinks, as_json, how["quiet"]))
    if tokens_out:
        save_tokens(tokens_out, end.tokens, task, how["force"])
    why = reason(end, task, session.spec, limits)
    if as_json:
        written = {"audio": output if speaks else None, "tokens": tokens_out}
        click.echo(answer.as_json(end, why, task, {what: path for what, path in written.items() if path}))
    _tell(end, why, how)


def _check_display(as_json: bool, output: str | None, how: dict[str, Any]) -> None:
    if how["quiet"] and how["verbose"]:
        raise UsageError("--quiet and --verbose contradict each other; give one")
    if as_json and output == STDOUT:
        raise UsageError("-o - and --json both want stdout; write the sound to a file")


def _named(source: str | None, question: str | None, model: str | None) -> tuple[str, str | None]:
    """SOURCE and QUESTION, of which --model may have said the first. Raises UsageError unless it is said once."""
    if model is not None and question is not None:
        raise UsageError(f"--model {model} and SOURCE {source} both say what to ask; leave one of them out")
    if model is not None:
        return model, source
    if source is None:
        raise click.MissingParameter("Give it, or --model.", param_hint="'SOURCE'", param_type="argument")
    return source, question


def _request(how: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Options -> arguments of Session.respond, but the audio. Raises UsageError."""
    sampling: Sampling = sampling_of(how)
    window = window_of(how["encoder_window"])
    same = {k: how[k] for k in ("text", "system", "two_row", "strict", "long_audio", "channel")}
    bounds = {"max_length": limits.max_length, "max_seconds": limits.max_seconds}
    return {**same, **bounds, "sampling": sampling, "encoder_window": window, "noise_seed": how["codec_noise"]}


def _text_to(sinks: Sinks, as_json: bool, quiet: bool) -> Callable[[str], None]:
    """Where text deltas go: with --json they leave stdout to the object, and with --quiet too are not shown at all."""
    if not as_json:
        return sinks.text
    return lambda delta: None if quiet else click.echo(delta, nl=False, err=True)


def consume(events: Iterable[Event], audio: Callable[[F32], None], text: Callable[[str], None]) -> TurnEnd:
    """Text and audio out as they come; returns the turn's end."""
    for event in events:
        if isinstance(event, TextDelta):
            text(event.text)
        elif isinstance(event, AudioChunk):
            audio(event.samples)
        else:
            text("\n")
            return event
    raise AssertionError("a turn ends with TurnEnd")


def _tell(end: TurnEnd, why: str, how: dict[str, Any]) -> None:
    """The summary, and with --verbose the stages, on stderr."""
    if how["verbose"]:
        for line in answer.stages(end):
            click.echo(line, err=True)
    if not how["quiet"]:
        click.echo(answer.summary(end, why), err=True)
