"""Random numbers that follow from what they are for, not from when they are drawn."""

from __future__ import annotations

import torch
from torch import Generator

from trainers.files import sha256_json


def generator_for(*, seed: int, tensor: str, content: str) -> Generator:
    """A CPU generator for one tensor of one trial.

    The same mask results whatever the order of tensors and trials, the number of processes and the device.

    Args:
        seed: of the configuration.
        tensor: name of the base tensor.
        content: the trial's content hash.
    """
    digest = sha256_json({"seed": seed, "tensor": tensor, "content": content})
    return torch.Generator().manual_seed(int(digest[:16], 16) >> 1)
