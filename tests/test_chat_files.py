"""Chat templates in a checkpoint's config.json and in a bundle's manifest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fakes import small_bundle, small_spec

from edgeomni import Bundle
from edgeomni.chat import ChatSpec
from edgeomni.errors import CheckpointError
from edgeomni.model import checkpoints

CHAT = ChatSpec("[{system}]", "Q {question}", "be short", ("stop", "no"))


def test_a_checkpoint_keeps_its_template_and_older_ones_have_none(tiny_dir: Path, tmp_path: Path) -> None:
    model = checkpoints.load(tiny_dir)
    plain = model.spec
    model.spec = dataclasses.replace(plain, chat=CHAT)
    path = checkpoints.save(model, tmp_path / "with") / "config.json"
    assert checkpoints.load(path.parent).spec.chat == CHAT
    config = json.loads(path.read_text())
    assert config["version"] == "1.1" and config["spec"]["chat"]["stop_words"] == ["stop", "no"]

    config["version"] = "1.0"
    del config["spec"]["chat"]
    path.write_text(json.dumps(config))
    assert checkpoints.load(path.parent).spec == plain


def test_a_bundle_keeps_its_template_and_older_ones_have_none(tmp_path: Path) -> None:
    root = small_bundle(tmp_path / "bundle", small_spec(chat=CHAT))
    assert Bundle.open(root).spec.chat == CHAT
    manifest = json.loads((root / "bundle.json").read_text())
    assert manifest["schema"] == "2.2"

    manifest["schema"] = "2.0"
    del manifest["spec"]["chat"]
    (root / "bundle.json").write_text(json.dumps(manifest))
    assert Bundle.open(root).spec == small_spec()


def test_a_damaged_template_is_refused_with_its_key(tiny_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_dir / "config.json").read_text())
    for chat, said in (
        ({"system_format": "x"}, r"\$\.spec\.chat: chat\.system_format must be a text that holds"),
        ({"stop_words": "x"}, r"\$\.spec\.chat\.stop_words: Expected `array`, got `str`"),
        ({"mood": "good"}, r"unknown key\(s\) \$\.spec\.chat\.mood"),
    ):
        config["spec"]["chat"] = chat
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=said):
            checkpoints.load(tmp_path)
