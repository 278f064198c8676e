"""What GPUs TensorRT engines are built for: their names, which package builds for them where, what they compute.

Facts of NVIDIA's documentation (CUDA compute capabilities; TensorRT-RTX 1.7, ComputeCapability), as far as they concern
EdgeOmni. Data only: nothing here imports TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import UsageError

PACKAGES = ("tensorrt_rtx", "tensorrt")
"""Import names of the two TensorRT packages: TensorRT for RTX (desktop GPUs), TensorRT (Jetson, data centres)."""
DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Target:
    """One kind of GPU. `rtx`: TensorRT-RTX builds for it anywhere, without the GPU."""

    name: str
    examples: str
    rtx: bool

    @property
    def number(self) -> int:
        """The compute capability without its dot: 89 for 8.9, 120 for 12.0."""
        return int(self.name.removeprefix("sm_"))


TARGETS = {
    target.name: target
    for target in (
        Target("sm_75", "GeForce RTX 20, T4", rtx=True),
        Target("sm_80", "A100", rtx=True),
        Target("sm_86", "GeForce RTX 30, A10", rtx=True),
        Target("sm_87", "Jetson Orin", rtx=False),
        Target("sm_89", "GeForce RTX 40, L4", rtx=True),
        Target("sm_90", "H100, H200", rtx=False),
        Target("sm_100", "B200", rtx=False),
        Target("sm_103", "B300", rtx=False),
        Target("sm_110", "Jetson Thor", rtx=False),
        Target("sm_120", "GeForce RTX 50", rtx=True),
        Target("sm_121", "DGX Spark", rtx=True),
    )
}
_OLDEST = {"fp32": 80, "int4": 80, "fp8": 89, "bf16": 80, "nvfp4": 100}
"""Precision -> the first compute capability that computes it. For 7.5 TensorRT-RTX refuses INT4 weights and products of
float32."""


def parse_targets(text: str) -> tuple[str, ...]:
    """ "sm_89,sm_120" -> names, in order of their numbers, each once. Raises UsageError that lists the known ones."""
    names = {word.strip() for word in text.split(",") if word.strip()}
    if unknown := sorted(names - set(TARGETS)):
        raise UsageError(
            f"unknown target {unknown[0]!r}; known are {', '.join(TARGETS)}. The number is the GPU's compute "
            "capability without its dot: sm_89 is 8.9"
        )
    if not names:
        raise UsageError(f"--target names no GPU; sm_89,sm_120 is an example, known are {', '.join(TARGETS)}")
    return tuple(sorted(names, key=lambda name: TARGETS[name].number))


def check_precision(precision: str, targets: Iterable[str]) -> None:
    """Raises UsageError where one of the targets does not compute `precision`."""
    oldest = _OLDEST.get(precision, 0)
    if unable := [name for name in targets if TARGETS[name].number < oldest]:
        number = TARGETS[unable[0]].number
        offered = ("fp16",) if precision == "fp32" else ("int4", "int8", "fp16")
        others = " or ".join(p for p in offered if _OLDEST.get(p, 0) <= number)
        raise UsageError(
            f"{unable[0]} ({TARGETS[unable[0]].examples}) does not compute {precision}, which begins with "
            f"sm_{oldest}; use {others} for it, or leave that target out"
        )


def built_anywhere(targets: Iterable[str]) -> tuple[str, ...]:
    """Those of `targets` that TensorRT-RTX builds for on a machine without the GPU."""
    return tuple(name for name in targets if TARGETS[name].rtx)
