"""Replayed states are what the sampler saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from spg_jax.diffusion.sampling import SamplingConfig, generate
from spg_jax.rl.objectives.trajectory import replay

pytestmark = pytest.mark.numerical
MASK, EOS, VOCABULARY, PROMPT = 9, 1, 10, 3


def record(config, rows=6):
    """The completion of a run on a toy model, and the tokens [steps, B, L] that the model saw."""
    inputs = []
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)

    def hidden(tokens, valid, window):
        jax.debug.callback(lambda x: inputs.append(np.asarray(x)), tokens, ordered=True)
        return window.cut(table[tokens + jnp.roll(tokens, 1, axis=1) % 3 - 1])

    completion = jax.jit(
        lambda keys: generate(
            hidden,
            lambda states: states,
            jnp.full((rows, PROMPT), 4, jnp.int32),
            jnp.ones((rows, PROMPT), bool),
            keys,
            config,
            MASK,
            EOS,
            jnp.ones(VOCABULARY, bool),
        )
    )(jax.random.split(jax.random.key(3), rows))
    jax.effects_barrier()
    return jax.tree.map(np.asarray, completion), np.stack(inputs)


@pytest.mark.parametrize('stop_early', [False, True])
def test_replayed_states_are_the_inputs_of_the_sampler(stop_early):
    config = SamplingConfig(12, 8, 6, temperature=1.0, stop_early=stop_early)
    completion, inputs = record(config)
    starts = jnp.arange(len(inputs), dtype=jnp.int32)
    masked, target = jax.vmap(replay, (0, None, None))(completion.commit_step, starts, starts + 1)
    seen = 0
    for row in range(len(masked)):
        for step in range(1 + completion.commit_step[row].max()):
            expected = inputs[step, row, PROMPT:]
            assert_array_equal(np.where(masked[row, step], MASK, completion.tokens[row]), expected)
            assert_array_equal(target[row, step], completion.commit_step[row] == step)
            seen += 1
    ended = (completion.commit_step < 0).any(axis=1)
    assert ended.any() == stop_early  # Some rows end early, and some do not.
    assert not ended.all()
    assert seen == len(masked) * config.steps - 4 * ended.sum()
    # States after the end of a row have nothing to score.
    assert not target[ended, config.steps_per_block :].any()


def test_merged_states_score_what_was_committed_until_the_next():
    commit_step = jnp.array([2, 0, 1, -1])
    masked, target = replay(commit_step, jnp.array([0, 2]), jnp.array([2, 4]))
    assert_array_equal(masked, [[True] * 4, [True, False, False, True]])
    assert_array_equal(target, [[False, True, True, False], [True, False, False, False]])
