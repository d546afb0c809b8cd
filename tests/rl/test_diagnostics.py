"""Entropy and divergences on fixed completions, against sums over whole distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.models.transformer import Transformer
from spg_jax.rl import diagnostics
from spg_jax.rl.diagnostics import divergence, make_diagnosis, probe_shapes, sketch
from spg_jax.training.train_state import TrainState
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.conftest import MASK, VOCAB, random_rollout

pytestmark = pytest.mark.numerical


def distributions(seed, vocabulary=40):
    logits = np.random.default_rng(seed).normal(size=(6, vocabulary)).astype(np.float32) * 2
    return np.asarray(jax.nn.log_softmax(logits))


def whole_divergence(now, before):
    return (np.exp(now) * (now - before)).sum(-1)


def test_a_sketch_of_a_small_vocabulary_loses_nothing():
    now, before = distributions(0), distributions(1)
    found = divergence(jnp.asarray(now), sketch(jnp.asarray(before)))
    assert_allclose(found, whole_divergence(now, before), rtol=1e-5)


def test_a_sketch_of_a_large_vocabulary_gives_at_most_the_divergence(monkeypatch):
    """It is the divergence of the distributions whose last tokens are one, by hand."""
    monkeypatch.setattr(diagnostics, 'TOKENS', 12)
    now, before = distributions(0), distributions(1)
    found = np.asarray(divergence(jnp.asarray(now), sketch(jnp.asarray(before))))
    for row in range(len(now)):
        order = np.argsort(-before[row])
        parts = [
            np.append(np.exp(x[row][order[:12]]), np.exp(x[row][order[12:]]).sum())
            for x in (now, before)
        ]
        assert_allclose(found[row], (parts[0] * np.log(parts[0] / parts[1])).sum(), rtol=1e-4)
    assert (found < whole_divergence(now, before)).all() and (found > 0).all()


def state_of(params):
    """A train state without an optimiser."""
    zero = jnp.int32(0)
    return TrainState(
        step=zero,
        trained={'params': params},
        frozen={},
        opt_state=None,
        average=None,
        skipped=zero,
    )


def moved(params):
    """Other parameters of the same shapes."""
    return jax.tree.map(
        lambda x: x + 0.3 * np.cos(np.arange(x.size, dtype=x.dtype).reshape(x.shape)), params
    )


def log_probs_of(apply, params, rollout, masked):
    sequence = jnp.concatenate([rollout.prompt, rollout.completion], axis=1)
    valid = jnp.concatenate([rollout.prompt_mask, jnp.ones(rollout.completion.shape, bool)], axis=1)
    logits = apply({'params': params}, jnp.where(masked, MASK, sequence), valid)
    return np.asarray(jax.nn.log_softmax(logits[:, rollout.prompt.shape[1] :]))


def test_a_look_is_what_whole_distributions_give(policy, config, monkeypatch):
    """On a mesh, the base itself, a policy, and another one after it; the masks are all of the
    completion. The whole distributions are those of one device."""
    rollout, mesh, config.rl.microbatch = random_rollout(), mesh_of(2, 2, 2), 4
    masked = np.zeros((8, 16), bool)
    masked[:, 4:] = True

    def mask_all(self, key, prompt_mask, scored):
        blocks = jnp.zeros(1, jnp.int32)
        return diagnostics.Draws(masked=jnp.arange(16)[None] >= 4, block=blocks)

    monkeypatch.setattr(diagnostics.Corruption, '__call__', mask_all)
    diagnosis = make_diagnosis(policy, assemble(config).batching, 4, seed=0)
    policies = [jax.tree.map(np.asarray, random_params(policy.model))]
    policies += [policies[0], moved(policies[0]), moved(moved(policies[0]))]
    placed = [
        state_of(jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, on_mesh))
        for on_mesh in [random_params(policy.model, mesh=mesh)]
        for params in policies
    ]
    with jax.set_mesh(mesh):
        rows = sharding.put_batch(mesh, jax.tree.map(np.asarray, rollout))
        probe = diagnosis.begin(placed[0], rows)
    jax.tree.map(
        lambda x, shape: None if x.shape == shape.shape else pytest.fail(f'{x.shape} {shape}'),
        probe,
        probe_shapes(8, 4, 12, VOCAB),
    )
    apply = jax.jit(Transformer(policy.config).apply)
    whole = [log_probs_of(apply, params, rollout, masked) for params in policies[1:]]
    whole = [whole[0], *whole]
    scored = np.asarray(rollout.scored)
    for number in (1, 2, 3):
        with jax.set_mesh(mesh):
            probe, metrics = diagnosis.look(placed[number], probe)
        now = whole[number]
        expected = {
            'entropy': -(np.exp(now) * now).sum(-1),
            'kl_to_base': whole_divergence(now, whole[0]),
            'kl_step': whole_divergence(now, whole[number - 1]),
        }
        assert metrics.keys() == expected.keys()
        for name, values in expected.items():
            total, weight = metrics[name]
            assert weight == scored.sum()
            mean = values[scored].mean()
            if number == 1 and name != 'entropy':  # The same policy has moved nowhere.
                assert abs(total / weight) < 1e-6
            else:
                assert_allclose(total / weight, mean, rtol=2e-4, err_msg=name)
