"""Losses of codec training against a computation in NumPy, and the discriminators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from codec_train_parts import ADVERSARY, harmonic

from edgeomni.arrays import F64
from edgeomni.train.codec_config import AdversarialConfig, LossConfig
from edgeomni.train.codec_discriminators import Discriminators, PeriodDiscriminator, SpectrumDiscriminator
from edgeomni.train.codec_losses import (
    ReconstructionLoss,
    Spectrum,
    discriminator_loss,
    generator_losses,
    mel_bank,
)

RATE = 16000


def plain_spectrum(wave: F64, window: int, bands: int, floor: float) -> tuple[F64, F64]:
    padded = np.pad(wave, window // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(padded) - window + 1, window // 4)
    power = np.stack([np.abs(np.fft.rfft(padded[s : s + window] * hann)) ** 2 for s in starts], axis=1)
    magnitude = np.sqrt(power + 1e-9) * 8 / window
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    hz = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, top, bands + 2)]
    bins = np.arange(window // 2 + 1) * RATE / window
    filters = np.stack([np.interp(bins, hz[i : i + 3], [0, 1, 0]) for i in range(bands)])
    return magnitude, np.log10(np.maximum(filters @ magnitude, floor))


def test_the_loss_is_that_of_a_plain_computation() -> None:
    config = LossConfig(windows=(256, 1024), mel_bands=(12, 40), floor=1e-3)
    a, b = (np.stack([harmonic(0.2, seed, RATE) for seed in seeds]) for seeds in ((0, 1), (2, 3)))
    ours = ReconstructionLoss(config, RATE)(torch.from_numpy(a), torch.from_numpy(b))
    log_mel, convergence = [], []
    for window, bands in ((256, 12), (1024, 40)):
        pairs = [[plain_spectrum(w.astype(np.float64), window, bands, 1e-3) for w in batch] for batch in (a, b)]
        (ours_m, ours_l), (theirs_m, theirs_l) = ([np.stack(x) for x in zip(*pair, strict=True)] for pair in pairs)
        log_mel.append(np.abs(ours_l - theirs_l).mean())
        convergence.append(np.linalg.norm(ours_m - theirs_m) / (np.linalg.norm(theirs_m) + 1e-3))
    assert float(ours["log_mel"]) == pytest.approx(np.mean(log_mel), rel=1e-4)
    assert float(ours["convergence"]) == pytest.approx(np.mean(convergence), rel=1e-4)


def test_a_sine_of_full_scale_is_2_at_its_bin() -> None:
    wave = torch.sin(2 * torch.pi * 1000 * torch.arange(RATE) / RATE)
    magnitude, log_mel = Spectrum(1024, 80, RATE, 1e-4)(wave[None])
    assert magnitude[0, 64, 10].item() == pytest.approx(2, rel=1e-3)
    assert log_mel.min() == pytest.approx(-4) and log_mel.max() < 1


@pytest.mark.parametrize(("window", "bands"), [(256, 24), (256, 80), (2048, 80), (64, 32)])
def test_every_mel_filter_sees_something(window: int, bands: int) -> None:
    bank = mel_bank(window, bands, RATE)
    assert bank.shape == (bands, window // 2 + 1) and bank.min() >= 0 and bank.max() <= 1
    assert bank.any(axis=1).all()


def test_losses_of_the_same_wave_are_zero_and_silence_has_finite_slopes() -> None:
    loss = ReconstructionLoss(LossConfig(), RATE)
    wave = torch.from_numpy(harmonic(0.5, 0, RATE))[None]
    assert all(float(v) == 0 for v in loss(wave, wave).values())
    silent = torch.zeros(1, RATE // 2, requires_grad=True)
    sum(loss(silent, wave).values()).backward()
    assert silent.grad is not None and silent.grad.isfinite().all()


def test_what_discriminators_look_at() -> None:
    judged, features = PeriodDiscriminator(3, 2)(torch.randn(2, 1000))
    assert [f.shape[1] for f in features] == [2, 8, 32, 64, 64]
    assert [tuple(f.shape[2:]) for f in features] == [(112, 3), (38, 3), (13, 3), (5, 3), (5, 3)]
    assert judged.shape == (2, 1, 5, 3)
    spectrum = SpectrumDiscriminator(256, 4)
    assert spectrum.bands == [(0, 13), (13, 32), (32, 64), (64, 97), (97, 129)]
    judged, features = spectrum(torch.randn(2, 1024))
    assert len(features) == 5 * 5 and judged.shape[:3] == (2, 1, 17)
    assert [f.shape[3] for f in features[:5]] == [13, 7, 4, 2, 2]
    assert len(Discriminators(AdversarialConfig(channels=1)).members) == 5 + 3


def test_a_period_discriminator_sees_its_own_samples_only() -> None:
    one = PeriodDiscriminator(4, 2)
    wave = torch.randn(1, 400)
    other = wave.clone()
    other[0, 2::4] += 1
    difference = (one(wave)[0] - one(other)[0]).abs().sum(dim=(0, 1, 2))
    assert difference[2] > 0 and difference[[0, 1, 3]].max() == 0


def test_adversarial_losses_by_hand() -> None:
    real = [(torch.tensor([1.0, 0.5]), [torch.tensor([1.0, 2]), torch.tensor([0.0])])]
    fake = [(torch.tensor([0.0, 1.0]), [torch.tensor([2.0, 4]), torch.tensor([0.5])])]
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.125 + 0.5)
    losses = generator_losses(real, fake)
    assert float(losses["adversarial"]) == pytest.approx(0.5) and float(losses["features"]) == pytest.approx(1.5 + 0.5)
    both = generator_losses(real * 3, fake * 3)
    assert float(both["adversarial"]) == pytest.approx(1.5)


def test_discriminators_learn_and_the_generator_loss_turns_their_judgement() -> None:
    torch.manual_seed(0)
    members = Discriminators(replace(ADVERSARY, channels=2))
    real = torch.stack([torch.from_numpy(harmonic(0.128, seed)) for seed in range(4)])
    fake = 0.3 * torch.randn(4, 1024)
    optimizer = torch.optim.AdamW(members.parameters(), 1e-2)
    before = discriminator_loss(members(real), members(fake)).item()
    for _ in range(25):
        optimizer.zero_grad()
        loss = discriminator_loss(members(real), members(fake))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * before
    wave = fake.clone().requires_grad_()
    members.requires_grad_(False)
    start = {name: v.item() for name, v in generator_losses(members(real), members(fake)).items()}
    generator = torch.optim.Adam([wave], 0.02)
    for _ in range(15):
        generator.zero_grad()
        losses = generator_losses(members(real), members(wave))
        (losses["adversarial"] + 0.1 * losses["features"]).backward()
        generator.step()
    assert losses["adversarial"].item() < 0.6 * start["adversarial"]
    assert losses["features"].item() < start["features"]
