"""A published checkpoint asked and measured without a run, and the flags that name it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import countdown
from spg_jax import evaluate, generate, score
from spg_jax.assembly import assemble
from spg_jax.data import batches
from spg_jax.models import weights
from spg_jax.models.transformer import Transformer
from spg_jax.process import cli
from spg_jax.rl.collection import decode
from spg_jax.runs import policies
from spg_jax.runs.directory import chosen_policy, run_config
from tests.meshes import mesh_of
from tests.published import END, MASK, SIZE, TURN_END, asked, byte_pairs, save_checkpoint

QUESTION = 'Reach 26 with 3, 44 and 7.'


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp('published')
    save_checkpoint(directory)
    return directory


def short_answers(length=4):
    """Countdown as published, decoded one token a step from left to right."""
    config = countdown.get_config('tiny')
    config.task.format = 'published_train'
    config.sampling.prompt_length = 400
    config.evaluation.update(lengths=(length,), steps=(length,), block_length=1, samples=1)
    return config


def test_prompts_of_a_task_are_padded_on_the_left_and_end_with_the_prefill(published):
    task = assemble(short_answers()).evaluation_task
    examples = [
        {'numbers': [3, 44, 7], 'target': 26, 'index': 0},
        {'numbers': [10, 20, 30], 'target': 100, 'index': 5},
    ]
    tokenizer = policies.load_tokenizer(published)
    rows = [asked(byte_pairs(), task.prompt(one), '<reasoning>') for one in examples]
    length = max(map(len, rows)) + 2
    batch = batches.encode_prompts(task, tokenizer, examples, length)
    for row, tokens, valid in zip(rows, batch.prompt, batch.prompt_mask, strict=True):
        assert tokens.tolist() == [END] * (length - len(row)) + row
        assert valid.tolist() == [False] * (length - len(row)) + [True] * len(row)


def test_scorers_see_the_end_of_the_turn_and_rewards_do_not(published):
    tokenizer = policies.load_tokenizer(published)
    answer, rest = byte_pairs().encode_batch(['12', '34'], add_special_tokens=False)
    rows = np.array([[*answer.ids, TURN_END, *rest.ids, END, *rest.ids]])
    assert decode(tokenizer, rows) == ['1234']
    assert decode(tokenizer, rows, keep_specials=True) == ['12<|eot_id|>34<|endoftext|>']


def by_hand(published: Path, prompt: list[int], length: int) -> list[int]:
    """Greedy completion from left to right, unpadded, in a plain loop over the model."""
    config, _, params = weights.load_checkpoint(published)
    apply = jax.jit(Transformer(config).apply)
    tokens = [*prompt, *[MASK] * length]
    for place in range(len(prompt), len(tokens)):
        valid = jnp.ones((1, len(tokens)), bool)
        logits = apply({'params': params}, jnp.asarray([tokens]), valid)[0, place]
        tokens[place] = int(np.argmax(np.asarray(logits)[:SIZE]))
    return tokens[len(prompt) :]


def complete_prompt(monkeypatch: pytest.MonkeyPatch, published: Path, prompt: str) -> None:
    """The function behind `spg_jax.generate`, for which prompts of training have at most 20 tokens.

    It runs in this process, because tests/test_train.py has the command in a process of its own.
    """
    config = short_answers()
    config.sampling.prompt_length = 20
    policy_flags = dict(workdir='', checkpoint=str(published), adapter='', config=config)
    own_flags = dict(prompt=prompt, prompts='', temperature=0.0, seed=0, trace=False)
    monkeypatch.setattr(generate, 'FLAGS', SimpleNamespace(**policy_flags, **own_flags))
    monkeypatch.setattr(cli, 'chosen_mesh', lambda _: mesh_of())
    monkeypatch.setattr(cli, 'compile_cache', lambda: None)  # The tests have a cache already.
    generate.main([])


def evaluate_on(monkeypatch: pytest.MonkeyPatch, published: Path, data: Path, out: Path) -> None:
    """The function behind `spg_jax.evaluate`, on a checkpoint that no run has made."""
    config = short_answers()
    config.sampling.prompt_length, config.evaluation.batch = 20, 2
    policy_flags = dict(workdir='', checkpoint=str(published), adapter='', config=config)
    own_flags = dict(data=str(data), split='test', samples=3, out=str(out))
    monkeypatch.setattr(evaluate, 'FLAGS', SimpleNamespace(**policy_flags, **own_flags))
    monkeypatch.setattr(cli, 'chosen_mesh', lambda _: mesh_of())
    monkeypatch.setattr(cli, 'compile_cache', lambda: None)
    evaluate.main([])


def test_a_published_checkpoint_is_asked_without_a_run(published, monkeypatch, capsys):
    complete_prompt(monkeypatch, published, QUESTION)
    text = capsys.readouterr().out
    backend = byte_pairs()
    prompt = asked(backend, QUESTION, '<reasoning>')
    assert len(prompt) > 20  # longer than those of training, and asked whole
    expected = by_hand(published, prompt, 4)
    if END in expected:
        expected = expected[: expected.index(END)]
    assert text.rstrip('\n') == backend.decode(expected).rstrip('\n')


def test_a_published_checkpoint_is_measured_without_a_run(published, tmp_path, monkeypatch, capsys):
    problems = tmp_path / 'two.jsonl'
    problems.write_text(
        '{"input": "30,100,93", "output": "23"}\n{"input": "1,2,3", "output": "6"}\n'
    )
    evaluate_on(monkeypatch, published, problems, tmp_path / 'out')
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    wanted = {'task': 'countdown', 'total': 2, 'correct': 0, 'scorer': 'published', 'length': 4}
    assert found | wanted == found and 'pass_at_3' in found
    again = score.score(None, [f'{tmp_path}/out'])
    assert again | {name: found[name] for name in ('accuracy', 'correct', 'total', 'card')} == again
    assert (again['card']['checkpoint'], again['card']['count']) == ('none', 2)


@pytest.mark.parametrize(
    ('workdir', 'checkpoint', 'adapter', 'configured', 'said'),
    [
        ('', '', '', False, 'neither of --workdir and --checkpoint given; use --workdir=DIR'),
        ('a', 'b', '', True, 'both of --workdir and --checkpoint given; use --workdir=DIR'),
        ('a', '', '', True, '--config given with --workdir, which has its own'),
        ('a', '', 'c', False, '--adapter given with --workdir, which has its own'),
        ('', 'b', '', False, r'--checkpoint given without --config; add --config=configs/TASK'),
        (
            'PUBLISHED',
            '',
            '',
            False,
            'config.json is not the configuration of a run; .*--checkpoint=',
        ),
    ],
)
def test_flags_that_name_no_policy(published, workdir, checkpoint, adapter, configured, said):
    config = short_answers() if configured else None
    with pytest.raises(ValueError, match=said) as error:
        chosen_policy(workdir.replace('PUBLISHED', str(published)), checkpoint, adapter, config)
    assert '\n' not in str(error.value)


def test_a_checkpoint_is_used_with_the_configuration_given(published):
    config = short_answers()
    assert chosen_policy('', str(published), '', config) == (config, published, None)
    config.evaluation.block_length = 3
    with pytest.raises(ValueError, match=re.escape('evaluation.block_length 3')):
        chosen_policy('', str(published), '', config)


def test_settings_newer_than_a_run_have_their_defaults(tmp_path):
    saved = short_answers().to_dict()
    del saved['data'], saved['evaluation']['samples']
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    found = run_config(tmp_path)
    assert found.data.long_prompts == 'drop' and found.evaluation.samples == 8
    assert found.task.format == 'published_train'
