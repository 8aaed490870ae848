"""Representation misdirection: pull a layer's outputs on the forget set to a random direction, and hold them on the retain set.

Shape suffixes: M tokens, B rows, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.config import Average
from trainers.objectives.terms import Activations, LossTerm, Side, Unit, averaged


def activation_term(*, activations: Activations, num_rows: int, side: Side, weight: float, average: Average) -> LossTerm:
    """Squared distance between a layer's outputs and their targets, mean over D, per token.

    On the forget set the target is a multiple of ``control_vector``: c = 6.5 for the paper's Zephyr-7B run (20 is the code's default),
    or, adaptive, 5 times the mean norm of the outputs themselves. On the retain set it is the reference's output, with weight 1200
    (100 is the code's default). Published code averages over padded positions too, so that its weight depends on the longest row of
    the batch; ours averages over real tokens, prompt and answer.

    Args:
        activations: outputs and targets, widened to float32; no gradient flows into the targets.
        num_rows: rows of this set in the micro-batch.
        side: the set; the term is called forget_rmu or retain_activation.
        weight: dimensionless.
        average: over tokens, or over rows' means.

    Raises:
        ValueError: if the shapes differ.

    Source: Li et al. 2024 (RMU), https://arxiv.org/abs/2403.03218; Huu-Tien et al. 2024 (adaptive RMU),
    https://arxiv.org/abs/2408.06223
    """
    name = "forget_rmu" if side is Side.FORGET else "retain_activation"
    values_MD, target_MD, row_M = activations.values_MD, activations.target_MD, activations.row_M
    if values_MD.ndim != 2 or target_MD.shape != values_MD.shape or row_M.shape != values_MD.shape[:1]:
        raise ValueError(
            f"{name} needs one target and one row per activation, but activations are {tuple(values_MD.shape)}, "
            f"targets {tuple(target_MD.shape)}, rows {tuple(row_M.shape)}"
        )
    wide = torch.promote_types(values_MD.dtype, torch.float32)
    distance_M = (values_MD.to(wide) - target_MD.detach().to(wide)).square().mean(dim=1)
    total, unit = averaged(distance_M, row_N=row_M, num_rows=num_rows, average=average, token_unit=Unit.REAL_TOKEN)
    return LossTerm(name=name, total=total, unit=unit, side=side, weight=weight)


def control_vector(hidden_size: int, *, seed: int) -> Tensor:
    """A random direction: uniform in [0, 1) per entry, scaled to length 1, float32 on the CPU, shape (D,); the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    direction_D = torch.rand(hidden_size, generator=generator, dtype=torch.float32)
    return direction_D / direction_D.norm()
