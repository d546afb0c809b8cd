"""Files of prompts for `spg_jax.generate`: which are read, and in which order they come back."""

import json

import jax
import numpy as np
import pytest

from spg_jax import generate, tasks
from spg_jax.data.tokenizers import word_tokenizer
from spg_jax.diffusion.sampling import Completion
from spg_jax.sharding import make_mesh

pytestmark = pytest.mark.fast

TASK = tasks.get('countdown')
PROMPTS = ['3 2 1 = 6 :', '100 93 30 = 23 :', '9 4 = 5 :']
PROBLEMS = [{'input': '30,100,93', 'output': '23'}, {'input': '1,2,3', 'output': '6'}]


@pytest.mark.parametrize(
    'text',
    [
        '\n'.join(PROMPTS),
        '\ufeff' + '\r\n\r\n'.join(PROMPTS) + '\r\n',
        '\n'.join(json.dumps({'prompt': prompt}) for prompt in PROMPTS),
    ],
    ids=['text', 'BOM, blank lines', 'JSON lines'],
)
def test_prompts_are_read_from_every_form(tmp_path, text):
    (tmp_path / 'file').write_text(text, encoding='utf-8')
    requests = generate.read_requests(str(tmp_path / 'file'), TASK)
    assert [request.prompt for request in requests] == PROMPTS
    assert [request.line for request in requests] == [{'prompt': prompt} for prompt in PROMPTS]


def test_problems_come_with_what_a_scorer_reads(tmp_path):
    (tmp_path / 'file').write_text('\n'.join(map(json.dumps, PROBLEMS)))
    first, second = generate.read_requests(str(tmp_path / 'file'), TASK)
    assert (first.prompt, second.prompt) == ('100 93 30 = 23 :', '3 2 1 = 6 :')
    assert first.line['ground_truth'] == [[30, 100, 93], 23] and first.is_problem


@pytest.mark.parametrize(
    ('words', 'text'),
    [
        (['countdown'], 'input;output\n30 100 93;23\n'),
        (['countdown'], json.dumps(PROBLEMS, indent=1)),
        (['sudoku'], '\n"Puzzle"\t"Solution"\n0040423100030104\t1342423124133124\n'),
        (['math500', 'published_eval'], 'problem,answer\nWhat is 2 + 3?,5\n'),
    ],
)
def test_the_contents_tell_that_a_file_holds_problems(tmp_path, words, text):
    (tmp_path / 'file').write_text(text)
    requests = generate.read_requests(str(tmp_path / 'file'), tasks.get(*words))
    assert requests and all(request.is_problem for request in requests)


def test_parquet_needs_no_suffix(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ('pyarrow', 'pyarrow.parquet'))
    parquet.write_table(pyarrow.Table.from_pylist(PROBLEMS), tmp_path / 'file')
    requests = generate.read_requests(str(tmp_path / 'file'), TASK)
    assert [request.prompt for request in requests] == ['100 93 30 = 23 :', '3 2 1 = 6 :']


@pytest.mark.parametrize('prompt', ['[INST] Add 2 and 3. [/INST]', '[1, 2]', '[ 3 2 1 = 6 :'])
def test_a_prompt_may_begin_with_a_bracket(tmp_path, prompt):
    (tmp_path / 'file').write_text(f'{prompt}\n1 = 1 :\n')
    requests = generate.read_requests(str(tmp_path / 'file'), TASK)
    assert [request.prompt for request in requests] == [prompt, '1 = 1 :']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"prompt": "1 = 1 :"}\nnonsense', ":2: found 'nonsense', expected JSON"),
        ('{"prompt": "1 = 1 :"}\n\n{"prompt": " "}', ':3: found '),
        ('{"prompt": "1 = 1 :"}\n{"prompt": 5}', ':2: found '),
        ('{"prompt": "1 = 1 :"}\n[1]', ':2: found [1], expected'),
        ('{"input": "30,100,93", "output": "x"}', ':1: found '),
        ('[\n {"input": "30,100,93", "output": "23"},\n', ":1: found '[', expected JSON"),
        ('input,output\n"30,100,93",x', ':2: found '),
        ('input,result\n"30,100,93",23', ":1: found 'input,result', expected JSON"),
        ('', 'the file is empty'),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, message):
    (tmp_path / 'file').write_text(text)
    with pytest.raises(ValueError) as error:
        generate.read_requests(str(tmp_path / 'file'), TASK)
    assert str(error.value).startswith(str(tmp_path / 'file')) and message in str(error.value)
    assert '\n' not in str(error.value)


def test_a_word_that_the_policy_does_not_know_is_named_by_its_line(tmp_path):
    (tmp_path / 'file').write_text('1 = 1 :\n\nhello = 1 :')
    requests = generate.read_requests(str(tmp_path / 'file'), TASK)
    with pytest.raises(ValueError, match='file:3: .*hello'):
        generate.encode_requests(requests, TASK, word_tokenizer(TASK))


def test_completions_do_not_depend_on_the_batch_and_keep_the_order():
    """The stand-in for a policy answers with the last word of the prompt and a word of its key."""
    tokenizer = word_tokenizer(TASK)
    mesh = make_mesh({'data': 2, 'fsdp': 1, 'tensor': 1}, jax.devices()[:2])
    requests = [
        generate.Request(str(number), f'{number} = 1 :', {'prompt': number}, is_problem=False)
        for number in range(7)
    ]
    encoded = generate.encode_requests(requests, TASK, tokenizer)

    def answer(prompt, valid, keys):
        number = jax.random.key_data(keys)[:, -1:] % 5 + 40
        tokens = jax.numpy.concatenate([prompt[:, -4:-3], number.astype('int32')], axis=1)
        return Completion(tokens, jax.numpy.zeros_like(tokens))

    def lines(batch):
        return list(
            generate.completed(
                answer, requests, encoded, TASK, tokenizer, mesh, batch=batch, buckets=(8,), seed=3
            )
        )

    whole = lines(100)
    assert [line['completion'].split()[0] for line in whole] == list(map(str, range(7)))
    assert len({line['completion'].split()[1] for line in whole}) > 1
    assert lines(1) == lines(3) == whole
    assert np.all([line['prompt'] == number for number, line in enumerate(whole)])
