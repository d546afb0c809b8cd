"""The estimate of a run's time on a CPU: its work counted in a plain loop, and what it hangs on."""

import pytest

from configs import countdown
from spg_jax.assembly import assemble
from spg_jax.planning.costs import forward
from spg_jax.planning.duration import FLOPS_OF_ONE_CORE, cpu_seconds
from spg_jax.planning.programs import planned_policy


def test_one_more_update_costs_its_forward_and_backward_passes():
    """Between two updates of one rollout nothing else happens."""
    config = countdown.get_config('tiny')
    config.train.steps, config.rl.inner_updates = 9, 100
    config.evaluation.every = 1000
    before = cpu_seconds(config, assemble(config), cores=1, base_exists=True)
    config.train.steps = 10
    more = cpu_seconds(config, assemble(config), cores=1, base_exists=True) - before
    model = planned_policy(config, 'cpu').config
    tokens = config.sampling.prompt_length + config.sampling.length
    rows = config.rl.prompts * config.rl.group_size * config.corruption.draws
    flops = rows * 3 * forward(model, tokens, config.sampling.length).total
    assert more * FLOPS_OF_ONE_CORE == pytest.approx(flops)


def test_a_base_policy_to_train_takes_longer_and_more_cores_less():
    config = countdown.get_config('tiny')
    parts = assemble(config)
    ready = cpu_seconds(config, parts, cores=1, base_exists=True)
    assert cpu_seconds(config, parts, cores=1, base_exists=False) > ready
    assert cpu_seconds(config, parts, cores=2, base_exists=True) < ready
