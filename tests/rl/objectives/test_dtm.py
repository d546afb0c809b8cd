"""Discrete tilt matching against its released code, its schedule, its corruption and its target."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.weights import load_checkpoint
from spg_jax.rl.objectives import Batch, Moment, View
from spg_jax.rl.objectives.dtm import read_distributions, share_of_rate, tilts_of_phases
from spg_jax.training.optimizers import AdamW, for_rl
from tests.rl.objectives.published import (
    MASK,
    REFERENCE,
    assert_published,
    draws_from,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """The parameters of the behaviour policy, as OBJECTIVES.md says they were made."""
    arrays, directory = published(), Path(tmp_path_factory.mktemp('teacher'))
    tensors = load_file(REFERENCE / 'tiny_llada' / 'model.safetensors')
    rng = np.random.default_rng(int(arrays['old_seed']))
    for name in sorted(tensors):
        noise = rng.standard_normal(tensors[name].shape).astype(np.float32)
        scale = tensors[name].std(ddof=1) * float(arrays['old_rel'])
        tensors[name] = tensors[name] + noise * scale
    save_file(tensors, directory / 'model.safetensors')
    (directory / 'config.json').write_bytes((REFERENCE / 'tiny_llada' / 'config.json').read_bytes())
    return {'params': load_checkpoint(directory)[2]}


@pytest.mark.parametrize(
    ('case', 'inputs', 'reward'),
    [
        ('sudoku', 'sudoku', 'sudoku'),
        ('countdown', 'sudoku', 'countdown'),
        ('c0.5', 'sudoku', 'sudoku'),
        ('all_masked', 'sudoku', 'sudoku'),
        ('one_block', 'one_block', 'countdown'),
    ],
)
def test_loss_and_gradient_are_the_published_ones(teacher, case, inputs, reward):
    arrays = published()
    objective = objective_of(
        'dtm', tilt=float(arrays[f'dtm/{case}/h']), c=float(arrays[f'dtm/{case}/c'])
    )
    masked = arrays[f'dtm/{inputs}/noisy'][:, None] == MASK
    target = arrays[f'dtm/{inputs}/active'].astype(bool)
    if case == 'all_masked':
        target = arrays[f'dtm/{inputs}/masked'].astype(bool)
    assert_published(
        f'dtm/{case}',
        objective,
        published_rollout(reward=arrays[f'dtm/reward_{reward}']),
        draws_from(masked, target=target[:, None]),
        teacher=teacher,
    )


def test_the_readout_is_the_cross_entropy_with_the_stored_teacher():
    """The target of `formula/…` times the log-probabilities, in float64 by NumPy."""
    arrays, row = published(), 3
    logits = arrays['dtm/policy_logits'][row].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rollout = jax.tree.map(lambda x: x[row], published_rollout())
    draws = jax.tree.map(lambda x: x[row], draws_from(np.zeros((6, 1, 32), bool)))
    view = View(rollout, draws, np.asarray(arrays['dtm/teacher_logits'][row][None]), np.int32(0))
    readouts = jax.jit(read_distributions)(arrays['dtm/policy_logits'][row][None], view)
    mass = np.exp(5.0 * arrays['dtm/reward_sudoku'])
    for c in (1.0, 0.5):
        assert_allclose(mass, arrays[f'dtm/formula/target_mass_c{c}'], rtol=1e-5)
        target = arrays[f'dtm/formula/target_c{c}_row{row}'].astype(np.float64)
        found = c * readouts['teacher'] + (mass[row] - c) * readouts['token']
        assert_allclose(found[0], (target * log_probs).sum(-1), rtol=1e-4)


def test_a_tilt_of_nothing_leaves_the_cross_entropy_with_the_teacher():
    """Two positions by hand, c = 1, reward 0: e^0 - 1 = 0, so the token does not matter."""
    objective = objective_of('dtm', group_size=1)
    rollout = jax.tree.map(lambda x: x[:1], published_rollout())
    target = np.zeros((1, 1, 32), bool)
    target[0, 0, :2] = True
    draws = jax.tree.map(lambda x: x[:1], draws_from(np.ones((6, 1, 32), bool)))
    draws = draws.replace(target=np.asarray(target))
    readouts = {
        'teacher': np.full((1, 1, 32), -3.0, np.float32),
        'token': np.full((1, 1, 32), -7.0, np.float32),
    }
    readouts['teacher'][0, 0, 1] = -1.0
    loss_of = jax.jit(objective.loss)
    for reward, step, expected in (
        (0.0, 0, 2.0),
        (1.0, 0, 2.0 + (np.e**6 - 1) * 7),
        (1.0, 19201, 2.0 + (np.e**4 - 1) * 7),  # in the last phase h is 4
        (-1.0, 0, 2.0),  # rewards below 0 count as 0
    ):
        rows = rollout.replace(reward=np.float32([reward]))
        loss = loss_of(readouts, Batch(rows, draws, {}, np.int32(step)))
        assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)


@functools.cache
def draws_of_many_keys(block_length):
    """Masks of prompts [keys, P] and completions [keys, C], and targets [keys, C]."""
    row = jax.tree.map(lambda x: x[0], published_rollout())
    sampling = SamplingConfig(32, 16, block_length, temperature=1.0)
    corruption = objective_of('dtm', sampling=sampling).corruption

    def draw(key):
        nothing = jnp.int32(0)
        return corruption(row, Moment(key, key, key, key, nothing, nothing))

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), 6000))
    masked = np.asarray(draws.masked)[:, 0]
    return masked[:, :12], masked[:, 12:], np.asarray(draws.target)[:, 0]


def masks(block_length, k):
    """The draws of many keys whose number of masked positions is k."""
    prompt, masked, target = draws_of_many_keys(block_length)
    chosen = masked.sum(1) == k
    assert not prompt.any()
    return masked[chosen], target[chosen]


@pytest.mark.parametrize(('block_length', 'name'), [(8, 'b8'), (32, 'b32')])
def test_blocks_are_masked_from_the_end(block_length, name):
    counts = published()[f'dtm/corruption/masked_per_block_{name}']
    for k in (1, 8, 9, 11, 32):
        masked, target = masks(block_length, k)
        assert len(masked) > 100
        by_block = masked.reshape(len(masked), -1, block_length).sum(2)
        assert (by_block == counts[k - 1]).all()
        # The loss looks at one block, the first that has masked positions.
        active = (by_block > 0).argmax(1)
        blocks = target.reshape(len(target), -1, block_length)
        assert (blocks.any(2).sum(1) == 1).all() and (blocks.any(2).argmax(1) == active).all()
        assert (target & ~masked).sum() == 0


def test_positions_of_the_active_block_are_equally_likely():
    masked, _ = masks(8, 11)
    assert_allclose(
        masked.mean(0), published()['dtm/corruption/frequency_k11_b8'], atol=4 / len(masked) ** 0.5
    )


def test_tilts_and_learning_rates_of_a_run_are_the_published_ones():
    arrays = published()
    for task, tilt, phase, rate, share in (
        ('sudoku', 5.0, 256, 3.0, 1 / 3),
        ('countdown', 6.0, 1200, 4.0, 0.5),
    ):
        phases = arrays[f'dtm/schedule/{task}_phases']
        assert_allclose(tilts_of_phases(tilt), phases[:, 1])
        expected = arrays[f'dtm/schedule/{task}_lr']
        shares = jax.jit(share_of_rate, static_argnums=(1, 2))
        found = rate * np.asarray(shares(np.arange(phase), phase, share))
        assert_allclose(found, expected, rtol=1e-5)


def test_the_optimiser_follows_the_rate_of_the_objective():
    """Adam moves by its learning rate where gradients are constant and nothing decays."""
    settings = AdamW(1.0, 0.5, 0.9, 0.99, 0.0, 1e9)
    optimizer = for_rl(settings, 10, lambda count: jnp.where(count == 1, 0.25, 1.0))
    params, gradient = {'x': np.zeros(1, np.float32)}, {'x': np.ones(1, np.float32)}
    state, moved, update = jax.jit(optimizer.init)(params), [], jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(gradient, state, params)
        moved.append(float(updates['x'][0]))
    assert_allclose(moved, [-1.0, -0.25, -1.0], rtol=1e-4)


def test_a_phase_ends_with_the_average_or_the_policy():
    trained, average = {'x': 1.0}, {'x': 2.0}
    with_average = objective_of('dtm')
    new, kept = with_average.phase.end(trained, {'teacher': {'x': 0.0}, 'average': average})
    assert new == average and kept == {'teacher': average, 'average': average}
    refreshed = with_average.kept['average'](5, average, trained)
    assert_allclose(refreshed['x'], 0.95 * 2 + 0.05)
    without = objective_of('dtm', average=0.0)
    assert set(without.kept) == {'teacher'}
    assert without.phase.end(trained, {'teacher': average}) == (trained, {'teacher': trained})


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'update_rows': 100}, 'fewer than dtm.update_rows 100'),
        ({'tilt': 0.0}, 'dtm.tilt is 0.0'),
        ({'positions': 'some'}, 'dtm.positions is some'),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objective_of('dtm', **settings)
