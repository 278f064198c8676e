"""Text as it comes, with real tokenizers built here: bytes (GPT-2's kind), word pieces with metaspace, none at all.

The layout has 100 text ids of which the last 8 are specials, so eot is 92 and ids 0 to 91 are text.
"""

from __future__ import annotations

import pytest
from fakes import small_spec
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from edgeomni.errors import CheckpointError, PromptError
from edgeomni.text import TextStream, Tokenizer

LAYOUT = small_spec().layout
EOT, PAD_T, INPUT_T = 92, 93, 94
BYTES = "é€😀 aHi"
"""What the byte-level tokenizer can spell: one id for each of its UTF-8 bytes, in order of their first use."""
PIECES = ["<unk>", "▁", "▁Hello", "▁wor", "ld", "!", "▁the", "▁new"]


def byte_names() -> dict[int, str]:
    """GPT-2's printable name of each byte (its bytes_to_unicode): printable Latin-1 is itself, others U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_level() -> str:
    used = list(dict.fromkeys(BYTES.encode()))
    vocab = {byte_names()[b]: i for i, b in enumerate(used)}
    hf = HfTokenizer(models.BPE(vocab=vocab, merges=[]))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    return str(hf.to_str())


def metaspace() -> str:
    hf = HfTokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Metaspace()
    return str(hf.to_str())


def byte_ids(text: str) -> list[int]:
    used = list(dict.fromkeys(BYTES.encode()))
    return [used.index(b) for b in text.encode()]


def deltas(tokenizer_json: str | None, ids: list[int]) -> tuple[list[str], str, str]:
    """What each id gives, what `finish` gives, and the whole text."""
    stream = TextStream(Tokenizer(tokenizer_json, LAYOUT))
    given = [stream.add(i) for i in ids]
    return given, stream.finish(), stream.text


def test_word_pieces_keep_the_space_before_them() -> None:
    """A piece decoded alone would lose it: 'Hello' + 'world' in place of 'Hello world'."""
    ids = [PIECES.index(p) for p in ("▁Hello", "▁wor", "ld", "!", "▁the", "▁new")]
    given, rest, text = deltas(metaspace(), ids)
    assert given == ["Hello", " wor", "ld", "!", " the", " new"]
    assert (rest, text) == ("", "Hello world! the new")


def test_a_repeated_piece_is_given_each_time() -> None:
    new = PIECES.index("▁new")
    assert deltas(metaspace(), [new] * 4) == (["new", " new", " new", " new"], "", "new new new new")


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_half_a_character_is_held_back_until_it_is_whole(character: str) -> None:
    ids = byte_ids("a") + byte_ids(character) + byte_ids("Hi")
    given, rest, text = deltas(byte_level(), ids)
    waiting = [""] * (len(character.encode()) - 1)
    assert given == ["a", *waiting, character, "H", "i"]
    assert (rest, text) == ("", f"a{character}Hi")


def test_characters_one_after_another_stay_apart() -> None:
    given, rest, text = deltas(byte_level(), byte_ids("é😀é€"))
    assert [d for d in given if d] == ["é", "😀", "é", "€"] and (rest, text) == ("", "é😀é€")


def test_finish_gives_what_never_became_whole_and_only_once() -> None:
    stream = TextStream(Tokenizer(byte_level(), LAYOUT))
    for i in byte_ids("H") + byte_ids("é")[:1]:
        stream.add(i)
    assert stream.text == "H"
    assert stream.finish() == "\ufffd" and stream.text == "H\ufffd"
    assert stream.finish() == "" and stream.text == "H\ufffd"


def test_white_space_before_the_first_word_is_no_text() -> None:
    given, _, text = deltas(byte_level(), byte_ids("  a H"))
    assert given == ["", "", "a", " ", "H"] and text == "a H"


def test_eot_ends_the_text_and_what_follows_is_dropped() -> None:
    given, rest, text = deltas(None, [1, EOT, 2, 3])
    assert (given, rest, text) == (["<1>", "", "", ""], "", "<1>")


def test_specials_are_no_text_and_end_nothing() -> None:
    given, _, text = deltas(None, [1, PAD_T, INPUT_T, 99, 2])
    assert given == ["<1>", "", "", "", "<2>"] and text == "<1><2>"


def test_the_last_id_below_eot_is_text() -> None:
    tokenizer = Tokenizer(None, LAYOUT)
    assert [tokenizer.is_text(i) for i in (0, EOT - 1, EOT, PAD_T)] == [True, True, False, False]
    assert [tokenizer.ends(i) for i in (0, EOT - 1, EOT, PAD_T)] == [False, False, True, False]
    assert deltas(None, [EOT - 1])[2] == f"<{EOT - 1}>"


def test_ids_stand_for_themselves_where_there_is_no_tokenizer() -> None:
    tokenizer = Tokenizer(None, LAYOUT)
    assert tokenizer.decode([4, 90]) == "<4><90>" and tokenizer.decode([]) == ""
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenizer.encode("hello")


def test_a_question_becomes_ids() -> None:
    assert Tokenizer(metaspace(), LAYOUT).encode("Hello the new") == [2, 6, 7]
    assert Tokenizer(byte_level(), LAYOUT).encode("Hi é") == byte_ids("Hi é")


def test_text_without_ids_is_refused() -> None:
    for empty in ("", " \n"):
        with pytest.raises(PromptError, match="text is empty"):
            Tokenizer(metaspace(), LAYOUT).encode(empty)
    with pytest.raises(PromptError, match="no ids of 'zzz'"):
        Tokenizer(byte_level(), LAYOUT).encode("zzz")


def test_a_broken_tokenizer_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer("{}", LAYOUT).decode([1])
