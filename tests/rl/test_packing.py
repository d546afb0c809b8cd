"""Rows that cannot move the gradient leave the update, and nothing else changes.

The truth is the same update of an objective that does not say which of its rows are idle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.models.lora import LoRA
from spg_jax.rl.advantages import group_advantages
from spg_jax.rl.gradient import make_gradient, rows_at_once
from spg_jax.rl.objectives import REGISTRY, Batch, Loss, Objective
from spg_jax.rl.objectives.objective import configured, over_groups, without_advantage
from spg_jax.rl.packing import packed, rows_of_piece
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import corrupt, moments
from tests.meshes import mesh_of
from tests.rl.conftest import VOCAB, random_rollout
from tests.rl.test_couplings import Config, Toy, parameters, scores

pytestmark = pytest.mark.numerical
GROUP, ROWS = 4, 16
# Of the norm of a gradient, for sums in another order; GPUs choose it by the shapes of products.
# It was 1.1e-6 on an H200, and a row that is lost or counted twice changes several per cent.
ROUNDING = 3e-6
READ = []  # the number of rows and draws of each forward pass that was computed


class Counting(Toy):
    """The toy policy of test_couplings, which notes what it computes."""

    def completion_logits(self, variables, prompt, *arguments):
        jax.debug.callback(lambda: READ.append(len(prompt)))
        return super().completion_logits(variables, prompt, *arguments)


def loss_of_rows(logp, batch):
    logp = jnp.where(batch.target, logp, 0.0)
    score, behaviour = scores(logp, batch), scores(batch.others['behaviour'], batch)
    tokens = batch.scored.sum().astype(jnp.float32)
    metrics = {
        'score': (score.sum(), tokens),
        'better': ((batch.advantage > 0).sum().astype(jnp.float32), jnp.float32(len(score))),
    }
    return Loss(-(jnp.exp(score - behaviour) * batch.advantage).sum(), tokens, metrics)


def loss_of_group(logp, batch):
    """It looks at the reference, which is not read out for idle rows either."""
    change = scores(logp, batch) - scores(batch.others['reference'], batch)
    metrics = {'change': (change.sum(), jnp.float32(len(change)))}
    return (jax.nn.softmax(3 * change) * batch.advantage).sum(), metrics


def loss_of_batch(logp, batch):
    total = (scores(logp, batch) * batch.advantage).sum()
    return Loss(total**2, batch.scored.sum().astype(jnp.float32), {})


def objective_of(couples: str, packs: bool = True) -> Objective:
    losses = {
        'row': loss_of_rows,
        'group': over_groups(loss_of_group, GROUP),
        'batch': loss_of_batch,
    }
    corruption = configured(Corruption('uniform', draws=2, block_length=4))  # not called here
    looks_at = ('reference',) if couples == 'group' else ()
    idle = without_advantage if packs else None
    return Objective(corruption, 2, losses[couples], couples, idle=idle, looks_at=looks_at)


def inputs(mesh, live: tuple[int, ...]):
    """A rollout whose groups named in `live` have advantages, with draws and other readouts."""
    rng = np.random.default_rng(2)
    rollout = jax.tree.map(np.asarray, random_rollout(ROWS))
    group = np.arange(ROWS) // GROUP
    advantage = rng.normal(size=ROWS).astype(np.float32) * np.isin(group, live)
    advantage[ROWS // 2 + 1] = 0.0  # a row without an advantage in a group that has some
    draws = Draws(masked=rng.random((ROWS, 2, 16)) < 0.5)
    others = {'behaviour': rng.normal(size=(ROWS, 2, 12)).astype(np.float32) - 3}
    return sharding.put_batch(mesh, (rollout.replace(advantage=advantage), draws, others))


@functools.cache
def gradient_of(couples, packs, sizes, live, microbatch, draws_per_pass, lora=None):
    """(loss, largest entries first: the gradient as numpy arrays, metrics, forward passes)."""
    policy, mesh = Counting(Config(lora)), mesh_of(*sizes)
    gradient = make_gradient(
        policy,
        objective_of(couples, packs),
        microbatch=microbatch,
        draws_per_pass=draws_per_pass,
        group_size=GROUP,
    )
    with jax.set_mesh(mesh):
        frozen = parameters(bool(lora), mesh)
        trained = {policy.trained: frozen.pop(policy.trained)}
        run = jax.jit(
            lambda trained, frozen, *rows, others: gradient(
                trained, frozen, *rows, others=others, kept={'reference': halved(trained)}
            )
        )
        results = []
        for groups in live:
            READ.clear()
            rollout, draws, others = inputs(mesh, groups)
            loss, leaves, metrics = run(trained, frozen, rollout, draws, others=others)
            jax.effects_barrier()
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(leaves)]
            results.append((float(loss), leaves, jax.device_get(metrics), sum(READ)))
        assert run._cache_size() == 1
    return results


def halved(trained):
    return jax.tree.map(lambda x: 0.5 * x, trained)


def norm(leaves) -> float:
    return float(np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in leaves)))


def distance(leaves, others) -> float:
    return norm([leaf - other for leaf, other in zip(leaves, others, strict=True)])


LIVE = ((0, 1, 2, 3), (2,), (0, 2), ())


# What a loss couples, pieces of the batch, devices, and the rows that are read for each of LIVE. A
# batch-wide loss in several pieces reads each twice. So do groups that are larger than a piece,
# whose loss also reads the reference once.
PIECES = [
    ('row', ROWS, 0, (1, 1, 1), [ROWS, 4, 8, 0]),
    ('group', 2, 0, (1, 1, 1), [3 * ROWS, 3 * 4, 3 * 8, 0]),
    ('batch', 8, 1, (1, 1, 1), [2 * ROWS, 2 * 8, 2 * 8, 0]),
    ('row', 8, 1, (2, 2, 2), None),
    ('group', ROWS, 0, (2, 2, 2), None),
]


@pytest.mark.parametrize(('couples', 'microbatch', 'draws_per_pass', 'sizes', 'reads'), PIECES)
def test_the_gradient_without_idle_rows_is_the_one_with_them_and_they_are_not_read_out(
    couples, microbatch, draws_per_pass, sizes, reads
):
    """One row of group 2 is idle by itself."""
    packed_ones = gradient_of(couples, True, sizes, LIVE, microbatch, draws_per_pass)
    # In pieces of another size the same sum differs by a few units of 1e-6, packed or not.
    shards = sharding.row_shards(mesh_of(*sizes))
    size = rows_at_once(objective_of(couples), ROWS, microbatch, GROUP, shards)
    whole_ones = gradient_of(couples, False, sizes, LIVE, size, draws_per_pass)
    for (loss, leaves, metrics, _), (expected_loss, expected, whole, _) in zip(
        packed_ones, whole_ones, strict=True
    ):
        assert_allclose(loss, expected_loss, rtol=1e-6, atol=1e-7)  # a sum of terms near 1
        assert distance(leaves, expected) <= ROUNDING * norm(expected)
        if couples == 'row':
            assert metrics['better'] == whole['better']
    assert all((leaf == 0).all() for leaf in packed_ones[-1][1])
    assert norm(whole_ones[1][1]) > 1e-3
    if reads:
        assert [read / 2 for *_, read in packed_ones] == reads  # two draws a row


def test_metrics_of_readouts_are_those_of_live_rows():
    """Whatever the pieces: an idle row that fills up a piece does not count."""
    index = LIVE.index((2,))
    rows = [
        gradient_of(couples, True, sizes, LIVE, microbatch, draws_per_pass)[index][2]
        for couples, microbatch, draws_per_pass, sizes, _ in PIECES
        if couples == 'row'
    ]
    rollout, draws, _ = inputs(mesh_of(), (2,))
    live = np.asarray(rollout.advantage) != 0
    assert live.sum() == 3
    scored = np.asarray(rollout.scored)
    unread = ~(np.asarray(draws.masked)[:, :, 4:] & scored[:, None]).any((1, 2))
    for metrics in rows:  # The score of a row without a target depends on no readout.
        assert metrics['score'][1] == scored[live | unread].sum()
        assert metrics['better'][1] == ROWS
    assert_allclose(rows[0]['score'], rows[1]['score'], rtol=1e-5)


def test_adapters_learn_the_same_without_idle_rows():
    """On one device. On a mesh, tests/rl/test_couplings.py has adapters, and the test above has
    idle rows."""
    lora = LoRA(rank=2, alpha=2.0)
    size = rows_at_once(objective_of('row'), ROWS, ROWS, GROUP, 1)
    (_, leaves, *_), (_, expected, *_) = (
        gradient_of('row', packs, (1, 1, 1), ((1,),), size, 0, lora)[0] for packs in (True, False)
    )
    assert norm(expected) > 1e-3
    assert distance(leaves, expected) <= ROUNDING * norm(expected)


@pytest.mark.parametrize('unit', [1, 4])
def test_pieces_hold_live_rows_first_and_are_joined_again(unit):
    idle = np.repeat([True, False, True, False], 4)

    @jax.jit
    def cut_and_joined(idle):
        pieces = packed(idle, rows=8, unit=unit)
        rows = pieces.split(jnp.arange(16))
        return pieces.live, rows, pieces.join(rows) if unit == 1 else None

    live, rows, joined = jax.device_get(cut_and_joined(idle))
    assert live == 1
    assert sorted(rows[0].tolist()) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert all((rows.reshape(-1, unit)[:, 0] % unit == 0).tolist())
    if unit == 1:
        assert joined.tolist() == list(range(16))


def test_rows_of_a_piece():
    assert rows_of_piece(128, 128, 1) == 32
    assert rows_of_piece(128, 16, 1) == 16  # the user's choice
    assert rows_of_piece(96, 48, 4) == 48
    assert rows_of_piece(96, 96, 4) == 24
    assert rows_of_piece(96, 96, 36) == 96  # parts of 36 and 72 rows do not divide the batch
    assert rows_of_piece(6, 6, 1) == 2
    assert rows_of_piece(7, 7, 1) == 7


# --- which rows objectives declare idle -----------------------------------------------------------


def built(name: str, **settings) -> tuple[Objective, int]:
    """An objective for groups of 4 rows without a divergence, and its number of sampler steps."""
    config = default_config(name)
    config.sampling.update(prompt_length=4, length=12, steps=12, block_length=4, temperature=1.0)
    config.rl.update(group_size=GROUP, prompts=ROWS // GROUP, microbatch=ROWS, inner_updates=2)
    if name == 'just_grpo':
        config.sampling.commit = 'left_to_right'
    if name == 'tracerl':
        settings = {'shrink': 4} | settings
    if name == 'd2':
        settings = {'segments': 4} | settings
    if 'kl' in config[name]:
        settings = {'kl': 0.0} | settings
    config[name].update(settings)
    return assemble(config).objective, config.sampling.steps


def sampled_rows() -> Rollout:
    """A rollout with two groups whose rewards are equal, and the extras of any objective."""
    rng = np.random.default_rng(3)
    rollout, bits = random_rollout(ROWS), -(-VOCAB // 8)
    reward = np.float32(rng.integers(0, 2, ROWS))
    reward[:3], reward[4:8], reward[12:] = (0, 1, 0), 1.0, 0.0
    reward[8:10] = 0, 1
    extras = {
        'log_prob': rng.normal(size=(ROWS, 12)).astype(np.float32) - 2,
        'entropy': rng.random((ROWS, 12)).astype(np.float32) + 0.1,
        'kept': np.full((ROWS, 12, bits), 255, np.uint8),
        'log_ratio': rng.normal(size=ROWS).astype(np.float32),
    }
    commit_step = np.argsort(rng.random((ROWS, 12)), axis=1).astype(np.int32)
    return rollout.replace(
        reward=reward,
        commit_step=commit_step,
        scored=np.ones((ROWS, 12), bool),
        extras=extras,
    )


def batch_of(objective: Objective, rollout: Rollout, others: dict) -> Batch:
    """The rows as the loss sees them, with their advantages and draws."""
    rollout = rollout.replace(advantage=objective.advantage(rollout.reward, GROUP))
    moment = moments(0, rollout, jnp.int32(0), jnp.int32(0))
    if objective.at_rollout:
        extras = objective.at_rollout(read, rollout, moment)
        rollout = rollout.replace(extras=rollout.extras | extras)
    draws = corrupt(objective.corruption, rollout, moment)
    return Batch(rollout, draws, others, jnp.int32(0))


def read(name, draws):
    return jnp.zeros((ROWS, draws.masked.shape[1], 12))


CASES = [
    *((name, {}) for name in sorted(REGISTRY) if name not in ('autoedit', 'dtm', 'rspo', 'gdsd')),
    ('spg', {'baseline': 'each'}),
    ('spg', {'negative': 'none'}),
    ('tracerl', {'kl': 0.1}),
    ('unigrpo', {'masking': 'random', 'masks': 3}),
]


@pytest.mark.parametrize(('name', 'settings'), CASES, ids=str)
def test_idle_rows_move_no_gradient_and_others_do(name, settings):
    objective, _ = built(name, **settings)
    rollout, rng = sampled_rows(), np.random.default_rng(4)
    shape = (ROWS, objective.draws, 12)
    others = {
        name: np.float32(rng.normal(size=shape)) * np.float32(0.1) - 2
        for name in ('behaviour', *objective.looks_at)
    }
    noise = np.float32(rng.normal(size=shape))
    logp = others['behaviour'] + np.float32(1e-3) * noise  # so near that nothing is clipped

    @jax.jit
    def evaluate(logp, rollout, others):
        """Which rows are idle, and the gradient."""
        batch = batch_of(objective, rollout, others)
        return objective.idle(batch), jax.grad(lambda x: objective.loss(x, batch).total)(logp)

    idle, of_readouts = jax.device_get(evaluate(logp, rollout, others))
    assert 0 < idle.sum() < ROWS
    changed = np.where(idle[:, None, None], logp - np.float32(1.0), logp)  # idle rows alone
    _, of_others = jax.device_get(evaluate(changed, rollout, others))
    largest = np.abs(of_readouts).max()
    assert np.abs(of_readouts[idle]).max() <= 1e-5 * largest
    assert_allclose(of_others[~idle], of_readouts[~idle], rtol=1e-5, atol=1e-9)
    moved = np.abs(of_readouts).max(axis=(1, 2)) > 1e-6 * largest
    exempt = {'vrpo': 4, 'spg': 2 * GROUP if settings else 0}.get(name, 0)
    assert (moved[~idle]).sum() >= (~idle).sum() - exempt


@pytest.mark.parametrize(
    ('name', 'settings'),
    [
        *((name, {'kl': 0.1}) for name in ('coupled_grpo', 'd1', 'd2', 'espo', 'unigrpo')),
        ('unigrpo', {'kl': 0.1, 'masking': 'random'}),
        ('gdsd', {}),
        ('rspo', {}),
    ],
    ids=str,
)
def test_no_row_is_idle_where_every_row_has_a_term(name, settings):
    assert built(name, **settings)[0].idle is None


def test_an_advantage_that_is_not_a_number_is_not_idle():
    advantage = np.array(group_advantages(jnp.zeros(ROWS), GROUP))
    advantage[1] = np.nan
    batch = Batch(random_rollout(ROWS).replace(advantage=jnp.asarray(advantage)), None, {}, None)
    assert np.asarray(without_advantage(batch)).sum() == ROWS - 1
