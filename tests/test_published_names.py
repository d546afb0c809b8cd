"""A random checkpoint with every tensor name of LLaDA-8B, shapes scaled down, through the whole
path on word problems: import, one SPG update, adapters out to PEFT, and in again."""

import itertools
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from configs import countdown
from spg_jax import tasks
from spg_jax.export import export
from spg_jax.process.interruption import Interruption
from spg_jax.runs import plots
from spg_jax.train import train
from tests import adapted
from tests.meshes import mesh_of
from tests.published import END, MASK, save_tokenizer

REAL = Path(__file__).parent / 'reference' / 'llada_8b'
D, F, V, LAYERS = 32, 96, 256, 32
SHAPES = {
    'wte': (V, D),
    'transformer.ff_out': (V, D),
    'ln_f': (D,),
    'attn_norm': (D,),
    'ff_norm': (D,),
    'q_proj': (D, D),
    'k_proj': (D, D),
    'v_proj': (D, D),
    'attn_out': (D, D),
    'ff_proj': (F, D),
    'up_proj': (F, D),
    'ff_out': (D, F),
}
PROBLEMS = [
    {'question': f'{i} + 1?', 'answer': f'{i + 1}', 'solution': '', 'index': i} for i in range(4)
]
ALPHA, RANK = 8.0, 4


def shape_of(name: str) -> tuple[int, ...]:
    """'model.transformer.blocks.3.ff_out.weight' and 'model.transformer.ff_out.weight' differ."""
    *_, module, _ = name.split('.')
    return SHAPES[module if '.blocks.' in name or module != 'ff_out' else 'transformer.ff_out']


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Four shards of bfloat16 in an order of their own, an index, config.json and a tokenizer."""
    directory = tmp_path_factory.mktemp('names')
    names = (REAL / 'tensors.txt').read_text().split()
    rng = np.random.default_rng(0)
    rng.shuffle(names)
    weight_map = {}
    for number, part in enumerate(np.array_split(names, 4)):
        file = f'model-{number}.safetensors'
        tensors = {
            str(name): (
                1.0 * (len(shape_of(name)) == 1) + 0.1 * rng.standard_normal(shape_of(name))
            ).astype(ml_dtypes.bfloat16)
            for name in part
        }
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    config = json.loads((REAL / 'config.json').read_text())
    assert config['n_layers'] == LAYERS
    config |= dict(d_model=D, n_heads=4, n_kv_heads=4, mlp_hidden_size=F, torch_dtype='float32')
    config |= dict(vocab_size=V, embedding_size=V)
    config |= dict(mask_token_id=MASK, eos_token_id=END, pad_token_id=END)
    (directory / 'config.json').write_text(json.dumps(config))
    save_tokenizer(directory)
    return directory


def config_of(published: Path, wording: Path):
    config = countdown.get_config('tiny')
    config.task.update(name='gsm8k', format='published_train', prompt_template=str(wording))
    config.base.checkpoint = str(published)
    config.lora.update(rank=RANK, alpha=ALPHA, dropout=0.0)
    config.sampling.update(prompt_length=64, length=4, steps=2, block_length=2)
    config.evaluation.update(lengths=(4,), steps=(2,), block_length=2, samples=1, batch=4)
    config.rl.update(prompts=2, group_size=2, microbatch=4)
    config.corruption.draws = 2
    config.optimizer.learning_rate = 1e-2
    config.train.steps = 1
    return config


def merged_by_hand(published: Path, adapter: Path, out: Path) -> Path:
    """What PEFT's documentation says an adapter means: W + alpha / r B A, by published names."""
    weights, factors = {}, load_file(adapter / 'adapter_model.safetensors')
    for shard in published.glob('*.safetensors'):
        weights |= {name: x.astype(np.float32) for name, x in load_file(shard).items()}
    targets = {name.rsplit('.lora_', 1)[0] for name in factors}
    assert len(factors) == 2 * len(targets) == 2 * 7 * LAYERS
    for target in targets:
        a, b = (factors[f'{target}.lora_{which}.weight'] for which in 'AB')
        weights[f'{target.removeprefix("base_model.model.")}.weight'] += ALPHA / RANK * b @ a
    out.mkdir()
    save_file(weights, out / 'model.safetensors')
    (out / 'config.json').write_text((published / 'config.json').read_text())
    save_tokenizer(out)
    return out


@pytest.fixture(scope='module')
def untrained(published):
    return adapted.logits(published)


def test_a_task_trains_on_the_published_names_and_exports(
    published, untrained, tmp_path, monkeypatch
):
    """Evaluation is left out, because its programs would be compiled; tests/test_adapted_run.py
    has it."""
    task, count = tasks.TASKS['gsm8k'], itertools.count()
    reward = task.reward
    monkeypatch.setattr(task, 'source', lambda self, split, folder: PROBLEMS)
    # Later completions are worth more, so that groups have a signal; and the last policy is best.
    monkeypatch.setattr(task, 'reward', lambda *words: reward(*words) + 10.0 * next(count))
    adapted.skip_evaluation(monkeypatch)
    monkeypatch.setattr(plots, 'curves', lambda _: None)
    (tmp_path / 'wording.txt').write_text('{question}')
    config = config_of(published, tmp_path / 'wording.txt')
    with jax.set_mesh(mesh_of()), Interruption() as interruption:
        assert train(config, tmp_path / 'run', mesh_of(), interruption)
    export(tmp_path / 'run' / 'best', published, tmp_path / 'peft', whole=False)

    trained = adapted.logits(tmp_path / 'run' / 'best')
    assert np.abs(trained - untrained).max() > 1e-2
    assert_array_equal(adapted.logits(published, tmp_path / 'peft'), trained)
    by_hand = merged_by_hand(published, tmp_path / 'peft', tmp_path / 'merged')
    assert_allclose(adapted.logits(by_hand), trained, atol=1e-4)
