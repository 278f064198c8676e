"""One step of codec training: forward, losses, discriminators, both optimizers; and the state of all that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from .codec_config import CodecTrainConfig
from .codec_discriminators import Discriminators
from .codec_losses import ReconstructionLoss, discriminator_loss, eval_spectrum, generator_losses
from .codec_quantizer import Quantizer
from .codec_use import CodeUse, used_per_level

BETAS = (0.8, 0.99)
"""Of AdamW for the codec (HiFi-GAN); the discriminators' are DAC's."""
DISCRIMINATOR_BETAS = (0.8, 0.9)
_EVAL_BATCH = 16
Draw = Callable[[int], Tensor]
"""Gives that many training segments [n, S]."""


class Learner:
    """The codec with all that teaches it. `began`: the first step with codes, None before."""

    def __init__(self, config: CodecTrainConfig, codec: nn.Module) -> None:
        self.config, self.codec = config, codec
        self.device = next(codec.parameters()).device
        self.quantizer = Quantizer(codec, config.quantizer)
        self.began: int | None = None
        rate = config.codec.sampling_rate
        self.reconstruction = ReconstructionLoss(config.loss, rate).to(self.device)
        self.judge = eval_spectrum(rate, config.loss.floor).to(self.device)
        self.use = [CodeUse(config.codec.codebook_size, config.collapse) for _ in config.codec.vq_strides]
        self._choose_parameters()
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(self.learning, o.lr, betas=BETAS, weight_decay=o.weight_decay, fused=True)
        self._add_discriminators()
        compiled = torch.compile if config.run.compile else lambda module: module
        self.encoder, self.decoder = compiled(codec.encoder), compiled(codec.decoder)

    def _choose_parameters(self) -> None:
        """Codebooks move by their means alone; with decoder_only, only the decoder learns."""
        learns = self.codec.decoder if self.config.decoder_only else self.codec
        self.codec.requires_grad_(False)
        learns.requires_grad_(True)
        for level in self.codec.quantizer.quantizers:
            level.codebook.requires_grad_(False)
        self.learning = [p for p in self.codec.parameters() if p.requires_grad]

    def _add_discriminators(self) -> None:
        settings = self.config.adversarial
        self.discriminators: Discriminators | None = None
        if settings.from_step is not None:
            self.discriminators = Discriminators(settings).to(self.device)
            parameters = self.discriminators.parameters()
            self.critic = torch.optim.AdamW(parameters, settings.lr, betas=DISCRIMINATOR_BETAS, fused=True)

    def begin_codes(self, step: int, draw: Draw) -> None:
        """Starts the codebooks, if `step` is the one: by k-means from scratch, else from the codec's own."""
        settings = self.config.quantizer
        if self.began is not None or (self.config.scratch and step <= settings.start):
            return
        self.began = step
        if self.config.decoder_only:  # codes only choose here, and nothing moves them
            self.quantizer.started = True
            return
        batch, latents = self.config.optimizer.batch, []
        with torch.no_grad():
            for at in range(0, settings.kmeans_segments, batch):
                wave = draw(min(batch, settings.kmeans_segments - at))
                latents.append(self.codec.encoder(wave[:, None]))
        self.quantizer.start(torch.cat(latents), batch / settings.kmeans_segments, own=not self.config.scratch)

    def step(self, step: int, wave: Tensor) -> dict[str, float]:
        """One batch, wave [B, S] (with decoder_only, with `margin` samples more on both sides) -> its figures.

        Raises TrainError for a loss or gradient that is no finite number, and for a level that has collapsed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        code = self._decoded_only if self.config.decoder_only else self._coded
        decoded, wave, commitment = code(step, wave)
        parts = {**self.reconstruction(decoded, wave), "commitment": commitment}
        figures = {}
        adversarial = self.config.adversarial
        if self.discriminators is not None and step >= (adversarial.from_step or 0):
            figures["discriminator"] = self._teach_discriminators(step, decoded.detach(), wave)
            parts |= self._judged(decoded, wave)
        loss = torch.stack([weight * parts[name] for name, weight in self._weights() if name in parts]).sum()
        figures |= {"loss": loss.item(), **{name: value.item() for name, value in parts.items()}}
        self._refuse_unfinite(step, figures)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        figures["grad_norm"] = nn.utils.clip_grad_norm_(self.learning, self.config.optimizer.clip).item()
        self._refuse_unfinite(step, figures)
        self.optimizer.step()
        return figures

    def _coded(self, step: int, wave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """wave [B, S] -> decoded [B, S], what it should be, commitment loss. Moves codebooks, counts codes."""
        with self._autocast():
            z = self.encoder(wave[:, None])
        revive = self.config.scratch and step <= self.config.quantizer.revive_until * self.config.optimizer.steps
        z, ids, commitment = self.quantizer(z.float(), learn=True, revive=revive)
        for level, (use, chosen) in enumerate(zip(self.use, ids, strict=bool(ids))):
            use.see(chosen, step)
            use.check(level, step, self.began or step)
        with self._autocast():
            decoded = self.decoder(z)
        return decoded[:, 0].float(), wave, commitment

    def _decoded_only(self, step: int, wave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for codes that stay. They are those of the sound with its surroundings, as in a whole recording;
        the edges of what is decoded, which lack these, are left out of the loss.
        """
        hop, margin = self.config.codec.hop, self.margin
        with torch.no_grad():
            z, ids, commitment = self.quantizer(self.codec.encoder(wave[:, None]))
        for use, chosen in zip(self.use, ids, strict=True):
            use.see(chosen, step)
        inner = wave[:, margin : wave.shape[1] - margin]
        with self._autocast():
            decoded = self.decoder(z[..., margin // hop : (wave.shape[1] - margin) // hop])
        edge = slice(hop // 2, inner.shape[1] - hop // 2)
        return decoded[:, 0, edge].float(), inner[:, edge], commitment

    @property
    def margin(self) -> int:
        """Samples that the encoder sees to either side of what it encodes, in whole units; 0 unless decoder_only."""
        if not self.config.decoder_only:
            return 0
        reach, apart = 0, 1
        for module in self.codec.encoder.modules():
            if isinstance(module, nn.Conv1d):
                reach += (module.kernel_size[0] - 1) * module.dilation[0] * apart
                apart *= module.stride[0]
        unit = self.config.codec.unit
        return -(-reach // 2 // unit) * unit

    def _teach_discriminators(self, step: int, decoded: Tensor, wave: Tensor) -> float:
        assert self.discriminators is not None
        with self._autocast():
            loss = discriminator_loss(self.discriminators(wave), self.discriminators(decoded))
        self._refuse_unfinite(step, {"discriminator": loss.item()})
        self.critic.zero_grad(set_to_none=True)
        loss.backward()
        self.critic.step()
        return loss.item()

    def _judged(self, decoded: Tensor, wave: Tensor) -> dict[str, Tensor]:
        """The generator's adversarial and feature losses. Gradients pass through the discriminators, not into them."""
        assert self.discriminators is not None
        self.discriminators.requires_grad_(False)
        with self._autocast():
            losses = generator_losses(self.discriminators(wave), self.discriminators(decoded))
        self.discriminators.requires_grad_(True)
        return losses

    def _weights(self) -> Iterator[tuple[str, float]]:
        yield from ((name, getattr(self.config.loss, name)) for name in ("log_mel", "convergence", "commitment"))
        yield from (
            ("adversarial", self.config.adversarial.weight),
            ("features", self.config.adversarial.feature_weight),
        )

    def _refuse_unfinite(self, step: int, figures: dict[str, float]) -> None:
        if bad := [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]:
            raise TrainError(
                f"step {step}: {', '.join(bad)}: training has diverged. Go on from the last saved state with --resume "
                "and a lower optimizer.lr or optimizer.clip, with precision fp32, or look for odd recordings with "
                "`edgeomni data check`"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 1 .. steps (see OptimizerConfig)."""
        o = self.config.optimizer
        rising = min(1.0, step / o.warmup) if o.warmup else 1.0
        falling = max(0.0, (step / o.steps - o.flat) / (1 - o.flat)) if o.flat < 1 else 0.0
        return o.lr * rising * (o.lr_end + (1 - o.lr_end) * 0.5 * (1 + math.cos(math.pi * falling)))

    @torch.no_grad()
    def validate(self, waves: Tensor) -> dict[str, Any]:
        """waves [n, S] -> {"held_out": mean |log10-mel difference|, "held_out_used": different codes per level}."""
        self.codec.eval()
        distances, ids = [], []
        for wave in waves.to(self.device).split(_EVAL_BATCH):
            z, chosen, _ = self.quantizer(self.codec.encoder(wave[:, None]))
            decoded = self.codec.decoder(z)[:, 0]
            distances.append((self.judge(decoded)[1] - self.judge(wave)[1]).abs().mean(dim=(1, 2)))
            ids.append(chosen)
        self.codec.train()
        levels = [torch.cat([level.reshape(-1) for level in batch]) for batch in zip(*ids, strict=True)]
        used = {"held_out_used": used_per_level(levels)} if levels else {}
        return {"held_out": float(torch.cat(distances).mean()), **used}

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside the configuration and the data."""
        critic = (
            {"discriminators": self.discriminators.state_dict(), "critic": self.critic.state_dict()}
            if self.discriminators is not None
            else {}
        )
        return {
            "codec": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "quantizer": self.quantizer.state(),
            "use": [use.state() for use in self.use],
            "began": self.began,
            **critic,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.quantizer.restore(state["quantizer"])
        self.began = state["began"]
        for use, saved in zip(self.use, state["use"], strict=True):
            use.restore(saved)
        if self.discriminators is not None and "critic" in state:
            self.discriminators.load_state_dict(state["discriminators"])
            self.critic.load_state_dict(state["critic"])
