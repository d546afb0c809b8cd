"""FLOPs by formula against the count of XLA for the same arithmetic without loops."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from spg_jax import sharding
from spg_jax.models.windows import Window
from spg_jax.planning.costs import forward, work
from spg_jax.planning.programs import FINE_TUNING, make_plan, program

pytestmark = pytest.mark.compiled_as_users_do

WIDE = {'model.width': 512, 'model.heads': 4, 'model.kv_heads': 4, 'model.mlp_width': 1536}
# Two layers, since the last one differs from the others where logits are of few positions.
UNROLLED = WIDE | {'model.layers': 2, 'model.scan_unroll': 2, 'mesh.fsdp': 1, 'mesh.tensor': 1}


def counted(run, *arguments):
    return run.lower(*arguments).cost_analysis()['flops']


@pytest.mark.parametrize(('kv_heads', 'windowed'), [(4, False), (2, True)])
def test_a_forward_pass_costs_what_xla_counts(plan_of, kv_heads, windowed):
    """The formula leaves out softmax, norms and rotary positions, which are 2 % at width 512."""
    plan = plan_of(UNROLLED | {'model.kv_heads': kv_heads}, jax.devices()[:1])
    rows, length, unembedded = 4, 144, 32

    @jax.jit
    def logits(variables, tokens):
        window = Window(length - unembedded, unembedded)
        asked = window if windowed else None
        valid = jnp.ones(tokens.shape, bool)
        hidden = plan.policy.hidden(variables, tokens, valid, window=asked)
        return plan.policy.unembed(variables, hidden if windowed else window.cut(hidden))

    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    xla_flops = counted(logits, plan.state.variables, tokens)
    expected = rows * forward(plan.policy.config, length, unembedded, windowed).total
    assert expected == pytest.approx(xla_flops, rel=0.04) and expected < xla_flops


@pytest.mark.parametrize(
    ('rank', 'remat', 'draws', 'draws_per_pass'), [(8, True, 2, 1), (0, False, 1, 0)]
)
def test_an_update_costs_what_xla_counts(plan_of, rank, remat, draws, draws_per_pass):
    """The cases have adapters, recomputation and passes of draws, or none of them."""
    changes = {
        'lora.rank': rank,
        'model.remat': remat,
        'corruption.draws': draws,
        'rl.draws_per_pass': draws_per_pass,
        'rl.microbatch': 64,
    }
    plan = plan_of(UNROLLED | changes, jax.devices()[:1])
    run, (state, rollout) = program(plan, 'update')
    # XLA counts the body of a loop over draws, or over pieces of the rows, once.
    pieces = plan.rows_of_update // plan.rows_at_once
    assert work(plan, 'update').flops / draws / pieces == pytest.approx(
        counted(run, state, rollout), rel=0.05
    )


def test_a_step_of_fine_tuning_costs_what_xla_counts(config):
    config.update_from_flattened_dict(UNROLLED | {'base.batch_size': 16})
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    plan = make_plan(config, mesh, 'cpu', fine_tuning=True)
    step, arguments = program(plan, FINE_TUNING)
    flops = counted(step, *arguments)
    assert work(plan, FINE_TUNING).flops == pytest.approx(flops, rel=0.05)


def test_a_rollout_is_a_forward_pass_for_every_step_and_twice_with_guidance(plan_of):
    plan = plan_of()
    row = forward(plan.policy.config, 16 + 128, 32, windowed=True).total
    assert work(plan, 'rollout').flops == 64 * 64 * row
    assert work(plan_of({'sampling.guidance': 1.5}), 'rollout').flops == 2 * 64 * 64 * row
    part = plan_of({'sampling.guidance': 0.0, 'rl.generation_batch': 16})
    assert work(part, 'rollout').flops == 16 * 64 * row
    assert program(part, 'rollout')[1][1].shape == (16, 16)


def test_a_model_that_sees_blocks_decodes_one_more(plan_of):
    """The first one that it generates may begin with the end of the prompt."""
    plan = plan_of()
    decoding = plan.parts.sampling
    model = dataclasses.replace(plan.policy.config, visible_block=decoding.block_length)
    on_grid = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, config=model))
    longer = dataclasses.replace(
        decoding,
        length=decoding.length + decoding.block_length,
        steps=decoding.steps + decoding.steps_per_block,
    )
    as_long = dataclasses.replace(plan, parts=dataclasses.replace(plan.parts, sampling=longer))
    assert work(on_grid, 'rollout') == work(as_long, 'rollout') != work(plan, 'rollout')


def test_every_shard_of_rows_reads_the_kernels(plan_of):
    two = work(plan_of(WIDE), 'rollout').bytes
    four = work(plan_of({'mesh.tensor': 1, 'mesh.fsdp': 4}), 'rollout').bytes
    kernels = 3 * (4 * 512 * 512 + 3 * 512 * 1536) + 512 * plan_of().policy.config.vocab_size
    assert four - two == 64 * 2 * kernels * 2  # 64 steps, bfloat16


def test_fused_attention_moves_no_scores_and_computes_them_again(plan_of):
    """There are 64 rows of 144 tokens, 3 layers of 2 heads, width 256 and 2 draws. In the backward
    pass splash takes seven products of the size of the scores, and einsum four."""
    einsum, splash = (plan_of({'model.attention': name}) for name in ('einsum', 'splash'))
    saved = work(einsum, 'rollout').bytes - work(splash, 'rollout').bytes
    assert saved == 64 * 64 * 3 * 2 * 144**2 * 2 * 4  # steps; written and read, float32
    more = work(splash, 'update').flops - work(einsum, 'update').flops
    assert more == 64 * 2 * 3 * (3 * 2 * 144**2 * 256)
