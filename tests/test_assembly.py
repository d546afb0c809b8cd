"""What an objective asks of the sampler and of the corruption, and what is refused at assembly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax.assembly import assemble, fit_to_model
from spg_jax.config import default_config
from spg_jax.models.transformer import TransformerConfig
from spg_jax.rl.objectives import REGISTRY
from spg_jax.rl.objectives.objective import Ring
from spg_jax.rl.scores import corrupt, moments
from tests.rl.conftest import random_rollout

pytestmark = pytest.mark.fast


@pytest.fixture
def objective_with(monkeypatch):
    """A function that gives the objective of default_config other fields."""

    def change(**fields):
        method = REGISTRY['spg']

        def build(settings, protocol):
            return dataclasses.replace(method.build(settings, protocol), **fields)

        monkeypatch.setitem(REGISTRY, 'spg', dataclasses.replace(method, build=build))

    return change


def test_the_sampler_records_what_the_objective_asks_for(objective_with):
    assert assemble(default_config()).sampling.records == ()
    assert assemble(default_config()).sampling.positions_read == 32
    objective_with(records=('kept', 'entropy'))
    parts = assemble(default_config())
    assert parts.sampling.records == ('entropy', 'kept')
    assert not any(decoding.records for decoding in parts.evaluation.decodings)


def test_an_objective_that_needs_the_law_refuses_a_sampler_that_does_not_record_it(objective_with):
    objective_with(needs_law=True)
    config = default_config()
    with pytest.raises(
        ValueError, match="rl.objective 'spg' needs the law of .* 0.9; use"
    ) as error:
        assemble(config)
    assert '\n' not in str(error.value)
    for commit in ('random', 'left_to_right', 'entropy', 'margin'):
        config.sampling.commit = commit
        assert assemble(config).sampling.records == ('log_prob',)
    config.sampling.update(commit='low_confidence', temperature=0.0)
    assert assemble(config).sampling.exact_law


def test_informed_masking_makes_the_sampler_measure_influence():
    config = default_config()
    config.corruption.update(informed=True, window=5)
    sampling = assemble(config).sampling
    assert (sampling.records, sampling.influence_window) == (('influence',), 5)
    assert sampling.positions_read == 32 + 5
    assert not assemble(default_config()).objective.records


def test_informed_masks_of_spg_follow_the_influence_in_the_rollout():
    config = default_config()
    config.sampling.update(length=8, block_length=4, steps=4)
    config.corruption.update(draws=40, informed=True, strength=100.0)
    influence = jnp.tile(jnp.array([0, 9, 9, 9, 9, 9, 9, 0.0]), (4, 1))
    rows = random_rollout(4, length=8).replace(
        scored=jnp.ones((4, 8), bool), extras={'influence': influence}
    )
    moment = moments(0, rows, jnp.int32(0), jnp.int32(0))
    draws = jax.jit(lambda moment: corrupt(assemble(config).objective.corruption, rows, moment))(
        moment
    )
    masked = np.asarray(draws.masked)[:, :, -8:].reshape(160, 2, 4)
    block = np.asarray(draws.block).ravel()
    chosen = masked[np.arange(160), block]  # [160, 4] of the block that each draw chose
    assert chosen[np.arange(160), np.where(block == 0, 0, 3)].all()
    assert 40 < (chosen.sum(1) < 3).sum() < 120


def test_an_evaluation_reads_all_settings_of_its_rule():
    config = default_config()
    settings = {'threshold': 0.8, 'factor': 0.7, 'entropy_bound': 0.3, 'remasks': 2}
    settings |= {'edit_threshold': 0.4, 'post_steps': 3, 'edit_rounds': 2, 'keep_threshold': 0.1}
    config.sampling.update(settings, commit='entropy', schedule='timesteps', top_k=5)
    config.evaluation.sampler = 'entropy_bounded'
    decoding = assemble(config).evaluation.headline
    assert {name: getattr(decoding, name) for name in settings} == settings
    assert (decoding.rule_name, decoding.schedule) == ('entropy_bounded', 'timesteps')
    assert (decoding.temperature, decoding.top_k, decoding.cache) == (0.0, 0, '')
    config.evaluation.sampler = ''
    assert assemble(config).evaluation.headline.rule_name == 'low_confidence'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'evaluation.lengths': (64, 64), 'evaluation.steps': (32, 64)}, 'names a length twice'),
        ({'evaluation.lengths': (100,), 'evaluation.steps': (64,)}, 'evaluation.lengths 100 is'),
        ({'evaluation.sampler': 'entropi'}, 'evaluation.sampler'),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_by_the_names_of_its_settings(change, message):
    config = default_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        assemble(config)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'corruption.kind': 'full'}, "corruption.kind 'full'.* use uniform or block"),
        ({'corruption.window': 0}, 'corruption.window is 0; use a positive integer'),
        ({'spg.estimator': 'block'}, "spg.estimator 'block' needs positions masked uniformly"),
        ({'sampling.top_p': 1.5}, 'sampling.top_p is 1.5'),
    ],
)
def test_informed_masking_that_cannot_work_is_refused(change, message):
    config = default_config()
    config.corruption.informed = True
    for name, value in change.items():
        group, leaf = name.split('.')
        config[group][leaf] = value
    with pytest.raises(ValueError, match=message) as error:
        assemble(config)
    assert '\n' not in str(error.value)


def test_informed_masking_is_refused_around_masks_of_other_methods(monkeypatch):
    """d1 under the settings of SPG, since it reads none of them."""
    d1 = REGISTRY['d1']
    monkeypatch.setitem(
        REGISTRY,
        'spg',
        dataclasses.replace(
            REGISTRY['spg'], build=lambda settings, protocol: d1.build(d1.settings(), protocol)
        ),
    )
    config = default_config()
    assemble(config)
    config.corruption.informed = True
    with pytest.raises(ValueError, match="'spg' draws masks of its own.*turn it off") as error:
        assemble(config)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', [name for name in REGISTRY if name != 'dtm'])
def test_a_group_of_one_cannot_be_compared(name):
    config = default_config(name)
    config.rl.update(group_size=1, microbatch=16)
    if name == 'just_grpo':
        config.sampling.commit = 'left_to_right'
        config.sampling.steps = config.sampling.length
    if name == 'autoedit':
        config.sampling.sampler = 'autoedit'
    with pytest.raises(ValueError, match=f'rl.group_size is 1; {name} compares') as error:
        assemble(config)
    assert '\n' not in str(error.value)


def test_discrete_tilt_matching_compares_nothing():
    config = default_config('dtm')
    config.rl.update(group_size=1, microbatch=16)
    assert assemble(config).batching.group_size == 1


def test_draws_that_a_model_with_blocks_adds_must_split_into_passes():
    """TraceRL has a draw for each 8 of 128 steps, and of the 16 that a block more takes."""
    config = default_config('tracerl')
    config.rl.draws_per_pass = 16
    model = TransformerConfig(10, 16, 2, 2, 1, 32, visible_block=config.sampling.block_length)
    parts = assemble(config)
    with pytest.raises(ValueError, match='rl.draws_per_pass 16 does not divide the 18 draws'):
        fit_to_model(config, parts, model)


def test_a_ring_and_readouts_of_the_behaviour_policy_exclude_each_other(monkeypatch):
    unigrpo, ring = REGISTRY['unigrpo'], Ring(prompts=16, every=2, rows=96)

    def build(settings, protocol):
        return dataclasses.replace(unigrpo.build(settings, protocol), experience=ring)

    monkeypatch.setitem(REGISTRY, 'unigrpo', dataclasses.replace(unigrpo, build=build))
    with pytest.raises(ValueError, match='unigrpo learns from a ring of rows and') as error:
        assemble(default_config('unigrpo'))
    assert '\n' not in str(error.value)
