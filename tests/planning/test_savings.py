"""Expected savings against the packing of drawn batches, and against slots walked in a loop."""

import jax
import numpy as np
import pytest

from spg_jax.planning.savings import Expected, work_left
from spg_jax.rl.packing import packed

ONE_CHIP = {'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.tensor': 1, 'rl.compact': True}


@pytest.fixture
def one_shard(plan_of):
    return plan_of(ONE_CHIP, jax.devices()[:1])


@pytest.mark.parametrize('signal', [0.0, 0.1, 0.6, 1.0])
def test_idle_groups_save_the_pieces_that_packing_leaves_out(plan_of, signal):
    plan = plan_of({'rl.microbatch': 16})
    group, rows = plan.parts.batching.group_size, plan.rows_of_update
    at_once = plan.rows_at_once
    pieces = rows // at_once
    assert pieces == 4
    rng = np.random.default_rng(0)
    idle = rng.random((4000, rows // group)) >= signal
    live = [int(packed(np.repeat(each, group), at_once, 1).live) for each in idle[:200]]
    assert live == list(np.ceil((~idle[:200]).sum(1) * group / at_once))  # the loop in one line
    drawn = np.ceil((~idle).sum(1) * group / at_once) / pieces
    left = work_left(plan, Expected(signal=signal))['update']
    assert abs(left - drawn.mean()) <= 4 * drawn.std() / np.sqrt(len(drawn))


def test_an_objective_that_learns_from_every_row_saves_nothing(plan_of):
    plan = plan_of({'rl.objective': 'rspo'})
    assert plan.parts.objective.idle is None
    assert work_left(plan, Expected(signal=0.1))['update'] == 1.0


def test_short_completions_save_the_blocks_that_slots_do_not_decode(one_shard):
    """128 tokens are 4 blocks of 32; lengths are uniform, and many rows wait for each slot."""
    rng, slots, rows = np.random.default_rng(0), 64, 64 * 100
    lengths = rng.integers(1, 97, rows)  # mean 48.5
    waiting, under_way, steps = list(-(-lengths // 32)), [], 0
    while waiting or under_way:
        while waiting and len(under_way) < slots:
            under_way.append(waiting.pop())
        steps += 1
        under_way = [blocks - 1 for blocks in under_way if blocks > 1]
    whole = rows // slots * 4
    left = work_left(one_shard, Expected(length=lengths.mean()))['rollout']
    assert left == pytest.approx(steps / whole, rel=0.02)


def test_rows_that_cannot_leave_wait_for_the_longest(plan_of):
    assert work_left(plan_of(), Expected(length=10))['rollout'] == 1.0  # two shards of rows
    one_shard = plan_of(ONE_CHIP | {'rl.compact': False}, jax.devices()[:1])
    assert work_left(one_shard, Expected(length=10))['rollout'] == 1.0


@pytest.mark.parametrize('figures', [{'signal': 1.5}, {'signal': float('nan')}, {'length': -1}])
def test_expectations_that_cannot_be_are_refused(figures):
    with pytest.raises(ValueError, match=r'--(signal|length) is .*; use '):
        Expected(**figures)
