"""The loss of a batch, held against a straightforward computation: sample by sample, without padding, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import ids_of, samples_in, small_model

from edgeomni import audio as sound
from edgeomni.data.sample import Sample
from edgeomni.model import encoders
from edgeomni.spec import TASKS, Task
from edgeomni.text import Tokenizer
from edgeomni.train.batching import Draw
from edgeomni.train.codes import codec_frames
from edgeomni.train.config import LossConfig
from edgeomni.train.ctc import CtcHead, CtcVocabulary
from edgeomni.train.dataset import BadSamples, Collator, Reader, Usable
from edgeomni.train.trainable import TrainableOmni

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "tied with a TTS adapter": {"tts_layers": 1},
    "untied with a TTS adapter": {"tied": False, "tts_layers": 1},
}


@pytest.fixture(params=list(SHAPES), scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return small_model(**SHAPES[request.param])


def batch_of(model: Any, samples: Sequence[Sample], tasks: Sequence[Task]) -> dict[str, Any]:
    """One batch of sample i as tasks[i], as the collator makes it."""
    reader = Reader(
        model.spec,
        Tokenizer(model.tokenizer_json, model.spec.layout),
        lambda s: codec_frames(model.codec, model.spec.codec, s),
    )
    data = Usable(samples, {task: list(range(len(samples))) for task in TASKS}, {})
    return Collator(data, reader, BadSamples(0))([Draw(i, task, i) for i, task in enumerate(tasks)])


def entropies(model: Any, sample: Sample, task: Task) -> tuple[list[float], list[list[float]]]:
    """Cross-entropies of one sample: of the text ids, and of the ids of each audio stream."""
    layout, spec = model.spec.layout, model.spec
    audio_prompt, text_prompt, features = question(model, sample, task)
    text = [*ids_of(sample.text if task == "asr" else sample.answer), layout.eot]
    streams: list[list[int]] = []
    if task in ("aa", "ta"):
        assert sample.answer_audio is not None
        codes = codec_frames(model.codec, spec.codec, sample.answer_audio.read(spec.codec.sample_rate))
        length = len(codes) + layout.streams + 1
        for k in range(layout.streams):
            spoken = [layout.pad_a] * (k + 1) + codes[:, k].tolist() + [layout.eoa]
            streams.append(spoken + [layout.pad_a] * (length - len(spoken)))
    else:
        length = len(text)
        streams = [[layout.pad_a] * length] * layout.streams
    said = text + [layout.pad_t] * (length - len(text))
    columns = [[*audio_prompt[k], *streams[k]] for k in range(layout.streams)]
    joint = [[layout.shift(k) + i for i in column] for k, column in enumerate(columns)] + [[*text_prompt, *said]]
    with torch.no_grad():
        text_logits, audio_logits = model(torch.tensor([joint]), features)
    first = len(text_prompt) - 1
    of_text = [-log_softmax(text_logits[0, first + t])[i] for t, i in enumerate(text)]
    of_audio = [
        [-log_softmax(audio_logits[0, first + t, k])[i] for t, i in enumerate(s)] for k, s in enumerate(streams)
    ]
    return of_text, of_audio if task in ("aa", "ta") else [[] for _ in streams]


def question(model: Any, sample: Sample, task: Task) -> tuple[list[list[int]], list[int], list[Any]]:
    """Unshifted ids of the audio streams, ids of the text stream, and the features' segment, as docs tell prompts."""
    layout, front = model.spec.layout, model.spec.front_end
    if task in ("tt", "ta"):
        ids = ids_of(sample.text)
        last = layout.answer_a if task == "ta" else layout.pad_a
        return (
            [[layout.pad_a] * (len(ids) + 2) + [last]] * layout.streams,
            [
                layout.input_t,
                *ids,
                layout.eot,
                layout.answer_t,
            ],
            [],
        )
    samples = sample.audio[0].read(front.sample_rate)
    count = int(len(samples) / front.sample_rate * 1000 / 20) + 1
    mel = sound.log_mel(samples, front, 100)  # a window of one second, which all questions here fit into
    with torch.no_grad():
        features = model.encode(torch.from_numpy(mel)[None])[0, :count]
    last = layout.answer_a if task == "aa" else layout.pad_a
    asked = layout.asr if task == "asr" else layout.answer_t
    audio = [layout.input_a, *[layout.pad_a] * count, layout.eoa, last]
    return [audio] * layout.streams, [layout.input_t, *[layout.pad_t] * count, layout.eot, asked], [(1, features)]


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))


@pytest.mark.parametrize("weights", [LossConfig(), LossConfig(text=0.5, audio=3.0, first_codebook=7.0)])
def test_a_mixed_batch(model: Any, weights: LossConfig, tmp_path: Path) -> None:
    samples = samples_in(tmp_path, 5)
    tasks: list[Task] = ["asr", "at", "aa", "tt", "ta"]
    found = TrainableOmni(model, weights)(**batch_of(model, samples, tasks))
    single = [entropies(model, sample, task) for sample, task in zip(samples, tasks, strict=True)]
    streams = model.spec.layout.streams
    text = np.mean([x for of_text, _ in single for x in of_text])
    audio = [np.mean([x for _, of_audio in single for x in of_audio[k]]) for k in range(streams)]
    shares = [weights.audio / streams * (weights.first_codebook if k == 0 else 1) for k in range(streams)]
    wanted = (weights.text * text + sum(w * a for w, a in zip(shares, audio, strict=True))) / (
        weights.text + sum(shares)
    )
    assert float(found["loss"]) == pytest.approx(wanted, rel=2e-5)
    for row, task in enumerate(tasks):
        sums = found["sums"][TASKS.index(task)]
        of_text, of_audio = single[row]
        assert sums[streams].tolist() == pytest.approx([sum(of_text), len(of_text)], rel=2e-5)
        for k in range(streams):
            assert sums[k].tolist() == pytest.approx([sum(of_audio[k]), len(of_audio[k])], rel=2e-5)


@pytest.mark.parametrize("task", TASKS)
def test_one_sample_of_each_task(model: Any, task: Task, tmp_path: Path) -> None:
    """A batch of text tasks has no audio loss, whatever its weight."""
    sample = samples_in(tmp_path, 1)[0]
    found = TrainableOmni(model, LossConfig(text=2.0, audio=1.0))(**batch_of(model, [sample], [task]))
    of_text, of_audio = entropies(model, sample, task)
    spoken = [np.mean(s) for s in of_audio if s]
    wanted = (2 * np.mean(of_text) + np.mean(spoken)) / 3 if spoken else np.mean(of_text)
    assert float(found["loss"]) == pytest.approx(wanted, rel=2e-5)


def test_counts_of_the_whole_update_make_shares_that_add_up(model: Any, tmp_path: Path) -> None:
    samples = samples_in(tmp_path, 4)
    tasks: list[Task] = ["aa", "asr", "ta", "tt"]
    trainable = TrainableOmni(model, LossConfig())
    whole = batch_of(model, samples, tasks)
    halves = [batch_of(model, samples[:1], tasks[:1]), batch_of(model, samples[1:], tasks[1:])]
    counts = sum(trainable.count_labels(half) for half in halves)
    assert counts.tolist() == trainable.count_labels(whole).tolist()
    shares = [float(trainable(**half, counts=counts)["loss"]) for half in halves]
    assert sum(shares) == pytest.approx(float(trainable(**whole)["loss"]), rel=1e-5)


def test_the_logits_as_trained_are_those_of_the_model(model: Any, tmp_path: Path) -> None:
    batch = batch_of(model, samples_in(tmp_path, 1), ["ta"])
    with torch.no_grad():
        ours, theirs = TrainableOmni(model, LossConfig()).logits(batch["ids"]), model(batch["ids"])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_ctc_loss_is_a_mean_over_the_units_of_all_transcripts(tmp_path: Path) -> None:
    """Three spoken samples, one of them without a transcript, beside a written one; the encoder is heard alone."""
    model = small_model()
    samples = samples_in(tmp_path, 4)
    samples[1] = replace(samples[1], text="")
    torch.manual_seed(0)
    head = CtcHead(model.spec.encoder.width, CtcVocabulary.of([s.text for s in samples]))
    tasks: list[Task] = ["asr", "at", "aa", "tt"]
    batch = batch_of(model, samples, tasks)
    trainable = TrainableOmni(model, LossConfig(ctc=0.7), head)
    found = trainable(**batch)
    total, units = 0.0, 0
    for sample in (samples[0], samples[2]):
        heard = sample.audio[0].read(16000)
        with torch.no_grad():
            mel = torch.from_numpy(sound.log_mel(heard, model.spec.front_end, 100))[None]
            features = encoders.encode(model.encoder, mel)[:, : int(len(heard) / 16000 * 1000 / 20) + 1]
            log_probs = head.linear(features).log_softmax(-1).transpose(0, 1)
        ids = torch.tensor([[1 + head.vocabulary.entries.index(c) for c in sample.text]])
        lengths = (torch.tensor([len(log_probs)]), torch.tensor([ids.shape[1]]))
        total += float(torch.nn.functional.ctc_loss(log_probs, ids, *lengths, reduction="sum"))
        units += ids.shape[1]
    plain = TrainableOmni(model, LossConfig())(**batch)
    assert found["loss"].item() == pytest.approx(plain["loss"].item() + 0.7 * total / units, rel=1e-5)
    assert found["sums"][:, -1].sum(0).tolist() == pytest.approx([total, units], rel=1e-5)
    assert found["sums"][TASKS.index("at"), -1].tolist() == [0, 0]
    counted = trainable.count_labels(batch).tolist()
    assert counted[-1] == units and counted == found["sums"][..., 1].sum(0).tolist()


def test_without_weight_for_the_answer_the_llm_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CTC loss is then the same, nothing else is counted, and the body is not computed."""
    model, samples = small_model(), samples_in(tmp_path, 2)
    torch.manual_seed(0)
    head = CtcHead(model.spec.encoder.width, CtcVocabulary.of([s.text for s in samples]))
    batch = batch_of(model, samples, ["asr", "aa"])
    with_answers = TrainableOmni(model, LossConfig(ctc=0.7), head)(**batch)["sums"][:, -1]
    monkeypatch.setattr(model.body.layers[0], "forward", None)
    alone = TrainableOmni(model, LossConfig(text=0, audio=0, ctc=0.7), head)
    found = alone(**batch)
    assert torch.equal(found["sums"][:, -1], with_answers) and not found["sums"][:, :-1].any()
    total, units = with_answers.sum(0).tolist()
    assert found["loss"].item() == pytest.approx(0.7 * total / units, rel=1e-6)
    assert alone.count_labels(batch).tolist() == [0.0] * (model.spec.layout.streams + 1) + [units]


def test_two_recordings_of_a_row_are_heard_one_behind_the_other() -> None:
    """Prepared data may hold several log-mels of one question; each is encoded in its own window."""
    model = small_model()
    mels = torch.randn(3, model.spec.front_end.n_mels, 100, generator=torch.Generator().manual_seed(1))
    group = {
        "mel": mels,
        "row": torch.tensor([1, 0, 1]),
        "start": torch.tensor([1, 1, 6]),
        "count": torch.tensor([5, 4, 3]),
    }
    segments, heard = TrainableOmni(model, LossConfig())._features([group])
    with torch.no_grad():
        alone = [encoders.encode(model.encoder, mel[None])[0] for mel in mels]
    torch.testing.assert_close(heard[1], torch.cat([alone[0][:5], alone[2][:3]]))
    torch.testing.assert_close(heard[0], alone[1][:4])
    assert [(len(values), row, start) for values, row, start in segments] == [(5, 1, 1), (4, 0, 1), (3, 1, 6)]
    for (values, _, _), raw, count in zip(segments, alone, (5, 4, 3), strict=True):
        torch.testing.assert_close(values, model.adapter(raw[:count]))


class Gives(torch.nn.Module):
    """An adapter whose output is always the same."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


def test_sounds_match_the_words_that_the_ctc_head_hears(model: Any) -> None:
    """Against distances between the LLM's inputs themselves, as the model embeds them, and a divergence written out."""
    layout, width = model.spec.layout, model.spec.body.width
    words = [7, 3, 12]
    head = CtcHead(model.spec.encoder.width, CtcVocabulary("words", True, ("a", "b", "c")))
    trainable = TrainableOmni(model, LossConfig(ctc=1.0, match=1.0), head, words)
    silence = [layout.shift(k) + layout.pad_a for k in range(layout.streams)]
    written = torch.tensor([[*([i] * 4 for i in silence), [layout.pad_t, *words]]])
    with torch.no_grad():
        inputs = model.embed(written)[0]  # of padding and of each word
        text = model.embedding.weight[layout.pad_t].clone()
    # An input is (K * feature + text) / (K + 1) where a feature stands: solved for the feature.
    exact = ((layout.streams + 1) * inputs - text) / layout.streams
    apart = torch.cdist(inputs[None], inputs[None])[0].square()
    mean = apart.sum() / 12

    random = torch.Generator().manual_seed(0)
    said = exact[[1, 0, 2, 2, 0, 0, 3]] + 0.02 * torch.randn(7, width, generator=random)
    features = torch.randn(7, model.spec.encoder.width, generator=random)
    heard = {1: features[:4], 0: features[4:]}
    trainable.adapter = Gives(said)
    given = (layout.streams * said + text) / (layout.streams + 1)
    given = given.detach().double()
    logits = -20 / mean.double() * torch.cdist(given, inputs.double()).square()
    wanted = 0.0
    for t in range(7):
        teacher = (head.linear.weight @ features[t] + head.linear.bias).double().exp().tolist()
        pupil = logits[t].exp().tolist()
        for p, q in zip(teacher, pupil, strict=True):
            p, q = p / sum(teacher), q / sum(pupil)
            wanted += p * math.log(p / q)
        words_given = sum(p / sum(teacher) * unit for p, unit in zip(teacher, inputs.double(), strict=True))
        wanted += 0.3 * 20 / mean.item() * (given[t] - words_given).square().sum().item()
    assert trainable._mismatch(heard).item() == pytest.approx(wanted, rel=1e-3)

    sure = [1, 0, 2, 2, 0, 0, 3]
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4, model.spec.encoder.width) * 30)
        head.linear.bias.zero_()
    trainable.adapter = Gives(exact[sure])
    features = torch.eye(4, model.spec.encoder.width)[sure]
    assert trainable._mismatch({0: features[:3], 1: features[3:]}).item() < 0.01


def test_matching_teaches_adapter_and_encoder_and_no_embedding(tmp_path: Path) -> None:
    model = small_model()
    batch = batch_of(model, samples_in(tmp_path, 2), ["asr", "tt"])
    words = sorted(set(batch["transcripts"][0].lower().split()))
    head = CtcHead(model.spec.encoder.width, CtcVocabulary("words", True, tuple(words)))
    tokenizer = Tokenizer(model.tokenizer_json, model.spec.layout)
    units = [tokenizer.encode(word)[0] for word in words]
    trainable = TrainableOmni(model, LossConfig(text=0, audio=0, ctc=1e-9, match=1.0), head, units)
    trainable.requires_grad_()
    trainable(**batch)["loss"].backward()
    learned = {
        name.split(".")[0]
        for name, p in trainable.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 1e-6
    }
    assert learned == {"encoder", "adapter"}


def test_distances_of_parts_add_up_to_those_of_the_whole(model: Any, tmp_path: Path) -> None:
    """As every loss does, so that accumulated batches and several processes give what one large batch would."""
    samples = samples_in(tmp_path, 3)
    words = sorted({word for sample in samples for word in sample.text.lower().split()})
    head = CtcHead(model.spec.encoder.width, CtcVocabulary("words", True, tuple(words)))
    loss = LossConfig(text=0, audio=0, ctc=0.5, match=2.0)
    trainable = TrainableOmni(model, loss, head, range(5, 5 + len(words)))
    whole = batch_of(model, samples, ["asr", "asr", "asr"])
    counts = trainable.count_labels(whole)
    parts = [batch_of(model, samples[:1], ["asr"]), batch_of(model, samples[1:], ["asr", "asr"])]
    added = sum(trainable(**part, counts=counts)["loss"].item() for part in parts)
    assert added == pytest.approx(trainable(**whole)["loss"].item(), rel=1e-4)


def test_the_distance_counts_by_its_weight(model: Any, tmp_path: Path) -> None:
    samples = samples_in(tmp_path, 2)
    batch = batch_of(model, samples, ["asr", "tt"])
    words = sorted({word for sample in samples for word in sample.text.lower().split()})
    losses = []
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        head = CtcHead(model.spec.encoder.width, CtcVocabulary("words", True, tuple(words)))
        trainable = TrainableOmni(model, LossConfig(ctc=0.5, match=weight), head, range(5, 5 + len(words)))
        losses.append(trainable(**batch)["loss"].item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)
    assert losses[1] > losses[0]
