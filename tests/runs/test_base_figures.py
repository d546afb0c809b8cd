"""Figures of the base policy that are kept beside it: believed only for what they were measured."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.lora import LoRA
from spg_jax.models.transformer import TransformerConfig
from spg_jax.rl.evaluator import Evaluation
from spg_jax.runs import base_figures as module
from spg_jax.runs.base_figures import SUFFIX, base_figures, identity_of
from spg_jax.runs.policies import make_policy
from tests.meshes import mesh_of

pytestmark = pytest.mark.fast

TOKENIZER = WordTokenizer(['1', '2', '+'])
MODEL = TransformerConfig(
    vocab_size=TOKENIZER.size, width=8, layers=1, heads=2, kv_heads=2, mlp_width=8
)
DECODING = SamplingConfig(length=4, steps=4, block_length=2, temperature=0.0)
EVALUATION = Evaluation(
    (DECODING,),
    trained_length=4,
    temperature=1.0,
    samples=2,
    batch=8,
    compact=False,
    prompt_lengths=(4,),
    seed=0,
)
PROBLEMS = ([{'numbers': [1, 2, 3], 'target': 6, 'index': 0}], [])
FIGURES = {
    'report': {'accuracy': 1 / 3, 'reward': 0.1, 'accuracy_by_length': {'4': 1 / 3}},
    'validation': {'accuracy': 0.1 + 0.2, 'reward': 0.0},
}


def identity(model=MODEL, variables=1.0, task=None, tokenizer=TOKENIZER, **others):
    return identity_of(
        make_policy(model, tokenizer),
        {'params': {'w': jnp.float32(variables)}},
        task or tasks.get('countdown'),
        tokenizer,
        others.get('evaluation', EVALUATION),
        others.get('problems', PROBLEMS),
        others.get('mesh', mesh_of()),
    )


def measured(base, of) -> tuple[dict, int]:
    """The figures of a base policy, and how often they were measured."""
    calls = []

    def measure():
        calls.append(0)
        return FIGURES

    return base_figures(base, of, measure), len(calls)


def test_figures_are_measured_once_and_come_back_to_the_last_bit(tmp_path):
    assert measured(tmp_path / 'base', identity()) == (FIGURES, 1)
    assert measured(tmp_path / 'base', identity()) == (FIGURES, 0)
    # Beside the policy: a file in its directory would change what the policy is.
    assert [path.name for path in tmp_path.iterdir()] == [f'base{SUFFIX}']


@pytest.mark.parametrize(
    'change',
    [
        {'variables': np.nextafter(np.float32(1), np.float32(2))},
        {'model': dataclasses.replace(MODEL, attention='folded')},
        {'model': dataclasses.replace(MODEL, lora=LoRA(rank=2, alpha=1.0))},
        {'task': tasks.get('countdown', rules='mended')},
        {'task': tasks.get('countdown', 'published_eval')},
        {'task': tasks.get('gsm8k', 'published_eval')},
        {'tokenizer': WordTokenizer(['2', '1', '+'])},
        {'evaluation': dataclasses.replace(EVALUATION, samples=3)},
        {'evaluation': dataclasses.replace(EVALUATION, seed=1)},
        {
            'evaluation': dataclasses.replace(
                EVALUATION, decodings=(dataclasses.replace(DECODING, commit='entropy'),)
            )
        },
        {'problems': ([PROBLEMS[0][0] | {'target': 5}], [])},
        {'problems': ([], PROBLEMS[0])},
        {'mesh': mesh_of(2, 1, 1)},
    ],
)
def test_figures_of_anything_else_are_not_believed(tmp_path, change):
    measured(tmp_path / 'base', identity())
    assert measured(tmp_path / 'base', identity(**change)) == (FIGURES, 1)


@pytest.mark.parametrize('changed', ['package_digest', '_processor'])
def test_figures_of_other_code_or_another_processor_are_not_believed(
    tmp_path, monkeypatch, changed
):
    measured(tmp_path / 'base', identity())
    monkeypatch.setattr(module, changed, lambda: 'another')
    assert measured(tmp_path / 'base', identity()) == (FIGURES, 1)


def _set(name, value):
    def damage(file):
        content = json.loads(file.read_text())
        content[name] = value(content[name]) if callable(value) else value
        file.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    'damage',
    [
        lambda file: file.write_text(file.read_text()[:-40]),
        lambda file: file.write_text(''),
        lambda file: file.write_text('[]'),
        lambda file: file.write_bytes(b'\xff' * 100),
        _set('figures', lambda figures: figures | {'report': {'accuracy': 1.0}}),
        _set('identity', lambda identity: identity | {'parameters': 'other'}),
        _set('digest', 'a' * 64),
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(tmp_path, damage):
    measured(tmp_path / 'base', identity())
    (file,) = (tmp_path / f'base{SUFFIX}').iterdir()
    damage(file)
    assert measured(tmp_path / 'base', identity()) == (FIGURES, 1)
    assert measured(tmp_path / 'base', identity()) == (FIGURES, 0)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / f'base{SUFFIX}').write_text('a file in the place of the folder')
    assert measured(tmp_path / 'base', identity()) == (FIGURES, 1)


def test_figures_of_a_task_of_the_user_are_not_kept(tmp_path):
    """Its file may import another one, whose changes nobody would notice."""
    own = SimpleNamespace(defining_files=lambda: {'task.py': tmp_path / 'task.py'})
    assert identity(task=own) is None
    assert measured(tmp_path / 'base', None) == (FIGURES, 1)
    assert not list(tmp_path.iterdir())
