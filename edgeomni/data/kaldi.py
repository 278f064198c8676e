"""CosyVoice's training folders, in Kaldi's form: `wav.scp`, `text`, `utt2spk`, by choice `spk2utt`.

Follows examples/libritts/cosyvoice/local/prepare_data.py of FunAudioLLM/CosyVoice, which writes them: each line is an
utterance's name, a space, and its path, text or speaker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .records import Fault, Items
from .sample import Clip, Sample

NEEDED = ("wav.scp", "text")
_Table = dict[str, tuple[str, str]]
"""Name -> (where its line stands, the rest of the line)."""


def read_kaldi(folder: Path) -> Items:
    """Of each utterance two samples: asr (speech to its transcript) and ta (reading the transcript aloud: TTS).

    Paths start from the folder, or where nothing is there, from the working directory as CosyVoice reads them.
    An utterance that only some of the files have is a fault. Raises DataError for a file that cannot be read.
    """
    faults: list[Fault] = []
    wavs, texts = (_table(folder / name, faults) for name in NEEDED)
    speakers = _speakers(folder, faults)
    yield from faults
    for utt, (where, spelled) in wavs.items():
        if spelled.endswith("|"):
            yield Fault(where, f"{utt} comes from a command, and EdgeOmni runs none; write the sound to a file first")
        elif utt not in texts:
            yield Fault(where, f"{utt} has no line in {folder / 'text'}")
        elif speakers and utt not in speakers:
            yield Fault(where, f"{utt} has no line in {folder / 'utt2spk'}")
        else:
            yield from _samples(where, Clip.of(_path(folder, spelled)), texts[utt][1], speakers.get(utt, ""))
    yield from (
        Fault(where, f"{utt} has no line in {folder / 'wav.scp'}")
        for utt, (where, _) in texts.items()
        if utt not in wavs
    )


def _samples(where: str, clip: Clip, text: str, speaker: str) -> Iterator[Sample]:
    yield Sample(where, "asr", (clip,), text, speaker=speaker)
    yield Sample(where, "ta", text=text, answer=text, answer_audio=clip, speaker=speaker)


def _speakers(folder: Path, faults: list[Fault]) -> dict[str, str]:
    """Utterance -> speaker, from utt2spk, or where there is none from spk2utt; empty where there is neither."""
    if (folder / "utt2spk").is_file():
        return {utt: speaker for utt, (_, speaker) in _table(folder / "utt2spk", faults).items()}
    if (folder / "spk2utt").is_file():
        table = _table(folder / "spk2utt", faults)
        return {utt: speaker for speaker, (_, utts) in table.items() for utt in utts.split()}
    return {}


def _table(path: Path, faults: list[Fault]) -> _Table:
    """The lines of one file; those that are not "NAME VALUE", or name something twice, join `faults`."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    found: _Table = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            name, *rest = line.decode("utf-8").split(maxsplit=1) or [""]  # text knows more blanks than bytes do
        except UnicodeDecodeError:
            faults.append(Fault(where, "is not UTF-8"))
            continue
        value = rest[0].strip() if rest else ""
        if not value or "\0" in value:
            faults.append(Fault(where, "must be a name, a space and a value"))
        elif name in found:
            faults.append(Fault(where, f"{name} stands here a second time"))
        else:
            found[name] = (where, value)
    return found


def _path(folder: Path, spelled: str) -> Path:
    below, here = folder / spelled, Path(spelled)
    return here if not below.exists() and here.exists() else below
