"""Bytes that stay on a chip, counted by hand; the formula for others against the compiler."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks.plan_tables import preset_for
from configs import gsm8k, sudoku
from spg_jax import sharding
from spg_jax.models.lora import TARGETS
from spg_jax.planning import memory
from spg_jax.planning.machines import GIB, LISTED, find_machine
from spg_jax.planning.programs import make_plan, planned_policy

RECORDS = Path(__file__).parents[2] / 'docs' / 'results' / 'plans.jsonl'

pytestmark = pytest.mark.compiled_as_users_do


def test_what_stays_is_what_the_mesh_leaves_on_each_chip(plan_of):
    """On fsdp=2 x tensor=2 a chip has a quarter of a kernel, half of a factor, and all norms."""
    plan = plan_of({'lora.targets': TARGETS})
    vocabulary, width, mlp, layers, rank = plan.policy.config.vocab_size, 256, 768, 3, 8
    kernels = layers * (4 * width * width + 3 * width * mlp) + 2 * vocabulary * width
    norms = (2 * layers + 1) * width
    factors = layers * rank * (4 * 2 * width + 3 * (width + mlp))
    resident = memory.resident(plan.state)
    assert resident.weights == kernels // 4 * 4 + norms * 4  # float32: a policy trained here
    assert resident.adapters == factors // 2 * 4
    assert resident.optimizer == pytest.approx(2 * resident.adapters, abs=16)  # and counters


def test_llada_8b_has_its_published_size_without_its_checkpoint():
    """It has 32 layers of width 4096 and MLP width 12288, and two tables of 126,464 rows."""
    layer = 4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096
    policy = planned_policy(gsm8k.get_config('llada_8b'), 'tpu')
    sizes = jax.tree.leaves(sharding.abstract_params(policy.model))
    assert sum(leaf.size for leaf in sizes) == 32 * layer + 2 * 126_464 * 4096 + 4096
    assert {leaf.dtype.name for leaf in sizes} == {'bfloat16'}


def test_a_rollout_in_parts_needs_the_memory_of_one(plan_of):
    whole = memory.estimate(plan_of(), 'rollout')
    part = memory.estimate(plan_of({'rl.generation_batch': 16}), 'rollout')
    for name in ('attention', 'layer'):  # the parts of a layer, where this decoding needs most
        assert part[name] == whole[name] / 4  # of 64 rows


@pytest.mark.parametrize('task', [gsm8k, sudoku])
@pytest.mark.parametrize('topology', [name for name in LISTED if name[0] == 'v'])
def test_the_formula_is_within_15_percent_of_the_compiler(topology, task):
    """What the compiler needed for LLaDA-8B is recorded; countdown and math500 have the shapes of
    gsm8k."""
    name = task.__name__.removeprefix('configs.')
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    compiled = {
        record['program']: (record['activations_gib'], record['peak_gib'])
        for record in records
        if (record['task'], record['topology']) == (name, topology)
    }
    machine = find_machine(topology)
    config = task.get_config(preset_for(topology))
    plan = make_plan(config, sharding.make_mesh(config.mesh, machine.devices), 'tpu')
    for program in ('rollout', 'evaluation', 'update'):
        needed, peak = compiled[program]
        estimate = sum(memory.estimate(plan, program).values()) / GIB
        assert abs(estimate - needed) < 0.15 * peak, (program, estimate, needed)


@pytest.mark.parametrize(('platform', 'runs'), [('tpu', 'splash'), ('cuda', 'cudnn')])
def test_attention_is_planned_as_it_would_run(platform, runs):
    policy = planned_policy(gsm8k.get_config('llada_8b'), platform)
    assert policy.config.attention == runs


def test_a_mesh_that_does_not_divide_the_model_or_the_rows_is_one_line(plan_of):
    with pytest.raises(ValueError, match='mesh.tensor is 4, which does not divide the 2 .*heads'):
        plan_of({'mesh.tensor': 4, 'mesh.fsdp': 1})
    with pytest.raises(ValueError, match='mesh.tensor'):
        plan_of({'model.mlp_width': 771, 'mesh.tensor': 4, 'mesh.fsdp': 1})
    with pytest.raises(ValueError, match='30 rows.*do not split over 4 shards'):
        plan_of(
            {
                'model.mlp_width': 384,
                'mesh.tensor': 1,
                'mesh.fsdp': 4,
                'rl.prompts': 5,
                'rl.group_size': 6,
                'rl.microbatch': 30,
            }
        )
