"""The step of a careful training script without this framework: a batch of pairs, each side filled to its longest row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.base import Gradient, Trainee, pad_rows
from benchmarks.arms.losses import answer_kl, answer_nll, npo
from benchmarks.workload import Settings, Workload
from trainers.data.encode import EncodedRow


class DynamicArm:
    """Two policy and two reference passes with full logits per step; activations are kept.

    Args:
        policy: the model that is trained, on its device.
        reference: a second, frozen model.
        workload: the rows that pairs index.
        settings: weights of the losses and the optimizer's values.
        as_trainers_do: also what common trainers add: labels go to every pass, so transformers computes a cross-entropy that
            is not used, and the retain batch passes through the policy once more for a loss that is thrown away.
    """

    def __init__(self, *, policy: Any, reference: Any, workload: Workload, settings: Settings, as_trainers_do: bool = False) -> None:
        self.name = "dynamic, usual trainer" if as_trainers_do else "dynamic"
        self._trainee = Trainee(policy, settings=settings)
        self._reference = reference
        self._workload = workload
        self._settings = settings
        self._device = str(next(policy.parameters()).device)
        self._as_trainers_do = as_trainers_do

    def step(self, pairs: Sequence[int]) -> float:
        loss = self._backward(pairs)
        self._trainee.update()
        return loss

    def gradient(self, pairs: Sequence[int]) -> Gradient:
        return self._trainee.take_gradient(self._backward(pairs))

    def tensors(self) -> list[Tensor]:
        return [*self._trainee.tensors(), *self._reference.parameters()]

    def _backward(self, pairs: Sequence[int]) -> float:
        forget_batch = self._batch([self._workload.forget[index] for index in pairs])
        retain_batch = self._batch([self._workload.retain[index] for index in pairs])
        policy = self._trainee.model
        if self._as_trainers_do:
            unused = self._run(policy, retain_batch).loss
        forget_logits_BTV = self._run(policy, forget_batch).logits
        retain_logits_BTV = self._run(policy, retain_batch).logits
        with torch.no_grad():
            reference_nll_B = answer_nll(self._run(self._reference, forget_batch).logits, labels_BT=forget_batch["labels"])
            reference_logits_BTV = self._run(self._reference, retain_batch).logits
        forget_term = npo(
            nll_B=answer_nll(forget_logits_BTV, labels_BT=forget_batch["labels"]),
            reference_nll_B=reference_nll_B,
            beta=self._settings.beta,
        )
        ce_term = answer_nll(retain_logits_BTV, labels_BT=retain_batch["labels"]).mean()
        kl_term = answer_kl(logits_BTV=retain_logits_BTV, reference_logits_BTV=reference_logits_BTV, labels_BT=retain_batch["labels"])
        loss = (
            self._settings.forget_weight * forget_term
            + self._settings.retain_ce_weight * ce_term
            + self._settings.retain_kl_weight * kl_term
        )
        loss.backward()
        if self._as_trainers_do:
            # It stays alive until here, as a local variable of a loss function does.
            del unused
        return float(loss.detach())

    def _batch(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        return pad_rows(rows, length=max(len(row.input_ids) for row in rows), device=self._device)

    def _run(self, model: Any, batch: dict[str, Tensor]) -> Any:
        if self._as_trainers_do:
            return model(**batch)
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
