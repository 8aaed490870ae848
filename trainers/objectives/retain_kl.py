"""KL(reference || model) on the retain set: stay close to the target model where nothing must change (KLR)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.objectives.terms import LossTerm, Scored, Side, Unit


def kl_reference_model(*, logits_NV: Tensor, reference_logits_NV: Tensor) -> Tensor:
    """Sum over tokens of KL(reference || model), nats: expectation under the reference, over the whole vocabulary.

    Args:
        logits_NV: of the model, shape (N, V).
        reference_logits_NV: of the reference, same shape; no gradient flows into it.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits_NV.shape != reference_logits_NV.shape:
        raise ValueError(f"model logits {tuple(logits_NV.shape)} and reference logits {tuple(reference_logits_NV.shape)} differ in shape")
    wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    model_NV = logits_NV.to(wide).log_softmax(dim=1)
    reference_NV = reference_logits_NV.detach().to(wide).log_softmax(dim=1)
    return (reference_NV.exp() * (reference_NV - model_NV)).sum()


def retain_kl_term(*, retain: Scored, weight: float) -> LossTerm:
    """KL(reference || model) per scored retain token: prompt and padding positions do not enter.

    Source: the KL baseline of Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121, restricted to answer tokens.

    Raises:
        ValueError: if the logits of the model or of the reference are missing.
    """
    if retain.logits_NV is None or retain.reference_logits_NV is None:
        raise ValueError("retain_kl needs the logits of the model and of the reference")
    total = kl_reference_model(logits_NV=retain.logits_NV, reference_logits_NV=retain.reference_logits_NV)
    return LossTerm(name="retain_kl", total=total, unit=Unit.TOKEN, side=Side.RETAIN, weight=weight)
