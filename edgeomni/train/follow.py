"""What happens beside the steps of a run: its log, its progress, which states are kept, and when it stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .progress import Progress
from .run_log import RunLog
from .states import mark_whole


class Follow(TrainerCallback):
    """Writes RUN/log.jsonl, shows the progress, marks every saved state when it is whole, and keeps `keep` of them."""

    def __init__(self, log: RunLog, progress: Progress, keep: int) -> None:
        self._log, self._progress, self._keep = log, progress, keep
        self._frames_before = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._frames_before = state.num_input_tokens_seen
            self._progress.start(state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & set(logs):
            return
        kept = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and k != "epoch"}
        frames = state.num_input_tokens_seen
        self._log.write({"step": state.global_step, **kept, "frames": frames})
        if "loss" in logs:
            self._progress.update(state.global_step, logs["loss"], frames - self._frames_before)
        else:
            self._progress.note(f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Older states go only when the new one is whole, so that there always is one to go on from."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_whole(Path(str(args.output_dir)), state.global_step)
            rotate_checkpoints(str(args.output_dir), self._keep, state.best_model_checkpoint)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress.stop()


class Patience(TrainerCallback):
    """Stops after `patience` validations without improvement, counted over the whole run, resumed or not."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
        if len(losses) - 1 - losses.index(min(losses)) >= self._patience:
            control.should_training_stop = True
