"""A small run that the tests plan for four TPU chips, which are not there."""

import jax
import pytest

from configs import countdown
from spg_jax import sharding
from spg_jax.planning.machines import find_machine
from spg_jax.planning.programs import make_plan


@pytest.fixture(scope='session')
def slice_of_four():
    return find_machine('v5e:2x2')


@pytest.fixture
def config():
    """Three layers of width 256, 64 rows of 16 + 128 tokens, and adapters of rank 8.

    There are only two targets and no dropout, because dropout takes most of the time of compiling.
    """
    config = countdown.get_config('tiny')
    config.model.update(width=256, layers=3, heads=2, kv_heads=2, mlp_width=768, remat=True)
    config.model.update(tie_embeddings=False, scan_unroll=1, dtype='bfloat16')
    config.model.attention = 'einsum'
    config.lora.update(rank=8, dropout=0.0, targets=('query', 'down'))
    config.sampling.update(prompt_length=16, length=128, steps=64, block_length=32)
    config.evaluation.update(lengths=(128,), steps=(64,), block_length=32, batch=64)
    config.corruption.draws = 2
    config.rl.update(prompts=8, microbatch=32, draws_per_pass=1)
    config.mesh.update(data=1, fsdp=2, tensor=2)
    return config


@pytest.fixture
def plan_of(config, slice_of_four):
    """A function that plans the changed configuration, by default on the four chips."""

    def plan(changes=None, devices=slice_of_four.devices):
        config.update_from_flattened_dict(changes or {})
        mesh = sharding.make_mesh(config.mesh, devices)
        return make_plan(config, mesh, devices[0].platform)

    return plan


@pytest.fixture(autouse=True)
def flags_for_tpus(monkeypatch):
    """Removes the flags of the tests, since the compiler for TPUs fails on one it does not know."""
    jax.devices()  # JAX reads the flags once, here.
    monkeypatch.delenv('XLA_FLAGS')
