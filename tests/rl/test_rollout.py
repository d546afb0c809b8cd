"""Rollouts have the same tokens on every mesh, in every batch and under every padding; figures are
checked by hand."""

import functools
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.data.batches import PromptBatch, left_pad
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.random import Purpose, check_range, example_ids, example_keys
from spg_jax.rl import collection
from spg_jax.rl.collection import make_collect, make_generate
from spg_jax.rl.rollout import rollout_metrics
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.conftest import EOS, VOCAB, random_rollout

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [5, 6, 7], [14], [15, 16, 17], [18, 19], [20]]


# A test of a batch in other parts or with other rows shares the programs of the same shapes.
generate_of = functools.cache(make_generate)


def completions(policy, config, mesh, prompts, ids, length=4):
    with jax.set_mesh(mesh):
        variables = {'params': random_params(policy.model, mesh=mesh)}
        tokens, valid = left_pad(prompts, length, pad_id=2)
        rows = {'tokens': tokens, 'valid': valid, 'ids': np.array(ids, np.uint32)}
        if len(prompts) % 8 == 0:
            rows = sharding.put_batch(mesh, rows)
        keys = example_keys(0, Purpose.SAMPLE, 3, rows['ids'])
        generate = generate_of(policy, assemble(config).sampling)
        found = generate(variables, rows['tokens'], rows['valid'], keys)
    return np.asarray(found.tokens), np.asarray(found.commit_step)


@pytest.fixture
def expected(policy, config):
    return completions(policy, config, mesh_of(), PROMPTS, range(8))


def test_a_prompt_alone_and_padded_more_gets_what_it_gets_in_the_batch(policy, config, expected):
    for row in (2, 7):
        found = completions(policy, config, mesh_of(), [PROMPTS[row]], [row], length=9)
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
    ids = np.arange(3, dtype=np.uint32)
    cases = [(0, Purpose.SAMPLE, 0), (1, Purpose.SAMPLE, 0), (0, Purpose.CORRUPT, 0)]
    cases.append((0, Purpose.SAMPLE, 1))
    keys = np.concatenate([jax.random.key_data(example_keys(*case, ids)) for case in cases])
    assert len({tuple(key) for key in keys.tolist()}) == 12


def test_metrics_are_what_counting_gives():
    some = random_rollout()
    completion = np.asarray(some.completion).copy()
    completion[5] = completion[4]
    completion[1, 1] = completion[1, 0]
    some = some.replace(completion=jnp.asarray(completion))
    reward = np.asarray(some.reward)
    metrics_of = jax.jit(rollout_metrics, static_argnums=(1, 2, 3))
    found = {
        name: float(total / weight)
        for name, (total, weight) in metrics_of(some, 4, EOS, VOCAB).items()
    }
    groups = [completion[:4].tolist(), completion[4:].tolist()]
    distinct = sum(len({tuple(row) for row in group}) for group in groups)
    signal = [len(set(reward[:4])) > 1, len(set(reward[4:])) > 1]
    lengths = [row.index(EOS) + 1 if EOS in row else len(row) for group in groups for row in group]
    scored = np.asarray(some.scored).sum(1)
    assert found['reward'] == pytest.approx(reward.mean())
    assert found['distinct_completions'] == distinct / 8
    assert found['groups_with_signal'] == sum(signal) / 2
    assert found['length'] == scored.mean()
    assert found['eos_rate'] == sum(EOS in row for group in groups for row in group) / 8
    rows = completion.tolist()
    tokens = [token for row, n in zip(rows, scored, strict=True) for token in row[:n]]
    pairs = [pair for row, n in zip(rows, scored, strict=True) for pair in pairwise(row[:n])]
    assert found['commonest_token'] == pytest.approx(
        Counter(tokens).most_common(1)[0][1] / len(tokens)
    )
    assert found['repeats'] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert found['repeats'] > 0
    assert [n for row, n in enumerate(lengths) if row != 5] == [
        n for row, n in enumerate(scored) if row != 5
    ]


class Odd:
    """Rewards 1 if the characters of the text plus the index are odd; records when it is asked."""

    def __init__(self, events):
        self.events = events

    def reward(self, text, example):
        self.events.append('reward')
        return float((len(text) + example['index']) % 2)


def rollout_of(policy, config, mesh, events, monkeypatch):
    """A rollout of two prompts; `events` gets 'start' when the generation of a batch starts."""
    tokenizer = WordTokenizer([f'w{number}' for number in range(21)])
    tokens, valid = left_pad(PROMPTS[:2], 4, pad_id=2)
    prompts = PromptBatch(tokens, valid, np.array([5, 4], np.uint32), [{'index': 5}, {'index': 4}])

    def telling(*arguments):
        generate = generate_of(*arguments)
        return lambda *rows: (events.append('start'), generate(*rows))[1]

    monkeypatch.setattr(collection, 'make_generate', telling)
    with jax.set_mesh(mesh):
        variables = {'params': random_params(policy.model, mesh=mesh)}
        parts = assemble(config)
        advantage = parts.objective.advantage
        collect = make_collect(
            policy, Odd(events), tokenizer, parts.sampling, parts.batching, advantage, 0, mesh
        )
        return collect(variables, prompts, 2)


def test_generating_in_parts_changes_nothing_and_rewards_meanwhile(policy, config, monkeypatch):
    """Equal shares of the batch, on a mesh, and two slots, into which waiting rows move in."""
    found, events = {}, {}
    trials = ((0, False, (1, 1, 1)), (2, False, (2, 1, 1)))
    for parts, compact, sizes in (*trials, ('slots', True, (1, 1, 1))):
        config.rl.update(compact=compact, generation_batch=2 if compact else parts)
        events[parts] = []
        found[parts] = rollout_of(policy, config, mesh_of(*sizes), events[parts], monkeypatch)
        monkeypatch.undo()
    expected, texts = found.pop(0)
    assert np.asarray(expected.example_id).tolist() == [20, 21, 22, 23, 16, 17, 18, 19]
    index = 4 * [5] + 4 * [4]
    reward = np.array([(len(text) + i) % 2 for text, i in zip(texts, index, strict=True)])
    assert np.asarray(expected.reward).tolist() == reward.tolist()
    mean = np.repeat(reward.reshape(2, 4).mean(1), 4)
    np.testing.assert_allclose(expected.advantage, reward - mean)
    for other, other_texts in found.values():
        assert other_texts == texts
        jax.tree.map(np.testing.assert_array_equal, other, expected)
    assert events[0] == ['start'] + 8 * ['reward']
    # The next batch is under way before the completions of the previous one are rewarded.
    pair = 2 * ['reward']
    assert events[2] == ['start', 'start', *pair, 'start', *pair, 'start', *pair, *pair]
