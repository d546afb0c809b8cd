"""Base policies: a cut training goes on exactly, fine-tuning imitates, wrong files say where."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import countdown
from spg_jax import pretrain, sharding
from spg_jax.assembly import assemble
from spg_jax.data.demonstrations import encode_pairs, read_demonstrations
from spg_jax.diffusion.denoising import stratified_masks
from spg_jax.models.number_features import PERIODS, WAVE_GAIN, with_number_features
from spg_jax.process.files import locked
from spg_jax.process.interruption import Interruption
from spg_jax.random import Purpose, example_keys, step_key
from spg_jax.runs import policies
from spg_jax.tasks.countdown import Countdown
from spg_jax.training import optimizers
from spg_jax.training.train_state import initial_state, shardings_of
from tests.meshes import mesh_of
from tests.parameters import random_params, start_from_random_params

GOOD_LINE = json.dumps(
    {
        'example': {'numbers': [1, 2, 3], 'target': 6},
        'completion': '<answer> 3 + 2 + 1 </answer>',
    }
)


STEPS = 40  # of every training here, so that all run one program
# Reading all that the task's own source has would take longer than the trainings.
SUMS = [
    {'numbers': [a, b, c], 'target': a + b + c}
    for a in range(1, 9)
    for b in (20, 30)
    for c in (4, 7)
]
PROBLEMS = [problem | {'index': index} for index, problem in enumerate(SUMS)]


@pytest.fixture(scope='module', autouse=True)
def few_problems():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Countdown, 'source', lambda self, split, folder: PROBLEMS)
        yield


@pytest.fixture(scope='module', autouse=True)
def one_program():
    """All trainings here take steps of one kind, whose program is traced and compiled once, and no
    init is compiled. That a start in a process of its own makes the same program is in
    tests/test_train.py, and so is a training that starts from an init."""
    make_step, programs = pretrain.make_step, []

    def once(*arguments):
        if not programs:
            programs.append(make_step(*arguments))
        return programs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, 'make_step', once)
        start_from_random_params(patch)
        yield


@pytest.fixture
def config():
    return two_stages()


def two_stages():
    config = countdown.get_config('tiny')
    config.base.stages = ((12, 1.0), (STEPS - 12, 0.3))
    config.base.update(batch_size=8, muon_rate=0.02)
    return config


def run(config, directory, *more):
    with Interruption() as interruption:
        return pretrain.pretrain(config, directory, mesh_of(), interruption, *more)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp('whole') / 'base'
    assert run(two_stages(), directory)
    return directory


def test_a_training_that_is_cut_twice_goes_on_exactly(config, whole, tmp_path, monkeypatch):
    """Interrupted within the first stage, and on the border of the two."""
    done = 0
    put_batch = sharding.put_batch

    def interrupting(*arguments):
        nonlocal done
        done += 1
        if done in (5, 12):
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*arguments)

    monkeypatch.setattr(sharding, 'put_batch', interrupting)
    for steps in (5, 12):
        assert not run(config, tmp_path / 'cut')
        assert done == steps and not policies.is_policy(tmp_path / 'cut')
    assert run(config, tmp_path / 'cut')
    assert done == STEPS
    found, expected = (
        policies.load_policy(path, mesh_of())[2] for path in (tmp_path / 'cut', whole)
    )
    jax.tree.map(assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_the_model_sees_the_tokens_that_it_is_asked_for_as_mask(config):
    """The loss that a step reports is that of a plain loop, in which masked tokens are MASK."""
    parts, mesh = assemble(config), mesh_of()
    policy, tokenizer, variables = pretrain._starting_point(config, parts, mesh, None)
    base, rows = config.base, config.base.batch_size
    optimizer = optimizers.for_pretraining(
        base.learning_rate, base.weight_decay, base.grad_clip, STEPS, base.muon_rate
    )
    state = initial_state(variables, optimizer, policy, mesh, average=True)
    pairs = [(problem, parts.task.right_answer(problem)) for problem in PROBLEMS[:rows]]
    pairs = [(problem, f'<answer> {answer} </answer>') for problem, answer in pairs]
    batch = encode_pairs(parts.task, tokenizer, pairs, 6, 12)
    keys = example_keys(base.seed, Purpose.CORRUPT, 0, batch.index)
    masked = np.asarray(stratified_masks(step_key(base.seed, Purpose.CORRUPT, 0), keys, 12))
    total, (prompt, valid, completion, *_) = 0.0, batch
    noisy = [
        [policy.mask_id if m else t for m, t in zip(*row, strict=True)]
        for row in zip(masked, completion, strict=True)
    ]
    logits = jax.jit(policy.completion_logits)(variables, prompt, valid, np.array(noisy))
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row in range(rows):
        chosen = logp[row, np.arange(12), completion[row]]
        total -= chosen[masked[row]].mean() / rows
    step = pretrain.make_step(policy, optimizer, base.seed, base.ema, shardings_of(state))
    _, metrics = step(state, sharding.put_batch(mesh, batch))
    assert_allclose(metrics['loss'][0], total, 1e-5)


def test_fine_tuning_imitates_what_it_is_given(config, whole, tmp_path):
    """Three trainings of as many steps as `whole`, whose program they run, one after the other."""
    records = tmp_path / 'records.jsonl'
    records.write_text(GOOD_LINE + '\n')
    pairs = read_demonstrations(str(records), assemble(config).task)
    config.base.stages, start = ((STEPS, 1.0),), whole
    for name in ('first', 'second', 'tuned'):
        assert run(config, tmp_path / name, start, pairs)
        start = tmp_path / name
    losses = [
        json.loads((training / 'metrics.jsonl').read_text().splitlines()[-1])
        for training in (whole.with_name('base.training'), tmp_path / 'tuned.training')
    ]
    assert losses[1]['loss'] < 0.3 * losses[0]['loss']


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        (None, 'cannot be read'),
        ('', 'is empty'),
        ('{"example": {}, "completion": ""}', ':1: found'),
        ('{"example": {"numbers": [1, 2, 3], "target": 6}, "completion": 6}', ':1: found'),
        (GOOD_LINE + '\nno json', ':2: found'),
        (GOOD_LINE + '\n{"example": {}}', ':2: found'),
    ],
)
def test_wrong_demonstrations_say_where(config, tmp_path, text, said):
    path = tmp_path / 'records.jsonl'
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_demonstrations(str(path), assemble(config).task)
    assert '\n' not in str(error.value)


def test_prompts_that_do_not_fit_are_refused_before_the_first_step(config, tmp_path):
    config.sampling.prompt_length, config.data.long_prompts = 5, 'drop'
    with pytest.raises(ValueError, match='6 tokens, more than sampling.prompt_length 5; set it'):
        run(config, tmp_path / 'base')
    assert not (tmp_path / 'base.training' / 'checkpoints').exists()


def test_another_training_is_not_continued_in_the_place_of_one(config, whole):
    config.base.learning_rate = 1e-3
    with pytest.raises(ValueError, match='base.learning_rate 0.003, asked for 0.001'):
        run(config, whole)


@pytest.mark.parametrize('name', ['', 'adapter'])
def test_fine_tuning_goes_on_only_from_the_same_files(config, tmp_path, monkeypatch, name):
    """A training that did not save their digests goes on."""
    files, tuned = ('published', 'adapter', 'another'), tmp_path / 'tuned'
    for place in files:
        (tmp_path / place).mkdir()
        (tmp_path / place / 'weights').write_text(place)
    monkeypatch.setattr(pretrain, '_pretrain', lambda *_: True)
    config.lora.update(rank=2, adapter=str(tmp_path / name) if name else '')
    assert run(config, tuned, tmp_path / 'published')
    (tmp_path / 'tuned.training' / 'checkpoints' / '4').mkdir(parents=True)
    assert run(config, tuned, tmp_path / 'published')

    def refused(key):
        with pytest.raises(ValueError, match=f'holds a training with another {key};') as error:
            run(config, tuned, tmp_path / 'published')
        assert '\n' not in str(error.value)

    adapter = config.lora.adapter
    for other in ('', *files[1:]):
        if other != name:
            config.lora.adapter = str(tmp_path / other) if other else ''
            refused('lora.adapter')
    config.lora.adapter = adapter
    (tmp_path / 'published' / 'weights').write_text('other')
    refused('base.checkpoint')
    saved = tmp_path / 'tuned.training' / 'config.json'
    settings = json.loads(saved.read_text())
    del settings['files']
    saved.write_text(json.dumps(settings))
    assert run(config, tuned, tmp_path / 'published')


def test_a_training_that_only_skips_stops_with_its_state_saved(config, tmp_path, monkeypatch):
    """At its second start as well, when it has no step left."""
    monkeypatch.setattr(pretrain, 'CHECKPOINT_EVERY', STEPS - 1)

    def not_a_number(model, key, mesh):
        return jax.tree.map(
            lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding),
            random_params(model, mesh=mesh),
        )

    monkeypatch.setattr(sharding, 'init_params', not_a_number)
    config.train.max_skipped = STEPS
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=f'{STEPS} non-finite updates in a row'):
            run(config, tmp_path / 'base')
        assert not policies.is_policy(tmp_path / 'base')
    checkpoints = (tmp_path / 'base.training' / 'checkpoints').iterdir()
    # There is an older one to fall back to.
    assert {path.name for path in checkpoints} == {str(STEPS - 1), str(STEPS)}


def test_what_is_no_policy_is_not_replaced_by_one(config, tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='is no policy and would be replaced by one') as error:
        run(config, tmp_path)
    assert '\n' not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']
    assert not tmp_path.with_name(tmp_path.name + '.training').exists()


def test_who_waits_for_a_base_policy_leaves_when_asked_to(config, tmp_path):
    class Asked(Interruption):
        def requested(self):
            return True

    (tmp_path / 'base.training').mkdir()
    with locked(tmp_path / 'base.training' / 'lock'):
        assert not pretrain.pretrain(config, tmp_path / 'base', mesh_of(), Asked(), wait=True)


def test_base_policies_are_named_by_what_makes_them(config, tmp_path):
    same, other = two_stages(), two_stages()
    same.rl.beta, same.train.seed, same.task.data_dir = 3.0, 5, 'elsewhere'
    same.data.long_prompts = 'truncate_left'
    other.base.seed = 1
    assert pretrain.base_directory(same) == pretrain.base_directory(config)
    assert pretrain.base_directory(other) != pretrain.base_directory(config)
    wording = tmp_path / 'wording.txt'
    wording.write_text('{numbers} = {target} :')
    same.task.prompt_template = str(wording)
    assert pretrain.base_directory(same) == pretrain.base_directory(config)
    wording.write_text('= {target} {numbers} :')
    assert pretrain.base_directory(same) != pretrain.base_directory(config)


def test_how_a_base_policy_is_computed_does_not_name_it(config, tmp_path):
    config.base.cache = str(tmp_path)
    directory = pretrain.base_directory(config)
    config.model.update(remat=True, scan_unroll=3, attention='einsum', quantize='')
    assert pretrain.base_directory(config) == directory
    config.base.random_rate = 0.3  # which nothing reads without the second loss
    assert pretrain.base_directory(config) == directory
    config.base.edit_weight = 1.0
    assert pretrain.base_directory(config) != directory


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_number_words_start_as_waves_of_their_value(dtype):
    table = np.random.default_rng(0).normal(size=(2_000, 32)) / 8
    params = {'embedding': jnp.asarray(table, dtype)}
    embedding = with_number_features(params, ['+', '10', '20'], 2)['embedding']
    found = np.asarray(embedding, np.float32)
    assert embedding.dtype == dtype
    assert_array_equal(found[:3], params['embedding'][:3])
    assert_allclose(found[3, PERIODS.index(10)], WAVE_GAIN / 8, rtol=0.02)  # the table has std 1/8
    ten = PERIODS.index(10)
    assert_allclose(found[3, ten], found[4, ten])
    assert abs(found[3, PERIODS.index(400)] - found[4, PERIODS.index(400)]) > 1e-3
    with pytest.raises(ValueError, match='model.width 16'):
        with_number_features({'embedding': jnp.zeros((5, 16))}, ['1'], 3)
