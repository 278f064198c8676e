"""What a training run is told: a TOML document, typed; the defaults of each stage; and what was resolved of them.

    checkpoint = "ckpt"            # the model to begin with
    stage = "3"                    # "1", "2", "3", "end-to-end", or "ctc"
    [data]
    train = ["train.jsonl"]
    [optimizer]
    steps = 2000

Everything that a document leaves out is filled by `resolved`, so that RUN/config.toml is enough to repeat the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..chat import ChatSpec
from ..errors import TrainError, UsageError
from ..schema import Source, parse_toml, read_bytes, typed
from ..spec import TASKS, Task
from .augment import AugmentConfig

Stage = Literal["1", "2", "3", "end-to-end", "ctc"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Mode = Literal["freeze", "lora", "train"]
Part = Literal["encoder", "adapter", "words", "specials", "audio", "tts", "body"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What a stage freezes or teaches. `words`, `specials` and `audio` are blocks of rows of the embedding, together with
the rows of the heads for the same ids; `audio` includes the audio heads of their own where the model has them."""
LORA_PARTS: frozenset[Part] = frozenset({"encoder", "tts", "body"})
_REMEDY = "correct it (docs/train.md lists all keys)"


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from. Paths are relative to the configuration's folder.

    `validation` "" splits off `validation_share` of the training samples. `text`: held-out samples of task tt, on
    which the text ability is measured before and after. `max_bad`: samples that may be unusable before the run stops.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    validation_share: float = 0.0
    text: list[str] = field(default_factory=list)
    format: str | None = None
    max_bad: int = 10
    workers: int = 0


@dataclass(frozen=True)
class LearnConfig:
    """How each part learns; None is what the stage says (stages.py)."""

    encoder: Mode | None = None
    adapter: Mode | None = None
    words: Mode | None = None
    specials: Mode | None = None
    audio: Mode | None = None
    tts: Mode | None = None
    body: Mode | None = None


@dataclass(frozen=True)
class PeftConfig:
    """LoRA (arXiv 2106.09685) as peft computes it. `targets`: names of the linear layers that get one, [] for all."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)
    rslora: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `lr` None and `warmup` None are the stage's. `warmup`: share of the steps. `batch`: samples per step of
    one process; `accumulate`: such batches per update. `max_frames`: padded LLM frames of one batch at most."""

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    lr: float | None = None
    warmup: float | None = None
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    max_frames: int | None = None


@dataclass(frozen=True)
class LossConfig:
    """Weights of the cross-entropies: `text` for the text stream, `audio` shared by the audio streams, the first of
    which counts `first_codebook` times. `ctc`: weight of the CTC loss on the encoder, 0 for none; `ctc_units`: what its
    head distinguishes; `ctc_head`: a head that an earlier run trained (RUN/ctc.safetensors)."""

    text: float = 1.0
    audio: float = 1.0
    first_codebook: float = 1.0
    ctc: float = 0.0
    ctc_units: Literal["characters", "words"] = "characters"
    ctc_head: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """How the loop runs. Steps between logging, saving and validating; `patience`: validations without improvement
    after which the run stops (0: never); `keep`: saved states kept beside the best. `fsdp`: as transformers'
    TrainingArguments take it ("full_shard auto_wrap"), for several GPUs under torchrun."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 200
    validate_every: int = 0
    patience: int = 0
    keep: int = 2
    tensorboard: bool = False
    fsdp: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """One run. `tasks`: task -> weight in the mix; {} is the stage's. `chat` None keeps the checkpoint's own.

    `init` says what the checkpoint's LLM is: "base", or "sft" where it was taught to answer already, which makes the
    defaults careful: a lower learning rate, a longer warm-up, and text questions replayed.
    """

    stage: Stage = "3"
    checkpoint: str = ""
    init: Literal["base", "sft"] = "base"
    lora: bool = True
    seed: int = 0
    tasks: dict[str, float] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    run: RunConfig = field(default_factory=RunConfig)
    chat: ChatSpec | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise TrainError(f"tasks: unknown task(s) {', '.join(unknown)}; known are {', '.join(TASKS)}")
        for name, number, least in self._numbers():
            if not least <= number < float("inf"):
                raise TrainError(f"{name} is {number}, and must be a number from {least:g} up")
        self._check_intervals()
        if self.tasks and not sum(self.tasks.values()):
            raise TrainError("tasks: all weights are 0; give at least one task a weight")
        for part in set(PARTS) - LORA_PARTS:
            if getattr(self.learn, part) == "lora":
                raise TrainError(
                    f"learn.{part} cannot be lora, which is for {', '.join(sorted(LORA_PARTS))}; say train or freeze"
                )

    def _check_intervals(self) -> None:
        run = self.run
        if run.save_every % run.log_every:
            raise TrainError(
                f"run.save_every {run.save_every} must be a multiple of run.log_every {run.log_every}, so that a "
                "resumed run logs what an uninterrupted one does"
            )
        every = run.validate_every
        if every and (run.save_every % every or every % run.log_every):
            raise TrainError(
                f"run.validate_every {every} must divide run.save_every {run.save_every} and be a multiple of "
                f"run.log_every {run.log_every}, so that a run may go on from its best state"
            )
        if not 0 <= self.data.validation_share < 1:
            raise TrainError(f"data.validation_share is {self.data.validation_share}, and must be from 0 to below 1")

    def _numbers(self) -> Iterable[tuple[str, float, float]]:
        o, r, p, d, w = self.optimizer, self.run, self.peft, self.data, self.loss
        yield from (
            (f"optimizer.{n}", getattr(o, n), 1)
            for n in ("steps", "batch", "accumulate", *(["max_frames"] if o.max_frames is not None else []))
        )
        yield from ((f"optimizer.{n}", getattr(o, n) or 0, 0) for n in ("lr", "warmup", "weight_decay", "clip"))
        yield from ((f"loss.{n}", getattr(w, n), 0) for n in ("text", "audio", "first_codebook", "ctc"))
        yield from ((f"run.{n}", getattr(r, n), 1) for n in ("log_every", "save_every", "keep"))
        yield from ((f"run.{n}", getattr(r, n), 0) for n in ("validate_every", "patience"))
        yield from (("peft.rank", p.rank, 1), ("peft.alpha", p.alpha, 1), ("peft.dropout", p.dropout, 0))
        yield from (("data.max_bad", d.max_bad, 0), ("data.workers", d.workers, 0), ("seed", self.seed, 0))
        yield from ((f"tasks.{task}", weight, 0) for task, weight in self.tasks.items())


_PAPER_TASKS: dict[Stage, tuple[Task, ...]] = {
    "1": ("asr", "ta"),
    "2": ("tt", "at"),
    "3": ("aa", "at", "ta", "tt"),
    "end-to-end": TASKS,
    "ctc": ("asr",),
}
"""The tasks of each stage, as Mini-Omni has them (arXiv 2408.16725, section 3.3)."""
REPLAYED = 0.2
"""Share of text questions in the mix of a run from an SFT checkpoint, so that it does not forget how to answer them."""
_RATES = {"new": 1e-3, "lora": 2e-4, "train": 1e-4}
"""Learning rates: of parts that begin untrained, of LoRA, and of a whole LLM."""
_CAREFUL = 0.25
_WARMUP = {"base": 0.03, "sft": 0.1}


def stage_tasks(config: TrainConfig) -> dict[str, float]:
    """The mix: what the configuration says, else the stage's tasks with equal weights, and tt replayed after SFT."""
    if config.tasks:
        return dict(config.tasks)
    mix: dict[str, float] = dict.fromkeys(_PAPER_TASKS[config.stage], 1.0)
    if config.init == "sft" and config.stage != "ctc":
        others = len(mix) - ("tt" in mix)
        mix["tt"] = max(mix.get("tt", 0.0), others * REPLAYED / (1 - REPLAYED))
    return mix


def resolved(config: TrainConfig, modes: Mapping[Part, Mode]) -> TrainConfig:
    """The configuration with everything filled in that was left to the stage. `modes`: stages.modes_of."""
    body = modes["body"]
    rate = _RATES["new" if body == "freeze" else body]
    rate *= _CAREFUL if config.init == "sft" else 1
    given = config.optimizer
    optimizer = replace(
        given,
        lr=rate if given.lr is None else given.lr,
        warmup=_WARMUP[config.init] if given.warmup is None else given.warmup,
    )
    loss = config.loss
    if config.stage == "ctc" and not loss.ctc:
        loss = replace(loss, ctc=1.0)
    return replace(
        config, tasks=stage_tasks(config), learn=replace(config.learn, **dict(modes)), optimizer=optimizer, loss=loss
    )


def read_config(path: Path, changes: Iterable[str] = (), *, anchored: bool = True) -> TrainConfig:
    """A TOML document, with `changes` ("optimizer.lr=1e-4") on top.

    Its relative paths count from its own folder, those of `changes` (and, without `anchored`, all) from the working
    directory. Raises TrainError that names the file and the key at
    fault, UsageError for a change that is no `section.key=value`.
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
        data["checkpoint"] = str(folder / data["checkpoint"])
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
        checkpoint=config.checkpoint and os.path.abspath(config.checkpoint),
        data=replace(data, train=_all(data.train), validation=_all(data.validation), text=_all(data.text)),
        loss=replace(loss, ctc_head=loss.ctc_head and os.path.abspath(loss.ctc_head)),
        augment=replace(augment, noise_folder=augment.noise_folder and os.path.abspath(augment.noise_folder)),
    )


def _all(paths: Iterable[str]) -> list[str]:
    return [os.path.abspath(path) for path in paths]


def to_toml(config: TrainConfig) -> str:
    """The configuration as a TOML document that `read_config` reads back; None is left out."""
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


def differences(a: TrainConfig, b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Key path -> the two values, of all keys in which two configurations differ."""
    return dict(_differing("", a, b))


def _differing(prefix: str, a: Any, b: Any) -> Iterable[tuple[str, tuple[Any, Any]]]:
    for one in fields(a):
        left, right, name = getattr(a, one.name), getattr(b, one.name), f"{prefix}{one.name}"
        if is_dataclass(left) and is_dataclass(right):
            yield from _differing(f"{name}.", left, right)
        elif left != right:
            yield name, (left, right)
