"""Traffic is read from compiled programs whose collectives were counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from spg_jax import sharding
from spg_jax.planning.collectives import read_traffic

pytestmark = pytest.mark.compiled_as_users_do

LAYERS, STEPS = 5, 3


def nested(x):
    """3 x (5 sums of [8, 128] float32 and one gather) and one permutation on each of 4 devices."""

    def layer(_, x):
        return jnp.tanh(jax.lax.psum(x, 'data') * 0.1)

    def step(_, x):
        x = jax.lax.fori_loop(0, LAYERS, layer, x)
        whole = jax.lax.all_gather(x, 'data', axis=0, tiled=True)  # [32, 128]
        return x + jnp.sin(whole).sum(0)[None] + whole[:8]

    x = jax.lax.fori_loop(0, STEPS, step, x)
    return jax.lax.ppermute(x, 'data', [(i, (i + 1) % 4) for i in range(4)])


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_collectives_in_nested_loops_are_counted_as_often_as_they_run(platform, slice_of_four):
    devices = slice_of_four.devices if platform == 'tpu' else jax.devices()[:4]
    mesh = sharding.make_mesh({'data': 4}, devices)
    rows = jax.NamedSharding(mesh, P('data'))
    x = jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=rows)
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
    traffic = read_traffic(jax.jit(mapped(nested, check_vma=False)).lower(x).compile().as_text())
    size = 8 * 128 * 4
    assert traffic == {
        'all-reduce': (STEPS * LAYERS, STEPS * LAYERS * 2 * size * 3 / 4),
        'all-gather': (STEPS, STEPS * 4 * size * 3 / 4),
        'collective-permute': (1, size),
    }


SPREAD = """
HloModule spread

%piece (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

%condition (c: (s32[], f32[2])) -> pred[] {
  %c = (s32[], f32[2]) parameter(0)
  %limit = s32[] constant(10)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[2])) -> (s32[], f32[2]) {
  %b = (s32[], f32[2]) parameter(0)
  %two = s32[] constant(2)
  %j = s32[] get-tuple-element(%b), index=0
  %next = s32[] add(%j, %two)
  %x = f32[2]{0} get-tuple-element(%b), index=1
  %more = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
  %kernel = f32[2]{0} custom-call(%x), custom_call_target="tpu", frontend_attributes={metadata={
"block_q": 512
}}, backend_config={}
  %sent = f32[2]{0} collective-permute(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[2]) tuple(%next, %sent)
}

ENTRY %main (x: f32[2]) -> (s32[], f32[2]) {
  %x = f32[2]{0} parameter(0)
  %start = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
  %zero = s32[] constant(0)
  %first = (s32[], f32[2]) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[2]) while(%first), condition=%condition, body=%body
}
"""


def test_a_collective_spread_over_a_loop_is_one_and_a_counter_may_advance_by_two():
    assert read_traffic(SPREAD) == {'all-gather': (1, 24.0), 'collective-permute': (5, 40.0)}


def test_a_loop_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match='cannot read how often a loop runs'):
        read_traffic(SPREAD.replace('direction=LT', 'direction=NE'))
