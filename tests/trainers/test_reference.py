"""The reference cache: what the frozen target says about every training row, computed once and shared by all trials.

The passes run in float64, so that what is equal in theory is equal to 1e-12 here and nothing else is.

Shape suffixes: N evaluated or scored tokens, M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_trial import random_lm, random_rows, tiny_inputs, tiny_train
from trainers import reference as module
from trainers.config import LoraConfig, ObjectiveConfig, TrainConfig
from trainers.data.encode import EncodedRow, evaluated_row
from trainers.data.types import ForgetRetain
from trainers.files import read_json
from trainers.loop import TrialInputs, build_model, prepare_reference, train_worker
from trainers.lora import fuse_adapters
from trainers.modeling import add_lora, decoder_layers
from trainers.reference import Part, Reference, ReferenceRequest, RowValues, compute_parts, is_cached, obtain_reference, part_key
from trainers.scoring import ScoringModel
from trainers.step import reference_request
from trainers.vocabulary import score_vocabulary

TOLERANCE = 1e-12
"""Measured: 2e-15. The adapters move log-probabilities by more than 0.1."""

PAD = 0
LAYER = 1
ROWS = random_rows(5, 12, 2, 9, 30, 9, 4)
LOOKED_AT = [evaluated_row(row, pad_to=14 * (index % 2), pad_token_id=PAD) for index, row in enumerate(ROWS)]
"""The same rows with their prompts evaluated, and every second one filled up with padding that is evaluated too."""

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def target() -> Any:
    return random_lm(num_hidden_layers=3)


@pytest.fixture(scope="module")
def adapted(target: Any) -> ScoringModel:
    """The target under adapters that change it, in training mode with dropout."""
    lm = add_lora(copy.deepcopy(target), lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5), seed=0).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for value in lm.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    fuse_adapters(lm)
    return ScoringModel(lm).train()


def compute(model: ScoringModel, *parts: Part, rows: list[EncodedRow] = LOOKED_AT, trains_head: bool = False, **more: Any) -> Reference:
    request = ReferenceRequest(frozenset(parts), trains_head=trains_head, layer=LAYER)
    values = compute_parts(
        model, parts=set(parts), request=request, rows=rows, pad_token_id=PAD, device="cpu", **{"batch_tokens": 40, **more}
    )
    return Reference(values, head_VD=model.head_weight.detach().clone() if trains_head else None)


class Direct:
    """One row's quantities from a plain pass of the target over that row alone, its logits whole."""

    def __init__(self, target: Any, row: EncodedRow) -> None:
        found: list[Tensor] = []
        handle = decoder_layers(target)[LAYER].register_forward_hook(lambda *of: found.append(of[2]))
        with torch.no_grad():
            logits_TV = target(input_ids=torch.tensor([row.input_ids])).logits[0]
        handle.remove()
        ids = torch.tensor(row.input_ids)
        scored, evaluated = list(row.scored), list(row.evaluated)
        self.log_prob_N = logits_TV.log_softmax(dim=1)[[position - 1 for position in scored], ids[scored]]
        self.q_NV = logits_TV.softmax(dim=1)[[position - 1 for position in evaluated]]
        self.negative_entropy_N = (self.q_NV * self.q_NV.log()).sum(dim=1)
        self.activations_MD = found[0][0, : len(row.input_ids) - row.num_padding]


# --- the values ---


@pytest.mark.parametrize("part", [Part.FORGET_LOG_PROBS, Part.ALTERNATIVE_LOG_PROBS])
@pytest.mark.parametrize("rows", [ROWS, LOOKED_AT], ids=["scored", "evaluated"])
def test_log_probs_are_those_of_the_target_without_adapters(target: Any, adapted: ScoringModel, part: Part, rows: list[EncodedRow]) -> None:
    """Only of scored tokens, whatever else is evaluated; row by row and alone, although computed in packed batches under adapters."""
    reference = compute(adapted, part, rows=rows)
    for index, row in enumerate(rows):
        actual = reference.log_probs(part, [index], device="cpu")
        torch.testing.assert_close(actual, Direct(target, row).log_prob_N, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        moved = Direct(adapted.eval().lm, rows[0]).log_prob_N
    adapted.train()
    control = (moved - reference.log_probs(part, [0], device="cpu")).abs().max()
    assert float(control) > 0.1, "negative control: the adapters do change the model"


@pytest.mark.parametrize("part", [Part.FORGET_DISTRIBUTIONS, Part.RETAIN_DISTRIBUTIONS])
@pytest.mark.parametrize("trains_head", [False, True])
def test_distributions_give_the_exact_kl_at_every_evaluated_token(
    target: Any, adapted: ScoringModel, part: Part, trains_head: bool
) -> None:
    """sum_v q_v z_v of any other logits z, and sum_v q_v log q_v, equal those of the whole distribution q: at prompts, answers and
    pads alike, by one vector per token, or by hidden states and a copy of the head."""
    reference = compute(adapted, part, trains_head=trains_head)
    chosen = [4, 0, 3, 1]
    direct = [Direct(target, LOOKED_AT[index]) for index in chosen]
    q_NV = torch.cat([one.q_NV for one in direct])
    distributions = reference.distributions(part, chosen, device="cpu")
    assert (distributions.mean_embedding_ND is None) is trains_head
    assert (distributions.hidden_ND is None) is (distributions.head_VD is None) is not trains_head
    expected_N = torch.cat([one.negative_entropy_N for one in direct])
    torch.testing.assert_close(distributions.negative_entropy_N, expected_N, rtol=0, atol=TOLERANCE)
    hidden_ND = torch.randn(len(q_NV), 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    head_VD = target.lm_head.weight.detach()
    label_N = torch.zeros(len(q_NV), dtype=torch.int64)
    actual_N = score_vocabulary(hidden_ND, head_VD=head_VD, label_N=label_N, reference=distributions).reference_mean_logit_N
    torch.testing.assert_close(actual_N, (q_NV * (hidden_ND @ head_VD.T)).sum(dim=1), rtol=0, atol=10 * TOLERANCE)
    shuffled = reference.distributions(part, chosen[::-1], device="cpu").negative_entropy_N
    assert float((shuffled - expected_N).abs().max()) > 0.1, "negative control: rows in another order are other distributions"


def test_activations_are_those_of_the_layer_at_real_tokens(target: Any, adapted: ScoringModel) -> None:
    """Padding that a row carries has none; norms are means over a row's tokens, in float32."""
    reference = compute(adapted, Part.RETAIN_ACTIVATIONS, Part.FORGET_NORMS)
    direct = [Direct(target, row) for row in LOOKED_AT]
    actual = reference.activations(range(len(LOOKED_AT)), device="cpu")
    torch.testing.assert_close(actual, torch.cat([one.activations_MD for one in direct]), rtol=0, atol=TOLERANCE)
    assert len(actual) == sum(len(row.input_ids) for row in ROWS)
    norms = torch.stack([one.activations_MD.norm(dim=1).mean() for one in direct])
    torch.testing.assert_close(reference.forget_norms().double(), norms, rtol=1e-6, atol=0)
    other = compute_parts(
        adapted,
        parts={Part.RETAIN_ACTIVATIONS},
        request=ReferenceRequest(frozenset({Part.RETAIN_ACTIVATIONS}), layer=0),
        rows=LOOKED_AT,
        pad_token_id=PAD,
        device="cpu",
    )
    assert float((other[Part.RETAIN_ACTIVATIONS].tensors["activations"] - actual).abs().max()) > 0.1, "negative control: another layer"


EVERY_PART = tuple(Part)


@pytest.mark.parametrize("trains_head", [False, True])
def test_neither_the_token_budget_nor_company_changes_a_part(adapted: ScoringModel, trains_head: bool) -> None:
    """One row per batch, all rows in one, and each part computed alone: the same numbers."""
    expected = compute(adapted, *EVERY_PART, trains_head=trains_head)
    for part in EVERY_PART:
        for actual in (
            compute(adapted, part, trains_head=trains_head, batch_tokens=1),
            compute(adapted, part, trains_head=trains_head, batch_tokens=999),
        ):
            assert actual.parts[part].start == expected.parts[part].start
            torch.testing.assert_close(actual.parts[part].tensors, expected.parts[part].tensors, rtol=0, atol=TOLERANCE)  # fmt: skip


def test_rows_come_back_in_the_order_asked_for(adapted: ScoringModel) -> None:
    reference = compute(adapted, Part.FORGET_LOG_PROBS, Part.RETAIN_DISTRIBUTIONS)
    first, second = (reference.log_probs(Part.FORGET_LOG_PROBS, [index], device="cpu") for index in (3, 1))
    assert torch.equal(reference.log_probs(Part.FORGET_LOG_PROBS, [3, 1, 3], device="cpu"), torch.cat([first, second, first]))
    assert (len(first), len(second)) == (LOOKED_AT[3].num_scored, LOOKED_AT[1].num_scored)
    assert reference.log_probs(Part.FORGET_LOG_PROBS, [], device="cpu").shape == (0,)
    nothing = reference.distributions(Part.RETAIN_DISTRIBUTIONS, [], device="cpu")
    assert nothing.mean_embedding_ND is not None
    assert (nothing.negative_entropy_N.shape, nothing.mean_embedding_ND.shape) == ((0,), (0, 16))
    start = reference.parts[Part.RETAIN_DISTRIBUTIONS].start
    assert [end - begin for begin, end in pairwise(start)] == [len(row.evaluated) for row in LOOKED_AT]


def test_computing_it_leaves_adapters_on_and_the_model_in_training(adapted: ScoringModel) -> None:
    ids = torch.tensor([ROWS[0].input_ids])

    def logits() -> Tensor:
        with torch.no_grad():
            return adapted.eval().lm(ids).logits

    before = logits()
    adapted.train()
    reference = compute(adapted, *EVERY_PART)
    assert adapted.training
    assert torch.equal(logits(), before)
    adapted.train()
    assert not any(value.requires_grad for values in reference.parts.values() for value in values.tensors.values())
    assert all(parameter.grad is None for parameter in adapted.parameters())


# --- which parts a trial asks for ---


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        ({"name": "grad_diff"}, set()),
        ({"name": "kl_min"}, {Part.RETAIN_DISTRIBUTIONS}),
        ({"name": "npo"}, {Part.FORGET_LOG_PROBS}),
        ({"name": "npo_ce_kl"}, {Part.FORGET_LOG_PROBS, Part.RETAIN_DISTRIBUTIONS}),
        ({"name": "npo_ce_kl", "retain_kl_weight": 0}, {Part.FORGET_LOG_PROBS}),
        ({"name": "dpo"}, {Part.FORGET_LOG_PROBS, Part.ALTERNATIVE_LOG_PROBS}),
        ({"name": "undial"}, {Part.FORGET_LOG_PROBS, Part.FORGET_DISTRIBUTIONS}),
        ({"name": "rmu"}, {Part.RETAIN_ACTIVATIONS}),
        ({"name": "rmu", "retain_activation_weight": 0}, set()),
        ({"name": "adaptive_rmu", "retain_kl_weight": 1}, {Part.RETAIN_ACTIVATIONS, Part.FORGET_NORMS, Part.RETAIN_DISTRIBUTIONS}),
    ],
)
def test_a_trial_asks_for_what_its_terms_read_and_no_more(objective: dict[str, Any], parts: set[Part]) -> None:
    train = TrainConfig(objective=ObjectiveConfig(**objective))
    assert reference_request(train, layer=2, trains_head=True) == ReferenceRequest(frozenset(parts), trains_head=True, layer=2)


# --- the key ---


def key(part: Part, *, rows: list[EncodedRow] = LOOKED_AT, trains_head: bool = False, layer: int | None = 1, **changes: Any) -> str:
    request = ReferenceRequest(frozenset(), trains_head=trains_head, layer=layer)
    return part_key(part, request=request, rows=rows, **{"target_hash": "t", "dtype": "float32", **changes})


@pytest.mark.parametrize("part", EVERY_PART)
def test_the_key_changes_with_everything_that_determines_a_parts_values_and_with_nothing_else(part: Part) -> None:
    first = LOOKED_AT[1]
    assert key(part) == key(part)
    assert key(part, rows=[LOOKED_AT[0], replace(first, row_id="another name"), *LOOKED_AT[2:]]) == key(part)
    changed_rows = [
        LOOKED_AT[1:],
        LOOKED_AT[::-1],
        ROWS,
        *(
            [LOOKED_AT[0], replace(first, **change), *LOOKED_AT[2:]]
            for change in (
                {"num_prompt": first.num_prompt + 1},
                {"input_ids": (*first.input_ids[:-1], 7)},
                {"evaluate_from": 2},
                {"evaluate_from": None},
                {"num_padding": first.num_padding + 1},
                {"input_ids": (*first.input_ids, PAD), "num_padding": first.num_padding + 1},
            )
        ),
    ]
    keys = [key(part), key(part, target_hash="u"), key(part, dtype="bfloat16"), *(key(part, rows=rows) for rows in changed_rows)]
    assert len(set(keys)) == len(keys)
    assert (key(part, trains_head=True) != key(part)) is part.value.endswith("distributions"), "the form of a distribution"
    assert (key(part, layer=0) != key(part)) is (part in (Part.FORGET_NORMS, Part.RETAIN_ACTIVATIONS)), "the layer steered"
    assert len({key(other) for other in EVERY_PART}) == len(EVERY_PART)


# --- the cache on disk ---


@pytest.fixture
def cache(tmp_path: Path, target: Any) -> Cache:
    return Cache(tmp_path / "cache", target)


class Cache:
    """A cache folder, and the passes that filled it."""

    def __init__(self, root: Path, target: Any) -> None:
        self.root = root
        self.target = target
        self.computed: list[set[Part]] = []

    def obtain(self, *parts: Part, model: ScoringModel | None = None, trains_head: bool = False, layer: int | None = LAYER) -> Reference:
        honest = module.compute_parts

        def spy(*arguments: Any, **keywords: Any) -> dict[Part, RowValues]:
            self.computed.append(set(keywords["parts"]))
            return honest(*arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "compute_parts", spy)
            return obtain_reference(
                model or ScoringModel(copy.deepcopy(self.target)),
                request=ReferenceRequest(frozenset(parts), trains_head=trains_head, layer=layer),
                rows={"forget": ROWS, "alternative": ROWS[::-1], "retain": LOOKED_AT},
                target_hash="t",
                dtype="float64",
                pad_token_id=PAD,
                root=self.root,
                device="cpu",
            )

    @property
    def manifests(self) -> Iterator[Path]:
        """One per part that is there."""
        return self.root.glob("*/manifest.json")


def test_a_part_is_computed_once_and_loads_bit_equal(cache: Cache, target: Any) -> None:
    """The values of the second call come from the file; with one pass over a set for all of its parts."""
    first = cache.obtain(*EVERY_PART)
    assert sorted(map(len, cache.computed)) == [1, 2, 3]
    second = cache.obtain(*EVERY_PART)
    assert len(cache.computed) == 3
    for part in EVERY_PART:
        assert first.parts[part].start == second.parts[part].start
        for name, value in first.parts[part].tensors.items():
            assert torch.equal(second.parts[part].tensors[name], value)
    computed = compute(ScoringModel(copy.deepcopy(target)), Part.RETAIN_ACTIVATIONS, batch_tokens=module.BATCH_TOKENS)
    assert torch.equal(second.activations([1, 2], device="cpu"), computed.activations([1, 2], device="cpu"))


def test_objectives_that_need_the_same_part_share_it(cache: Cache) -> None:
    """NPO's log-probabilities serve UNDIAL, and the retain distributions of one objective another; only what is missing is computed."""
    cache.obtain(Part.FORGET_LOG_PROBS)
    cache.obtain(Part.FORGET_LOG_PROBS, Part.FORGET_DISTRIBUTIONS)
    cache.obtain(Part.FORGET_LOG_PROBS, Part.RETAIN_DISTRIBUTIONS)
    cache.obtain(Part.FORGET_LOG_PROBS, Part.RETAIN_DISTRIBUTIONS, layer=None)
    assert cache.computed == [{Part.FORGET_LOG_PROBS}, {Part.FORGET_DISTRIBUTIONS}, {Part.RETAIN_DISTRIBUTIONS}]
    cache.obtain(Part.RETAIN_DISTRIBUTIONS, trains_head=True)
    assert len(cache.computed) == 4, "the form for trained heads is another part"
    cache.obtain(Part.FORGET_LOG_PROBS, trains_head=True)
    assert len(cache.computed) == 4, "log-probabilities have one form"
    cache.obtain(Part.FORGET_NORMS, layer=0)
    cache.obtain(Part.FORGET_NORMS, layer=1)
    assert len(cache.computed) == 6, "another layer is another part"
    assert sorted(path.parent.name.partition("-")[0] for path in cache.manifests) == [
        "forget_distributions",
        "forget_log_probs",
        "forget_norms",
        "forget_norms",
        "retain_distributions",
        "retain_distributions",
    ]


def test_a_request_is_cached_once_every_part_of_it_is_there(cache: Cache) -> None:
    """Then nothing has to be computed, and no model need be loaded for it."""

    def cached(*parts: Part, **changes: Any) -> bool:
        request = ReferenceRequest(frozenset(parts), layer=LAYER)
        rows = {"forget": ROWS, "alternative": ROWS[::-1], "retain": LOOKED_AT}
        return is_cached(**{"request": request, "rows": rows, "target_hash": "t", "dtype": "float64", "root": cache.root, **changes})

    assert cached(), "what needs no reference lacks none"
    assert not cached(Part.FORGET_LOG_PROBS)
    cache.obtain(Part.FORGET_LOG_PROBS)
    assert cached(Part.FORGET_LOG_PROBS)
    assert not cached(Part.FORGET_LOG_PROBS, Part.RETAIN_DISTRIBUTIONS)
    assert not cached(Part.FORGET_LOG_PROBS, target_hash="u")
    (manifest,) = cache.manifests
    manifest.unlink()
    assert not cached(Part.FORGET_LOG_PROBS)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["before the manifest", "after the manifest is lost"])
def test_a_half_written_folder_is_no_part(cache: Cache, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A process that is killed while it writes leaves nothing that the next one would read; the next one computes again."""
    if where == "before the manifest":

        def kill(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_json", kill)
            with pytest.raises(Killed):
                cache.obtain(Part.FORGET_LOG_PROBS)
        assert not list(cache.manifests)
    else:
        cache.obtain(Part.FORGET_LOG_PROBS)
        (manifest,) = cache.manifests
        manifest.unlink()
    again = cache.obtain(Part.FORGET_LOG_PROBS)
    assert len(cache.computed) == 2
    assert len(again.log_probs(Part.FORGET_LOG_PROBS, [0], device="cpu")) == ROWS[0].num_scored
    cache.obtain(Part.FORGET_LOG_PROBS)
    assert len(cache.computed) == 2


def test_a_part_that_another_trial_wrote_in_the_meantime_is_kept(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing the file would pull it away from under a reader that has mapped it."""
    honest = module.compute_parts

    def slow(*arguments: Any, **keywords: Any) -> dict[Part, RowValues]:
        values = honest(*arguments, **keywords)
        other = Cache(cache.root, cache.target)
        with monkeypatch.context() as patch:
            patch.setattr(module, "compute_parts", honest)
            other.obtain(Part.FORGET_LOG_PROBS)
        written.extend(file.stat().st_ino for file in cache.root.rglob("*.safetensors"))
        return values

    written: list[int] = []
    monkeypatch.setattr(module, "compute_parts", slow)
    cache.obtain(Part.FORGET_LOG_PROBS)
    assert [file.stat().st_ino for file in cache.root.rglob("*.safetensors")] == written
    assert len(written) == 1


def test_the_head_is_a_copy_that_training_does_not_move(cache: Cache, target: Any) -> None:
    """Full-parameter training changes the model's head in place; the reference keeps the target's, and so does its KL."""
    model = ScoringModel(copy.deepcopy(target).requires_grad_(True))
    reference = cache.obtain(Part.RETAIN_DISTRIBUTIONS, model=model, trains_head=True)
    assert reference.head_VD is not None
    assert not reference.head_VD.requires_grad
    expected = reference.head_VD.clone()
    assert torch.equal(expected, target.lm_head.weight)
    with torch.no_grad():
        model.head_weight.add_(1.0)
    assert torch.equal(reference.head_VD, expected)
    assert cache.obtain(Part.FORGET_LOG_PROBS, model=model, trains_head=True).head_VD is None, "no distributions, no copy"
    assert cache.obtain(Part.RETAIN_DISTRIBUTIONS).head_VD is None


def test_the_manifest_holds_each_rows_first_value(cache: Cache) -> None:
    reference = cache.obtain(Part.RETAIN_ACTIVATIONS)
    (manifest,) = cache.manifests
    assert read_json(manifest) == {"schema_version": 2, "start": list(reference.parts[Part.RETAIN_ACTIVATIONS].start)}


# --- trials ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("reference"))


def test_it_is_computed_once_per_sweep(inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the sweep's preparation no trial computes it, whatever its hyperparameters; other rows or another target would."""
    inputs = replace(inputs, reference_root=tmp_path / "reference")
    prepare_reference(inputs, train=tiny_train())
    files = {file: file.stat().st_mtime_ns for file in inputs.reference_root.rglob("*")}
    assert len([file for file in files if file.name == "manifest.json"]) == 2

    class ComputedAgain(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ComputedAgain

    monkeypatch.setattr(module, "compute_parts", fail)
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1, "learning_rate": 1e-3},
        {"objective": {"name": "npo"}},
        {"objective": {"name": "npo"}, "lora": None},
        {"objective": {"name": "grad_diff"}},
    ]
    for index, change in enumerate(changes):
        next(train_worker(train=tiny_train(signals=0, **change), inputs=inputs, trial=tmp_path / f"trial-{index}"))
    prepare_reference(inputs, train=tiny_train())
    assert {file: file.stat().st_mtime_ns for file in inputs.reference_root.rglob("*")} == files
    fewer = ForgetRetain(inputs.train.forget[1:], inputs.train.retain)
    for other in (replace(inputs, train=fewer), replace(inputs, target_hash="another target")):
        with pytest.raises(ComputedAgain):
            next(train_worker(train=tiny_train(), inputs=other, trial=tmp_path / "other"))
    for objective in ({"name": "npo_ce_kl", "kl_scope": "real"}, {"name": "undial"}):
        with pytest.raises(ComputedAgain):
            next(train_worker(train=tiny_train(objective=objective), inputs=inputs, trial=tmp_path / "other"))


@pytest.mark.parametrize("lora", [LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0), None], ids=["lora", "full"])
def test_a_resumed_trial_whose_cache_is_gone_computes_the_targets_again(
    inputs: TrialInputs, tmp_path: Path, lora: LoraConfig | None
) -> None:
    """Not that of the weights it goes on from: the metrics are those of a trial that was never stopped."""
    train = tiny_train(lora=lora, signals=0, checkpoints=2, num_train_epochs=1, train_batch_size=3)
    inputs = replace(inputs, reference_root=tmp_path / "reference")

    def lines(trial: Path) -> list[dict[str, Any]]:
        given = train_worker(train=train, inputs=inputs, trial=trial)
        return [{key: value for key, value in line.items() if key != "seconds"} for line in given]

    expected = lines(tmp_path / "whole")
    assert len(expected) == 4
    stopped = train_worker(train=train, inputs=inputs, trial=tmp_path / "stopped")
    for _ in range(3):
        next(stopped)
    stopped.close()
    before = {file.name: file.read_bytes() for file in inputs.reference_root.rglob("*.safetensors")}
    shutil.rmtree(inputs.reference_root)
    assert lines(tmp_path / "stopped") == expected[2:]
    assert {file.name: file.read_bytes() for file in inputs.reference_root.rglob("*.safetensors")} == before


def test_a_frozen_head_needs_one_vector_per_token_and_a_trained_one_its_hidden_states(inputs: TrialInputs) -> None:
    """Adapters, and full training without the head, freeze it."""
    full, part = {"lora": None}, {"lora": None, "trainable": {"modules": ["down_proj"]}}
    trains = [build_model(inputs, train=tiny_train(**changes)).trains_head for changes in ({}, full, part)]
    assert trains == [False, True, False]
