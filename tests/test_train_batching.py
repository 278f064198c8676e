"""Batches: every sample once per pass, tasks within one draw of their shares, lengths close together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from edgeomni.errors import TrainError
from edgeomni.spec import TASKS, Task
from edgeomni.train.batching import Batch, BatchPlan, Draw, PlannedBatches

SIZES: dict[Task, int] = {"asr": 40, "aa": 23, "tt": 7}
WEIGHTS: dict[Task, float] = {"asr": 2, "aa": 1.5, "tt": 0.5}


def plan(sizes: dict[Task, int] = SIZES, **changes: Any) -> BatchPlan:
    """Samples of random lengths; those of a task have indices from 1000 * its place in TASKS on."""
    rng = random.Random(5)
    members = {task: [1000 * TASKS.index(task) + i for i in range(n)] for task, n in sizes.items()}
    lengths = {task: [rng.randint(10, 200) for _ in range(n)] for task, n in sizes.items()}
    given: dict[str, Any] = {"lengths": lengths, "members": members, "weights": WEIGHTS, "batch": 4, "seed": 3}
    return BatchPlan(**{**given, **changes})


def length(made: BatchPlan, draw: Draw) -> int:
    return made.lengths[draw.task][made.members[draw.task].index(draw.index)]


def first(made: BatchPlan, batches: int) -> list[Batch]:
    return list(islice(made.batches(), batches))


def in_order(made: BatchPlan, draws: int) -> list[Draw]:
    """The first draws by number, taken from whole pools."""
    assert draws % (made.batch * made.pool) == 0
    pools = made.batches()
    found: list[Draw] = []
    while len(found) < draws:
        found += next(pools)
    return sorted(found, key=lambda draw: draw.number)


def padded(made: BatchPlan, batches: list[Batch]) -> int:
    return sum(len(batch) * max(length(made, draw) for draw in batch) for batch in batches)


def test_one_pass_has_every_member_once_and_the_next_pass_another_order() -> None:
    made = plan({"asr": 64}, weights={"asr": 1.0})
    draws = in_order(made, 128)
    passes = [[draw.index for draw in draws[:64]], [draw.index for draw in draws[64:]]]
    assert sorted(passes[0]) == sorted(passes[1]) == list(made.members["asr"])
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0])


def test_each_task_goes_through_all_its_members_before_it_repeats_one() -> None:
    draws = in_order(plan(), 64 * 10)
    for task, size in SIZES.items():
        mine = [draw.index for draw in draws if draw.task == task]
        assert len(mine) >= 2 * size
        for begin in range(0, len(mine) - size + 1, size):
            assert len(set(mine[begin : begin + size])) == size
        assert {index // 1000 for index in mine} == {TASKS.index(task)}


def test_draws_are_numbered_without_gaps() -> None:
    assert [draw.number for draw in in_order(plan(), 128)] == list(range(128))


def all_weights() -> Iterator[dict[Task, float]]:
    yield {"asr": 1.0}
    yield {"asr": 1.0, "at": 1.0}
    yield {"asr": 1.0, "at": 1.0, "aa": 1.0}
    rng = random.Random(1)
    for n in (2, 3, 4, 5, 5, 5, 5):
        yield {task: rng.random() ** 3 + 0.002 for task in TASKS[:n]}


@pytest.mark.parametrize("weights", list(all_weights()))
def test_after_any_number_of_draws_every_task_is_within_one_draw_of_its_share(weights: dict[Task, float]) -> None:
    draws = in_order(plan(dict.fromkeys(TASKS, 3), weights=weights), 64 * 16)
    total, counts = sum(weights.values()), Counter[str]()
    for n, draw in enumerate(draws, start=1):
        counts[draw.task] += 1
        assert all(abs(counts[task] - n * weight / total) < 1 for task, weight in weights.items())


@pytest.mark.parametrize("pool", [1, 16])
def test_every_batch_mixes_the_tasks_by_their_weights(pool: int) -> None:
    made = plan(weights={"asr": 2, "aa": 1, "tt": 1}, pool=pool)
    for batch in first(made, 40):
        assert Counter(draw.task for draw in batch) == {"asr": 2, "aa": 1, "tt": 1}


def test_the_longest_of_every_task_meet_in_one_batch() -> None:
    """Lengths 1..16 per task, one of each per batch: with a pool of 16, every batch holds three equal lengths."""
    sizes: dict[Task, int] = {"asr": 16, "aa": 16, "tt": 16}
    lengths = {task: list(range(1, 17)) for task in sizes}
    made = plan(sizes, lengths=lengths, weights=dict.fromkeys(sizes, 1), batch=3)
    for batch in first(made, 16):
        assert len({length(made, draw) for draw in batch}) == 1 and len(batch) == 3


def test_a_task_of_weight_0_or_without_a_weight_is_not_drawn() -> None:
    made = plan(weights={"asr": 1, "aa": 0})
    assert {draw.task for batch in first(made, 40) for draw in batch} == {"asr"}


@pytest.mark.parametrize("changes", [{}, {"max_frames": 300}, {"pool": 1}])
def test_starting_at_a_batch_equals_skipping_those_before(changes: dict[str, Any]) -> None:
    whole = first(plan(**changes), 60)
    for start in (0, 1, 15, 16, 17, 50):
        assert list(islice(plan(**changes).batches(start), 60 - start)) == whole[start:]


def test_a_plan_depends_on_its_seed_alone() -> None:
    backwards = dict(reversed(WEIGHTS.items()))
    assert first(plan(), 30) == first(plan(weights=backwards), 30)
    assert first(plan(), 30) != first(plan(seed=4), 30)


def test_lengths_are_close_within_a_batch() -> None:
    """The waste of padding, against batches of the same draws in the order in which they were drawn."""
    made = plan({"asr": 640, "aa": 640, "tt": 640}, batch=8)
    draws = in_order(made, 8 * 16 * 10)
    needed = sum(length(made, draw) for draw in draws)
    unsorted = padded(made, [draws[i : i + 8] for i in range(0, len(draws), 8)]) - needed
    planned = padded(made, first(made, 160)) - needed
    assert planned < unsorted / 5


def test_batches_of_a_pool_come_in_no_order_of_length() -> None:
    made = plan({"asr": 640}, weights={"asr": 1}, batch=8)
    tops = [max(length(made, draw) for draw in batch) for batch in first(made, 32)]
    assert tops[:16] != sorted(tops[:16]) and tops[:16] != sorted(tops[:16], reverse=True)
    ranks = [[sorted(pool).index(top) for top in pool] for pool in (tops[:16], tops[16:])]
    assert ranks[0] != ranks[1]


def test_max_frames_makes_batches_smaller_and_loses_nobody() -> None:
    made = plan({"asr": 64}, weights={"asr": 1}, max_frames=300)
    pools = made.batches()
    batches: list[Batch] = []
    while sum(map(len, batches)) < 64:
        batches.append(next(pools))
    assert sorted(draw.index for batch in batches for draw in batch) == list(made.members["asr"])
    assert all(padded(made, [batch]) <= 300 and 1 <= len(batch) <= 4 for batch in batches)
    assert {len(batch) for batch in batches} >= {1, 2, 3, 4}


def test_max_frames_by_hand() -> None:
    """Lengths 10, 8, 5, 5, 3, 2 under 16 frames: one of 10, two of 8 and 5, then three of at most 5."""
    made = plan(lengths={"tt": [5, 2, 10, 3, 8, 5]}, members={"tt": range(6)}, weights={"tt": 1}, batch=3, pool=2)
    capped = BatchPlan(made.lengths, made.members, made.weights, 3, 0, max_frames=16, pool=2)
    batches = [sorted((length(capped, d) for d in batch), reverse=True) for batch in first(capped, 3)]
    assert sorted(batches, reverse=True) == [[10], [8, 5], [5, 3, 2]]
    assert sorted([sorted(length(made, d) for d in b) for b in first(made, 2)]) == [[2, 3, 5], [5, 8, 10]]


def test_batches_of_one() -> None:
    batches = first(plan({"asr": 5}, weights={"asr": 1}, batch=1, pool=5), 5)
    assert sorted(batch[0].index for batch in batches) == list(range(5)) and {len(batch) for batch in batches} == {1}


def test_two_processes_that_take_alternate_batches_share_no_draw() -> None:
    sampled = list(PlannedBatches(plan(), 41))
    taken = [{draw.number for batch in sampled[i::2] for draw in batch} for i in (0, 1)]
    assert not taken[0] & taken[1] and len(taken[0] | taken[1]) == 41 * 4


def test_a_sampler_gives_its_number_of_batches_from_its_start_again_and_again() -> None:
    sampler = PlannedBatches(plan(), 20)
    assert len(sampler) == 20 and list(sampler) == list(sampler) == first(plan(), 20)
    sampler.start = 7
    assert len(sampler) == 20 and list(sampler) == first(plan(), 27)[7:]
    assert list(PlannedBatches(plan(), 3, start=7)) == first(plan(), 10)[7:]


def test_accelerate_gives_each_process_every_other_batch_whatever_its_size() -> None:
    from accelerate.data_loader import BatchSamplerShard

    made = plan(max_frames=300)
    shards = [list(BatchSamplerShard(PlannedBatches(made, 41), 2, rank)) for rank in (0, 1)]
    whole = first(made, 40)
    assert {len(batch) for batch in whole} != {4}
    assert shards == [whole[0::2], whole[1::2]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": {"asr": 1, "ta": 1}}, "task ta has a weight but no samples"),
        ({"weights": {"asr": 0}}, "no task has a weight above 0"),
        ({"weights": {}}, "no task has a weight above 0"),
        ({"weights": {"asr": -1, "aa": 2}}, "task asr has the weight -1"),
        ({"weights": {"asr": float("nan")}}, "task asr has the weight nan"),
        ({"weights": {"ast": 1}}, "there is no task 'ast'"),
        ({"batch": 0}, "batch 0"),
        ({"pool": 0}, "pool 0"),
        ({"max_frames": 20}, "more than max_frames 20"),
        ({"lengths": {"asr": [1], "aa": [1] * 23, "tt": [1] * 7}}, "40 samples but 1 lengths"),
        ({"lengths": {"asr": [1] * 40, "aa": [1] * 22 + [0], "tt": [1] * 7}}, "task aa has a sample of 0 frames"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        plan(**changes)


def test_there_is_no_batch_before_the_first() -> None:
    with pytest.raises(TrainError, match="no batch -1"):
        plan().batches(-1)
