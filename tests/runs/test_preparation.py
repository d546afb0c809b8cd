"""What a run is made of that its settings do not name: problems on disk, and a base made here."""

import json
from types import SimpleNamespace

import pytest

from spg_jax import tasks
from spg_jax.runs import policies, preparation
from spg_jax.runs.preparation import origins_of

pytestmark = pytest.mark.fast


class Letters:
    """A tokenizer with an id for each character."""

    def encode_prompt(self, prompt, prefill=''):
        return list(map(ord, prompt + prefill))

    def identity(self):
        return 'letters'


def digest_of_problems(folder, numbers):
    folder.mkdir(exist_ok=True)
    for split in ('train', 'test'):
        records = [
            {'question': f'Is it {split} {n}?', 'answer': f'#### {n}'} for n in range(numbers)
        ]
        (folder / f'gsm8k_{split}.jsonl').write_text('\n'.join(map(json.dumps, records)))
    config = SimpleNamespace(
        task=SimpleNamespace(data_dir=folder),
        sampling=SimpleNamespace(prompt_length=10_000),
        data=SimpleNamespace(long_prompts='error'),
        evaluation=SimpleNamespace(problems=2),
    )
    parts = SimpleNamespace(
        task=tasks.get('gsm8k', 'published_train'), batching=SimpleNamespace(group_size=1)
    )
    return preparation.read_problems(config, parts, Letters()).digest


def test_other_problems_have_another_digest_wherever_they_lie(tmp_path):
    first = digest_of_problems(tmp_path / 'a', 20)
    assert digest_of_problems(tmp_path / 'b', 20) == first
    assert digest_of_problems(tmp_path / 'a', 21) != first


@pytest.mark.parametrize(
    ('lora', 'digest', 'expected'),
    [
        (True, 'd', {'problems': 'p', 'base_policy': 'd'}),
        (True, '', {'problems': 'p'}),  # a published checkpoint
        (None, 'd', {'problems': 'p'}),  # every parameter is in the checkpoint
    ],
)
def test_a_base_policy_counts_where_it_is_read_again(monkeypatch, lora, digest, expected):
    monkeypatch.setattr(policies, 'digest_of', lambda base: digest)
    problems = SimpleNamespace(digest='p')
    assert origins_of(SimpleNamespace(lora=lora), problems, 'base') == expected
