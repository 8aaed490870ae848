"""The named readings of TIES, each against its own definition, on the cases where they part."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from merging.combine import check_vectors, combine, majority_sign, model_thresholds
from merging.config import MergeConfig
from merging.merge import merge_checkpoint
from merging.methods.seed import merge_factors
from merging.task_vectors import open_task_vector
from tests.helpers.merge_models import write_base, write_full, write_lora
from trainers.errors import InputError
from trainers.files import read_json, write_json

torch.set_num_threads(1)


@dataclass(frozen=True)
class Vector:
    """A task vector of given tensors."""

    tensors: dict[str, torch.Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def update(self, name: str, *, device: str = "cpu") -> torch.Tensor:
        return self.tensors[name].clone()


def _merge(vectors: list[dict[str, torch.Tensor]], *, convention: str, weights=None, density: float = 1.0) -> dict[str, torch.Tensor]:
    """Every tensor merged under a convention, with the whole-model facts that it needs."""
    config = MergeConfig(convention=convention, density=density, weights=weights)
    opened = [Vector(tensors) for tensors in vectors]
    thresholds = majority = None
    if config.trim_scope == "model":
        thresholds = model_thresholds(vectors=opened, density=density, trim_count=config.trim_count)
    if config.zero_sum == "majority":
        majority = majority_sign(vectors=opened, thresholds=thresholds, config=config)
    names = dict.fromkeys(name for vector in opened for name in vector.names)
    return {name: combine(name, vectors=opened, config=config, thresholds=thresholds, majority=majority).update for name in names}


def _one(values: list[list[float]], **settings) -> list[float]:
    return _merge([{"w": torch.tensor(one)} for one in values], **settings)["w"].tolist()


# ---- the cases where implementations disagree


def test_equal_and_opposite_values_in_a_vector_that_is_mostly_negative():
    """0.5 and -0.5 sum to zero. Signs elected elsewhere are minus twice, so the paper's code takes minus; the others always plus."""
    values = [[0.5, -1.0, -2.0], [-0.5, -1.0, -2.0]]
    assert _one(values, convention="paper")[0] == -0.5
    assert _one(values, convention="peft-dense")[0] == 0.5
    assert _one(values, convention="mergekit")[0] == 0.5
    assert _one([[-v for v in one] for one in values], convention="paper")[0] == 0.5


def test_the_majority_is_that_of_the_whole_model_not_of_the_tensor():
    """The tensor's own signs are plus, those of the other tensor minus, and there are more of them."""
    first = {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([-1.0, -1.0, -1.0])}
    second = {"a": torch.tensor([-0.5, 1.0]), "b": torch.tensor([-1.0, -1.0, -1.0])}
    assert _merge([first, second], convention="paper")["a"].tolist() == [-0.5, 1]
    assert _merge([{"a": first["a"]}, {"a": second["a"]}], convention="paper")["a"].tolist() == [0.5, 1]


@pytest.mark.parametrize(("convention", "expected"), [("peft-dense", -0.18), ("mergekit", 0.4)])
def test_weights_enter_before_or_after_the_election(convention, expected):
    """0.4 against -0.9 with weights (1, 0.2): unweighted, minus wins and leaves -0.9 * 0.2; weighted, 0.4 beats 0.18."""
    assert _one([[0.4], [-0.9]], convention=convention, weights=(1, 0.2)) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("convention", "weights", "expected"),
    [("paper", None, 1), ("peft-dense", (0.6, 0.4), 0.5), ("mergekit", (0.6, 0.4), 1), ("peft-dense", None, 1), ("mergekit", None, 1)],
)
def test_two_equal_values(convention, weights, expected):
    assert _one([[1.0], [1.0]], convention=convention, weights=weights) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("convention", "weights", "expected"), [("paper", None, 1), ("peft-dense", (0.6, 0.4), 0.6), ("mergekit", (0.6, 0.4), 1)]
)
def test_a_value_that_survives_alone(convention, weights, expected):
    assert _one([[1.0], [0.0]], convention=convention, weights=weights) == pytest.approx([expected])


@pytest.mark.parametrize(("convention", "kept"), [("paper", {8, 9, 10}), ("peft-dense", {9, 10}), ("mergekit", {9, 10})])
def test_how_many_of_ten_a_density_of_a_fifth_keeps(convention, kept):
    assert {value for value in _one([[float(v) for v in range(1, 11)]], convention=convention, density=0.2) if value} == kept


@pytest.mark.parametrize(("convention", "number"), [("paper", 4), ("peft-dense", 2), ("mergekit", 2)])
def test_how_many_of_four_equal_values_a_density_of_a_half_keeps(convention, number):
    """Two of four: mergekit takes the first, peft those that torch.topk gives it. The paper keeps all that equal the last."""
    from peft.utils.merge_utils import magnitude_based_pruning

    actual = _one([[1.0] * 4], convention=convention, density=0.5)
    expected = {"paper": [1] * 4, "peft-dense": magnitude_based_pruning(torch.ones(4), 0.5).tolist(), "mergekit": [1, 1, 0, 0]}
    assert sum(actual) == number
    assert actual == expected[convention]


def test_a_weight_below_zero_has_no_agreed_meaning():
    """a = (1, 1), b = (0.5, 2), weights (1, -1): peft gives (0.25, -0.5), mergekit (1, 2). It is refused under every convention."""
    for convention in ("paper", "peft-dense", "mergekit", "seed"):
        with pytest.raises(ValueError, match="negative weights"):
            MergeConfig(convention=convention, weights=(1, -1))


@pytest.mark.parametrize(("convention", "number"), [("paper", 1), ("peft-dense", 0), ("mergekit", 0)])
def test_a_density_below_one_element(convention, number):
    """A fifth of four is no element. peft keeps none, the paper's code one, and mergekit stops with an assertion."""
    assert sum(value != 0 for value in _one([[1.0, 2.0, 3.0, 4.0]], convention=convention, density=0.2)) == number


def test_the_scope_decides_which_tensors_are_kept():
    """Half of (10 .. 13 | 0.1 .. 0.4): over the whole vector the large ones and one more, per tensor two of each."""
    tensors = {"a": torch.tensor([10.0, 11, 12, 13]), "b": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    whole, apart = (_merge([tensors], convention=convention, density=0.5) for convention in ("paper", "peft-dense"))
    assert (whole["a"].tolist(), whole["b"].tolist()) == ([10, 11, 12, 13], pytest.approx([0, 0, 0, 0.4]))
    assert (apart["a"].tolist(), apart["b"].tolist()) == ([0, 0, 12, 13], pytest.approx([0, 0, 0.3, 0.4]))


# ---- paper


def _paper(vectors: list[list[float]], density: float) -> list[float]:
    """The authors' steps in Python: the threshold is the (n - int(density * n))-th smallest magnitude, and what reaches it stays."""
    trimmed = []
    for vector in vectors:
        ordered = sorted(abs(value) for value in vector)
        border = ordered[len(vector) - int(density * len(vector)) - 1]
        trimmed.append([value if abs(value) >= border else 0.0 for value in vector])
    signs = [(total > 0) - (total < 0) for total in (math.fsum(values) for values in zip(*trimmed, strict=True))]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    merged = []
    for sign, values in zip(signs, zip(*trimmed, strict=True), strict=True):
        positive = (sign or majority) > 0
        agreeing = [value for value in values if (value > 0 if positive else value < 0)]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


@pytest.mark.parametrize("drift", [0.0, -0.4, 0.4], ids=["balanced", "negative", "positive"])
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.8])
def test_paper_is_the_authors_code_on_the_concatenated_vector(density, models, drift):
    """Rounded to eighths, so that borders run through equal magnitudes and many sums are exactly zero; everything is exact then."""
    generator = torch.Generator().manual_seed(5)
    vectors = []
    for _ in range(models):
        tensors = {name: torch.randn(shape, generator=generator) + drift for name, shape in (("a", (9, 11)), ("b", (13, 5)), ("c", (7,)))}
        vectors.append({name: (8 * tensor).round() / 8 for name, tensor in tensors.items()})
    flat = [[float(value) for tensor in vector.values() for value in tensor.flatten()] for vector in vectors]
    expected = torch.tensor(_paper(flat, density), dtype=torch.float32)
    actual = torch.cat([tensor.flatten() for tensor in _merge(vectors, convention="paper", density=density).values()])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    if models == 2:
        other = torch.cat([tensor.flatten() for tensor in _merge(vectors, convention="peft-dense", density=density).values()])
        assert not torch.allclose(other, expected, rtol=1e-3)


def test_paper_needs_the_whole_model():
    vectors = [Vector({"w": torch.ones(3)})]
    with pytest.raises(InputError, match="whole model"):
        combine("w", vectors=vectors, config=MergeConfig(convention="paper"), thresholds=[0.0])


# ---- peft-dense


@pytest.mark.parametrize("density", [0.05, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("weights", [None, (0.6, 0.4, 1.5)])
def test_peft_dense_is_peft_bit_for_bit(density, weights):
    from peft.utils.merge_utils import ties

    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(37, 41, generator=generator) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ties([update.clone() for update in updates], torch.tensor(weights or [1.0] * 3), density)
    actual = _merge([{"w": update} for update in updates], convention="peft-dense", density=density, weights=weights)["w"]
    assert torch.equal(actual, expected)


# ---- seed


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("conventions")
    base = write_base(root / "base", dtype=torch.float32)
    for number in (1, 2):
        write_lora(root / f"trial-{number}", base=base, seed=number, lora_alpha=4 * number)
    write_lora(root / "rank-2", base=base, seed=3, r=2)
    write_lora(root / "q-only", base=base, seed=3, targets=["q_proj"])
    write_full(root / "full", base=base, seed=4, only="mlp")
    return root


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.6, 0.4)])
def test_seed_is_what_pefts_adapter_merge_writes(root, tmp_path, weights):
    """Factors bit for bit, and the written model equal to peft's merge_and_unload to float32 rounding."""
    from peft import PeftModel

    from trainers.modeling import load_model

    model = PeftModel.from_pretrained(load_model(root / "base"), str(root / "trial-1"), adapter_name="one")
    model.load_adapter(str(root / "trial-2"), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(weights), "merged", combination_type="ties", density=0.8)
    vectors = [open_task_vector(base=root / "base", trial=root / f"trial-{number}") for number in (1, 2)]
    layers = dict(model.base_model.model.named_modules())
    for name in vectors[0].names:
        layer = layers[name.removesuffix(".weight")]
        pairs = [vector.factors(name) for vector in vectors]
        merged = merge_factors(updates=[], factors=pairs, weights=weights, density=0.8).factors
        assert torch.equal(merged.a, layer.lora_A["merged"].weight)
        assert torch.equal(merged.b, layer.lora_B["merged"].weight)
    model.set_adapter("merged")
    expected = model.merge_and_unload().state_dict()
    config = MergeConfig(convention="seed", weights=weights)
    merge_checkpoint(base=root / "base", trials=[root / "trial-1", root / "trial-2"], out=tmp_path / "out", config=config)
    actual, before = load_model(tmp_path / "out").state_dict(), load_model(root / "base").state_dict()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    assert any((actual[name] - before[name]).abs().max() > 1e-3 for name in actual)


@pytest.mark.parametrize(
    ("other", "message"),
    [("rank-2", "rank 4 and rank 2"), ("q-only", "rank 4 and no factors"), ("full", "has none")],
)
def test_seed_refuses_trials_whose_factors_do_not_match(root, tmp_path, other, message):
    with pytest.raises(InputError, match=message):
        merge_checkpoint(
            base=root / "base", trials=[root / "trial-1", root / other], out=tmp_path / "out", config=MergeConfig(convention="seed")
        )
    assert not (tmp_path / "out").exists()
    vectors = [open_task_vector(base=root / "base", trial=root / name) for name in ("trial-1", other)]
    check_vectors(vectors, config=MergeConfig())


@pytest.mark.parametrize(("seeds", "noted"), [((42, 42), False), ((42, 43), True), ((None, None), True)])
def test_seed_notes_trials_that_may_not_have_started_alike(root, tmp_path, seeds, noted):
    trials = [root / f"trial-{number}" for number in (1, 2)]
    kept = [(trial / "manifest.json").read_text() for trial in trials]
    for trial, seed in zip(trials, seeds, strict=True):
        write_json(trial / "manifest.json", read_json(trial / "manifest.json") | ({"train": {"seed": seed}} if seed else {}))
    for method in ("seed", "ties"):
        merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / method, config=MergeConfig(method=method))
    for trial, text in zip(trials, kept, strict=True):
        (trial / "manifest.json").write_text(text)
    notes = read_json(tmp_path / "seed" / "merge.json")["notes"]
    assert (len(notes) == 1 and "seeds differ" in notes[0]) is noted
    assert read_json(tmp_path / "ties" / "merge.json")["notes"] == []
