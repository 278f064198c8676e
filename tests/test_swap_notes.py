"""What is told of a swap: provenance, stages that wait, refusals, and the command; a swapped model is exported too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import swaps
import torch
from click.testing import CliRunner, Result
from swaps import swapped, trained

from edgeomni.cli import main
from edgeomni.errors import CheckpointError, UsageError
from edgeomni.export import export_bundle
from edgeomni.gate.judge import GateOptions
from edgeomni.model import checkpoints


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return swaps.shelf(tmp_path_factory.mktemp("swaps"))


def edgeomni(*args: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_provenance_says_where_the_parts_come_from_and_what_waits(shelf: Path) -> None:
    old = trained(shelf)
    old.licences = {"encoder": "A", "llm": "B", "codec": "C"}
    old.provenance["limit"] = "short-sighted"
    model = swapped(shelf, old, codec="snac-2").model
    facts = model.provenance
    assert (facts["weights"], facts["kind"], facts["swapped_from"]) == ("random", "swapped", "abc")
    assert (facts["untrained"], facts["stages"]) == ("audio rows", "1, 3")
    assert facts["source"] == "ours; swapped: codec snac-2" and facts["limit"] == "short-sighted"
    assert model.licences == {"encoder": "A", "llm": "B", "codec": "not stated (snac-2)"}
    hashes = {facts["source_hash"]}
    for changes in ({"codec": "snac"}, {"codec": "snac-2", "seed": 1}, {"encoder": "whisper-2"}):
        hashes.add(swapped(shelf, trained(shelf), **changes).model.provenance["source_hash"])
    assert len(hashes) == 4 and all(len(h) == 64 for h in hashes)


def test_an_llm_with_a_sliding_window_limits_the_context_anew(shelf: Path, tmp_path: Path) -> None:
    window = Path(shutil.copytree(shelf / "llm", tmp_path / "window"))
    config = json.loads((window / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 80, "max_window_layers": 1, "layer_types": None}
    (window / "config.json").write_text(json.dumps(config))
    old = trained(shelf)
    old.provenance["limit"] = "the old LLM's"
    model = swapped(tmp_path, old, llm="window").model
    assert model.spec.context == 80 and "last 80 frames" in model.provenance["limit"]
    old = trained(shelf)
    old.provenance["limit"] = "the old LLM's"
    assert "limit" not in swapped(shelf, old, llm="llm-2").model.provenance


@pytest.mark.parametrize(
    ("before", "stages", "untrained"),
    [
        ({"weights": "trained", "stages": "2", "untrained": ""}, [1], ["adapter"]),
        ({"weights": "random", "stages": "1, 3", "untrained": "audio rows"}, [1, 3], ["adapter", "audio rows"]),
        (
            {"weights": "random", "untrained": "special tokens, tongue"},
            [1, 2, 3],
            ["adapter", "special tokens", "tongue"],
        ),
        ({}, [1, 2, 3], ["adapter"]),
    ],
)
def test_what_the_checkpoint_still_waited_for_stays(
    shelf: Path, before: dict[str, Any], stages: list[int], untrained: list[str]
) -> None:
    old = trained(shelf)
    old.provenance = before
    notes = swapped(shelf, old, encoder="whisper-2").notes
    assert (list(notes.stages), notes.untrained) == (stages, untrained)
    if len(stages) > 1:
        assert notes.stages[3] == ["the checkpoint that was swapped from had not been trained in it"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "nothing to swap: give --encoder, --llm or --codec"),
        ({"encoder": "whisper-2", "streams": 3}, "--streams is for a Mimi codec: give --codec"),
        ({"codec": "snac-2", "adapter": "linear"}, "--adapter goes with --encoder or --llm"),
        ({"encoder": "whisper-2", "adapter": "swiglu"}, "it fits and is kept; leave --adapter out"),
        ({"encoder": "whisper-2", "tts_layers": 1}, "--tts-layers goes with --llm"),
        ({"llm": "llm-2", "tts_layers": 101}, "0 to 100 layers, not 101"),
        ({"llm": "llm-2", "seed": -1}, "seed"),
    ],
)
def test_swaps_that_make_no_sense(shelf: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        swapped(shelf, trained(shelf), **how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"encoder": "snac"}, "snac: config.json has no model_type; encoder types supported are whisper"),
        ({"llm": "whisper"}, "LLM type 'whisper'; supported are llama, mistral, qwen2, qwen3"),
        ({"codec": "llm"}, "codec type 'qwen2'; supported are snac, mimi"),
        ({"codec": "mimi", "streams": 9}, "9 streams"),
        ({"codec": "no/such"}, "no/such: no such file or directory"),
    ],
)
def test_parts_of_the_wrong_kind_are_named(shelf: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        swapped(shelf, trained(shelf), **how)


def test_a_part_whose_tensors_do_not_fit_its_configuration(shelf: Path, tmp_path: Path) -> None:
    for part, option, key in (
        ("whisper-2", "encoder", "encoder_ffn_dim"),
        ("llm-2", "llm", "intermediate_size"),
        ("snac-2", "codec", "codebook_dim"),
    ):
        bad = Path(shutil.copytree(shelf / part, tmp_path / part))
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, key: config[key] * 2}))
        with pytest.raises(CheckpointError, match=rf"(?s){part}: .*wrong shape"):
            swapped(tmp_path, trained(shelf), **{option: part})


# --- the command


def test_init_swaps_parts_of_a_checkpoint_and_says_what_waits(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    start = checkpoints.save(old, tmp_path / "old")
    result = edgeomni("init", "--from", start, "--codec", shelf / "mimi", "--streams", 3, "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    for line in (
        "codec: replaced by mimi",
        "adapter: kept",
        "stage 1 must be run again: the audio rows are new",
        "stage 3 must be run again: spoken answers",
        "new: written",
    ):
        assert line in result.stderr
    assert "stage 2" not in result.stderr and result.stdout == ""
    new, words = checkpoints.load(tmp_path / "new"), old.spec.layout.text_vocab
    assert new.spec.codec.kind == "mimi" and new.spec.codec.streams == 3
    assert torch.equal(new.embedding.weight[:words], old.embedding.weight[:words])
    assert new.provenance["swapped_from"] == checkpoints.load(start).provenance["source_hash"]
    shown = edgeomni("inspect", tmp_path / "new")
    assert shown.exit_code == 0 and "not trained yet are audio rows" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to swap"),
        (["--preset", "tiny", "--random"], "--preset and --recipe draw new ones; choose one"),
        (["--llm", "x", "--recipe"], "choose one"),
        (["--codec", "x", "--tts-layers", "1"], "--tts-layers goes with --llm"),
    ],
)
def test_init_refuses_before_anything_is_read(args: list[str], said: str, tmp_path: Path) -> None:
    result = edgeomni("init", "--from", tmp_path / "nowhere", *args, "-o", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_none_cannot_be_swapped_from(shelf: Path, tmp_path: Path) -> None:
    result = edgeomni("init", "--from", tmp_path / "nowhere", "--llm", shelf / "llm", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "no such checkpoint directory" in result.stderr


def test_a_swapped_model_is_exported(shelf: Path, tmp_path: Path) -> None:
    model = swapped(shelf, trained(shelf, llm="llama", tts_layers=1), llm="wide", codec="mimi", streams=2).model
    loaded = checkpoints.load(checkpoints.save(model, tmp_path / "saved"))
    bundle = export_bundle(loaded, tmp_path / "bundle", precision="fp32", threads=1, gate=GateOptions())
    assert bundle.manifest.gate["passed"] is True and bundle.spec == model.spec
    assert bundle.manifest.provenance["stages"] == "1, 2, 3"


def with_other_tensors(shelf: Path, folder: Path, start: str) -> Path:
    """The codec "snac" with every tensor whose name begins with `start` half as large again."""
    file = Path(shutil.copytree(shelf / "snac", folder)) / "pytorch_model.bin"
    state = torch.load(file)
    assert any(name.startswith(start) for name in state)
    torch.save({n: t * 1.5 if n.startswith(start) else t for n, t in state.items()}, file)
    return folder


def test_a_codec_with_another_decoder_alone_leaves_nothing_to_train(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    rows, encoder = old.audio_rows().clone(), old.codec.encoder.state_dict()
    decoder = with_other_tensors(shelf, tmp_path / "decoder", "decoder.")
    found = swapped(tmp_path, old, codec=decoder.name)
    facts = found.model.provenance
    assert (facts["weights"], facts["untrained"], facts["stages"]) == ("trained", "", "")
    assert "same codes" in found.notes.parts["codec"] and not found.notes.stages
    assert torch.equal(found.model.audio_rows(), rows)
    wanted = torch.load(decoder / "pytorch_model.bin")
    assert all(torch.equal(t, wanted[f"decoder.{n}"]) for n, t in found.model.codec.decoder.state_dict().items())
    assert all(torch.equal(t, encoder[n]) for n, t in found.model.codec.encoder.state_dict().items())


@pytest.mark.parametrize("start", ["encoder.", "quantizer."])
def test_a_codec_with_other_codes_has_to_be_learned(shelf: Path, tmp_path: Path, start: str) -> None:
    other = with_other_tensors(shelf, tmp_path / "other", start)
    found = swapped(tmp_path, trained(shelf), codec=other.name)
    assert list(found.notes.stages) == [1, 3] and found.model.provenance["weights"] == "random"


def test_a_decoder_does_not_finish_what_still_waited(shelf: Path, tmp_path: Path) -> None:
    old = trained(shelf)
    old.provenance = {"weights": "random", "stages": "2", "untrained": "special tokens"}
    with_other_tensors(shelf, tmp_path / "decoder", "decoder.")
    facts = swapped(tmp_path, old, codec="decoder").model.provenance
    assert (facts["weights"], facts["untrained"], facts["stages"]) == ("random", "special tokens", "2")
