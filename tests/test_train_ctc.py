"""The CTC head: its loss against every alignment written out and against torch, its decoding by hand, its file."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgeomni.errors import CheckpointError, TrainError, UsageError
from edgeomni.train.ctc import CtcHead, CtcVocabulary, ctc_loss

AB = CtcVocabulary("characters", True, ("a", "b"))


def head(vocabulary: CtcVocabulary = AB, width: int = 3, seed: int = 0) -> CtcHead:
    torch.manual_seed(seed)
    return CtcHead(width, vocabulary)


def features(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(log_probs: list[list[float]], target: list[int]) -> float:
    """-log of the summed probability of every sequence of ids that reads as `target`."""
    total = 0.0
    for path in itertools.product(range(len(log_probs[0])), repeat=len(log_probs)):
        read = [b for a, b in zip([None, *path], path, strict=False) if a != b]
        if [i for i in read if i] == target:
            total += math.exp(sum(row[i] for row, i in zip(log_probs, path, strict=True)))
    return -math.log(total)


@pytest.mark.parametrize(("text", "ids"), [("ab", [1, 2]), ("aa", [1, 1]), ("b", [2]), ("abba", [1, 2, 2, 1])])
def test_the_loss_sums_over_every_alignment(text: str, ids: list[int]) -> None:
    made, x = head(), features(1, 5, 3)
    log_probs = torch.log_softmax(x[0] @ made.linear.weight.T + made.linear.bias, -1).tolist()
    loss = ctc_loss(made, x, [5], [text])
    assert loss.total.item() == pytest.approx(brute_force(log_probs, ids), rel=1e-5)
    assert loss.units == len(ids) and made.too_long == 0


def test_the_loss_of_a_batch_is_torchs_of_each_row_alone() -> None:
    made, x = head(width=8), features(3, 9, 8)
    lengths, texts, ids = [9, 4, 6], ["abab", "b", "A"], [[1, 2, 1, 2], [2], [1]]
    expected = 0.0
    for row, n in enumerate(lengths):
        alone = made.linear(x[row, :n]).log_softmax(-1)
        expected += torch.nn.functional.ctc_loss(
            alone, torch.tensor(ids[row]), torch.tensor(n), torch.tensor(len(ids[row])), reduction="sum"
        ).item()
    loss = ctc_loss(made, x, lengths, texts)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5) and loss.units == 6


def test_padding_has_no_say_and_gets_no_gradient() -> None:
    made, x = head(), features(2, 6, 3).requires_grad_()
    ctc_loss(made, x, [6, 3], ["ab", "a"]).total.backward()
    assert x.grad is not None and x.grad[1, 3:].abs().max() == 0 and x.grad[1, :3].abs().min() > 0


@pytest.mark.parametrize(("text", "fewest"), [("ab", 2), ("aa", 3), ("aabb", 6), ("abab", 4)])
def test_texts_longer_than_their_recordings_are_counted_and_left_out(
    text: str, fewest: int, caplog: pytest.LogCaptureFixture
) -> None:
    made, x = head(), features(2, 8, 3)
    enough = ctc_loss(made, x, [fewest, 8], [text, "b"])
    assert made.too_long == 0 and enough.units == len(text) + 1 and not caplog.messages
    for times in (1, 2):
        short = ctc_loss(made, x, [fewest - 1, 8], [text, "b"])
        alone = ctc_loss(made, x[1:], [8], ["b"])
        assert short.units == 1 and short.total.item() == pytest.approx(alone.total.item())
        assert made.too_long == times and len(caplog.messages) == 1 and repr(text) in caplog.messages[0]


def test_a_batch_without_a_usable_text_has_a_loss_of_0_that_can_be_learnt_from() -> None:
    made = head()
    loss = ctc_loss(made, features(2, 3, 3), [1, 3], ["ab", " "])
    loss.total.backward()
    assert loss.total.item() == 0 and loss.units == 0 and made.too_long == 1
    assert made.linear.weight.grad is not None and made.linear.weight.grad.abs().max() == 0


def test_an_empty_text_is_left_out() -> None:
    made, x = head(), features(2, 4, 3)
    both, alone = ctc_loss(made, x, [4, 4], ["", "ab"]), ctc_loss(made, x[1:], [4], ["ab"])
    assert both.total.item() == pytest.approx(alone.total.item()) and both.units == 2 and made.too_long == 0


def test_autocast_does_not_round_the_loss() -> None:
    made, x = head(width=64), features(1, 50, 64)
    plain = ctc_loss(made, x, [50], ["ab" * 12]).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ctc_loss(made, x, [50], ["ab" * 12]).total
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(plain.item(), rel=2e-3)


def test_it_overfits_two_sentences() -> None:
    texts = ["hello there", "what is it"]
    made, x = head(CtcVocabulary.of(texts), width=64), features(2, 25, 64)
    optimizer = torch.optim.Adam(made.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ctc_loss(made, x, [25, 22], texts)
        loss.total.backward()
        optimizer.step()
    assert loss.total.item() / loss.units < 0.05
    assert made.decode(x, [25, 22]) == texts


@pytest.mark.parametrize(
    ("ids", "text"),
    [([], ""), ([0, 0], ""), ([1, 1, 2], "ab"), ([1, 0, 1, 1, 0], "aa"), ([0, 2, 2, 0, 2, 1], "bba")],
)
def test_decoding_by_hand(ids: list[int], text: str) -> None:
    assert AB.text(ids) == text
    made = CtcHead(3, AB)
    with torch.no_grad():
        made.linear.weight.copy_(torch.eye(3))
        made.linear.bias.zero_()
    x = torch.zeros(1, 8, 3)
    x[0, :, 1] = 1  # what stands beyond the length would add an a
    for place, i in enumerate(ids):
        x[0, place] = torch.eye(3)[i]
    assert made.decode(x, [len(ids)]) == [text]


def test_vocabularies() -> None:
    texts = ["No  way", "e\u0301a\n"]
    assert CtcVocabulary.of(texts).entries == (" ", "a", "n", "o", "w", "y", "\u00e9")
    assert CtcVocabulary.of(texts, lower=False).entries == (" ", "N", "a", "o", "w", "y", "\u00e9")
    words = CtcVocabulary.of(["go up", "UP there"], "words")
    assert words.entries == ("go", "there", "up")
    assert words.ids("up  go up") == [3, 1, 3] and words.text([3, 3, 0, 1, 3]) == "up go up"
    letters = CtcVocabulary.of(["a b"])
    assert letters.ids(" b  a ") == [3, 1, 2] and letters.text([3, 1, 1, 2, 1]) == "b a"


def test_unknown_units_are_named() -> None:
    with pytest.raises(TrainError, match=r"'abcd' holds characters that the CTC head does not know: 'c', 'd'; train"):
        AB.ids("abcd")
    with pytest.raises(TrainError, match="holds words that .* 'down'"):
        ctc_loss(head(CtcVocabulary.of(["up"], "words")), features(1, 4, 3), [4], ["up down"])
    with pytest.raises(TrainError, match="all empty"):
        CtcVocabulary.of(["", " "])


def test_a_saved_head_is_the_same_head(tmp_path: Path) -> None:
    made = head(CtcVocabulary.of(["ça va", 'say "no"'], lower=False))
    made.save(tmp_path / "ctc.safetensors")
    again = CtcHead.load(tmp_path / "ctc.safetensors", 3)
    assert again.vocabulary == made.vocabulary
    torch.testing.assert_close(again(features(2, 4, 3)), made(features(2, 4, 3)), rtol=0, atol=0)
    assert again.linear.weight.requires_grad
    with pytest.raises(UsageError, match="exists"):
        made.save(tmp_path / "ctc.safetensors")
    made.save(tmp_path / "ctc.safetensors", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ctc.safetensors"]


def test_files_that_hold_no_fitting_head_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ctc.safetensors"
    head().save(path)
    with pytest.raises(CheckpointError, match=r"width 5: .*\n.*weight is \(3, 3\), not \(3, 5\)"):
        CtcHead.load(path, 5)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="ctc.safetensors"):
        CtcHead.load(path, 3)
    with pytest.raises(CheckpointError, match="no such file"):
        CtcHead.load(tmp_path / "none", 3)
    tensors = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="holds no CTC head"):
        CtcHead.load(path, 3)
    for entries in (["a", "a"], ["a"], [], "ab", [1, 2]):
        save_file(
            tensors, path, {"edgeomni_ctc": json.dumps({"units": "characters", "lower": True, "entries": entries})}
        )
        with pytest.raises(CheckpointError):
            CtcHead.load(path, 3)
    good = {"units": "characters", "lower": True, "entries": ["a", "b"]}
    save_file({**tensors, "bias": torch.full((3,), float("nan"))}, path, {"edgeomni_ctc": json.dumps(good)})
    with pytest.raises(CheckpointError, match="NaN"):
        CtcHead.load(path, 3)
