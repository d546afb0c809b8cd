"""What people type: names of configurations, words, paths and numbers that work or are refused."""

import json
import math
import os
import re
import shutil
import signal
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags

from spg_jax import random, score, train
from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.export import _refuse_links, export
from spg_jax.limits import PATHS
from spg_jax.method import complete
from spg_jax.models import weights
from spg_jax.planning.machines import find_machine
from spg_jax.process import cli, config_flag
from tests.processes import REPOSITORY, finish, run, start_module, wait_until

pytestmark = pytest.mark.fast


# --- configurations -------------------------------------------------------------------------------


def parse(argument: str):
    return config_flag._ConfigParser().parse(argument)


@pytest.mark.parametrize(
    'argument', ['countdown', 'countdown:tiny', f'{REPOSITORY}/configs/countdown.py:tiny']
)
def test_a_configuration_is_named_by_its_task_or_its_file(argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(argument).task.name == 'countdown'


HEAD = 'from spg_jax.config import default_config\ndef get_config():\n    c = default_config()\n'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(:\n', 'own.py:1: '),
        ('x = 1\x00\n', 'own.py:1: '),
        ('', "own.py:1: AttributeError: module 'config' has no attribute 'get_config'"),
        ('import no_such_module\n', "own.py:1: ModuleNotFoundError: No module named 'no_such_"),
        ('def get_config():\n    return 5\n', 'own.py: get_config returned int, expected'),
        ('def get_config():\n    pass\n', 'own.py: get_config returned NoneType, expected'),
        ('def get_config():\n    return {}\n', 'own.py: get_config returned dict, expected'),
        (
            'def get_config():\n\n    return 1 / 0\n',
            'own.py:3: ZeroDivisionError: division by',
        ),
        ('def get_config(preset):\n    pass\n', 'own.py:1: TypeError: get_config() missing 1'),
        (HEAD + '    raise ValueError("no\\nsuch")\n', 'own.py:4: no such'),
        (HEAD + '    c.rl.grup_size = 1\n', "own.py:4: no setting 'grup_size'; use group_size"),
        (HEAD + '    c.rl.update(grup_size=1)\n', "own.py:4: no setting 'grup_size'; use group_si"),
        (HEAD + '    c.new = 1\n', "own.py:4: no setting 'new'"),
        (HEAD + '    c.rl.group_size = "x"\n', 'own.py:4: TypeError: Could not override field'),
    ],
)
def test_a_configuration_file_that_fails_is_one_line(tmp_path, text, message):
    (tmp_path / 'own.py').write_text(text)
    with pytest.raises(config_flag.UnusableConfig, match=re.escape(message)) as error:
        parse(f'{tmp_path}/own.py')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['gs://bucket/own.py', 's3://bucket/own.py:tiny'])
def test_a_configuration_in_a_store_is_told_to_mount_it(name):
    with pytest.raises(config_flag.UnusableConfig, match='launch/README.md'):
        parse(name)


@pytest.mark.parametrize('name', ['countdwn', 'configs/nothing.py', 'gs://bucket/own.py', ''])
def test_a_configuration_that_is_not_there_is_one_line(name):
    with pytest.raises(config_flag.UnusableConfig) as error:
        parse(name)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('group', default_config())
def test_no_group_takes_an_unknown_setting(group):
    config = default_config()
    with pytest.raises(AttributeError):
        config[group].unknown = 1
    with config.unlocked():
        config[group].unknown = 1
    with pytest.raises(ValueError, match=f'no setting {group}.unknown; '):
        assemble(config)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.rl.update(grup_size=6), 'no setting rl.grup_size; use rl.group_size, or see'),
        (lambda c: c.update(more=1), 'no setting more; see'),
        (lambda c: c.rl.__delitem__('beta'), 'setting rl.beta is missing'),
        (lambda c: c.rl.__setitem__('beta', None), 'rl.beta is None; use a value like 1.5'),
        (lambda c: c.sampling.__setitem__('prompt_buckets', ('a',)), 'sampling.prompt_buckets is'),
    ],
)
def test_settings_of_a_configuration_made_elsewhere_are_checked(change, message):
    config = type(default_config())(default_config().to_dict())
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        change(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        assemble(config)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'rl.group_size': 6 * 10**8}, 'rl.prompts x rl.group_size is 9600000000 rows'),
        ({'base.batch_size': 10**8}, 'base.batch_size is 100000000 rows'),
        ({'evaluation.batch': 10**8}, 'evaluation.batch is 100000000 rows'),
        ({'model.width': 2**24}, 'model.width is 16777216; use a positive integer up to'),
        ({'model.layers': 2**31}, 'model.layers is 2147483648; use a positive integer up to'),
        ({'model.width': 10**6}, 'model.layers, model.width and model.mlp_width make'),
        ({'train.seed': 10**20}, 'train.seed is 100000000000000000000; use integers below 2^32'),
        ({'train.seed': -1}, 'train.seed is -1; use a seed of at least 0'),
        ({'base.seed': 2**32}, 'base.seed is 4294967296; use integers below 2^32'),
        ({'train.steps': 2**63}, 'train.steps is 9223372036854775808; use integers'),
        ({'corruption.draws': 4 * 10**9}, 'rl.prompts x rl.group_size x corruption.draws is 38400'),
        ({'evaluation.samples': 4 * 10**9}, 'evaluation.batch x evaluation.samples is 256000000'),
        ({'lora.rank': 4 * 10**9}, 'lora.rank is 4000000000, wider than the model that it adapts'),
        ({'lora.rank': 193}, 'wider than the model that it adapts; use at most 192'),
        ({'lora.rank': 20_000, 'base.checkpoint': 'c'}, 'lora.rank is 20000, wider than'),
        ({'lora.alpha': math.inf}, 'lora.alpha is inf; use finite numbers'),
        ({'sampling.temperature': math.inf}, 'sampling.temperature is inf; use finite numbers'),
        ({'rl.beta': math.inf}, 'spg.beta is inf; use finite numbers'),
        ({'base.learning_rate': math.nan}, 'base.learning_rate is nan; use finite numbers'),
        ({'evaluation.lengths': (2**40,), 'evaluation.steps': (1,)}, 'evaluation.lengths is ('),
    ],
)
def test_numbers_beyond_any_machine_are_refused(change, message):
    config = default_config()
    for key, value in change.items():
        group, leaf = key.split('.')
        config[group][leaf] = value
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        assemble(config)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('topology', ['h100:1000000', 'v5p:100x100x100', 'a100:' + '9' * 30])
def test_machines_that_nobody_has_are_refused(topology):
    with pytest.raises(ValueError, match='more than [0-9]+ chips'):
        find_machine(topology)


# --- words and keys -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('word', 'meant'),
    [
        ('config.rl.group_size=1', '--config.rl.group_size=1'),
        ('rl.group_size=1', '--config.rl.group_size=1'),
        ('\u2013config.rl.group_size=1', '--config.rl.group_size=1'),
        ('\u2014verbosity=1', '--verbosity=1'),
        ('verbosity=1', '--verbosity=1'),
        ('true', '--NAME=VALUE'),
        ('countdown:tiny', '--config=countdown:tiny'),
        ('own/file.py', '--config=own/file.py'),
    ],
)
def test_a_word_that_is_no_flag_is_told_what_was_probably_meant(monkeypatch, word, meant):
    values = flags.FlagValues()
    flags.DEFINE_string('config', '', '', flag_values=values)
    flags.DEFINE_string('verbosity', '', '', flag_values=values)
    monkeypatch.setattr(cli.flags, 'FLAGS', values)
    assert f'{word!r} is no flag; use {meant}, or see --help' == config_flag.left_over(word)


TINY = '--config=countdown:tiny'


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], '--config is not given: TASK[:PRESET] or'),
        (['--out', 'countdown'], '--config is not given'),
        (['countdown:tiny'], "'countdown:tiny' is no flag; use --config=countdown:tiny"),
        (['--config.train.steps=3'], 'use --config=TASK[:PRESET] as well'),
        (
            [TINY, '--config.train.steps=4.5'],
            "train.steps is '4.5'; use a value like 8",
        ),
        (
            [TINY, '--config.rl.compact=maybe'],
            "rl.compact is 'maybe'; use a value like False",
        ),
        (
            [TINY, '--config.sampling.steps=(1'],
            "sampling.steps is '(1'; use a value like 12",
        ),
        (
            [TINY, '--config.spg=2'],
            'spg is a group of settings; use --config.spg.KEY=VALUE',
        ),
        ([TINY, '--out=a', '--ouut=b'], "Unknown command line flag 'ouut'"),
    ],
)
def test_flags_that_cannot_be_used_are_told_in_one_line_what_to_write(monkeypatch, words, message):
    values, arguments = flags.FlagValues(), ['train', *words]
    monkeypatch.setattr(config_flag.flags, 'FLAGS', values)
    monkeypatch.setattr(sys, 'argv', arguments)
    config_flag.define_config_flag(complete)
    flags.DEFINE_string('out', '', '', flag_values=values)
    with pytest.raises((flags.Error, ValueError)) as error:
        values(arguments)
    told = config_flag.explained(error.value, arguments)
    assert message in told and '\n' not in told


# --- paths ----------------------------------------------------------------------------------------


def refusals(path: str, checkpoints: bool) -> list[str]:
    """What every flag and setting that takes such a path says."""
    messages = []
    for key, saves in PATHS.items():
        if saves or not checkpoints:
            config = default_config()
            group, leaf = key.split('.')
            config[group][leaf] = path
            with pytest.raises(ValueError) as error:
                assemble(config)
            assert str(error.value).startswith(f'{key}: ')
            messages.append(str(error.value))
    with pytest.raises(ValueError) as error:
        cli._PathParser(checkpoints).parse(path)
    return [*messages, str(error.value)]


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://b/r', 'hdfs://h/r', 'https://h/r'])
def test_an_address_of_a_store_is_refused(path):
    for message in refusals(path, checkpoints=False):
        assert 'launch/README.md' in message and '\n' not in message
    assert 'A file system for all workers' in (REPOSITORY / 'launch/README.md').read_text()


@pytest.mark.parametrize('name', ['br[1]', '[proj]/run', 'a*', 'a?', 'a\\b', 'a\nb', 'a\x7fb'])
def test_a_name_that_nothing_could_be_read_from_is_refused(name, tmp_path, monkeypatch):
    for message in refusals(name, checkpoints=True):
        assert 'read back' in message and '\n' not in message
    (tmp_path / '[here]').mkdir()
    monkeypatch.chdir(tmp_path / '[here]')
    refusals('run', checkpoints=True)


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv('HOME', '/somewhere')
    assert cli._PathParser(True).parse('~/run') == '/somewhere/run'
    assert cli._PathParser(True).parse('') == ''
    config = default_config()
    config.base.cache, config.task.data_dir, config.lora.adapter = '~/a', '~', 'b~'
    assert str(assemble(config).adapter) == 'b~'
    assert (config.base.cache, config.task.data_dir) == ('/somewhere/a', '/somewhere')


def test_every_path_flag_is_read_as_a_path():
    """A flag whose name or help says that it is a file or a folder must not be plain text.
    `--verify` of spg_jax.score is, and has a test of its own."""
    names = ('workdir', 'out', 'data', 'checkpoint', 'adapter', 'demonstrations', 'faults', 'move')
    names += ('prompts', 'completions')
    for folder in ('spg_jax', 'benchmarks'):
        for path in (REPOSITORY / folder).glob('*.py'):
            plain = re.findall(r'DEFINE_string\(\s*(\S+),', path.read_text())
            assert not {*map(repr, names), 'task'}.intersection(plain), path


@pytest.mark.parametrize('words', [['--task=countdown', '{}'], ['--verify={}']])
def test_score_reads_its_files_as_paths(tmp_path, monkeypatch, capsys, words):
    record = {'task': 'countdown', 'question': 'q', 'ground_truth': [[2, 3], 5]}
    record |= {'completion': r'\boxed{2+3}', 'score': True}
    (tmp_path / 'f.jsonl').write_text(json.dumps(record))
    monkeypatch.setenv('HOME', str(tmp_path))

    def run_score(path):
        values = flags.FlagValues()
        for name in ('task', 'verify'):
            flags.DEFINE_string(name, None, '', flag_values=values)
        for name, default in (('judge', 'published'), ('rules', 'released'), ('fields', '')):
            flags.DEFINE_string(name, default, '', flag_values=values)
        flags.DEFINE_bool('apart', False, '', flag_values=values)
        monkeypatch.setattr(score, 'flags', types.SimpleNamespace(FLAGS=values))
        score.main(values(['score', *(word.format(path) for word in words)]))

    run_score('~/f.jsonl')
    assert str(tmp_path / 'f.jsonl') in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_score('gs://bucket/f.jsonl')
    error = capsys.readouterr().err
    assert 'launch/README.md' in error and error.count('\n') == 1


def test_the_default_workdir_is_checked_before_any_work(tmp_path, monkeypatch):
    """Its parent is the working directory, under whatever name that has."""
    (tmp_path / '[here]').mkdir()
    monkeypatch.chdir(tmp_path / '[here]')
    config = default_config()
    config.base.cache = str(tmp_path / 'base')
    monkeypatch.setattr(
        train, 'FLAGS', types.SimpleNamespace(config=config, workdir='', explain=False)
    )
    monkeypatch.setattr(train, 'claimed', None)
    with pytest.raises(ValueError, match=r"under a name with '\['"):
        train.main([])
    assert not list((tmp_path / '[here]').iterdir())


def linked(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def test_export_copies_no_targets_of_links(tmp_path):
    (tmp_path / 'secret').write_text('secret')
    policy = tmp_path / 'policy'
    (policy / 'adapter').mkdir(parents=True)
    (policy / 'adapter' / 'weights').write_text('')
    again = linked(policy / 'adapter' / 'again', 'weights')
    _refuse_links(policy, [again])
    notes = linked(policy / 'adapter' / 'notes', tmp_path / 'secret')
    with pytest.raises(ValueError, match=f'{notes} is a link to {tmp_path}/secret, outside'):
        export(policy, tmp_path, tmp_path / 'out', whole=False)
    notes.unlink()
    (policy / 'adapter').rename(tmp_path / 'elsewhere')
    linked(policy / 'adapter', tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match=f'{policy}/adapter is a link to'):
        export(policy, tmp_path, tmp_path / 'out', whole=False)


def test_export_looks_only_at_links_that_it_would_copy(tmp_path):
    (tmp_path / 'blob').write_text('{}')
    source = tmp_path / 'published'
    linked(source / 'model-1-of-1.safetensors', tmp_path / 'blob')
    linked(source / 'model.safetensors.index.json', tmp_path / 'blob')
    _refuse_links(source, weights.copied_files(source))
    linked(source / 'notes', tmp_path / 'blob')
    with pytest.raises(ValueError, match=f'{source}/notes is a link to'):
        _refuse_links(source, weights.copied_files(source))


def test_the_links_of_a_hugging_face_cache_are_its_own(tmp_path):
    snapshot, blob = tmp_path / 'models--a' / 'snapshots' / 'f00', tmp_path / 'models--a' / 'blobs'
    blob.mkdir(parents=True)
    (blob / '1').write_text('{}')
    linked(snapshot / 'config.json', '../../blobs/1')
    _refuse_links(snapshot, weights.copied_files(snapshot))
    (tmp_path / 'secret').write_text('secret')
    linked(snapshot / 'notes', tmp_path / 'secret')
    with pytest.raises(ValueError, match='is a link'):
        _refuse_links(snapshot, weights.copied_files(snapshot))


# --- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', [0, 7, 2**31, 2**32 - 1])
def test_a_key_is_that_of_the_default_generator_whatever_the_environment_asks(seed):
    expected = jax.random.key_data(jax.random.key(seed))
    assert expected.tolist() == [0, seed]  # threefry2x32 takes the two halves of 64 bits
    with jax.default_prng_impl('rbg'):
        key = random.root_key(seed)
        assert jax.random.key_data(key).tolist() == expected.tolist()
        rows = random.example_keys(seed, random.Purpose.SAMPLE, 1, np.arange(3, dtype=np.uint32))
    again = random.example_keys(seed, random.Purpose.SAMPLE, 1, np.arange(3, dtype=np.uint32))
    assert (jax.random.key_data(rows) == jax.random.key_data(again)).all()


def test_the_options_that_change_numbers_have_the_defaults_of_jax():
    """The main job, which sets no variable, computes what it computed before."""
    names = ', '.join(f'jax.config.values[{option!r}]' for option in cli.NUMBERS)
    program = f'import jax; print(repr([{names}]))'
    clean = {name: value for name, value in os.environ.items() if not name.startswith('JAX_')}
    printed = run([sys.executable, '-c', program], env=clean | {'JAX_PLATFORMS': 'cpu'}).stdout
    printed = re.sub(r'<[^>]*: (\S+)>', r'\1', printed)  # an enumeration, by its value
    assert printed.strip() == repr(list(cli.NUMBERS.values()))


def test_options_that_change_numbers_are_put_back(capsys):
    """Those of the environment that turn the compiler off, or most of it."""
    before = jax.config.values
    options = ('jax_disable_jit', 'jax_disable_most_optimizations')
    try:
        for option in options:
            jax.config.update(option, True)
        cli.fix_numbers()
        assert not any(jax.config.values[option] for option in options)
        error = capsys.readouterr().err
        assert all(f'{option.upper()}= is ignored' in error for option in options)
    finally:
        for option in (*options, *cli.GUARDS):
            jax.config.update(option, before[option])


def test_ctrl_c_during_imports_is_one_line(tmp_path):
    """A module of the imports is replaced by one that waits, so that the signal comes in time."""
    (tmp_path / 'optax.py').write_text(
        f'import time; open({str(tmp_path / "importing")!r}, "w").close(); time.sleep(600)'
    )
    process = start_module('spg_jax.train', PYTHONPATH=f'{tmp_path}:{REPOSITORY}')
    wait_until((tmp_path / 'importing').exists, process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, '', 'interrupted\n')


# --- installed as a package -----------------------------------------------------------------------


def test_the_configurations_are_found_by_name_in_an_installed_package(tmp_path):
    """What setup.py builds is what a wheel holds."""
    pytest.importorskip('setuptools')
    for name in ('spg_jax', 'configs'):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ('setup.py', 'pyproject.toml', 'README.md'):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    built = run(
        [sys.executable, 'setup.py', '-q', 'build', f'--build-lib={tmp_path}/site'], cwd=tmp_path
    )
    assert built.returncode == 0, built.stderr
    program = (
        'from spg_jax.process import config_flag; print(config_flag.CONFIGS, '
        'config_flag._ConfigParser().parse("countdown:tiny").task.name)'
    )
    ended = run(
        [sys.executable, '-c', program],
        cwd=tmp_path / 'site',
        env=os.environ | {'PYTHONPATH': str(tmp_path / 'site')},
    )
    assert ended.stdout.split() == [str(tmp_path / 'site/spg_jax/configs'), 'countdown']
