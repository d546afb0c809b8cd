"""Rollouts: the same tokens on every mesh, in every batch, under every padding; figures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax import sharding
from spg_jax.config import sampling_config
from spg_jax.data import left_pad
from spg_jax.random import Purpose, check_range, example_ids, example_keys
from spg_jax.rl.rollout import make_generate, rollout_metrics
from tests.rl.conftest import EOS, random_rollout
from tests.rl.test_learner import MESHES, mesh_of

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [5, 6, 7], [14], [15, 16, 17], [18, 19], [20]]


def completions(policy, config, mesh, prompts, ids, length=4):
    with jax.set_mesh(mesh):
        variables = {'params': sharding.init_params(policy.model, jax.random.key(0), mesh)}
        tokens, valid = left_pad(prompts, length, pad_id=2)
        rows = {'tokens': tokens, 'valid': valid, 'ids': np.array(ids, np.uint32)}
        if len(prompts) % 8 == 0:
            rows = sharding.put_batch(mesh, rows)
        keys = example_keys(0, Purpose.SAMPLE, 3, rows['ids'])
        generate = make_generate(policy, sampling_config(config))
        found = generate(variables, rows['tokens'], rows['valid'], keys)
    return np.asarray(found.tokens), np.asarray(found.commit_step)


@pytest.fixture
def expected(policy, config):
    return completions(policy, config, mesh_of((1, 1, 1)), PROMPTS, range(8))


@pytest.mark.parametrize('sizes', MESHES[1:])
def test_tokens_are_the_same_on_every_mesh(policy, config, expected, sizes):
    found = completions(policy, config, mesh_of(sizes), PROMPTS, range(8))
    assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()


def test_a_prompt_alone_or_padded_more_gets_what_it_gets_in_the_batch(policy, config, expected):
    for row in (0, 2, 7):
        for length in (4, 9):
            found = completions(
                policy, config, mesh_of((1, 1, 1)), [PROMPTS[row]], [row], length=length
            )
            assert (found[0][0] == expected[0][row]).all()


def test_equal_prompts_with_different_identities_get_different_completions(expected):
    assert PROMPTS[0] == PROMPTS[3]
    assert (expected[0][0] != expected[0][3]).any()


def test_identities_are_prompt_by_prompt_and_checked_against_uint32():
    assert example_ids(np.array([7, 2], np.uint32), 3).tolist() == [21, 22, 23, 6, 7, 8]
    check_range(2**30, 4)
    with pytest.raises(ValueError, match='group of at most 4'):
        check_range(2**30, 5)


def test_keys_differ_by_seed_purpose_step_and_row():
    ids = jnp.arange(3, dtype=jnp.uint32)
    cases = [(0, Purpose.SAMPLE, 0), (1, Purpose.SAMPLE, 0), (0, Purpose.CORRUPT, 0)]
    cases.append((0, Purpose.SAMPLE, 1))
    keys = np.concatenate([jax.random.key_data(example_keys(*case, ids)) for case in cases])
    assert len({tuple(key) for key in keys.tolist()}) == 12


def test_metrics_are_what_counting_gives():
    rollout = random_rollout()
    completion = np.asarray(rollout.completion).copy()
    completion[5] = completion[4]
    rollout = rollout.replace(completion=jnp.asarray(completion))
    reward = np.asarray(rollout.reward)
    found = {
        name: float(total / weight)
        for name, (total, weight) in rollout_metrics(rollout, 4, EOS).items()
    }
    groups = [completion[:4].tolist(), completion[4:].tolist()]
    distinct = sum(len({tuple(row) for row in group}) for group in groups)
    signal = [len(set(reward[:4])) > 1, len(set(reward[4:])) > 1]
    lengths = [row.index(EOS) + 1 if EOS in row else len(row) for group in groups for row in group]
    scored = np.asarray(rollout.scored).sum(1)
    assert found['reward'] == pytest.approx(reward.mean())
    assert found['distinct_completions'] == distinct / 8
    assert found['groups_with_signal'] == sum(signal) / 2
    assert found['length'] == scored.mean()
    assert found['eos_rate'] == sum(EOS in row for group in groups for row in group) / 8
    assert [n for row, n in enumerate(lengths) if row != 5] == [
        n for row, n in enumerate(scored) if row != 5
    ]
