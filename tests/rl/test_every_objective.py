"""The update of every objective, with the settings of its run: whether it can be made at all.

Values are tested elsewhere, with arrays that tests hand over; here every part hands over its own.
"""

import jax
import jax.numpy as jnp
import pytest

from configs import countdown
from spg_jax import sharding
from spg_jax.method import set_objective
from spg_jax.models.policy import Policy
from spg_jax.planning.programs import make_plan, program
from spg_jax.rl.objectives import REGISTRY

SETTINGS = {
    'just_grpo': {'sampling.commit': 'left_to_right'},
    'autoedit': {'sampling.sampler': 'autoedit'},
    'd2': {'d2.segments': 4},
}


def averages(policy, variables, prompt, valid, completion, dropout=None, exists=None):
    """Hidden states [B, C, D] that depend on every parameter, and are traced in no time."""
    total = sum(leaf.mean() for leaf in jax.tree.leaves(variables))
    return total + jnp.zeros((*completion.shape, policy.config.width), jnp.float32)


@pytest.mark.parametrize('name', [*REGISTRY, 'spg_jax.rl.rejection'])
def test_an_update_comes_from_the_parts_of_its_run(name, monkeypatch):
    """The model itself is traced for one of them, as all ask it for the same."""
    if name != 'spg':
        monkeypatch.setattr(Policy, 'completion_hidden', averages)
    config = countdown.get_config('tiny')
    config.model.layers = config.model.scan_unroll = 1
    set_objective(config, name)
    config.update_from_flattened_dict(SETTINGS.get(name, {}))
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
    plan = make_plan(config, mesh, 'cpu')
    for part in plan.programs:
        if part in ('arrival', 'update'):
            function, arguments = program(plan, part)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                result = jax.eval_shape(function, *arguments)
    state, metrics = result
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, plan.state)
    assert {'loss', 'reward', 'gradient_norm'} <= metrics.keys()
