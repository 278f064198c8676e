"""transformers' Trainer over our batches: it owns the loop, the optimizer, accumulation, processes and schedules.

What is ours: batches come from a plan, losses are normalized by stream over everything that shares an update, states
hold only what learns, and a state counts only when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from ..errors import TrainError
from ..spec import TASKS
from .batching import BatchPlan, PlannedBatches
from .config import TrainConfig
from .dataset import Collator
from .trainable import TrainableOmni

WEIGHTS = "model.safetensors"
GO_ON = "go on from the last saved state with a lower optimizer.lr or run.precision=fp32 (--resume)"
FSDP_NEEDS = "run.fsdp is for several GPUs under torchrun; leave it out here"


class Draws(Dataset):
    """What a plan draws stands for itself; the collator makes samples of it."""

    def __getitem__(self, draw: Any) -> Any:
        return draw


class OmniTrainer(Trainer):
    """Trains a TrainableOmni, or peft's wrapper around one. `held_out`: fixed batches to validate on."""

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        plan: BatchPlan,
        collator: Collator,
        held_out: Iterable[Any] | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        # `evaluate` below goes through `held_out`; the data set only satisfies the Trainer's check
        super().__init__(model, args, eval_dataset=None if held_out is None else Draws(), callbacks=callbacks)
        if args.fsdp and not self.is_fsdp_enabled:  # accelerate leaves it out on CPUs without a word
            raise TrainError(FSDP_NEEDS)
        self.remove_callback(PrinterCallback)
        self._plan, self._collator, self._held_out = plan, collator, held_out
        self.loss_is_scaled_for_ga = True
        self._sums: Tensor | None = None

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
        loader = DataLoader(
            Draws(),
            batch_sampler=PlannedBatches(self._plan, batches),
            collate_fn=self._collator,
            num_workers=args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Labels per stream [K+2] over all batches and processes that share one update.

        Their LLM frames are counted here too, where a state keeps them for the run that goes on from it.
        """
        counts = sum(self._omni().count_labels(batch) for batch in batch_samples).to(device)
        frames = torch.tensor([sum(batch["ids"][:, 0].numel() for batch in batch_samples)], device=device)
        self.state.num_input_tokens_seen += int(self._gathered(frames))
        return self._gathered(counts)

    def _omni(self) -> TrainableOmni:
        inner = self.accelerator.unwrap_model(self.model)
        return inner if isinstance(inner, TrainableOmni) else inner.get_base_model()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """This batch's share of the update's loss. Processes average their gradients, so each counts world_size times.

        Raises TrainError for a loss that is no finite number, before it can reach a weight.
        """
        outputs = model(**inputs, counts=num_items_in_batch)
        if not bool(torch.isfinite(outputs["loss"])):
            raise TrainError(f"the loss became {outputs['loss'].item()} in step {self.state.global_step + 1}; {GO_ON}")
        self._sums = outputs["sums"] if self._sums is None else self._sums + outputs["sums"]
        loss = outputs["loss"] * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """accelerate leaves fp16 out on a CPU without a word, so it is switched on here (without loss scaling)."""
        if self.args.fp16 and self.args.device.type == "cpu":
            return torch.autocast("cpu", dtype=torch.float16, cache_enabled=cache_enabled)
        return super().autocast_smart_context_manager(cache_enabled)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums is not None:
            logs = {**logs, **figures(self._gathered(self._sums))}
            self._sums = None
        super().log(logs, start_time)

    def _gathered(self, sums: Tensor) -> Tensor:
        return self.accelerator.gather(sums[None]).sum(0) if self.args.world_size > 1 else sums

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss over the held-out batches, normalized over all of them at once. Every process computes all."""
        if self._held_out is None:
            return {}
        model = self._omni_or_peft()  # FSDP gathers the weights where its outermost module is called
        model.eval()
        sums = sum(model(**self._prepare_inputs(batch))["sums"] for batch in self._held_out)
        model.train()
        total = self._omni().weighted(sums[..., 0].sum(0), sums[..., 1].sum(0))
        metrics = {"eval_loss": float(total), **{f"eval_{k}": v for k, v in figures(sums).items()}}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best state so far is saved at once, also between two states that are saved anyway."""
        better = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or better
        return better

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Of the model only what learns: the rest lies in the checkpoint that the run began with."""
        if not self.args.should_save:  # of several processes, one writes
            return
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        save_file(learning_state(self._omni_or_peft(), state_dict), os.path.join(output_dir, WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_learning_state(self._omni_or_peft(), Path(resume_from_checkpoint) / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A resumed run may have another learning rate or number of steps: what was saved of the old ones is undone."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        scheduler.base_lrs = [self.args.learning_rate] * len(groups)
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = self.args.learning_rate
            group["lr"] = self.args.learning_rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]  # what is logged

    def _load_best_model(self) -> None:
        load_learning_state(self._omni_or_peft(), Path(str(self.state.best_model_checkpoint)) / WEIGHTS)

    def _omni_or_peft(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)


def learning_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Name -> tensor of every parameter that learns, each with storage of its own.

    Raises TrainError where one is no finite number: a state with such weights could not be gone on from.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: (state or named)[name].detach().clone().contiguous() for name in named}
    if broken := [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]:
        raise TrainError(f"weights became infinite or not a number ({', '.join(broken[:4])}); {GO_ON}")
    return found


@torch.no_grad()
def load_learning_state(model: nn.Module, path: Path) -> None:
    """Raises TrainError where the file does not hold exactly what learns."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as exc:
        raise TrainError(f"{path}: cannot be read ({exc}); remove this state to go on from the one before") from exc
    odd = {*named} ^ {*stored} or {name for name, p in named.items() if p.shape != stored[name].shape}
    if odd:
        raise TrainError(f"{path}: does not fit this run ({', '.join(sorted(odd)[:4])}); begin a new run")
    for name, parameter in named.items():
        value = stored[name].to(parameter.device)
        if isinstance(parameter, DTensor):  # under FSDP this process holds a part
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def gather_weights(model: nn.Module) -> None:
    """Makes whole parameters of those that FSDP spread over the processes; all of them must call this."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(parameter.full_tensor().cpu(), parameter.requires_grad)


def figures(sums: Tensor) -> dict[str, float]:
    """Sums [len(TASKS), K+2, 2] -> mean cross-entropies by stream (loss_text, loss_audio0.., loss_ctc) and by task."""
    streams = sums.shape[1] - 2
    names = [*(f"audio{k}" for k in range(streams)), "text", "ctc"]
    by_stream, by_task = sums.sum(0), sums[:, : streams + 1].sum(1)
    found = {f"loss_{n}": float(s / c) for n, (s, c) in zip(names, by_stream.tolist(), strict=True) if c}
    return found | {f"loss_{t}": float(s / c) for t, (s, c) in zip(TASKS, by_task.tolist(), strict=True) if c}


def arguments(config: TrainConfig, states: Path, validates: bool, logs: Path) -> TrainingArguments:
    """Our configuration as transformers' arguments. `states`: where saved states go; `logs`: TensorBoard's folder."""
    run, optimizer = config.run, config.optimizer
    assert optimizer.lr is not None and optimizer.warmup is not None
    if run.fsdp and processes() == 1:
        raise TrainError(FSDP_NEEDS)
    cpu = run.device == "cpu" or not torch.cuda.is_available()
    if run.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    return TrainingArguments(
        output_dir=str(states),
        max_steps=optimizer.steps,
        per_device_train_batch_size=optimizer.batch,
        gradient_accumulation_steps=optimizer.accumulate,
        learning_rate=optimizer.lr,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=round(optimizer.warmup * optimizer.steps),
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.clip,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        save_steps=run.save_every,
        save_total_limit=None,  # follow.py removes old states, when the new one is whole
        eval_strategy="steps" if validates else "no",
        eval_steps=(run.validate_every or run.save_every) if validates else None,
        load_best_model_at_end=validates,
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False if validates else None,
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes() > 1 else None,
        ddp_find_unused_parameters=False,  # trainable.py gives every parameter a gradient
        fsdp=run.fsdp,
        seed=config.seed,
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=False,
        accelerator_config={"even_batches": False},
        remove_unused_columns=False,
        report_to=["tensorboard"] if run.tensorboard else [],
        disable_tqdm=True,
    )


def processes() -> int:
    """How many processes train together: what torchrun started, else one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
