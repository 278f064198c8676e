"""Every checkpoint source gives the same kind of model; bad ones are refused with everything named at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mini_omni_reference
import numpy as np
import pytest
import torch
import yaml
from conftest import Golden
from safetensors.torch import load_file, save_file

from edgeomni.errors import CheckpointError, UsageError
from edgeomni.model import checkpoints


def same_logits(a: Any, b: Any) -> bool:
    layout = a.spec.layout
    ids = torch.arange((layout.streams + 1) * 5).reshape(1, layout.streams + 1, 5) % layout.joint_vocab
    with torch.inference_mode():
        return all(torch.equal(x, y) for x, y in zip(a(ids), b(ids), strict=True))


@pytest.fixture
def released(golden: Golden, tmp_path: Path) -> Path:
    """A copy of the golden layout, to be altered."""
    return Path(shutil.copytree(golden.path, tmp_path / "released"))


def alter_lit(directory: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(directory / "lit_model.pth", weights_only=True)
    change(state)
    torch.save(state, directory / "lit_model.pth")
    return state


def alter_config(directory: Path, **values: Any) -> dict[str, Any]:
    path = directory / "model_config.yaml"
    config = {**yaml.safe_load(path.read_text()), **values}
    path.write_text(yaml.safe_dump(config))
    return config


# Our own directory


def test_round_trip(tiny_model: Any, tiny_dir: Path) -> None:
    again = checkpoints.load(tiny_dir)
    assert checkpoints.kind_of(tiny_dir) == "edgeomni"
    assert again.spec == tiny_model.spec and again.tokenizer_json == tiny_model.tokenizer_json
    assert again.state_dict().keys() == tiny_model.state_dict().keys()
    assert again.provenance["weights"] == "random" and again.licences == tiny_model.licences
    assert same_logits(again, tiny_model)


def test_released_layout_survives_saving(golden_model: Any, tmp_path: Path) -> None:
    saved = checkpoints.load(checkpoints.save(golden_model, tmp_path / "saved"))
    assert saved.provenance["weights"] == "trained" and same_logits(saved, golden_model)


def test_saving_twice_gives_the_same_bytes(tiny_model: Any, tiny_dir: Path, tmp_path: Path) -> None:
    again = checkpoints.save(tiny_model, tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (tiny_dir / name).read_bytes(), name


def test_existing_path_needs_force(tiny_model: Any, tmp_path: Path) -> None:
    target = checkpoints.save_preset("tiny", 3, tmp_path / "model")
    with pytest.raises(UsageError, match="--force"):
        checkpoints.save(tiny_model, target)
    checkpoints.save(tiny_model, target, force=True)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_save_leaves_the_older_one(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    target = tmp_path / "model"
    checkpoints.save_preset("tiny", 3, target)

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt):
        checkpoints.save(tiny_model, target, force=True)
    assert os.listdir(tmp_path) == ["model"] and checkpoints.kind_of(target) == "preset"


def test_all_misfits_of_our_own_directory_are_named_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(tiny_dir, tmp_path / "bad"))
    state = load_file(bad / "model.safetensors")
    del state["body.norm.weight"]
    state["embedding.weight"] = state["embedding.weight"][:-1].clone()
    state["stray"] = torch.zeros(1)
    save_file(state, bad / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(bad)
    for text in ("missing: body.norm.weight", "wrong shape: embedding.weight", "unexpected: stray"):
        assert text in str(caught.value)


# Presets


def test_presets_repeat_and_differ_by_seed(tiny_model: Any, tmp_path: Path) -> None:
    recipe = checkpoints.save_preset("tiny", 0, tmp_path / "recipe")
    assert checkpoints.kind_of(recipe) == "preset"
    assert same_logits(checkpoints.load(recipe), tiny_model)
    assert not same_logits(checkpoints.preset("tiny", 1), tiny_model)


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="huge"):
        checkpoints.preset("huge")


def test_preset_speaks_and_prints(tiny_model: Any) -> None:
    codes = [torch.randint(tiny_model.spec.codec.codebook_size, (1, 6 * n)) for n in (1, 2, 4)]
    wave = tiny_model.decode_codes(codes)
    assert 0.02 < wave.std() < 0.6 and wave.abs().max() < 1
    words = json.loads(tiny_model.tokenizer_json)["model"]["vocab"]
    assert len(words) == tiny_model.spec.layout.eot and all(w.isprintable() and w for w in words)


# The released layout


def check_against_reference(directory: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    model = checkpoints.load(directory)
    layout = model.spec.layout
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(layout.joint_vocab, (1, layout.streams + 1, 9), generator=generator)
    features = torch.randn(4, model.spec.encoder.width, generator=generator)
    with torch.inference_mode():
        text, audio = model(ids, [(1, model.adapter(features))])
    expected_text, expected_audio = mini_omni_reference.logits(state, config, ids, features)
    assert (text[0] - expected_text).abs().max() < 1e-4
    assert (audio[0].flatten(1) - expected_audio).abs().max() < 1e-4


def test_reference_agrees_on_the_layout_itself(released: Path) -> None:
    check_against_reference(released, alter_lit(released, lambda _: None), alter_config(released))


def test_untied_heads_and_padded_vocabulary(released: Path) -> None:
    def untie(state: dict[str, Any]) -> None:
        table = state["transformer.wte.weight"]
        state["transformer.wte.weight"] = torch.cat([table, torch.zeros(24, table.shape[1])])
        state["lm_head.weight"] = torch.randn(len(table) + 24, table.shape[1], generator=torch.Generator())

    state = alter_lit(released, untie)
    config = alter_config(released, tie_word_embeddings=False, padded_vocab_size=len(state["lm_head.weight"]))
    check_against_reference(released, state, config)
    saved = checkpoints.save(checkpoints.load(released), released.parent / "saved")
    assert same_logits(checkpoints.load(saved), checkpoints.load(released))


def test_linear_adapter(released: Path) -> None:
    def linear(state: dict[str, Any]) -> None:
        out, hidden = state.pop("whisper_adapter.proj.weight").shape
        width = state.pop("whisper_adapter.fc_1.weight").shape[1]
        del state["whisper_adapter.fc_2.weight"], hidden
        state["whisper_adapter.weight"] = torch.randn(out, width) / 8
        state["whisper_adapter.bias"] = torch.randn(out)

    check_against_reference(released, alter_lit(released, linear), alter_config(released, asr_adapter="mlp"))


def add_tts(state: dict[str, Any]) -> None:
    for name in [n for n in state if n.startswith("transformer.h.0.")]:
        noise = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(len(name)))
        state[name.replace("h.0.", "post_adapter.0.")] = state[name] + noise * 0.05
    width = state["transformer.ln_f.weight"].shape[0]
    state["transformer.post_adapter_audio_ln.weight"] = torch.rand(width) + 0.5
    state["transformer.post_adapter_audio_lm_head.weight"] = torch.randn(7 * 128, width)


def test_tts_adapter(released: Path) -> None:
    config = alter_config(released, post_adapter=True, post_adapter_layers=1)
    check_against_reference(released, alter_lit(released, add_tts), config)


def test_tts_adapter_in_the_config_alone_is_off(released: Path, golden_model: Any) -> None:
    """As the published loader does it, which always switches it off."""
    alter_config(released, post_adapter=True)
    assert same_logits(checkpoints.load(released), golden_model)


def test_wrapped_half_precision_and_other_file_names(released: Path, golden_model: Any) -> None:
    state = torch.load(released / "lit_model.pth", weights_only=True)
    del state["lm_head.weight"]
    torch.save({"model": {n: t.half() for n, t in state.items()}}, released / "lit_model.pth")
    (released / "small.pt").rename(released / "base.pt")
    for file in (released / "snac").iterdir():
        file.rename(released / file.name)
    model = checkpoints.load(released)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (model.embedding.weight - golden_model.embedding.weight).abs().max() < 2e-3


def test_all_misfits_of_the_released_layout_are_named_at_once(released: Path) -> None:
    def spoil(state: dict[str, Any]) -> None:
        del state["transformer.h.0.norm_1.weight"]
        state["transformer.h.1.attn.attn.weight"] = state["transformer.h.1.attn.attn.weight"][:-1]
        state["transformer.h.9.norm_1.weight"] = torch.zeros(1)

    alter_lit(released, spoil)
    whisper = torch.load(released / "small.pt", weights_only=True)
    del whisper["model_state_dict"]["encoder.ln_post.bias"]
    torch.save(whisper, released / "small.pt")
    codec = torch.load(released / "snac" / "pytorch_model.bin", weights_only=True)
    codec["stray"] = torch.zeros(2)
    torch.save(codec, released / "snac" / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(released)
    for text in (
        "missing: transformer.h.0.norm_1.weight",
        "wrong shape: transformer.h.1.attn.attn.weight",
        "unexpected: transformer.h.9.norm_1.weight",
        "missing: encoder.ln_post.bias",
        "unexpected: stray",
    ):
        assert text in str(caught.value)


def test_all_missing_files_are_named_at_once(released: Path) -> None:
    (released / "tokenizer.json").unlink()
    (released / "small.pt").unlink()
    shutil.rmtree(released / "snac")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(released)
    for name in ("tokenizer.json", "small.pt", "snac/config.json", "snac/pytorch_model.bin"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"norm_class_name": "LayerNorm", "rotary_percentage": 0.5}, "rotary_percentage is 0.5"),
        ({"asr_adapter": "conv"}, "asr_adapter 'conv'"),
        ({"cat_audio_vocab_size": 640}, "cat_audio_vocab_size 640"),
        ({"n_embd": None}, "n_embd missing"),
        ({"n_query_groups": 3}, "not a multiple"),
        ({"text_vocab_size": 32}, "text_vocab 32"),
    ],
)
def test_configurations_that_make_no_sense(released: Path, values: dict[str, Any], said: str) -> None:
    alter_config(released, **values)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.load(released)


# Damage


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("file", ["lit_model.pth", "small.pt", "snac/pytorch_model.bin"])
def test_pickles_that_hold_more_than_weights_are_refused(released: Path, file: str) -> None:
    torch.save({"x": Evil()}, released / file)
    with pytest.raises(CheckpointError, match=f"{file}: a pickle that holds more than weights"):
        checkpoints.load(released)


@pytest.mark.parametrize("file", ["lit_model.pth", "small.pt", "snac/pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_files(released: Path, file: str, keep: float) -> None:
    path = released / file
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=f"{file}: damaged or truncated"):
        checkpoints.load(released)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_safetensors(tiny_dir: Path, tmp_path: Path, keep: float) -> None:
    bad = Path(shutil.copytree(tiny_dir, tmp_path / "bad"))
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        checkpoints.load(bad)


def test_what_is_no_checkpoint(tmp_path: Path, tiny_dir: Path) -> None:
    assert checkpoints.kind_of(tmp_path) is None and checkpoints.kind_of(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no checkpoint layout"):
        checkpoints.load(tmp_path)
    bad = Path(shutil.copytree(tiny_dir, tmp_path / "bad"))
    (bad / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        checkpoints.load(bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        checkpoints.load(bad)


def reconfigured(tiny_dir: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    bad = Path(shutil.copytree(tiny_dir, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    change(config)
    (bad / "config.json").write_text(json.dumps(config))
    return bad


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(version="2.0"), r"\$\.version: .*'2.0' is newer than 1.1.*; update EdgeOmni"),
        (lambda c: c.update(version="0.9"), r"\$\.version: .*'0.9' is older than 1.1.*edgeomni init"),
        (lambda c: c.pop("licences"), "missing required field `licences`"),
        (lambda c: c.update(colour=1), r"unknown key\(s\) \$\.colour"),
        (lambda c: c["codec"].update(colour=1), r"unknown key\(s\) \$\.codec\.colour"),
        (lambda c: c["codec"].update(decoder_dim="wide"), r"\$\.codec\.decoder_dim: Expected `int"),
        (lambda c: c["codec"].update(decoder_dim=10**9), r"\$\.codec\.decoder_dim: Expected `int` <="),
        (lambda c: c["codec"].update(decoder_dim=1 << 16), r"wrong shape: codec\.decoder"),
        (lambda c: c["codec"].update(sampling_rate=16000), r"\$\.codec is .*16000.*\$\.spec\.codec is .*24000"),
        (lambda c: c["codec"].update(kind="dac"), r"\$\.codec\.kind: "),
        (lambda c: c["spec"]["body"].update(layers=10**9), r"\$\.spec\.body: body\.layers is 1000000000, but no"),
        (
            lambda c: c["spec"]["body"].update(layers=1000),
            r"number of layers is \d+, and the weights hold \d+ tensors in all",
        ),
        (lambda c: c["spec"]["body"].update(width=1 << 16, head_dim=1 << 14), "wrong shape: body"),
        (lambda c: c["spec"]["layout"].update(text_vocab=10**12), r"layout\.text_vocab is 1000000000000, but no"),
        (lambda c: c["spec"]["body"].update(rope_scaling={"rope_type": "odd"}), "no model can be built of"),
        (lambda c: c["provenance"].update(weights=3), r"\$\.provenance\.weights: "),
        (lambda c: c.update(preset="huge"), "unknown key"),
    ],
)
def test_configurations_of_our_own_that_make_no_sense(
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    """All are refused before the weights are read, and before anything of the stated sizes is allocated."""
    bad = reconfigured(tiny_dir, tmp_path, change)
    monkeypatch.setattr(checkpoints, "read_safetensors", None)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoints.load(bad)
    assert str(bad) in str(caught.value)


def test_the_first_version_and_newer_minor_ones_are_read(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoints.load(reconfigured(tiny_dir, tmp_path, lambda c: c.update(version=1))).provenance
    (tmp_path / "newer").mkdir()
    newer = reconfigured(tiny_dir, tmp_path / "newer", lambda c: c.update(version="1.4", mood="good"))
    with caplog.at_level("WARNING", "edgeomni"):
        assert checkpoints.load(newer).spec == checkpoints.load(tiny_dir).spec
    assert [("$.mood" in r.getMessage(), "config.json" in r.getMessage()) for r in caplog.records] == [(True, True)]


@pytest.mark.parametrize(
    ("values", "said"),
    [({"preset": "huge"}, "no preset 'huge'; known are"), ({"seed": "x"}, r"\$\.seed: Expected `int`")],
)
def test_recipes_that_make_no_sense(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    path = checkpoints.save_preset("tiny", 3, tmp_path / "recipe") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=f"config.json: .*{said}"):
        checkpoints.load(tmp_path / "recipe")


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a":' * 100_000, b"\xff"])
def test_a_damaged_configuration_is_not_called_an_unknown_layout(tiny_dir: Path, tmp_path: Path, raw: bytes) -> None:
    bad = Path(shutil.copytree(tiny_dir, tmp_path / "bad"))
    (bad / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"config\.json: (the file is empty|not valid JSON|is not UTF-8)"):
        checkpoints.load(bad)


def test_golden_text_reaches_the_tokenizer(golden: Golden, golden_model: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ids = tokenizers.Tokenizer.from_str(golden_model.tokenizer_json).encode(golden.meta["text"]).ids
    assert np.array_equal(ids, golden["text_ids"])


def test_force_replaces_a_checkpoint_and_nothing_else(tiny_model: Any, tmp_path: Path) -> None:
    target = checkpoints.save(tiny_model, tmp_path / "checkpoint")
    checkpoints.save(tiny_model, target, force=True)
    for other in (tmp_path / "photos", tmp_path / "note.txt"):
        other.mkdir() if not other.suffix else other.write_text("mine")
        if other.is_dir():
            (other / "me.jpg").write_bytes(b"mine")
        with pytest.raises(UsageError, match="is no checkpoint that EdgeOmni wrote, so --force does not overwrite it"):
            checkpoints.save(tiny_model, other, force=True)
        assert other.exists()


@pytest.mark.parametrize("name", ["model_config.yaml", "lit_model.pth", "config.json", "model.safetensors"])
def test_one_file_with_a_known_name_does_not_make_a_checkpoint(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / name).write_text("{}")
    (home / "thesis.txt").write_text("mine")
    for check in (checkpoints.check_target, lambda d, force: checkpoints.save_preset("tiny", 0, d, force=force)):
        with pytest.raises(UsageError, match="is no checkpoint that EdgeOmni wrote"):
            check(home, force=True)
    assert sorted(p.name for p in home.iterdir()) == sorted([name, "thesis.txt"])


def test_released_checkpoints_are_not_ours_to_replace(released: Path, tiny_model: Any) -> None:
    with pytest.raises(UsageError, match="is no checkpoint that EdgeOmni wrote"):
        checkpoints.save(tiny_model, released, force=True)
    assert checkpoints.kind_of(released) == "mini-omni"


def test_a_checkpoint_that_also_holds_other_files_is_refused_by_name(tmp_path: Path) -> None:
    target = checkpoints.save_preset("tiny", 3, tmp_path / "model")
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "e.txt"):
        (target / name).write_text("mine")
    with pytest.raises(UsageError, match=r"also holds a\.txt, b\.txt, c\.txt and 2 more, which EdgeOmni did not"):
        checkpoints.save_preset("tiny", 4, target, force=True)
    assert len(list(target.iterdir())) == 6 and json.loads((target / "config.json").read_text())["seed"] == 3


def test_what_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, target = checkpoints._write_config, tmp_path / "model"

    def slow(stage: Path, config: Any) -> None:
        write(stage, config)
        target.mkdir()

    monkeypatch.setattr(checkpoints, "_write_config", slow)
    with pytest.raises(UsageError, match="appeared meanwhile"):
        checkpoints.save_preset("tiny", 3, target)
    assert list(tmp_path.rglob("*")) == [target]


def test_the_umask_holds_for_every_file_of_a_checkpoint(tiny_model: Any, tmp_path: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            target = checkpoints.save(tiny_model, tmp_path / f"{umask:o}")
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in target.iterdir()} == {0o666 & ~umask}
        assert target.stat().st_mode & 0o777 == 0o777 & ~umask
