"""How much memory the losses alone need at OLMo's real vocabulary: from last hidden states to their gradient.

    python benchmarks/loss_memory.py --data DIR --tokenizer DIR --write

Takes about a minute: the head's matrix products are real.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms.base import pad_rows
from benchmarks.arms.losses import answer_kl, answer_nll, npo
from benchmarks.arms.ours import Answers, loss_of_answers
from benchmarks.counters import LiveBytes
from benchmarks.gate import Gradient, check_close, difference
from benchmarks.models import OLMO_1B
from benchmarks.options import add_workload_options, shown_command
from benchmarks.results import Result, Table, publish
from benchmarks.workload import Settings, Workload, build_workload
from trainers.vocabulary import CHUNK_BYTES, ReferenceDistributions, measure_vocabulary

SIDES = ("forget", "retain")


@dataclass(frozen=True)
class States:
    """Last hidden states of pairs of rows at every position of the padded rows.

    Args:
        hidden_BTD: by (model, side).
        labels_BT: by side.
        head_VD: the frozen head, which both models share.
    """

    hidden_BTD: dict[tuple[str, str], Tensor]
    labels_BT: dict[str, Tensor]
    head_VD: Tensor

    def answers(self, model: str, side: str) -> Answers:
        """The answer tokens of a side under a model."""
        is_answer_BT = self.labels_BT[side][:, 1:] >= 0
        return Answers(
            self.hidden_BTD[model, side][:, :-1][is_answer_BT], self.labels_BT[side][:, 1:][is_answer_BT], is_answer_BT.nonzero()[:, 0]
        )

    def pair(self, index: int, *, dtype: torch.dtype) -> States:
        """One of the pairs, in another dtype."""
        rows = slice(index, index + 1)
        hidden = {key: value[rows].to(dtype) for key, value in self.hidden_BTD.items()}
        return States(hidden, {key: value[rows] for key, value in self.labels_BT.items()}, self.head_VD.to(dtype))

    @property
    def num_pairs(self) -> int:
        """Pairs of rows."""
        return len(self.labels_BT["forget"])


@dataclass(frozen=True)
class Outcome:
    """A loss with its gradients by the hidden states at answer tokens, and the most bytes alive on the way."""

    gradient: Gradient
    peak: int


def draw_states(workload: Workload, *, hidden: int, vocabulary: int, length: int, seed: int) -> States:
    """Random hidden states of the size that a final norm gives, the reference's a little off."""
    generator = torch.Generator().manual_seed(seed)
    states, labels = {}, {}
    for side, rows in zip(SIDES, (workload.forget, workload.retain), strict=True):
        own = torch.randn(len(rows), length, hidden, generator=generator)
        states["policy", side] = own
        states["reference", side] = own + 0.1 * torch.randn(own.shape, generator=generator)
        labels[side] = pad_rows(rows, length=length, device="cpu")["labels"]
    return States(states, labels, 0.02 * torch.randn(vocabulary, hidden, generator=generator))


def recipe_loss(pair: States, *, settings: Settings) -> Outcome:
    """Four times full logits and transformers' own cross-entropy, then NPO, cross-entropy and KL over all positions of one pair."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    assert pair.num_pairs == 1, "one pair per micro-batch, as published"
    policy = {side: pair.hidden_BTD["policy", side].detach().clone().requires_grad_() for side in SIDES}
    labels = pair.labels_BT

    def outputs(hidden_BTD: Tensor, side: str) -> tuple[Tensor, Tensor]:
        logits_BTV = hidden_BTD @ pair.head_VD.T
        return logits_BTV, ForCausalLMLoss(logits_BTV, labels[side], len(pair.head_VD))

    with LiveBytes() as tracker:
        # A model's output holds loss and logits, so both live as long as it does.
        outputs_of = {side: outputs(policy[side], side) for side in SIDES}
        with torch.no_grad():
            references = {side: outputs(pair.hidden_BTD["reference", side], side) for side in SIDES}
            reference_nll_B = answer_nll(references["forget"][0], labels_BT=labels["forget"])
        nll_B = answer_nll(outputs_of["forget"][0], labels_BT=labels["forget"])
        kl = answer_kl(logits_BTV=outputs_of["retain"][0], reference_logits_BTV=references["retain"][0], labels_BT=labels["retain"])
        loss = (
            settings.forget_weight * npo(nll_B=nll_B, reference_nll_B=reference_nll_B, beta=settings.beta)
            + settings.retain_ce_weight * outputs_of["retain"][1]
            + settings.retain_kl_weight * kl
        )
        loss.backward()
    gradients = {}
    for side, value in policy.items():
        assert value.grad is not None
        gradients[side] = value.grad[:, :-1][labels[side][:, 1:] >= 0]
    return Outcome(Gradient(float(loss.detach()), gradients), tracker.peak)


def our_loss(states: States, *, settings: Settings) -> Outcome:
    """The vocabulary in chunks at the answer tokens of all pairs together, the reference read from its cache."""
    cached = {}
    for side in SIDES:
        answers = states.answers("reference", side)
        cached[side] = measure_vocabulary(answers.hidden_ND, head_VD=states.head_VD, label_N=answers.label_N, mean_embedding=True)
    kept = cached["retain"]
    assert kept.mean_embedding_ND is not None
    mean_logit_N = (states.answers("reference", "retain").hidden_ND * kept.mean_embedding_ND).sum(1)
    reference = ReferenceDistributions(mean_logit_N - kept.log_normaliser_N, mean_embedding_ND=kept.mean_embedding_ND)
    policy = {side: states.answers("policy", side) for side in SIDES}
    for answers in policy.values():
        answers.hidden_ND.requires_grad_()
    with LiveBytes([reference.negative_entropy_N, kept.mean_embedding_ND, cached["forget"].log_prob_N]) as tracker:
        loss = loss_of_answers(
            forget=policy["forget"],
            retain=policy["retain"],
            head_VD=states.head_VD,
            reference_log_prob_N=cached["forget"].log_prob_N,
            reference=reference,
            settings=settings,
        )
        loss.backward()
    gradients = {side: answers.hidden_ND.grad for side, answers in policy.items()}
    return Outcome(Gradient(float(loss.detach()), {side: value for side, value in gradients.items() if value is not None}), tracker.peak)


def accumulated(outcomes: Sequence[Outcome]) -> Gradient:
    """What a step over pairs one after the other amounts to: the mean loss, and each pair's share of its gradient."""
    share = 1.0 / len(outcomes)
    return Gradient(
        loss=share * sum(one.gradient.loss for one in outcomes),
        by_name={side: torch.cat([share * one.gradient.by_name[side] for one in outcomes]) for side in SIDES},
    )


def main() -> None:
    """Check that both ways agree in float32, then read the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, num_pairs=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings, shape = Settings(), OLMO_1B
    workload = build_workload(
        options.data,
        tokenizer=options.tokenizer,
        num_pairs=options.pairs,
        vocabulary=shape.vocabulary,
        max_tokens=settings.padded_length,
        seed=options.seed,
    )
    states = draw_states(workload, hidden=shape.hidden, vocabulary=shape.vocabulary, length=settings.padded_length, seed=options.seed)
    pairs = range(states.num_pairs)
    full = [recipe_loss(states.pair(index, dtype=torch.float32), settings=settings) for index in pairs]
    ours = [our_loss(states.pair(index, dtype=torch.float32), settings=settings) for index in pairs]
    together = our_loss(states, settings=settings)
    apart = difference(accumulated(full), together.gradient, arm="ours")
    check_close(apart, expected="recipe")
    half = recipe_loss(states.pair(0, dtype=torch.bfloat16), settings=settings)
    base = max(one.peak for one in ours)
    lines = [
        ("recipe, one pair, float32 logits", full[0].peak, "the first"),
        ("recipe, one pair, bfloat16 logits, transformers' cross-entropy in float32", half.peak, ""),
        ("ours, one pair (the largest of them)", base, ""),
        (f"ours, {len(ours)} pairs at once", together.peak, f"{apart.loss:.0e} / {apart.gradient:.0e}"),
    ]
    publish(
        Result(
            theme="loss_memory",
            title="Memory of the losses",
            question="How many bytes do NPO, cross-entropy and KL need between the last hidden states and their gradient?",
            command=shown_command("benchmarks/loss_memory.py", parser=parser, options=options),
            settings={
                "sizes": f"hidden {shape.hidden:,}, vocabulary {shape.vocabulary:,}, rows of {settings.padded_length} positions (recipe)",
                "rows": f"{workload.source}; {workload.scored_per_pair:.0f} answer tokens per pair",
                "runs": "1; the count does not vary",
                "seed": options.seed,
            },
            tables=[
                Table(
                    ("loss", "peak live MB", "recipe in bfloat16 ÷ this", "loss / gradient difference"),
                    [(name, f"{peak / 1e6:.1f}", f"{half.peak / peak:.1f}", note) for name, peak, note in lines],
                )
            ],
            reading=[
                "Counted are all tensors that operations make, and our cached reference; neither the head nor the hidden states.",
                "Ours computes float32 chunks whatever the model's dtype, so its lines hold for bfloat16 models too.",
                f"However many answer tokens there are, one chunk has at most {CHUNK_BYTES['cpu'] / 1e6:.0f} MB on a CPU and "
                f"{CHUNK_BYTES['cuda'] / 1e6:.0f} MB on a GPU.",
            ],
        ),
        write=options.write,
    )


if __name__ == "__main__":
    main()
