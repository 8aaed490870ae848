"""Which rows meet in which step, on which rank, in which micro-batch, under each schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.config import TrainConfig
from trainers.errors import InputError
from trainers.plan import MicroBatch, StepPlan, plan_trial, split_step

SCHEDULES = ("paired", "chunked", "alternating")


def plan(
    name: str = "paired",
    *,
    num_forget: int = 10,
    num_retain: int = 7,
    batch_size: int = 4,
    num_epochs: float = 2,
    seed: int = 0,
    **schedule,
) -> list[StepPlan]:
    train = TrainConfig.model_validate(
        {"train_batch_size": batch_size, "num_train_epochs": num_epochs, "seed": seed, "schedule": {"name": name, **schedule}}
    )
    return plan_trial(train=train, num_forget=num_forget, num_retain=num_retain)


def cycles(plans: list[StepPlan]) -> list[list[StepPlan]]:
    starts = [index for index, step in enumerate(plans) if step.cycle_step == 1]
    return [plans[start:end] for start, end in zip(starts, [*starts[1:], len(plans)], strict=True)]


def rows(plans: list[StepPlan], side: str) -> list[int]:
    return [index for step in plans for index in getattr(step, side)]


def spread(uses: Counter, *, num_rows: int) -> int:
    counts = [uses.get(index, 0) for index in range(num_rows)]
    return max(counts) - min(counts)


SIZES = {"num_forget": st.integers(1, 40), "num_retain": st.integers(0, 40), "batch_size": st.integers(1, 12), "seed": st.integers(0, 9999)}
TRIALS = {
    "num_forget": st.integers(1, 40),
    "num_retain": st.integers(1, 40),
    "batch_size": st.integers(1, 12),
    "seed": st.integers(0, 9999),
    "shuffle": st.booleans(),
    "chunk_size": st.integers(1, 50),
    "retain_per_forget": st.integers(1, 4),
    "annealing_fraction": st.floats(0.01, 1),
}


# --- every schedule ---


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(SCHEDULES), trial=st.fixed_dictionaries(TRIALS), num_epochs=st.integers(1, 3))
def test_every_forget_row_comes_once_per_epoch_under_every_schedule(name: str, trial: dict, num_epochs: int) -> None:
    """And steps are not larger than asked for, numbered without gaps, and in cycles that say their length."""
    plans = plan(name, **trial, num_epochs=num_epochs)
    assert Counter(rows(plans, "forget")) == dict.fromkeys(range(trial["num_forget"]), num_epochs)
    assert [step.step for step in plans] == list(range(1, len(plans) + 1))
    assert plans[-1].epoch == pytest.approx(num_epochs, rel=1e-9)
    assert all(earlier.epoch <= later.epoch for earlier, later in pairwise(plans))
    for cycle in cycles(plans):
        assert [step.cycle_step for step in cycle] == list(range(1, len(cycle) + 1))
        assert {step.cycle_steps for step in cycle} == {len(cycle)}
    for step in plans:
        assert step.forget or step.retain
        assert len(step.forget) <= trial["batch_size"]
        if not step.forget:
            assert len(step.retain) <= trial["batch_size"]
        elif name == "alternating":
            assert not step.retain
        else:
            assert len(step.retain) == trial["retain_per_forget"] * len(step.forget)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(SCHEDULES), trial=st.fixed_dictionaries(TRIALS), num_epochs=st.floats(0.1, 3), data=st.data())
def test_what_is_left_after_a_stop_does_not_depend_on_what_ran_before(
    name: str, trial: dict, num_epochs: float, data: st.DataObject
) -> None:
    """A run that stops after any step and resumes sees the suffix of an uninterrupted one, whatever drew random numbers meanwhile."""
    whole = plan(name, **trial, num_epochs=num_epochs)
    done = data.draw(st.integers(0, len(whole)))
    np.random.seed(done)
    plan(name, **{**trial, "seed": trial["seed"] + 1}, num_epochs=1)
    assert plan(name, **trial, num_epochs=num_epochs)[done:] == whole[done:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_order_is_a_function_of_the_seed(name: str) -> None:
    changes = {"num_forget": 30, "num_retain": 30, "chunk_size": 15}
    assert plan(name, seed=3, **changes) == plan(name, seed=3, **changes)
    assert plan(name, seed=3, **changes) != plan(name, seed=4, **changes)
    assert plan(name, seed=3, shuffle=False, **changes) == plan(name, seed=4, shuffle=False, **changes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_empty_forget_set_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="the forget set is empty"):
        plan(name, num_forget=0)


def test_annealing_without_retain_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"no retain rows to anneal on(.|\n)*train\.schedule\.name"):
        plan("alternating", num_retain=0)


@pytest.mark.parametrize("name", ["paired", "chunked"])
def test_without_a_retain_term_the_forget_side_stays_the_same(name: str) -> None:
    with_retain, without = plan(name, chunk_size=3), plan(name, chunk_size=3, num_retain=0)
    assert without == [replace(step, retain=()) for step in with_retain]
    assert rows(with_retain, "retain")


# --- paired ---


def test_ten_rows_in_batches_of_four_make_steps_of_four_four_and_two() -> None:
    """Two epochs: 3 steps each; the epoch is the share of passes done after the step; one cycle, so one optimizer."""
    plans = plan()
    assert [len(step.forget) for step in plans] == [4, 4, 2, 4, 4, 2]
    assert [len(step.retain) for step in plans] == [4, 4, 2, 4, 4, 2]
    assert [step.step for step in plans] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in plans] == [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]
    assert [(step.cycle_step, step.cycle_steps) for step in plans] == [(number, 6) for number in range(1, 7)]
    assert not any(step.fresh_optimizer for step in plans)


def test_the_last_step_of_a_pass_ends_on_a_whole_epoch() -> None:
    """49 steps per pass: 49 * (1 / 49) is not 1 in float64, 49 / 49 is."""
    assert [step.epoch for step in plan(num_forget=49, batch_size=1)][48::49] == [1.0, 2.0]
    assert 49 * (1 / 49) != 1.0


def test_the_order_of_a_seed_stays_what_it_was() -> None:
    """Pass e over a side is the permutation of (seed, side, e); trials recorded earlier depend on it."""

    def permutation(side: int, epoch: int, size: int) -> list[int]:
        return np.random.default_rng([5, side, epoch]).permutation(size).tolist()

    plans = plan(seed=5, num_epochs=2)
    assert rows(plans, "forget") == permutation(0, 0, 10) + permutation(0, 1, 10)
    assert rows(plans, "retain") == (permutation(1, 0, 7) + permutation(1, 1, 7) + permutation(1, 2, 7))[:20]


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_epochs=st.integers(1, 4))
def test_every_forget_row_comes_once_per_epoch(num_forget: int, num_retain: int, batch_size: int, num_epochs: int, seed: int) -> None:
    plans = plan(num_forget=num_forget, num_retain=num_retain, batch_size=batch_size, num_epochs=num_epochs, seed=seed)
    assert len(plans) % num_epochs == 0
    steps_per_epoch = len(plans) // num_epochs
    for epoch in range(num_epochs):
        passed = rows(plans[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch], "forget")
        assert sorted(passed) == list(range(num_forget))
    assert all(len(step.forget) <= batch_size for step in plans)


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_epochs=st.floats(0.1, 4), retain_per_forget=st.integers(1, 4), shuffle=st.booleans())
def test_retain_rows_are_used_equally_often_up_to_one(
    num_forget: int, num_retain: int, batch_size: int, num_epochs: float, seed: int, retain_per_forget: int, shuffle: bool
) -> None:
    """The retain stream is shorter or longer than the forget set and goes on through its epochs; no row is favoured."""
    plans = plan(
        num_forget=num_forget,
        num_retain=num_retain,
        batch_size=batch_size,
        num_epochs=num_epochs,
        seed=seed,
        retain_per_forget=retain_per_forget,
        shuffle=shuffle,
    )
    uses = Counter(rows(plans, "retain"))
    if num_retain == 0:
        assert not uses
        return
    assert all(len(step.retain) == retain_per_forget * len(step.forget) for step in plans)
    assert spread(uses, num_rows=num_retain) <= 1


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_epochs=st.floats(0.1, 3), more=st.floats(0, 2))
def test_a_longer_run_begins_like_a_shorter_one(
    num_forget: int, num_retain: int, batch_size: int, num_epochs: float, more: float, seed: int
) -> None:
    """In its rows; its learning rate falls more slowly."""
    sizes = {"num_forget": num_forget, "num_retain": num_retain, "batch_size": batch_size, "seed": seed}
    shorter = plan(**sizes, num_epochs=num_epochs)
    longer = plan(**sizes, num_epochs=num_epochs + more)
    assert [replace(step, cycle_steps=len(shorter)) for step in longer[: len(shorter)]] == shorter
    assert longer[0].cycle_steps == len(longer)


def test_the_order_changes_between_epochs_and_between_the_sets() -> None:
    first, second = plan(num_forget=30, batch_size=30)
    assert first.forget != second.forget
    assert first.forget != tuple(range(30))
    both = plan(num_forget=30, num_retain=30, batch_size=30, num_epochs=1)[0]
    assert both.forget != both.retain, "the two sets are shuffled apart"


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(0.5, 2), (1, 3), (1.34, 4), (0.01, 1)])
def test_a_fraction_of_an_epoch_ends_within_the_pass_but_never_before_the_first_step(num_epochs: float, num_steps: int) -> None:
    """Three steps per epoch: 1.5 rounds to 2, 4.02 to 4, 0.03 becomes 1."""
    assert len(plan(num_epochs=num_epochs)) == num_steps


def test_without_shuffling_every_epoch_follows_the_file_and_retain_rows_go_round() -> None:
    """3 forget rows with 2 retain rows each, out of 4: 6 in the first epoch, going on at row 2 in the second."""
    plans = plan(num_forget=3, num_retain=4, batch_size=2, shuffle=False, retain_per_forget=2)
    assert [(step.forget, step.retain) for step in plans] == [
        ((0, 1), (0, 1, 2, 3)),
        ((2,), (0, 1)),
        ((0, 1), (2, 3, 0, 1)),
        ((2,), (2, 3)),
    ]


# --- chunked (SUGD) ---


def test_chunks_follow_each_other_each_with_its_share_of_retain_rows() -> None:
    """Five forget rows in chunks of 2, 2 and 1, two passes each, with 2 retain rows per forget row out of 7.

    The chunks' shares are rows 0-3, then 4-6 and 0, then 1-2. A chunk keeps its share in its second pass, as the published code does:
    its retain index moves on between chunks only.
    """
    plans = plan("chunked", num_forget=5, num_retain=7, batch_size=1, shuffle=False, chunk_size=2, retain_per_forget=2)
    first = [((0,), (0, 1)), ((1,), (2, 3))]
    second = [((2,), (4, 5)), ((3,), (6, 0))]
    third = [((4,), (1, 2))]
    assert [(step.forget, step.retain) for step in plans] == first * 2 + second * 2 + third * 2
    assert [(step.cycle_step, step.cycle_steps) for step in plans] == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2 + [(1, 2), (2, 2)]
    assert [step.step for step in plans if step.fresh_optimizer] == [5, 9]
    # A pass over two of five rows is worth 0.4, over one 0.2.
    assert [step.epoch for step in plans] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])


@settings(max_examples=100, deadline=None)
@given(trial=st.fixed_dictionaries(TRIALS), num_epochs=st.integers(1, 3))
def test_a_chunk_is_finished_before_the_next_one_starts_with_a_fresh_optimizer(trial: dict, num_epochs: int) -> None:
    parts = cycles(plan("chunked", **trial, num_epochs=num_epochs))
    sizes = [len(set(rows(part, "forget"))) for part in parts]
    full, rest = divmod(trial["num_forget"], trial["chunk_size"])
    assert sizes == [trial["chunk_size"]] * full + [rest] * bool(rest)
    assert sum(sizes) == trial["num_forget"], "no row is in two chunks"
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        assert [step.fresh_optimizer for step in part] == [number > 0] + [False] * (len(part) - 1)
        steps_per_pass = len(part) // num_epochs
        for start in range(0, len(part), steps_per_pass):
            assert len(set(rows(part[start : start + steps_per_pass], "forget"))) == size


@settings(max_examples=100, deadline=None)
@given(trial=st.fixed_dictionaries(TRIALS), num_epochs=st.integers(1, 3))
def test_the_chunks_shares_use_all_retain_rows_equally_often_up_to_one(trial: dict, num_epochs: int) -> None:
    """Counted in passes: each pass over a chunk uses its share once, so over the trial the counts differ by one chunk's passes at most."""
    plans = plan("chunked", **trial, num_epochs=num_epochs)
    for part in cycles(plans):
        steps_per_pass = len(part) // num_epochs
        shares = [sorted(rows(part[start : start + steps_per_pass], "retain")) for start in range(0, len(part), steps_per_pass)]
        assert all(share == shares[0] for share in shares)
        assert spread(Counter(shares[0]), num_rows=trial["num_retain"]) <= 1
    uses = Counter(rows(plans, "retain"))
    assert all(count % num_epochs == 0 for count in uses.values())
    assert spread(uses, num_rows=trial["num_retain"]) <= num_epochs


@settings(max_examples=60, deadline=None)
@given(trial=st.fixed_dictionaries(TRIALS), num_epochs=st.floats(0.1, 2), more=st.floats(0, 2))
def test_more_passes_change_neither_chunks_nor_shares_nor_the_passes_before(trial: dict, num_epochs: float, more: float) -> None:
    shorter, longer = (cycles(plan("chunked", **trial, num_epochs=passes)) for passes in (num_epochs, num_epochs + more))
    assert len(shorter) == len(longer)
    for part, long_part in zip(shorter, longer, strict=True):
        assert [(step.forget, step.retain) for step in part] == [(step.forget, step.retain) for step in long_part[: len(part)]]


def test_passes_over_a_chunk_are_shuffled_apart_and_so_are_the_chunks() -> None:
    """Two chunks of 15 in steps of 15: a step is a pass."""
    plans = plan("chunked", num_forget=30, num_retain=30, batch_size=15, chunk_size=15)
    orders = [step.forget for step in plans]
    assert len(set(orders)) == 4
    assert set(orders[0]) == set(orders[1])
    assert set(orders[0]) != set(range(15)), "chunks are cut from the shuffled set"
    assert plans[0].retain != plans[1].retain
    assert set(plans[0].retain) == set(plans[1].retain)


def test_the_order_within_a_cycle_is_a_function_of_seed_cycle_and_pass() -> None:
    """A set is cut in the order of (seed, side), and pass e over its part c takes the permutation of (seed, 2 + side, c, e) of it."""

    def permuted(rows: list[int], *place: int) -> list[int]:
        return [rows[index] for index in np.random.default_rng([5, *place]).permutation(len(rows))]

    forget, retain = permuted(list(range(6)), 0), permuted(list(range(9)), 1)
    expected = [
        (permuted(forget[3 * chunk :][:3], 2, chunk, epoch), permuted(retain[3 * chunk :][:3], 3, chunk, epoch))
        for chunk in range(2)
        for epoch in range(2)
    ]
    chunked = plan("chunked", seed=5, num_forget=6, num_retain=9, chunk_size=3)
    assert [(list(step.forget), list(step.retain)) for step in chunked] == expected
    alternating = plan("alternating", seed=5, num_forget=6, num_retain=9, chunk_size=3, batch_size=9, annealing_fraction=1 / 3)
    assert [list(step.retain) for step in alternating if step.retain] == [
        expected[0][1],
        expected[2][1],
        permuted(list(range(9)), 3, 2, 0),
    ]


def test_one_chunk_of_everything_sees_the_rows_of_the_paired_schedule() -> None:
    """Each pass then holds the same forget rows, and it is one cycle; a smaller chunk is not."""
    chunked, paired = (plan(name, chunk_size=10, shuffle=False, num_retain=10) for name in ("chunked", "paired"))
    assert chunked == paired
    assert plan("chunked", chunk_size=9, shuffle=False, num_retain=10) != paired


# --- alternating (AGAD) ---


def test_forgetting_and_annealing_take_turns() -> None:
    """Three forget rows in chunks of 2 and 1, two passes; after each, one pass over half of 5 retain rows (2), at the end over all."""
    plans = plan("alternating", num_forget=3, num_retain=5, batch_size=2, shuffle=False, chunk_size=2, annealing_fraction=0.5)
    assert [(step.forget, step.retain) for step in plans] == [
        ((0, 1), ()),
        ((0, 1), ()),
        ((), (0, 1)),
        ((2,), ()),
        ((2,), ()),
        ((), (2, 3)),
        ((), (0, 1)),
        ((), (2, 3)),
        ((), (4,)),
    ]
    assert [step.step for step in plans if step.fresh_optimizer] == [3, 4, 6, 7], "each phase has an optimizer of its own"
    assert [step.cycle_steps for step in plans] == [2, 2, 1, 2, 2, 1, 3, 3, 3]
    # Annealing adds nothing to the passes over the forget set.
    assert [step.epoch for step in plans] == pytest.approx([2 / 3, 4 / 3, 4 / 3, 5 / 3, 2, 2, 2, 2, 2])


def test_the_final_annealing_can_be_left_out() -> None:
    changes = {"chunk_size": 4, "annealing_fraction": 0.3}
    with_final, without = (plan("alternating", final_annealing=final, **changes) for final in (True, False))
    assert with_final[: len(without)] == without
    rest = with_final[len(without) :]
    assert sorted(rows(rest, "retain")) == list(range(7))
    assert not rows(rest, "forget")


@pytest.mark.parametrize(
    ("annealing_epochs", "num_steps"),
    # 6 of 8 rows in steps of 2: 3 steps per pass. At least one step.
    [(1, 3), (2, 6), (0.5, 2), (0.1, 1)],
)
def test_annealing_counts_its_own_passes(annealing_epochs: float, num_steps: int) -> None:
    plans = plan(
        "alternating",
        num_forget=4,
        num_retain=8,
        batch_size=2,
        num_epochs=1,
        chunk_size=4,
        annealing_fraction=0.75,
        annealing_epochs=annealing_epochs,
        final_annealing=False,
    )
    assert [bool(step.forget) for step in plans] == [True, True] + [False] * num_steps
    if annealing_epochs == 2:
        passes = [rows(plans[2:5], "retain"), rows(plans[5:8], "retain")]
        assert sorted(passes[0]) == sorted(passes[1])
        assert passes[0] != passes[1]


@settings(max_examples=100, deadline=None)
@given(trial=st.fixed_dictionaries(TRIALS), final_annealing=st.booleans())
def test_annealing_shares_have_no_row_twice_and_use_all_rows_equally_often_up_to_one(trial: dict, final_annealing: bool) -> None:
    plans = plan("alternating", **trial, final_annealing=final_annealing)
    annealing = [part for part in cycles(plans) if not part[0].forget]
    share_size = max(1, round(trial["annealing_fraction"] * trial["num_retain"]))
    num_chunks = -(-trial["num_forget"] // trial["chunk_size"])
    sizes = [len(rows(part, "retain")) for part in annealing]
    assert sizes == [share_size] * num_chunks + [trial["num_retain"]] * final_annealing
    assert all(len(set(rows(part, "retain"))) == size for part, size in zip(annealing, sizes, strict=True))
    assert spread(Counter(rows(plans, "retain")), num_rows=trial["num_retain"]) <= 1
    assert all(step.retain_per_forget == 1 for step in plans), "retain_per_forget has no meaning here"


# --- ranks and micro-batches ---

SPLITS = {
    "num_forget": st.integers(0, 13),
    "num_retain": st.integers(0, 13),
    "world_size": st.integers(1, 5),
    "micro_batch_size": st.integers(1, 6),
}


def step_of(forget: tuple[int, ...], retain: tuple[int, ...], *, retain_per_forget: int = 1) -> StepPlan:
    return StepPlan(1, 1.0, forget, retain, cycle_step=1, cycle_steps=1, retain_per_forget=retain_per_forget)


def split(step: StepPlan, *, world_size: int, micro_batch_size: int) -> list[list[MicroBatch]]:
    return [split_step(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size) for rank in range(world_size)]


def assert_shared_without_overlap_or_loss(step: StepPlan, *, parts: list[list[MicroBatch]]) -> None:
    """Disjoint, complete, equally many micro-batches on every rank, shares equal up to one row."""
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) >= 1
    for name in ("forget", "retain"):
        assert Counter(index for part in parts for micro in part for index in getattr(micro, name)) == Counter(getattr(step, name))
        shares = [sum(len(getattr(micro, name)) for micro in part) for part in parts]
        assert max(shares) - min(shares) <= 1


@settings(max_examples=150, deadline=None)
@given(**SPLITS)
def test_ranks_share_a_step_without_overlap_or_loss(num_forget: int, num_retain: int, world_size: int, micro_batch_size: int) -> None:
    step = step_of(tuple(range(num_forget)), tuple(range(100, 100 + num_retain)))
    parts = split(step, world_size=world_size, micro_batch_size=micro_batch_size)
    assert_shared_without_overlap_or_loss(step, parts=parts)
    for micro in (micro for part in parts for micro in part):
        assert max(len(micro.forget), len(micro.retain)) <= micro_batch_size


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(SCHEDULES), trial=st.fixed_dictionaries(TRIALS), world_size=st.integers(1, 5), micro_batch_size=st.integers(1, 6)
)
def test_ranks_share_the_steps_of_every_schedule(name: str, trial: dict, world_size: int, micro_batch_size: int) -> None:
    """Per pass at most micro_batch_size forget rows with their company, or micro_batch_size retain rows, and not one pass too many."""
    for step in plan(name, **trial, num_epochs=1):
        parts = split(step, world_size=world_size, micro_batch_size=micro_batch_size)
        assert_shared_without_overlap_or_loss(step, parts=parts)
        ratio = trial["retain_per_forget"] if step.forget and step.retain else 1
        for micro in (micro for part in parts for micro in part):
            assert len(micro.forget) <= micro_batch_size
            assert len(micro.retain) <= ratio * micro_batch_size
        # The first side of a step with both decides: its company is exactly ratio times as large.
        largest_share = -(-len(step.forget or step.retain) // world_size)
        assert len(parts[0]) == -(-largest_share // micro_batch_size)


def test_a_rank_without_rows_still_makes_its_passes() -> None:
    """Three pairs on two ranks, one pair per pass: rank 0 has rows 0 and 2, rank 1 has row 1 and an empty pass."""
    first, second = split(step_of((10, 11, 12), (20, 21, 22)), world_size=2, micro_batch_size=1)
    assert [(micro.forget, micro.retain) for micro in first] == [((10,), (20,)), ((12,), (22,))]
    assert [(micro.forget, micro.retain) for micro in second] == [((11,), (21,)), ((), ())]


def test_several_retain_rows_per_forget_row_are_dealt_out_evenly() -> None:
    """Three forget rows with 2 retain rows each, on two ranks, one forget row per pass.

    Each rank gets 3 retain rows, 2 of them in its first pass. Kept with their forget rows, rank 0 would compute 6 rows and rank 1 only 3.
    """
    step = step_of((10, 11, 12), (20, 21, 22, 23, 24, 25), retain_per_forget=2)
    first, second = split(step, world_size=2, micro_batch_size=1)
    assert first == [MicroBatch((10,), (20, 22)), MicroBatch((12,), (24,))]
    assert second == [MicroBatch((11,), (21, 23)), MicroBatch((), (25,))]


@pytest.mark.parametrize("retain_per_forget", [1, 3])
def test_a_step_of_one_side_has_micro_batch_size_rows_per_pass(retain_per_forget: int) -> None:
    """Without forget rows the ratio has nothing to multiply."""
    retain_only, forget_only = step_of((), (0, 1, 2, 3, 4), retain_per_forget=retain_per_forget), step_of((0, 1, 2), ())
    assert split(retain_only, world_size=1, micro_batch_size=2)[0] == [MicroBatch((), rows) for rows in ((0, 1), (2, 3), (4,))]
    assert split(forget_only, world_size=1, micro_batch_size=2)[0] == [MicroBatch((0, 1), ()), MicroBatch((2,), ())]


def test_a_step_with_fewer_rows_than_ranks_is_one_pass_everywhere() -> None:
    parts = split(step_of((7,), (8, 9), retain_per_forget=2), world_size=4, micro_batch_size=3)
    assert parts == [[MicroBatch((7,), (8,))], [MicroBatch((), (9,))], [MicroBatch((), ())], [MicroBatch((), ())]]
