"""Conversions: a cut one goes on exactly, the result is a policy, and wrong input is refused."""

import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import countdown
from spg_jax import convert, sharding
from spg_jax import pretrain as pretrain_module
from spg_jax.assembly import assemble, conversion_of, fit_to_model
from spg_jax.data.hf_tokenizer import HFTokenizer
from spg_jax.diffusion.block_denoising import draw_masks, embedding_noise
from spg_jax.models.families import read_config
from spg_jax.models.transformer import Transformer
from spg_jax.pretrain import _starting_point, pretrain
from spg_jax.process.interruption import Interruption
from spg_jax.random import Purpose, example_keys, step_key
from spg_jax.runs import plots, policies, validation
from spg_jax.runs.examples import lessons_of
from spg_jax.runs.metrics import read_rows
from spg_jax.tasks.countdown import Countdown
from spg_jax.train import train
from spg_jax.training.conversion import logits_of
from tests.meshes import mesh_of
from tests.parameters import start_from_random_params
from tests.published import END, START, byte_pairs, save_tokenizer
from tests.test_pretrain import PROBLEMS

REFERENCE = Path(__file__).parent / 'reference' / 'families'
QWEN2 = {'vocab_size': 256, 'bos_token_id': START, 'eos_token_id': END, 'pad_token_id': END}
drawn, requested = [], set()


@pytest.fixture(scope='module', autouse=True)
def few_problems_and_programs():
    """All conversions here have the same programs, which are compiled once, not at each start.

    Phases of every block run the update and the validation of the first one, because each block
    would be two more programs. `requested` notes the makers and blocks that were asked for; what a
    block means for the loss is in tests/diffusion/test_block_denoising.py. Curves are not drawn,
    which tests/test_train.py does.
    """
    programs = {}

    def once(make):
        def maker(policy, *arguments, **settings):
            requested.add((make.__name__, next(x for x in arguments if isinstance(x, int))))
            if make.__name__ not in programs:
                programs[make.__name__] = make(policy, *arguments, **settings)
            return programs[make.__name__]

        return maker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Countdown, 'source', lambda self, split, folder: PROBLEMS)
        start_from_random_params(patch)
        patch.setattr(convert, 'make_update', once(convert.make_update))
        patch.setattr(plots, 'curves', lambda training, panels: drawn.append(panels))
        patch.setattr(validation, 'make_validation', once(validation.make_validation))
        yield


@pytest.fixture
def config():
    return tiny()


def tiny():
    config = countdown.get_config('tiny')
    config.base.update(stages=((3, 1.0),), kind='autoregressive')
    config.convert.phases = ((4, 2, 1.0), (0, 2, 1.0), (4, 4, 1.0))
    return config


def run(config, directory, start):
    with Interruption() as interruption:
        return convert.convert(config, directory, mesh_of(), interruption, start)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """An autoregressive policy."""
    directory = tmp_path_factory.mktemp('start') / 'base'
    with Interruption() as interruption:
        assert pretrain(tiny(), directory, mesh_of(), interruption)
    return directory


@pytest.fixture(scope='module')
def whole(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp('whole') / 'converted'
    assert run(tiny(), directory, start)
    return directory


def params_of(directory):
    return jax.device_get(policies.load_policy(directory, mesh_of())[2]['params'])


def test_an_autoregressive_base_learns_the_next_token(start):
    """The loss of the first step is that of a plain loop over unpadded prefixes."""
    assert policies.model_of_policy(start).autoregressive
    config, mesh = tiny(), mesh_of()
    parts = assemble(config)
    policy, tokenizer, variables = _starting_point(config, parts, mesh, None)
    first = read_rows(start.with_name('base.training') / 'metrics.jsonl')[0]
    assert first['step'] == 1
    rows = config.base.batch_size
    lessons = lessons_of(config, parts, tokenizer, rows, np.arange(rows), None)
    batch = next(lessons.batches(1.0, config.base.seed))
    apply = jax.jit(Transformer(policy.config).apply)
    shown = policy.model.config
    assert (shown.visible_block, shown.shift_logits) == (1, True)
    total = 0.0
    for place in range(12):  # The tokens from `place` on are not there.
        tokens = np.concatenate([batch.prompt, batch.completion], axis=1)
        tokens[:, 6 + place :] = 0
        logits = np.asarray(apply(variables, tokens, np.ones(tokens.shape, bool)))[:, 6 + place]
        normalizer = np.log(np.exp(logits).sum(-1))
        chosen = logits[np.arange(rows), batch.completion[:, place]]
        total += (normalizer - chosen).mean() / 12
    assert_allclose(first['loss'], total, rtol=1e-5)


def test_a_conversion_that_is_cut_goes_on_exactly(config, start, whole, tmp_path, monkeypatch):
    """Cut within the last phase."""
    done, placed = 0, convert.Examples.placed

    def interrupting(*arguments):
        nonlocal done
        done += 1
        if done == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return placed(*arguments)

    monkeypatch.setattr(convert.Examples, 'placed', interrupting)
    assert not run(config, tmp_path / 'cut', start)
    assert done == 7 and not policies.is_policy(tmp_path / 'cut')
    assert run(config, tmp_path / 'cut', start)
    assert done == 8
    jax.tree.map(assert_array_equal, params_of(tmp_path / 'cut'), params_of(whole))
    notes = [policies.policy_notes(path)['conversion'] for path in (tmp_path / 'cut', whole)]
    assert notes[0] == notes[1]


def test_problems_held_out_belong_to_a_conversion(config, start, whole):
    """They are not learned from. A conversion that did not save how many they are goes on."""
    problems = config.evaluation.problems
    config.evaluation.problems = problems + 1
    said = f'training with evaluation.problems {problems}, asked for {problems + 1};'
    with pytest.raises(ValueError, match=said) as error:
        run(config, whole, start)
    assert '\n' not in str(error.value)
    saved = whole.with_name('converted.training') / 'config.json'
    text = saved.read_text()
    older = {group: x for group, x in json.loads(text).items() if group != 'evaluation'}
    try:
        saved.write_text(json.dumps(older))
        assert run(config, whole, start)
    finally:
        saved.write_text(text)


def test_the_result_is_the_mean_of_the_best_of_the_last_phase(whole):
    training = whole.with_name('converted.training')
    rows = read_rows(training / 'metrics.jsonl')
    by_block = {4: 'validation_loss_block_4', 0: 'validation_loss_whole'}
    losses = {
        row['step']: row[by_block[row['block']]]
        for row in rows
        if row.get('block') is not None and row['step'] > 4
    }
    assert sorted(losses) == [6, 8]
    conversion = policies.policy_notes(whole)['conversion']
    assert conversion['mean_of_updates'] == [6, 8]
    assert [row['block'] for row in conversion['validated']] == [4, 0, 4]
    assert 'validation_loss_whole' in conversion['validated'][1]
    kept = [params_of(training / 'candidates' / str(step)) for step in (6, 8)]
    jax.tree.map(
        lambda result, *parts: assert_allclose(result, np.mean(parts, axis=0), atol=1e-7),
        params_of(whole),
        *kept,
    )
    names = {name for row in rows for name in row}
    assert {name for panel, shown in drawn[0] for name in shown} <= names
    assert 'after whole length: validation loss' in convert.closing_lines(whole)
    makers = ('make_update', 'make_validation')
    assert requested == {(maker, block) for maker in makers for block in (0, 4)}


def test_reinforcement_learning_accepts_the_result(config, whole):
    """It sees blocks of 4 and predicts a token at its own place. An update of SPG on such a model
    is in tests/test_families_runs.py."""
    model = policies.model_of_policy(whole)
    assert (model.visible_block, model.shift_logits, model.autoregressive) == (4, False, False)
    assert fit_to_model(config, assemble(config), model).sampling.block_length == 4


def test_fine_tuning_trains_adapters_over_a_frozen_base(config, whole, tmp_path, monkeypatch):
    """From a conversion, cut once. The base stays as it is, and training asks for it in few bits.

    Here it gets all bits; updates of adapters on quantised bases are in test_quantized.py.
    """
    config.base.update(stages=((4, 1.0),), kind='diffusion')
    config.lora.update(rank=2, alpha=4.0, dropout=0.0, targets=('query',))
    config.model.quantize = 'int8'
    formats, load, put_batch, done = [], policies.load_policy, sharding.put_batch, 0

    def noted(*arguments, **execution):
        formats.append(execution['quantize'])
        return load(*arguments, **execution | {'quantize': ''})

    def interrupting(*arguments):
        nonlocal done
        done += 1
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*arguments)

    def tuned():
        with Interruption() as interruption:
            return pretrain(config, tmp_path / 'tuned', mesh_of(), interruption, whole)

    make_step, programs = pretrain_module.make_step, []

    def once(*arguments):
        if not programs:
            programs.append(make_step(*arguments))
        return programs[0]

    monkeypatch.setattr(pretrain_module, 'make_step', once)
    monkeypatch.setattr(policies, 'load_policy', noted)
    monkeypatch.setattr(sharding, 'put_batch', interrupting)
    assert not tuned()
    saved = (tmp_path / 'tuned.training' / 'checkpoints' / '2').rglob('*')
    assert sum(path.stat().st_size for path in saved) < 60_000  # The base has 36 kB alone, thrice.
    assert tuned()
    assert done == 4
    assert formats == ['int8', 'int8']
    assert policies.base_of(tmp_path / 'tuned') == whole
    policy, _, variables = load(tmp_path / 'tuned', mesh_of())
    assert policy.config.lora.rank == 2
    assert all(np.any(x != 0) for x in jax.tree.leaves(jax.device_get(variables['lora'])))
    base = load(whole, mesh_of())[2]
    jax.tree.map(assert_array_equal, variables['params'], base['params'])
    config.lora.rank = 4
    with pytest.raises(ValueError, match='holds a training with given.adapters'):
        tuned()


def test_noise_reaches_what_sees_a_masked_token(config, start):
    """With blocks of 1 a masked token is seen by itself alone, and the clean copy has no noise."""
    mesh, parts = mesh_of(), assemble(config)
    conversion = conversion_of(config)
    examples = convert.Examples(config, parts, conversion, start, mesh, None)
    policy, _, variables = convert.starting_point(start, mesh, parts.execution)
    batch = examples.held_out()[0]
    keys = example_keys(0, Purpose.CORRUPT, 0, batch.index)
    masks = draw_masks(step_key(0, Purpose.CORRUPT, 0), keys, batch.maskable, False)

    @jax.jit
    def logits(scale):
        noise = embedding_noise(keys, masks.masked, policy.config.width, scale)
        return logits_of(policy, variables, batch.tokens, batch, masks, 1, noise)

    with_noise, without = logits(np.float32(0.5)), logits(np.float32(0.0))
    changed = np.abs(with_noise - without).max(-1) > 0
    assert_array_equal(changed, masks.masked)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'convert.length': 18},
            'convert.length 18 is not a multiple of the block of 4 .*; use 20',
        ),
        ({'convert.length': 16}, 'convert.length is 16 .* have up to 18 tokens each; use 20'),
        ({'convert.documents': 3, 'convert.length': 62}, 'convert.length is 62 for .*; use 60'),
        ({'convert.phases': ((4, 2, 1.0), (1, 2, 1.0))}, 'ends with blocks of 1, which is an auto'),
        ({'convert.phases': ((4, 0, 1.0),)}, r'convert.phases has \(4, 0, 1.0\); use \(block'),
        ({'convert.phases': ()}, r'convert.phases is \(\); use one phase'),
        ({'convert.phases': ((2, 2, 1.0),)}, 'ends with blocks of 2: block_length is 4, but'),
        ({'convert.batch_size': 2**28}, 'convert.batch_size is 268435456, up to 2'),
        ({'base.kind': 'causal'}, "base.kind is 'causal'; use one of diffusion, autoregressive"),
        ({'convert.noise': -1.0}, 'convert.noise is -1.0; use a number of at least 0'),
    ],
)
def test_settings_that_cannot_work_are_refused(config, start, tmp_path, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message) as error:
        run(config, tmp_path / 'converted', start)
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_starting_points_that_cannot_be_converted_are_refused(config, start, whole, tmp_path):
    for work, message in (
        (lambda: run(config, tmp_path / 'x', whole), f'{whole} is a diffusion model already'),
        (
            lambda: train(config, tmp_path / 'x', mesh_of(), None),
            "the model of base.kind 'autoregressive' is autoregressive, and this is reinforcement "
            'learning of diffusion models; make it one with spg_jax.convert',
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            work()
        assert '\n' not in str(error.value)
    config.base.kind = 'diffusion'
    with pytest.raises(ValueError, match='convert it with spg_jax.convert, or set base.kind auto'):
        with Interruption() as interruption:
            pretrain(config, tmp_path / 'x', mesh_of(), interruption, start)


def test_a_published_checkpoint_gets_a_mask_of_its_own(tmp_path, monkeypatch):
    """Qwen2, for which another token stands in for MASK; no weights are needed to see it."""
    contents = json.loads((REFERENCE / 'tiny_qwen2/untied' / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(contents | QWEN2))
    save_tokenizer(tmp_path)
    model, ids = read_config(tmp_path / 'config.json')
    tokenizer = HFTokenizer(tmp_path, *ids)
    size = max(byte_pairs().get_vocab().values()) + 1
    assert ids.mask != size
    loaded = policies.make_policy(model, tokenizer), tokenizer, {}
    monkeypatch.setattr(policies, 'load_policy', lambda *_, **execution: loaded)
    policy, tokenizer, _ = convert.starting_point(tmp_path, mesh_of(), {})
    assert (policy.mask_id, policy.eos_id) == (size, END) and not policy.allowed[size]
    assert (policy.config.visible_block, policy.config.shift_logits) == (0, False)
    assert tokenizer.save(tmp_path / 'saved')['hf_tokenizer']['mask_id'] == size
    HFTokenizer(tmp_path / 'saved', size, END, END)  # It can be read again.


def test_where_a_vocabulary_has_room_for_mask(tmp_path):
    save_tokenizer(tmp_path)
    size = max(byte_pairs().get_vocab().values()) + 1
    tokenizer = HFTokenizer(tmp_path, mask_id=0, eos_id=1, pad_id=1)
    assert tokenizer.with_mask(size + 3).mask_id == size
    with pytest.raises(ValueError, match=f'no room for MASK, since each of the {size} rows') as e:
        tokenizer.with_mask(size)
    assert '\n' not in str(e.value)
