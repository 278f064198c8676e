"""Configurations as files: TOML read, changed from the command line, written again, and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TrainError, UsageError
from ..schema import Source, parse_toml, read_bytes, typed
from ..shipped import found
from .config import TrainConfig

_REMEDY = "correct it (docs/train.md lists all keys)"


def read_config(path: Path, changes: Iterable[str] = (), *, anchored: bool = True) -> TrainConfig:
    """A TOML document, with `changes` ("optimizer.lr=1e-4") on top.

    Its relative paths count from its own folder, those of `changes` (and, without `anchored`, all) from the working
    directory. Raises TrainError that names the file and the key at fault, UsageError for a change that is no
    `section.key=value`.
    """
    source = Source(str(path), TrainError, _REMEDY)
    data = parse_toml(read_bytes(path, source), source)
    if anchored:
        _anchor(data, path.parent)
    for change in changes:
        set_key(data, change)
    return _typed(data, source)


def from_changes(data: dict[str, Any], changes: Iterable[str] = ()) -> TrainConfig:
    """The same without a file: plain data, with `changes` on top."""
    for change in changes:
        set_key(data, change)
    return _typed(data, Source("--set", TrainError, _REMEDY))


def _typed(data: dict[str, Any], source: Source) -> TrainConfig:
    if isinstance(data.get("stage"), int):  # `stage = 1` is what people write
        data["stage"] = str(data["stage"])
    return typed(data, TrainConfig, source)


def set_key(data: dict[str, Any], change: str) -> None:
    """`section.key=value` into plain data; the value is TOML, or a text where it is not ("run.precision=bf16")."""
    name, equals, text = change.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise UsageError(f"--set {change!r} is not of the form section.key=value")
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UsageError(f"--set {change!r}: {key} is no section")
    data[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    source = Source("--set", TrainError, _REMEDY)
    try:
        return parse_toml(f"value = {text}".encode(), source)["value"]
    except TrainError:
        return text


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Makes the document's relative paths relative to its own folder."""
    section, loss = data.get("data"), data.get("loss")
    if isinstance(data.get("checkpoint"), str) and data["checkpoint"]:
        data["checkpoint"] = str(folder / found(data["checkpoint"], "checkpoint", folder))
    if isinstance(section, dict):
        for key in ("train", "validation", "text"):
            if isinstance(section.get(key), list):
                section[key] = [str(folder / p) if isinstance(p, str) else p for p in section[key]]
    for table, key in ((loss, "ctc_head"), (data.get("augment"), "noise_folder")):
        if isinstance(table, dict) and isinstance(table.get(key), str) and table[key]:
            table[key] = str(folder / table[key])


def absolute(config: TrainConfig) -> TrainConfig:
    """The same with absolute paths, so that RUN/config.toml means the same from everywhere."""
    data, loss, augment = config.data, config.loss, config.augment
    return replace(
        config,
        checkpoint=config.checkpoint and os.path.abspath(found(config.checkpoint, "checkpoint")),
        data=replace(data, train=_all(data.train), validation=_all(data.validation), text=_all(data.text)),
        loss=replace(loss, ctc_head=loss.ctc_head and os.path.abspath(loss.ctc_head)),
        augment=replace(augment, noise_folder=augment.noise_folder and os.path.abspath(augment.noise_folder)),
    )


def _all(paths: Iterable[str]) -> list[str]:
    return [os.path.abspath(path) for path in paths]


def to_toml(config: Any) -> str:
    """A configuration (a dataclass of dataclasses) as the TOML document that it is read from; None is left out."""
    plain = asdict(config)
    lines = [f"{key} = {_literal(value)}" for key, value in plain.items() if not _is_table(value) and value is not None]
    for key, value in plain.items():
        if _is_table(value):
            lines += ["", f"[{key}]", *(f"{k} = {_literal(v)}" for k, v in value.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _literal(value: Any) -> str:
    """A TOML value: JSON's texts, numbers and lists are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Key path -> the two values, of all keys in which two configurations differ."""
    return dict(_differing("", a, b))


def _differing(prefix: str, a: Any, b: Any) -> Iterable[tuple[str, tuple[Any, Any]]]:
    for one in fields(a):
        left, right, name = getattr(a, one.name), getattr(b, one.name), f"{prefix}{one.name}"
        if is_dataclass(left) and is_dataclass(right):
            yield from _differing(f"{name}.", left, right)
        elif left != right:
            yield name, (left, right)
