"""The torch reference runtime: an OmniModel behind the three component protocols, in float32, on the CPU or CUDA."""

from __future__ import annotations

import torch

from edgeomni.components import Components, OpenOptions
from edgeomni.errors import EngineError
from edgeomni.hardware import check_threads
from edgeomni.model import OmniModel
from edgeomni.runtimes.torch.codec import TorchCodec
from edgeomni.runtimes.torch.encoder import TorchEncoder
from edgeomni.runtimes.torch.llm import TorchLanguageModel

__all__ = ["TorchCodec", "TorchEncoder", "TorchLanguageModel", "components_of"]


def components_of(model: OmniModel, options: OpenOptions | None = None) -> Components:
    """Components that run `model` with torch; `options.threads` becomes torch's own, process-wide setting.

    Raises EngineError where the device is not there, UsageError for a number of threads out of range.
    """
    options = options or OpenOptions()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError("--device cuda: this torch sees no CUDA device; install a CUDA build of torch, or use cpu")
    check_threads(options.threads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = model.to(options.device).eval()
    return Components(TorchEncoder(model), TorchLanguageModel(model), TorchCodec(model))
