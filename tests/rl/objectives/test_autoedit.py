"""autoedit: the law of recorded edits, a case by hand, and who gets credit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.samplers import decoder
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import TransformerConfig
from spg_jax.rl.objectives import Batch
from spg_jax.rl.objectives.autoedit import drawn_log_probs, with_draft
from spg_jax.rl.rollout import rollout_metrics
from spg_jax.rl.scores import Reader, corrupt, moments
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.conftest import EOS, VOCAB
from tests.rl.test_rollout import rollout_of

pytestmark = pytest.mark.numerical

DRAWS, ROUNDS = 4, 3


def parts_of(**changes):
    config = default_config('autoedit')
    config.sampling.update(prompt_length=4, length=12, steps=12, block_length=4, temperature=0.7)
    config.sampling.update(sampler='autoedit', keep_threshold=0.3, edit_threshold=0.6, top_k=5)
    config.corruption.draws = DRAWS
    config.rl.update(group_size=4, prompts=2, microbatch=8, inner_updates=2)
    for key, value in changes.items():
        group, leaf = key.split('.')
        config[group][leaf] = value
    return config, assemble(config)


@pytest.fixture(scope='module')
def sampled():
    """A rollout in slots, with edits, of a policy with random parameters."""
    model = TransformerConfig(
        vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, scale_logits=True
    )
    policy = Policy(model, mask_id=0, eos_id=EOS, allowed=np.arange(VOCAB) > 0)
    config, parts = parts_of()
    with pytest.MonkeyPatch.context() as patch:
        # Batches that shrink are in tests/rl/test_slots.py.
        patch.setattr(decoder, 'SHARES', (1,))
        rollout, texts = rollout_of(policy, config, mesh_of(), [], patch)
    rollout = jax.tree.map(np.asarray, rollout)
    # Rewards in which both groups have better and worse rows, and some rows neither.
    reward = np.array([0, 1, 0, 1, 0.5, 0, 1, 0.5], np.float32)
    return policy, parts, rollout, rollout.replace(
        reward=reward, advantage=reward - np.repeat(reward.reshape(2, 4).mean(1), 4)
    )  # fmt: skip


@functools.cache
def drawing(corruption):
    def draw(rollout):
        moment = moments(0, rollout, jnp.int32(0), jnp.int32(0))
        return corrupt(corruption, rollout, moment)

    return jax.jit(draw)


def drawn(parts, rollout):
    return jax.device_get(drawing(parts.objective.corruption)(rollout))


def test_the_rollout_knows_its_draft(sampled):
    """The reward of the stand-in task is odd for texts of odd length."""
    _, _, rollout, _ = sampled
    draft, edits = rollout.extras['draft'], rollout.extras['edits']
    assert edits.shape == (8, 12, ROUNDS) and (edits >= 0).any(1).all(-1).any()
    changed = (rollout.completion != draft).any(1)
    assert changed.any()
    scored = rollout.extras['draft_scored']
    for row in range(8):
        end = draft[row].tolist().index(EOS) + 1 if EOS in draft[row] else 12
        assert scored[row].tolist() == [True] * end + [False] * (12 - end)
    metrics_of = jax.jit(rollout_metrics, static_argnums=(1, 2, 3))
    metrics = {
        name: float(total / weight)
        for name, (total, weight) in metrics_of(rollout, 4, EOS, VOCAB).items()
    }
    before, after = rollout.extras['draft_reward'], rollout.reward
    assert set(before) <= {0.0, 1.0}
    assert_allclose(metrics['draft_reward'], before.mean())
    assert_allclose(metrics['improved'], (after > before).mean())
    assert_allclose(metrics['worsened'], (after < before).mean())
    assert_allclose(metrics['writes'], (edits >= 0).sum() / 8)
    counted = scored | rollout.scored
    share = ((rollout.completion != draft) & counted).sum() / counted.sum()
    assert_allclose(metrics['edited'], share, rtol=1e-6)


def test_readouts_of_edits_are_what_the_sampler_recorded(sampled):
    """With the policy that sampled, in the states replayed: two independent ways to one number."""
    policy, parts, rollout, _ = sampled
    draws = drawn(parts, rollout)
    assert draws.masked.shape == (8, DRAWS + ROUNDS, 16)
    assert not draws.masked[:, DRAWS:].any() and draws.masked[:, :DRAWS, 4:].any(-1).all()
    edits = np.moveaxis(rollout.extras['edits'], 2, 1)  # [B, R, C]
    target = np.asarray(draws.target)[:, DRAWS:]
    assert_array_equal(target, edits >= 0)
    assert_array_equal(np.asarray(draws.label)[:, DRAWS:][target], edits[target])
    assert_array_equal(draws.tokens[:, DRAWS, 4:], rollout.extras['draft'])
    assert_array_equal(draws.label[:, -1], rollout.completion)
    assert_array_equal(draws.tokens[:, :, :4], np.repeat(rollout.prompt[:, None], 7, axis=1))
    variables = {'params': random_params(policy.model)}
    reader = Reader(policy, parts.objective.readout)
    plain = Reader(policy)

    @jax.jit
    def read(rows, draws):
        """Of all draws, and of the draft by the plain reader."""
        first = jax.tree.map(lambda x: x[:, :DRAWS], draws)
        return (
            reader(variables, rows, draws, jnp.int32(0)),
            plain(variables, rows, first, jnp.int32(0)),
        )

    logp, expected = jax.device_get(read(rollout, draws))
    recorded = np.moveaxis(rollout.extras['edit_log_prob'], 2, 1)
    assert_allclose(logp[:, DRAWS:][target], recorded[target], atol=1e-4)
    assert (recorded[target] < -0.1).any()
    # Those of the draft are probabilities among all ids, at temperature 1.
    assert_allclose(logp[:, :DRAWS], expected, atol=1e-5)


def test_the_loss_is_that_of_spg_on_the_draft_and_of_reinforce_on_edits(sampled):
    """The parts add up, with numbers typed here; without credit for edits they are left out."""
    _, parts, _, rollout = sampled
    draws = drawn(parts, rollout)
    rng = np.random.default_rng(1)
    logp = np.float32(-3 * rng.random((8, DRAWS + ROUNDS, 12)))
    batch = Batch(rollout, draws, {}, np.int32(0))

    def gradient_of(objective, logp, batch):
        def total(logp):
            loss = objective.loss(logp, batch)
            return loss.total, loss

        return jax.device_get(jax.jit(jax.grad(total, has_aux=True))(logp))

    gradient, loss = gradient_of(parts.objective, logp, batch)
    target = np.asarray(draws.target)[:, DRAWS:]
    expected = np.where(target, -rollout.advantage[:, None, None], 0.0)
    assert_allclose(gradient[:, DRAWS:], expected, atol=1e-6)
    config = default_config()
    config.corruption.draws = DRAWS
    spg = assemble(config).objective
    masked = draws.masked[:, :DRAWS]
    of_draft = Batch(with_draft(rollout), Draws(masked, draws.block[:, :DRAWS]), {}, np.int32(0))
    expected, of_spg = gradient_of(spg, logp[:, :DRAWS], of_draft)
    assert_allclose(gradient[:, :DRAWS], expected, atol=1e-6)
    edits = np.asarray(logp)[:, DRAWS:]
    addend = -(rollout.advantage * np.where(target, edits, 0).sum((1, 2))).sum()
    assert_allclose(loss.total, of_spg.total + addend, rtol=1e-5)
    assert loss.weight == of_spg.weight == rollout.extras['draft_scored'].sum()
    total, count = loss.metrics['edit_log_prob']
    assert_allclose(total / count, edits[target].mean(), rtol=1e-5)

    _, alone = parts_of(**{'autoedit.credit': 'draft'})
    only_draft = drawn(alone, rollout)
    assert alone.objective.draws == DRAWS == only_draft.masked.shape[1]
    batch = Batch(rollout, only_draft, {}, jnp.int32(0))
    draft_gradient, loss = gradient_of(alone.objective, logp[:, :DRAWS], batch)
    assert_allclose(draft_gradient, gradient[:, :DRAWS], atol=1e-6)
    assert_allclose(loss.total, of_spg.total, rtol=1e-6)


def test_rows_without_advantage_are_idle(sampled):
    _, parts, _, rollout = sampled
    batch = Batch(rollout, drawn(parts, rollout), {}, np.int32(0))
    idle = np.asarray(jax.jit(parts.objective.idle)(batch))
    assert idle.tolist() == (rollout.advantage == 0).tolist() and 0 < idle.sum() < 8


def test_the_law_of_an_edit_has_finite_gradients_where_ids_are_left_out():
    """Two of four ids are left: p = (e^2, e^1) / Z at T = 1/2 of logits (1, .5)."""
    _, parts = parts_of()
    sampling = dataclasses.replace(parts.sampling, temperature=0.5, top_k=2)
    logits = jnp.asarray([[[1.0, 0.5, 0.2, 9.0]]])
    allowed = jnp.asarray([True, True, True, False])
    of_edit = jax.value_and_grad(
        lambda x: drawn_log_probs(x, jnp.asarray([[1]]), allowed, sampling)[0, 0]
    )
    value, gradient = jax.jit(of_edit)(logits)
    assert_allclose(value, np.log(np.e / (np.e**2 + np.e)), rtol=1e-5)
    p = np.e / (1 + np.e)
    assert_allclose(gradient[0, 0], [-2 * p, 2 * p, 0, 0], atol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'autoedit.credit': 'edits'}, "autoedit.credit is 'edits'"),
        ({'sampling.sampler': ''}, "sampling.commit 'low_confidence' does not make"),
        ({'sampling.sampler': 'llada21'}, "sampling.sampler 'llada21' does not make"),
        ({'sampling.temperature': 0.0}, 'sampling.temperature is 0.0'),
        ({'autoedit.beta': 0.5}, 'autoedit.beta is 0.5'),
        ({'sampling.edit_threshold': 2.0}, 'sampling.edit_threshold is 2.0'),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        parts_of(**changes)
    assert '\n' not in str(error.value)


def test_methods_that_read_the_record_of_tokens_refuse_edits():
    config = default_config('agrpo')
    config.sampling.sampler = 'autoedit'
    with pytest.raises(ValueError, match="'autoedit' edits; use a sampler that does not") as error:
        assemble(config)
    assert '\n' not in str(error.value)
