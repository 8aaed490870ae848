"""Every merge method as maths: its reference, the laws that it keeps, and what it shares with peft."""

from __future__ import annotations

import inspect
import math
import typing
import warnings

import pytest
import torch

from merging.config import MergeConfig
from merging.methods.combination import Combination
from merging.methods.dare import drop_at_random
from merging.methods.della import drop_by_rank, keep_probabilities
from merging.methods.low_rank import LowRank
from merging.methods.run import run_method
from merging.methods.seeded import generator_for
from merging.methods.slerp import arc_coefficients, slerp
from merging.methods.table import CONVENTIONS, METHODS, PARAMETERS, MethodName, Need, load
from merging.ties import ties

torch.set_num_threads(1)

ON_UPDATES = tuple(name for name in METHODS if name != "seed")
ANY_NUMBER = tuple(name for name in ON_UPDATES if name != "slerp")
SPARSE: dict[str, dict[str, typing.Any]] = {
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.4},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.4, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "knots": {"density": 0.4},
}
"""Settings under which every method leaves something out."""


def _updates(*, models: int, shape: tuple[int, ...] = (13, 17), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1e-3 * torch.randn(shape, generator=generator) for _ in range(models)]


def _merge(method: str, updates, *, names=None, factors=None, total_weight=None, **settings) -> Combination:
    """A method on updates that are called 0, 1, ...; the names decide the masks."""
    config = MergeConfig(method=method, **settings)
    names = names or [str(index) for index in range(len(updates))]
    return run_method(
        updates=updates,
        weights=config.trial_weights(len(updates)),
        config=config,
        total_weight=total_weight,
        generators=[generator_for(seed=config.seed, tensor="w", content=name) for name in names],
        factors=factors or [None] * len(updates),
    )


def _masks(names, shape, density) -> list[list[bool]]:
    """The same masks, from the documented draw: uniform numbers below the keep probability."""
    drawn = [torch.rand(shape, generator=generator_for(seed=42, tensor="w", content=name)) for name in names]
    return [(one < density).flatten().tolist() for one in drawn]


# ---- the table


def test_the_table_the_configuration_and_the_functions_agree():
    assert tuple(METHODS) == tuple(MethodName)
    assert {*CONVENTIONS, None} == {
        *typing.get_args(typing.get_args(MergeConfig.model_fields["convention"].annotation)[0]),
        None,
    }
    for method in METHODS.values():
        assert method.source.startswith("https://")
        assert set(method.reads) <= set(MergeConfig.model_fields)
        taken: set[str] = set()
        for function in filter(None, (method.prepare, method.merge)):
            taken |= set(inspect.signature(load(function)).parameters)
        drawn = {"seed"} if Need.GENERATORS in method.needs else set()
        # Trim scope and count of ties are the whole model's affair.
        assert set(method.reads) - {"convention", "trim_scope", "trim_count"} - drawn <= taken, method.name
        assert taken & (set(PARAMETERS) - set(method.reads)) == set(), method.name
        assert {need.value for need in method.needs - {Need.ABSENT}} <= taken


# ---- laws


@pytest.mark.parametrize("method", [name for name in ANY_NUMBER if name != "della"])
def test_one_model_with_nothing_left_out_is_that_model(method):
    """knots rebuilds it from a decomposition, in float32. With something left out it is another model."""
    (update,) = _updates(models=1)
    full = {"density": 1.0} if "density" in METHODS[method].reads else {}
    full |= {"gamma": 0.0} if method == "breadcrumbs" else {}
    actual = _merge(method, [update], **full).update
    if method == "knots":
        torch.testing.assert_close(actual, update, rtol=1e-5, atol=1e-9)
    else:
        assert torch.equal(actual, update)
    if method in SPARSE:
        assert not torch.allclose(_merge(method, [update], **SPARSE[method]).update, update, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("method", ANY_NUMBER)
def test_the_order_of_models_does_not_matter(method, models):
    """With their weights and their masks; other weights are the control. Sums run in another order, so the last bits may differ."""
    updates, weights = _updates(models=models), [0.5, 1.25, 2.0][:models]
    names = ["a", "b", "c"][:models]
    settings = SPARSE.get(method, {})
    forward = _merge(method, updates, names=names, weights=weights, **settings).update
    backward = _merge(method, updates[::-1], names=names[::-1], weights=weights[::-1], **settings).update
    torch.testing.assert_close(backward, forward, rtol=2e-6, atol=1e-9)
    if models > 1:
        other = _merge(method, updates[::-1], names=names[::-1], weights=weights, **settings).update
        assert not torch.allclose(other, forward, rtol=1e-3, atol=1e-6)


def test_the_order_of_two_slerped_models_does_not_matter():
    updates = _updates(models=2)
    forward, backward = _merge("slerp", updates, weights=(3, 1)).update, _merge("slerp", updates[::-1], weights=(1, 3)).update
    torch.testing.assert_close(backward, forward, rtol=1e-6, atol=1e-10)
    assert not torch.allclose(_merge("slerp", updates, weights=(1, 3)).update, forward, rtol=1e-2)


@pytest.mark.parametrize("method", ON_UPDATES)
def test_scaling_the_updates_scales_the_merge(method):
    """By a power of two, exactly; knots and slerp to float32 rounding."""
    updates = _updates(models=2)
    once = _merge(method, updates, **SPARSE.get(method, {})).update
    scaled = _merge(method, [4 * update for update in updates], **SPARSE.get(method, {})).update
    torch.testing.assert_close(scaled, 4 * once, rtol=1e-5 if method in ("knots", "slerp") else 0, atol=1e-9 if method == "knots" else 0)
    assert once.abs().sum() > 0


@pytest.mark.parametrize("method", ANY_NUMBER)
def test_a_model_without_an_update(method):
    """It changes nothing, except where the mean counts it (linear: half) or where it disagrees with every sign (unanimous: nothing)."""
    (update,), settings = _updates(models=1), SPARSE.get(method, {})
    alone = _merge(method, [update], **settings).update
    actual = _merge(method, [update, torch.zeros_like(update)], **settings).update
    expected = {"linear": alone / 2, "unanimous": torch.zeros_like(alone)}.get(method, alone)
    torch.testing.assert_close(actual, expected, rtol=1e-5 if method == "knots" else 0, atol=1e-9 if method == "knots" else 0)
    nothing = _merge(method, [torch.zeros_like(update)] * 2, **settings)
    assert nothing.update.shape == update.shape
    assert nothing.update.count_nonzero() == 0


@pytest.mark.parametrize("method", ON_UPDATES)
def test_how_the_factors_are_written_does_not_matter(method):
    """(A, B) -> (inverse(G) A, B G) is the same update, so it is the same merge; rounding of 1e-7 moves no element over a border here."""
    generator = torch.Generator().manual_seed(3)
    pairs = [LowRank(torch.randn(r, 17, generator=generator), torch.randn(13, r, generator=generator), 0.5) for r in (3, 4)]
    gauges = [torch.linalg.qr(torch.randn(pair.rank, pair.rank, generator=generator)).Q * 1.5 for pair in pairs]
    others = [LowRank(torch.linalg.inv(g) @ p.a, p.b @ g, p.scale) for p, g in zip(pairs, gauges, strict=True)]
    first, second = (
        _merge(method, [pair.dense() for pair in side], factors=side, **SPARSE.get(method, {})).update for side in (pairs, others)
    )
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    assert first.abs().mean() > 0.05


def test_merging_factors_apart_does_depend_on_how_they_are_written():
    """The negative control: one and the same update twice, the second time as (-A, -B)."""
    generator = torch.Generator().manual_seed(3)
    pair = LowRank(torch.randn(3, 17, generator=generator), torch.randn(13, 3, generator=generator))
    same, negated = (_merge("seed", [pair.dense()] * 2, factors=[pair, LowRank(s * pair.a, s * pair.b)], density=1.0) for s in (1, -1))
    torch.testing.assert_close(same.update, pair.dense(), rtol=1e-5, atol=1e-6)
    assert torch.cosine_similarity(negated.update.flatten(), pair.dense().flatten(), dim=0).abs() < 0.5


# ---- references in Python's float64


def _top(values: list[float], number: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda index: -abs(values[index]))[:number])


def _elected(columns) -> list[float]:
    merged = []
    for values in columns:
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def _reference(method: str, vectors: list[list[float]], *, weights: list[float], names: list[str], shape: tuple[int, ...]) -> list[float]:
    """density 0.4, gamma 0.1, epsilon 0.2; weights only where a method is a sum."""
    number = len(vectors[0])
    columns = list(zip(*vectors, strict=True))
    if method in ("linear", "task_arithmetic"):
        divide = sum(weights) if method == "linear" else 1.0
        return [sum(w * value for w, value in zip(weights, column, strict=True)) / divide for column in columns]
    if method == "unanimous":
        agreed = [column if all(v > 0 for v in column) or all(v < 0 for v in column) else [0.0] * len(column) for column in columns]
        return [sum(w * value for w, value in zip(weights, column, strict=True)) / sum(weights) for column in agreed]
    if method == "slerp":
        norms = [math.sqrt(sum(value * value for value in vector)) for vector in vectors]
        angle = math.acos(sum(a * b for a, b in columns) / (norms[0] * norms[1]))
        t = weights[1] / sum(weights)
        return [(math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle) for a, b in columns]
    if method in ("magnitude_prune", "breadcrumbs"):
        top = int(0.1 * number) if method == "breadcrumbs" else 0
        kept = [_top(vector, int(0.4 * number) + top) - _top(vector, top) for vector in vectors]
        sparse = [[value if i in keep else 0.0 for i, value in enumerate(vector)] for vector, keep in zip(vectors, kept, strict=True)]
        return [sum(w * value for w, value in zip(weights, column, strict=True)) for column in zip(*sparse, strict=True)]
    probabilities = [[0.4] * number for _ in vectors]
    if method == "della":
        width = shape[1]
        for vector, chances in zip(vectors, probabilities, strict=True):
            for start in range(0, number, width):
                row = sorted(range(start, start + width), key=lambda index: abs(vector[index]))
                for rank, index in enumerate(row):
                    chances[index] = 0.4 - 0.2 + 0.4 * rank / (width - 1)
    draws = [torch.rand(shape, generator=generator_for(seed=42, tensor="w", content=name)).flatten().tolist() for name in names]
    sparse = [
        [value / p if draw < p else 0.0 for value, p, draw in zip(vector, chances, drawn, strict=True)]
        for vector, chances, drawn in zip(vectors, probabilities, draws, strict=True)
    ]
    if method == "dare_linear":
        return [sum(w * value for w, value in zip(weights, column, strict=True)) for column in zip(*sparse, strict=True)]
    return _elected(zip(*sparse, strict=True))


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("method", [name for name in ON_UPDATES if name not in ("ties", "knots")])
def test_every_method_matches_a_plain_reference(method, models):
    """A handful of float32 roundings, 1e-6 relative; a wrong rank, sign, divisor or probability is off by far more than 1 %."""
    if method == "slerp" and models != 2:
        pytest.skip("slerp merges two")
    updates, names, weights = _updates(models=models, shape=(11, 10)), ["a", "b", "c"][:models], [0.75, 2.0, 0.5][:models]
    weighted = {} if method in ("dare_ties", "della") else {"weights": weights}
    actual = _merge(method, updates, names=names, **weighted, **SPARSE.get(method, {})).update
    vectors = [[float(value) for value in update.flatten()] for update in updates]
    expected = _reference(method, vectors, weights=weights, names=names, shape=(11, 10))
    torch.testing.assert_close(actual.double().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 9), (40, 9), (9, 31), (7,), (4, 3, 5)], ids=str)
def test_knots_matches_the_decomposition_of_the_whole(shape):
    """float64 SVD of the updates side by side, TIES of the right factors, product. Rows beyond N times the columns take another way."""
    updates = _updates(models=2, shape=shape)
    rows = [update.reshape(1, -1) if update.dim() == 1 else update.flatten(1) for update in updates]
    u, s, v = torch.linalg.svd(torch.cat(rows, dim=1).double(), full_matrices=False)
    parts = [part.float() for part in v.split(rows[0].shape[1], dim=1)]
    expected = ((u * s) @ ties(updates=parts, density=0.4).double()).reshape(shape)
    actual = _merge("knots", updates, density=0.4).update
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(actual, ties(updates=updates, density=0.4), rtol=1e-2, atol=1e-5) or len(shape) == 1


def test_knots_of_factors_is_knots_of_their_products_and_has_low_rank():
    generator = torch.Generator().manual_seed(1)
    for transpose in (False, True):
        pairs = [
            LowRank(torch.randn(r, 31, generator=generator), torch.randn(23, r, generator=generator), scale, transpose)
            for r, scale in ((2, 0.5), (5, 2.0), (3, 1.0))
        ]
        dense = [pair.dense() for pair in pairs]
        known, unknown = (_merge("knots", dense, factors=factors, density=0.6) for factors in (pairs, [None, *pairs[1:]]))
        torch.testing.assert_close(known.update, unknown.update, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(known.update, rtol=1e-5) == known.factors.rank == 10
        torch.testing.assert_close(known.factors.dense(), known.update, rtol=1e-5, atol=1e-6)
        assert known.factors.transpose is transpose


def test_knots_does_not_give_places_to_directions_that_nothing_uses():
    """Two trials with one A span 3 directions, not 6: a decomposition that keeps 6 spends half of its density on rounding."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(3, 31, generator=generator)
    shared_b = torch.randn(23, 3, generator=generator)
    pairs = [LowRank(a, shared_b), LowRank(a * 2, shared_b)]
    merged = _merge("knots", [pair.dense() for pair in pairs], factors=pairs, density=0.5)
    assert merged.factors.rank == 3
    assert merged.entered[0].shape == (3, 31)


# ---- peft


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("method", ["task_arithmetic", "magnitude_prune", "dare_linear", "dare_ties"])
def test_peft_merges_the_same_updates_alike(method, models, monkeypatch):
    """Bit for bit; for the random methods under the same masks. Another density is the control."""
    from peft.utils import merge_utils

    updates, weights = _updates(models=models), [0.75, 2.0, 0.5][:models]
    masks = iter([torch.tensor(mask).reshape(13, 17).float() for mask in _masks([str(i) for i in range(models)], (13, 17), 0.4)])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    arguments = {} if method == "task_arithmetic" else {"density": 0.4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = getattr(merge_utils, method)([update.clone() for update in updates], torch.tensor(weights), **arguments)
    assert torch.equal(_merge(method, updates, weights=weights, **arguments).update, expected)
    if arguments:
        assert not torch.equal(_merge(method, updates, weights=weights, density=0.5).update, expected)


# ---- random masks


def test_a_mask_follows_from_seed_tensor_and_trial_and_from_nothing_else():
    (update,) = _updates(models=1, shape=(50, 60))

    def drop(**changes) -> torch.Tensor:
        key = {"seed": 1, "tensor": "w", "content": "abc"} | changes
        return drop_at_random(updates=[update], density=0.5, generators=[generator_for(**key)])[0]

    torch.manual_seed(1)
    first = drop()
    torch.manual_seed(2)
    torch.rand(1000)
    assert torch.equal(drop(), first)
    for change in ({"seed": 2}, {"tensor": "v"}, {"content": "abd"}):
        different = ((drop(**change) != 0) != (first != 0)).float().mean()
        assert 0.45 < different < 0.55


@pytest.mark.parametrize("method", ["dare", "della"])
def test_dropping_keeps_the_share_the_mean_and_the_norm_that_it_says(method):
    """200 masks: the mean of what is kept and rescaled by its probability is the update; each L1 norm is kept by l1, none by none."""
    (update,) = _updates(models=1, shape=(6, 50))

    def drop(number: int, rescale: str) -> torch.Tensor:
        generators = [generator_for(seed=number, tensor="w", content="abc")]
        if method == "dare":
            return drop_at_random(updates=[update], density=0.3, generators=generators, rescale=rescale)[0]
        return drop_by_rank(updates=[update], density=0.3, epsilon=0.2, generators=generators, rescale=rescale)[0]

    masks = [drop(number, "density") for number in range(200)]
    shares = torch.stack([(mask != 0).float() for mask in masks])
    assert shares.mean() == pytest.approx(0.3, abs=0.01)
    # Var of value / p * mask is value² (1 - p) / p: at most 3 times the value in one draw (p >= 0.1), a fifth of it in 200.
    error = (torch.stack(masks).mean(0) - update).abs() / update.abs()
    assert error.mean() < 0.2
    largest = update.abs() > update.abs().quantile(0.9, dim=1, keepdim=True)
    assert shares[:, largest].mean() == pytest.approx(0.3 if method == "dare" else 0.48, abs=0.03)
    norms = [float(drop(number, "l1").abs().sum()) for number in range(5)]
    assert norms == pytest.approx([float(update.abs().sum())] * 5, rel=1e-5)
    bare = drop(3, "none")
    assert torch.equal(bare[bare != 0], update[bare != 0])
    assert float(bare.abs().sum()) < 0.8 * float(update.abs().sum())


def test_della_probabilities_by_hand():
    """Ranks in the row (3, -1, 2) are 2, 0, 1; the second row is all equal, so ranked by position."""
    update = torch.tensor([[3.0, -1.0, 2.0], [1.0, 1.0, 1.0]])
    expected = torch.tensor([[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]])
    torch.testing.assert_close(keep_probabilities(update, density=0.5, epsilon=0.2), expected)
    torch.testing.assert_close(keep_probabilities(update[0], density=0.5, epsilon=0.2), expected[0])
    assert keep_probabilities(torch.ones(4, 1), density=0.5, epsilon=0.2).tolist() == [[0.5]] * 4
    with pytest.raises(ValueError, match="epsilon"):
        drop_by_rank(updates=[update], density=0.9, epsilon=0.2, generators=[torch.Generator()])


# ---- single steps by hand


def test_breadcrumbs_by_hand():
    """Of ten, gamma 0.1 drops the largest (10), density 0.3 keeps 9, 8, 7; equal magnitudes fall on neither side twice."""
    update = torch.tensor([1.0, -10.0, 9.0, 2.0, -8.0, 3.0, 7.0, 4.0, 5.0, 6.0])
    merged = _merge("breadcrumbs", [update], density=0.3, gamma=0.1)
    assert merged.update.tolist() == [0, 0, 9, 0, -8, 0, 7, 0, 0, 0]
    equal = _merge("breadcrumbs", [torch.ones(10)], density=0.3, gamma=0.2).update
    assert sorted(equal.tolist()) == [0] * 7 + [1] * 3
    with pytest.raises(ValueError, match="gamma"):
        MergeConfig(method="breadcrumbs", density=0.95, gamma=0.1)


def test_unanimous_by_hand():
    """(1, -1, 2, 0) and (3, -3, -2, 5): both positive, both negative, different, and a zero that has no sign."""
    updates = [torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([3.0, -3.0, -2.0, 5.0])]
    assert _merge("unanimous", updates).update.tolist() == [2, -2, 0, 0]
    assert _merge("unanimous", updates, weights=(3, 1)).update.tolist() == [1.5, -1.5, 0, 0]


def test_slerp_by_hand():
    """Half of a right angle between unit vectors is (1, 1) / sqrt(2), of length 1, where the mean has 0.71."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(updates=[a, b]), torch.tensor([1.0, 1.0]) / math.sqrt(2))
    third = arc_coefficients(updates=[a, b], weights=(2.0, 1.0))
    assert third == pytest.approx((math.sin(math.pi / 3), math.sin(math.pi / 6)))
    assert slerp(updates=[a, 3 * a]).tolist() == [2, 0]
    assert slerp(updates=[a, -a]).tolist() == [0, 0]
    assert slerp(updates=[a, torch.zeros(2)], weights=(3.0, 1.0)).tolist() == [0.75, 0]
    with pytest.raises(ValueError, match="two updates"):
        slerp(updates=[a, b, a])


def test_factors_that_do_not_fit_are_refused():
    pair, other = LowRank(torch.ones(2, 4), torch.ones(3, 2)), LowRank(torch.ones(1, 4), torch.ones(3, 1))
    for factors in ([pair, other], [pair, None]):
        with pytest.raises(ValueError, match="one rank"):
            _merge("seed", [torch.ones(3, 4)] * 2, factors=factors)
