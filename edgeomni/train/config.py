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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ..chat import ChatSpec
from ..errors import TrainError
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


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from. Paths are relative to the configuration's folder.

    `validation` "" splits off `validation_share` of the training samples. `text`: held-out samples of task tt, on
    which the text ability is measured before and after. `max_bad`: samples that may be unusable before the run stops.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    validation_share: float = 0.0
    validation_limit: int = 0
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
    head distinguishes; `ctc_head`: a head that an earlier run trained (RUN/ctc.safetensors). `match`: weight of
    how far the LLM's input for a sound is from that for the written words which the CTC head hears in it
    (trainable.py); for units that are one id each."""

    text: float = 1.0
    audio: float = 1.0
    first_codebook: float = 1.0
    ctc: float = 0.0
    ctc_units: Literal["characters", "words"] = "characters"
    ctc_head: str | None = None
    match: float = 0.0


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
        if (warmup := self.optimizer.warmup) is not None and warmup > 1:
            raise TrainError(f"optimizer.warmup is {warmup}, and is a share of the steps: from 0 to 1")
        if not 0 <= self.data.validation_share < 1:
            raise TrainError(f"data.validation_share is {self.data.validation_share}, and must be from 0 to below 1")

    def _numbers(self) -> Iterable[tuple[str, float, float]]:
        o, r, p, d, w = self.optimizer, self.run, self.peft, self.data, self.loss
        yield from (
            (f"optimizer.{n}", getattr(o, n), 1)
            for n in ("steps", "batch", "accumulate", *(["max_frames"] if o.max_frames is not None else []))
        )
        yield from ((f"optimizer.{n}", getattr(o, n) or 0, 0) for n in ("lr", "warmup", "weight_decay", "clip"))
        yield from ((f"loss.{n}", getattr(w, n), 0) for n in ("text", "audio", "first_codebook", "ctc", "match"))
        yield from ((f"run.{n}", getattr(r, n), 1) for n in ("log_every", "save_every", "keep"))
        yield from ((f"run.{n}", getattr(r, n), 0) for n in ("validate_every", "patience"))
        yield from (("peft.rank", p.rank, 1), ("peft.alpha", p.alpha, 1), ("peft.dropout", p.dropout, 0))
        yield from (
            ("data.max_bad", d.max_bad, 0),
            ("data.validation_limit", d.validation_limit, 0),
            ("data.workers", d.workers, 0),
            ("seed", self.seed, 0),
        )
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
    if config.stage == "ctc":  # an LLM that is not taught yet has nothing to say about what the encoder hears
        loss = replace(loss, ctc=loss.ctc or 1.0, text=0.0, audio=0.0)
    return replace(
        config, tasks=stage_tasks(config), learn=replace(config.learn, **dict(modes)), optimizer=optimizer, loss=loss
    )
