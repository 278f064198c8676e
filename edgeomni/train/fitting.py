"""One training run, from a model and data to a trained model: `fit`."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback
from transformers import logging as transformers_logging

from ..data.sample import Sample
from ..errors import EdgeOmniError, TrainError
from ..model import checkpoints
from ..model.omni import OmniModel
from ..outputs import write_file
from ..spec import TASKS
from ..text import Tokenizer
from . import run as runs
from . import run_log
from .adapters import ctc_head_of, merged, prepared, save_adapter, trainable_numbers
from .augment import Augmenter
from .batching import BatchPlan
from .config import TrainConfig, resolved
from .config_file import absolute
from .ctc import CtcHead, CtcVocabulary
from .curves import draw_curves
from .dataset import BadSamples, Collator, Reader, Usable, usable
from .follow import Follow, Patience
from .loop import OmniTrainer, arguments, gather_weights
from .material import Data, HeldOut, check_stop_words, fingerprint, mix, read, split, trained_spec
from .prepare import encode_codes
from .progress import Progress
from .provenance import licences_of, provenance_of
from .run_log import RunLog
from .stages import Frozen, learning_table, modes_of, part_sizes
from .states import last_whole_state, remove_cut_off
from .text_ability import text_ability
from .trainable import TrainableOmni

logger = logging.getLogger("edgeomni")


@dataclass(frozen=True, eq=False)
class Trained:
    """The trained model, its run's folder (None where no folder was asked for), and the logged lines."""

    model: OmniModel
    folder: Path | None
    log: list[dict[str, Any]]


def fit(
    model: OmniModel,
    data: Data | None = None,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    validation: Data | None = None,
    resume: bool = False,
    show: Callable[[Table], None] = lambda _: None,
) -> Trained:
    """Trains `model` in place on `data` (samples, or what edgeomni.data.readers reads) and returns it.

    `out`: the run's folder, None for none. `data` and `validation` None: what the configuration says. `resume` goes on
    from the last state that is whole. `show` gets the table of what learns, before it begins.

    Raises TrainError for a configuration, data or state that does not fit, for a loss that is no finite number and for
    a full disk; DataError for data that cannot be used; UsageError where `out` may not be written. The last saved
    state stays usable.
    """
    asked = config or TrainConfig()
    settled = absolute(resolved(asked, modes_of(asked)))
    with ExitStack() as stack:
        stack.enter_context(_quiet_transformers())
        if out is None:
            folder = runs.RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            folder.states.mkdir()
        else:
            stack.enter_context(_disk_errors(Path(out)))
            folder = _folder(Path(out), settled, resume)
        if out is not None and not resume and first_process():
            stack.enter_context(runs.discarded_if_empty(folder))
        run = _Run(model, settled, folder, resume)
        trained = run.train(*run.samples(data, validation), asked.tasks, show)
        if out is not None and first_process():
            run.write(trained)
        return Trained(trained.model, None if out is None else folder.path, run_log.read(folder.log))


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What training gave: the merged model, and what else is written."""

    model: OmniModel
    wrapped: nn.Module
    origin: dict[str, Any]
    before: dict[str, Any] | None


class _Run:
    """What the steps of one run share: the model, the settled configuration, its folder, samples found bad."""

    def __init__(self, model: OmniModel, config: TrainConfig, folder: runs.RunFolder, resume: bool) -> None:
        self.omni, self.config, self.folder, self.resume = model, config, folder, resume
        self.bad = BadSamples(config.data.max_bad)
        self.text: list[Sample] = []

    def samples(self, data: Data | None, validation: Data | None) -> tuple[list[Sample], list[Sample]]:
        """Samples to learn from, and to validate on. Those for the text ability are read here too."""
        section, omni = self.config.data, self.omni
        learn = read(section.train if data is None else data, "data.train", section, omni)
        if self.config.init == "sft" and not section.text:
            logger.warning(
                "what the run forgets is not measured: name text questions and their answers in data.text (--text)"
            )
        if section.text:
            self.text = read(section.text, "data.text", section, omni)
        if validation is None and not section.validation:
            return split(learn, section.validation_share, self.config.seed)
        held = section.validation if validation is None else validation
        return learn, read(held, "data.validation", section, omni)

    def train(
        self, learn: list[Sample], held: list[Sample], asked: dict[str, float], show: Callable[[Table], None]
    ) -> _Outcome:
        """Trains, merges, and proves that nothing frozen has moved."""
        config, omni = self.config, self.omni
        omni.spec = trained_spec(omni.spec, config, learn)
        check_stop_words(omni.spec, Tokenizer(omni.tokenizer_json, omni.spec.layout))
        before = self._text_ability()
        taught, validated = self._usable(learn), self._usable(held)
        weights = mix(config, asked, taught)
        if first_process():
            runs.check_same_data(self.folder, fingerprint(taught), self.resume)
        modes, origin = modes_of(config), dict(omni.provenance)
        frozen, sizes = Frozen(omni, modes, config.peft.targets), part_sizes(omni)
        torch.manual_seed(config.seed)
        head = self._ctc_head([*learn, *held])
        trainable = TrainableOmni(omni, config.loss, head, self._unit_ids(head))
        if config.run.gradient_checkpointing:
            trainable.checkpoint_gradients()
        wrapped = prepared(trainable, modes, config.peft)
        if first_process():
            show(learning_table(sizes, modes, trainable_numbers(wrapped)))
        self._loop(wrapped, taught, validated, weights)
        trained = merged(wrapped, omni)
        frozen.check(trained)
        trained.provenance = provenance_of(origin, config)
        trained.licences = licences_of(trained.licences, config)
        return _Outcome(trained, wrapped, origin, before)

    def write(self, trained: _Outcome) -> None:
        """What a run leaves behind beside its log."""
        folder, config = self.folder, self.config
        checkpoints.save(trained.model, folder.checkpoint, force=True)
        draw_curves(run_log.read(folder.log), folder.curves)
        if (head := ctc_head_of(trained.wrapped)) is not None:
            head.save(folder.ctc, force=True)
        if trained.before is not None:
            found = {"before": trained.before, "after": self._text_ability()}
            write_file(folder.evaluation, (json.dumps(found, indent=1) + "\n").encode(), force=True)
        logger.info("stage %s: %s", config.stage, folder.checkpoint)

    def _loop(self, wrapped: nn.Module, taught: Usable, validated: Usable, weights: dict[Any, float]) -> None:
        config, folder, batch = self.config, self.folder, self.config.optimizer.batch
        held_collator = Collator(validated, self._reader(None), self.bad)
        held = HeldOut(validated, held_collator, batch, config.data.validation_limit)
        plan = BatchPlan(
            taught.lengths, taught.members, weights, batch, config.seed, max_frames=config.optimizer.max_frames
        )
        collator = Collator(taught, self._reader(Augmenter(config.augment)), self.bad, config.seed)
        log, progress = RunLog(folder.log), Progress()
        callbacks: list[TrainerCallback] = [Follow(log, progress, config.run.keep)]
        if held and config.run.patience:
            callbacks.append(Patience(config.run.patience))
        args = arguments(config, folder.states, bool(held), folder.tensorboard)
        trainer = OmniTrainer(wrapped, args, plan, collator, held or None, callbacks)
        state = last_whole_state(folder.states) if self.resume else None
        if first_process():
            remove_cut_off(folder.states)
            log.trim(int(state.name.rpartition("-")[2]) if state else 0)
        try:
            trainer.train(resume_from_checkpoint=str(state) if state else None)
        finally:
            progress.stop()
        gather_weights(wrapped)
        if first_process():
            save_adapter(wrapped, folder.adapter, self._origin())

    def _origin(self) -> dict[str, Any]:
        """What an adapter belongs to, and what it makes of that."""
        provenance = dict(self.omni.provenance)
        return {
            "base_hash": provenance.get("source_hash"),
            "checkpoint": self.config.checkpoint,
            "spec": self.omni.spec.to_dict(),
            "trained": provenance_of(provenance, self.config),
        }

    def _usable(self, samples: Sequence[Sample]) -> Usable:
        tasks = [task for task in TASKS if self.config.tasks.get(task)]
        return usable(samples, tasks, self._reader(None), self.bad)

    def _reader(self, augmenter: Augmenter | None) -> Reader:
        omni = self.omni
        tokenizer = Tokenizer(omni.tokenizer_json, omni.spec.layout)
        return Reader(omni.spec, tokenizer, lambda samples: encode_codes(omni, samples), augmenter)

    def _ctc_head(self, samples: Sequence[Sample]) -> CtcHead | None:
        """The head of an earlier run, or a new one over all transcripts; None where its loss has no weight."""
        loss, width = self.config.loss, self.omni.spec.encoder.width
        if not loss.ctc:
            return None
        if loss.ctc_head:
            return CtcHead.load(loss.ctc_head, width)
        texts = [sample.text for sample in samples if not sample.missing("asr")]
        return CtcHead(width, CtcVocabulary.of(texts, loss.ctc_units))

    def _unit_ids(self, head: CtcHead | None) -> list[int]:
        """The text id of every unit of the CTC head, where `loss.match` needs them; [] where it has no weight.

        Raises TrainError where there is no head, or one whose units are not one id each.
        """
        if not self.config.loss.match:
            return []
        if head is None:
            raise TrainError(
                "loss.match needs the CTC loss, whose units are the words that it compares with; set loss.ctc too"
            )
        tokenizer = Tokenizer(self.omni.tokenizer_json, self.omni.spec.layout)
        found = [tokenizer.encode(unit) for unit in head.vocabulary.entries]
        if several := [unit for unit, ids in zip(head.vocabulary.entries, found, strict=True) if len(ids) != 1]:
            raise TrainError(
                f"loss.match needs units that are one id of the tokenizer each, and {several[0]!r} is not; set it to 0"
            )
        return [ids[0] for ids in found]

    def _text_ability(self) -> dict[str, Any] | None:
        """How well the model answers the held-out questions in text; None where there are none."""
        return text_ability(self.omni, self.text) if self.text and first_process() else None


def first_process() -> bool:
    """Whether this process writes and speaks: the only one, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def _folder(path: Path, config: TrainConfig, resume: bool) -> runs.RunFolder:
    """The run's folder: the first process makes it, the others find it."""
    if not first_process():
        return runs.RunFolder(path)
    return runs.resume(path, config) if resume else runs.begin(path, config)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A full disk, as torch, safetensors and transformers report it, becomes TrainError."""
    try:
        yield
    except EdgeOmniError:
        raise
    except OSError as exc:
        reason = exc.strerror or str(exc)
    except (RuntimeError, SafetensorError) as exc:  # torch.save and safetensors do not raise OSError
        signs = ("file write failed", "unexpected pos", "I/O error", "PytorchStreamWriter")
        if not any(sign in str(exc) for sign in signs):
            raise
        reason = str(exc).splitlines()[0]
    else:
        return
    raise TrainError(
        f"{path}: could not be written ({reason}); make room and go on from the last whole state: --resume"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Our own messages and progress stand for transformers'."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
