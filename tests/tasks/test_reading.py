"""Files as people have them: every usual form gives the same problems, and errors name the file."""

import builtins
import json
import os
import threading

import pytest

from spg_jax import tasks
from spg_jax.tasks import reading

BOM = '\ufeff'
SUDOKU = ('0040423100030104', '1342423124133124')


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(name, path, fields=''):
    """Returns the problems of a file without their indices."""
    task = tasks.get(name, 'published_eval', fields=fields)
    examples = task.read_published(path)
    assert [example['index'] for example in examples] == list(range(len(examples)))
    return [{k: v for k, v in example.items() if k != 'index'} for example in examples]


GSM8K = [
    {'question': 'What, then, is "it"?\nSay.', 'answer': '9 * 2\n#### 18'},
    {'question': 'How; many?', 'answer': '#### 2,125'},
]
READ = [
    {'question': 'What, then, is "it"?\nSay.', 'answer': '18', 'solution': '9 * 2'},
    {'question': 'How; many?', 'answer': '2,125', 'solution': ''},
]


def table(delimiter):
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    rows = [['question', 'answer'], *([r['question'], r['answer']] for r in GSM8K)]
    return '\n'.join(delimiter.join(map(quoted, row)) for row in rows) + '\n'


FORMS = {
    'lines.jsonl': '\n'.join(map(json.dumps, GSM8K)),
    'list.json': json.dumps(GSM8K),
    'list of lines.json': json.dumps(GSM8K, indent=2),
    'table.csv': table(','),
    'german table.csv': table(';'),
    'table.tsv': table('\t'),
    'table without a name': table(','),
}


@pytest.mark.parametrize('bom', ['', BOM], ids=['plain', 'BOM'])
@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['LF', 'CRLF'])
@pytest.mark.parametrize('name', FORMS)
def test_every_form_gives_the_same_problems(tmp_path, name, end, bom):
    path = written(tmp_path / name, bom + FORMS[name].replace('\n', end))
    assert problems('gsm8k', path) == READ


def test_a_table_without_quotes(tmp_path):
    path = written(tmp_path / 'a.csv', 'answer;question\n18;9 * 2?\n\n7;14 / 2, then?\n')
    assert problems('gsm8k', path) == [
        {'question': '9 * 2?', 'answer': '18', 'solution': ''},
        {'question': '14 / 2, then?', 'answer': '7', 'solution': ''},
    ]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / 'a.parquet')
    assert problems('gsm8k', tmp_path / 'a.parquet') == READ
    rows = [{'nums': [30, 100, 93], 'target': 23, 'data': {'q': 'x'}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'b.parquet')
    assert problems('countdown', tmp_path / 'b.parquet') == [
        {'numbers': [30, 100, 93], 'target': 23}
    ]
    whole = (tmp_path / 'b.parquet').read_bytes()
    for contents in (whole[:-20], b'PAR1' + b'x' * 100):
        path = written(tmp_path / 'cut.parquet', contents)
        with pytest.raises(ValueError, match='cut.parquet: not a whole Parquet file') as error:
            problems('countdown', path)
        assert '\n' not in str(error.value)


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(reading.importlib.util, 'find_spec', lambda _: None)
    path = written(tmp_path / 'a.parquet', b'PAR1 and so on')
    with pytest.raises(ValueError, match='a.parquet: .* pyarrow; pip install pyarrow'):
        problems('gsm8k', path)


@pytest.mark.parametrize('name', ['lines.jsonl', 'list.json', 'table.csv'])
def test_a_pipe_is_read_once(tmp_path, name):
    path = tmp_path / 'pipe'
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text(FORMS[name]))
    writer.start()
    assert problems('gsm8k', path) == READ
    writer.join()


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    path, opened, real = written(tmp_path / 'a.jsonl', FORMS['lines.jsonl']), [], builtins.open

    def counting(file, *arguments, **options):
        opened.append(str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr('io.open', counting)
    problems('gsm8k', path)
    assert opened.count(str(path)) == 1


@pytest.mark.parametrize(
    ('name', 'fields', 'record', 'problem'),
    [
        (
            'gsm8k',
            'question:problem,answer:solution',
            {'problem': 'q', 'solution': 'It is.\n#### 18'},
            {'question': 'q', 'answer': '18', 'solution': 'It is.'},
        ),
        (
            'gsm8k',
            'answer:label',
            {'question': 'q', 'label': 18, 'answer': 'seven'},
            {'question': 'q', 'answer': '18', 'solution': ''},
        ),
        (
            'gsm8k',
            ' question : a.b , answer : c.d ',
            {'a': {'b': 'q'}, 'c': {'d': ['18']}},
            {'question': 'q', 'answer': '18', 'solution': ''},
        ),
        (
            'math500',
            'problem:prompt,answer:target,solution:cot',
            {'prompt': 'q', 'target': 0.5, 'cot': 'It is.'},
            {'question': 'q', 'answer': '0.5', 'solution': 'It is.'},
        ),
        (
            'math500',
            '',
            {'question': 'q', 'answer': [r'\frac12']},
            {'question': 'q', 'answer': r'\frac12', 'solution': ''},
        ),
        (
            'countdown',
            '',
            {'nums': [44, 19, 35], 'target': 98},
            {'numbers': [44, 19, 35], 'target': 98},
        ),
        (
            'countdown',
            'numbers:n,target:t',
            {'n': '44 19 35', 't': '98', 'nums': [1]},
            {'numbers': [44, 19, 35], 'target': 98},
        ),
        (
            'countdown',
            'input:reward.ground_truth.numbers,output:reward.ground_truth.target',
            {'reward': {'ground_truth': {'numbers': [44, 19], 'target': 63.0}}},
            {'numbers': [44, 19], 'target': 63},
        ),
        (
            'sudoku',
            'puzzle:quiz,solution:grid',
            {'quiz': SUDOKU[0].replace('0', '.'), 'grid': SUDOKU[1]},
            dict(zip(('puzzle', 'solution'), SUDOKU, strict=True)),
        ),
        (
            'sudoku',
            '',
            {
                'puzzle': [[0, 0, 4, 0], [4, 2, 3, 1], [0, 0, 0, 3], [0, 1, 0, 4]],
                'solution': '1342\n4231\n2413\n3124',
            },
            dict(zip(('puzzle', 'solution'), SUDOKU, strict=True)),
        ),
    ],
)
def test_own_keys(tmp_path, name, fields, record, problem):
    path = written(tmp_path / 'a.jsonl', json.dumps(record))
    assert problems(name, path, fields) == [problem]
    path = written(tmp_path / 'a.json', json.dumps([record, record]))
    assert problems(name, path, fields) == [problem, problem]


def test_a_misspelt_key_of_the_answer_is_no_box_of_the_solution(tmp_path):
    record = {'problem': 'q', 'label': '5', 'solution': r'\boxed{6}'}
    path = written(tmp_path / 'a.jsonl', json.dumps(record))
    with pytest.raises(ValueError, match='a.jsonl:1: found'):
        problems('math500', path, 'answer:lable')
    assert problems('math500', path, 'answer:label')[0]['answer'] == '5'


@pytest.mark.parametrize('fields', ['question', 'question:', ':q', 'goal:q', 'question=q'])
def test_wrong_own_keys(fields):
    with pytest.raises(ValueError, match='task.fields is .* use pairs such as question:KEY') as e:
        tasks.get('gsm8k', 'published_eval', fields=fields)
    assert '\n' not in str(e.value) and 'among question, answer' in str(e.value)


def test_sudoku_blanks_are_points_or_zeros(tmp_path):
    """The table starts with a byte order mark, as in fault F64."""
    puzzle, solution = SUDOKU
    rows = f'{puzzle.replace("0", ".")},{solution}\n{puzzle},{solution}\n'
    path = written(tmp_path / 'a.csv', f'{BOM}Puzzle,Solution\n{rows}')
    first, second = problems('sudoku', path)
    assert first == second == {'puzzle': puzzle, 'solution': solution}
    task = tasks.get('sudoku')
    for question in (puzzle, puzzle.replace('0', '.'), f'Sudoku puzzle: {puzzle}\n'):
        assert task.read_record(question, solution) == first


@pytest.mark.parametrize('blank', ['0', '.'])
def test_a_grid_of_nine_by_nine_is_refused_as_such(tmp_path, blank):
    puzzle, solution = f'53{blank * 2}7{blank * 76}', '534678912' * 9
    path = written(tmp_path / 'a.csv', f'Puzzle,Solution\n{puzzle},{solution}\n')
    with pytest.raises(ValueError, match='a.csv:2: .*a grid of 9 x 9, and this task has .* 4 x 4'):
        problems('sudoku', path)
    with pytest.raises(ValueError, match='a grid of 9 x 9, and this task has grids of 4 x 4'):
        tasks.get('sudoku').read_record(puzzle, solution)


@pytest.mark.parametrize(
    ('puzzle', 'solution'),
    [
        ('0' * 16, '0' * 16),
        (SUDOKU[1], SUDOKU[1]),
        (SUDOKU[0], '2' + SUDOKU[1][1:-1] + '1'),
        (SUDOKU[0], SUDOKU[0]),
        ('5' + SUDOKU[0][1:], '5' + SUDOKU[1][1:]),
        (SUDOKU[0], ''),
        (SUDOKU[0], None),
    ],
)
def test_a_sudoku_that_asks_for_nothing_or_agrees_with_nothing_is_refused(puzzle, solution):
    with pytest.raises(ValueError, match='expected a puzzle of 16 digits, some of them 0'):
        tasks.get('sudoku').read_record(puzzle, solution)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[1, 2]', r'a: found|a\[0\]: found 1, expected question, answer'),
        ('[]', 'a is \\[\\], expected a list of objects'),
        (f'{BOM}', 'a: the file is empty'),
        ('[{"question": "q"', 'a:1: found .*expected JSON'),
        ('question,reply\n1,2\n', "a:1: found 'question,reply', expected JSON"),
        (b'\xff\xfe{\x00', 'a: byte 0 is not UTF-8'),
        ('{"question": "q", "answer": ' + '1' * 5000 + '}', 'a:1: found .*expected JSON'),
    ],
)
def test_an_error_names_the_file(tmp_path, text, message):
    path = written(tmp_path / 'a', text)
    with pytest.raises(ValueError, match=message) as error:
        problems('gsm8k', path)
    assert str(error.value).startswith(str(path)) and '\n' not in str(error.value)


def test_a_template_loses_its_byte_order_mark(tmp_path):
    """Fault F65."""
    path = written(tmp_path / 'prompt.txt', f'{BOM}Make {{target}} from {{numbers}}.\r\nAnswer:')
    task = tasks.get('countdown', prompt_template=str(path))
    assert task.prompt({'numbers': [1, 2], 'target': 3}) == 'Make 3 from 2 1.\nAnswer:'


@pytest.mark.parametrize(
    ('truth', 'problem'),
    [
        ([[30, 100], 130], ([30, 100], 130)),
        ('[[30, 100], 130]', ([30, 100], 130)),
        ({'numbers': [30, 100], 'target': 130}, ([30, 100], 130)),
        ({'nums': [30, 100], 'target': '130'}, ([30, 100], 130)),
        ([['30', '100'], 130.0], ([30, 100], 130)),
        ([[30, 100], 10**400], None),
        ([[30, 10**400], 130], None),
        ([[30, 1e400], 130], None),
        ([[30, 100], True], None),
        ([[], 130], None),
        ([[30, 100]], None),
        ('30', None),
        ('[' * 100_000, None),
        ({}, None),
        (None, None),
        (float('nan'), None),
        ([[30, 100], float('nan')], None),
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, list) else None,
)
def test_countdown_records(truth, problem):
    task = tasks.get('countdown', 'published_eval')
    if problem is None:
        with pytest.raises(ValueError, match='found ground_truth .*, expected ') as error:
            task.read_record('q', truth)
        assert '\n' not in str(error.value) and len(str(error.value)) < 300
    else:
        assert task.read_record('q', truth) == {'numbers': problem[0], 'target': problem[1]}
