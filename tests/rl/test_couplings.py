"""Whatever a loss couples, its gradient in pieces is the joint one, on a mesh, with adapters.

The joint gradient is the plain derivative of the loss of all rows, without the learner. The model
is a toy whose programs compile in no time; tests/rl/test_learner.py has the real one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.models.lora import LoRA
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.objectives import Batch, Loss, Objective
from spg_jax.rl.objectives.objective import configured, over_groups
from spg_jax.rl.scores import Reader
from tests.meshes import mesh_of
from tests.rl.conftest import MASK, VOCAB, random_rollout

pytestmark = pytest.mark.numerical
GROUP, WIDTH = 4, 16


@dataclasses.dataclass(frozen=True)
class Config:
    lora: LoRA | None


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """A policy whose logits at a position depend on its token and on the mean of all tokens."""

    config: Config
    mask_id = MASK

    @property
    def trained(self) -> str:
        return 'lora' if self.config.lora else 'params'

    def completion_logits(self, variables, prompt, valid, completion, dropout, exists):
        tokens = jnp.concatenate([prompt, completion], axis=1)
        hidden = variables['params']['embedding'][tokens]
        hidden = jnp.tanh(hidden + jnp.where(valid.any(), hidden.mean(1, keepdims=True), 0.0))
        kernel = variables['params']['kernel']
        if self.config.lora and 'lora' in variables:
            kernel = kernel + variables['lora']['a'] @ variables['lora']['b']
        return hidden[:, prompt.shape[1] :] @ kernel


def scores(logp, batch):
    """[b], the mean log-probability of a row's masked tokens, over draws."""
    return (logp * batch.target).sum((1, 2)) / jnp.maximum(batch.target.sum((1, 2)), 1)


def loss_of_rows(logp, batch):
    """The sum of one term for each row, which looks at two other policies."""
    score, behaviour = scores(logp, batch), scores(batch.others['behaviour'], batch)
    reference = scores(batch.others['reference'], batch)
    value = -jnp.exp(score - behaviour) * batch.advantage + (score - reference) ** 2
    return Loss(value.sum(), batch.scored.sum().astype(jnp.float32), {})


def loss_of_group(logp, batch):
    """A softmax over the group, which is no sum over its rows."""
    return (jax.nn.softmax(3 * scores(logp, batch)) * batch.advantage).sum(), {}


def loss_of_batch(logp, batch):
    """The square of a sum over all rows."""
    total = (scores(logp, batch) * (batch.advantage + 0.5)).sum()
    return Loss(total**2, jnp.float32(len(logp)), {})


def objective_of(couples: str) -> Objective:
    losses = {
        'row': loss_of_rows,
        'group': over_groups(loss_of_group, GROUP),
        'batch': loss_of_batch,
    }
    corruption = configured(Corruption('uniform', draws=2, block_length=4))  # not called here
    looks_at = ('reference',) if couples == 'row' else ()
    return Objective(corruption, 2, losses[couples], couples, looks_at=looks_at)


def simple_objective(draws: int) -> Objective:
    """REINFORCE on the mean log-probability of masked tokens, which is traced in no time."""

    def loss(logp, batch):
        total = -(scores(logp, batch) * batch.advantage).sum()
        return Loss(total, jnp.float32(len(logp)), {})

    return Objective(configured(Corruption('uniform', draws=draws, block_length=4)), draws, loss)


def parameters(lora: bool, mesh: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    spec = {
        'params': {'embedding': (VOCAB, WIDTH), 'kernel': (WIDTH, VOCAB)},
        'lora': {'a': (WIDTH, 2), 'b': (2, VOCAB)},
    }
    split = {'embedding': P(None, 'fsdp'), 'kernel': P('fsdp', 'tensor'), 'a': P(), 'b': P()}
    return {
        name: {
            leaf: jax.device_put(
                rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, split[leaf])
            )
            for leaf, shape in leaves.items()
        }
        for name, leaves in spec.items()
        if lora or name == 'params'
    }


def inputs(mesh: Any) -> tuple[Any, Any, Any]:
    """A rollout, draws that mask half of its tokens, and readouts of the behaviour policy."""
    rng, rollout = np.random.default_rng(2), jax.tree.map(np.asarray, random_rollout())
    draws = Draws(masked=rng.random((8, 2, 16)) < 0.5)
    others = {'behaviour': rng.normal(size=(8, 2, 12)).astype(np.float32) - 3}
    return sharding.put_batch(mesh, (rollout, draws, others))


def with_half(in_pieces: Any) -> Any:
    """A function of the same gradient whose reference has half of each parameter."""

    def run(trained, frozen, rollout, draws, others):
        params = (trained | frozen)['params']
        kept = {'reference': {'params': jax.tree.map(lambda x: 0.5 * x, params)}}
        return in_pieces(trained, frozen, rollout, draws, others=others, kept=kept)

    return run


def joint_gradient(policy: Toy, objective: Objective) -> tuple[Any, Any]:
    """The plain derivative by the trained parameters of total / weight, from one forward pass."""
    variables = parameters(bool(policy.config.lora), mesh_of())
    rollout, draws, others = inputs(mesh_of())
    reader, trained = Reader(policy), policy.trained

    def value(params):
        initial = jax.tree.map(lambda x: 0.5 * x, variables['params'])
        reference = reader({'params': initial}, rollout, draws, jnp.int32(0))
        logp = reader(variables | {trained: params}, rollout, draws, jnp.int32(0))
        looks = others | {'reference': reference}
        loss = objective.loss(logp, Batch(rollout, draws, looks, jnp.int32(0)))
        return loss.total / loss.weight

    return jax.device_get(jax.jit(jax.value_and_grad(value))(variables[trained]))


@functools.cache
def joint_gradient_of(couples: str, lora: LoRA | None) -> tuple[Any, Any]:
    """`joint_gradient`, once for all meshes."""
    return joint_gradient(Toy(Config(lora)), objective_of(couples))


@pytest.mark.parametrize('couples', ['row', 'group', 'batch'])
@pytest.mark.parametrize(
    # Rows and draws differentiated at once; 0 takes all draws.
    ('sizes', 'microbatch', 'draws_per_pass', 'lora'),
    [
        ((1, 1, 1), 4, 0, None),
        ((8, 1, 1), 8, 1, None),
        ((2, 2, 2), 2, 1, None),
        ((2, 2, 2), 2, 0, LoRA(rank=2, alpha=2.0)),
    ],
    ids=['1x1x1', '8x1x1', '2x2x2', 'adapters on 2x2x2'],
)
def test_the_gradient_in_pieces_is_the_joint_one(sizes, microbatch, draws_per_pass, lora, couples):
    policy, objective = Toy(Config(lora)), objective_of(couples)
    mesh = mesh_of(*sizes)
    loss, gradient = joint_gradient_of(couples, lora)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-3
    in_pieces = make_gradient(
        policy, objective, microbatch=microbatch, draws_per_pass=draws_per_pass, group_size=GROUP
    )
    with jax.set_mesh(mesh):
        frozen = parameters(bool(lora), mesh)
        trained = {policy.trained: frozen.pop(policy.trained)}
        rollout, draws, others = inputs(mesh)
        found_loss, found, _ = jax.jit(with_half(in_pieces))(
            trained, frozen, rollout, draws, others
        )
    assert_allclose(found_loss, loss, rtol=1e-5)
    for leaf, expected in zip(
        jax.tree.leaves(found[policy.trained]), jax.tree.leaves(gradient), strict=True
    ):
        assert_allclose(np.asarray(leaf), expected, rtol=0, atol=1e-5 * largest)


def test_a_group_stays_in_one_microbatch():
    """A loss that couples a group sees its rows next to each other, in every microbatch."""
    seen = []

    def loss(logp, batch):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids).tolist()), batch.rows.example_id)
        return Loss(logp.sum(), jnp.float32(1), {})

    objective = dataclasses.replace(objective_of('group'), loss=loss)
    policy = Toy(Config(None))
    gradient = make_gradient(policy, objective, microbatch=4, draws_per_pass=0, group_size=2)
    rollout, draws, _ = inputs(mesh_of())
    jax.jit(gradient)(parameters(False, mesh_of()), {}, rollout, draws)
    jax.effects_barrier()
    ids = [[number - 17 for number in numbers] for numbers in seen]
    assert sorted(sum(ids, [])) == list(range(8))
    for numbers in ids:
        assert all(
            b == a + 1 and a % 2 == 0 for a, b in zip(numbers[::2], numbers[1::2], strict=True)
        )


def test_the_reference_is_the_model_without_its_adapters():
    """Unless a reference is kept, as where adapters were there from the start."""
    policy, objective = Toy(Config(LoRA(rank=2, alpha=2.0))), objective_of('row')
    variables = parameters(True, mesh_of())
    rollout, draws, others = inputs(mesh_of())
    gradient = make_gradient(policy, objective, microbatch=8, draws_per_pass=0, group_size=GROUP)
    trained, frozen = {'lora': variables['lora']}, {'params': variables['params']}
    zero = jax.tree.map(np.zeros_like, jax.device_get(trained))
    run = jax.jit(gradient)
    without, *_ = run(trained, frozen, rollout, draws, others=others)
    kept, *_ = run(trained, frozen, rollout, draws, others=others, kept={'reference': zero})
    other, *_ = run(trained, frozen, rollout, draws, others=others, kept={'reference': trained})
    assert_allclose(without, kept, rtol=1e-6)
    assert abs(float(without - other)) > 1e-3
