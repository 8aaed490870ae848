"""The published recipe's step: one pair at a time, rows filled to a fixed length, a second model as reference, recomputed activations.

Written from the paper (https://arxiv.org/abs/2503.21088) and from what its public code is known to compute; no code of it is used.
Where there was a choice the cheaper one was taken: AdamW as one fused operation, no trainer around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.base import Gradient, Trainee, pad_rows
from benchmarks.arms.losses import answer_kl, answer_nll, npo
from benchmarks.workload import Settings, Workload


class ReferencePasses:
    """The two forward passes of the frozen model that the recipe makes for a pair, every time the pair comes up.

    Args:
        reference: the frozen model.
        workload: the rows that pairs index.
        settings: the length of padded rows.
    """

    def __init__(self, reference: Any, *, workload: Workload, settings: Settings) -> None:
        self.model = reference
        self._workload = workload
        self._length = settings.padded_length
        self._device = str(next(reference.parameters()).device)

    def batches(self, pair: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The padded forget and retain batch of one row each."""
        rows = self._workload.forget[pair], self._workload.retain[pair]
        forget, retain = (pad_rows([row], length=self._length, device=self._device) for row in rows)
        return forget, retain

    @torch.no_grad()
    def run(self, pair: int) -> tuple[Any, Any]:
        """Outputs for both batches. Labels go in, so transformers computes cross-entropies that nobody reads."""
        forget, retain = self.batches(pair)
        return self.model(**forget), self.model(**retain)


class RecipeArm:
    """Four forward passes with full logits per pair, two of them recomputed, gradients accumulated over the step's pairs.

    Args:
        policy: the model that is trained, on its device.
        reference: a second, frozen model.
        workload: the rows that pairs index.
        settings: weights of the losses and the optimizer's values.
    """

    name = "recipe"

    def __init__(self, *, policy: Any, reference: Any, workload: Workload, settings: Settings) -> None:
        # As the published code's versions do it: a layer is recomputed whole, and needs inputs with gradients.
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        policy.enable_input_require_grads()
        self._trainee = Trainee(policy, settings=settings)
        self._reference = ReferencePasses(reference, workload=workload, settings=settings)
        self._settings = settings

    def step(self, pairs: Sequence[int]) -> float:
        loss = self._accumulate(pairs)
        self._trainee.update()
        return loss

    def gradient(self, pairs: Sequence[int]) -> Gradient:
        return self._trainee.take_gradient(self._accumulate(pairs))

    def tensors(self) -> list[Tensor]:
        return [*self._trainee.tensors(), *self._reference.model.parameters()]

    def _accumulate(self, pairs: Sequence[int]) -> float:
        total = 0.0
        for pair in pairs:
            loss = self._pair_loss(pair) / len(pairs)
            loss.backward()
            total += float(loss.detach())
        return total

    def _pair_loss(self, pair: int) -> Tensor:
        forget_batch, retain_batch = self._reference.batches(pair)
        # Labels go to all four passes, so transformers computes four cross-entropies; only the retain one is used.
        forget_output = self._trainee.model(**forget_batch)
        retain_output = self._trainee.model(**retain_batch)
        forget_reference, retain_reference = self._reference.run(pair)
        with torch.no_grad():
            reference_nll_B = answer_nll(forget_reference.logits, labels_BT=forget_batch["labels"])
        forget_term = npo(
            nll_B=answer_nll(forget_output.logits, labels_BT=forget_batch["labels"]),
            reference_nll_B=reference_nll_B,
            beta=self._settings.beta,
        )
        kl_term = answer_kl(logits_BTV=retain_output.logits, reference_logits_BTV=retain_reference.logits, labels_BT=retain_batch["labels"])
        return (
            self._settings.forget_weight * forget_term
            + self._settings.retain_ce_weight * retain_output.loss
            + self._settings.retain_kl_weight * kl_term
        )
