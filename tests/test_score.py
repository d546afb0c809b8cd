"""The score command: totals, both layouts of a file, errors of one line for wrong input."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from spg_jax import score
from spg_jax.tasks import judge
from tests import forks
from tests.processes import REPOSITORY, finish, start_module
from tests.processes import run as run_command

FIXTURES = Path(__file__).parent / 'tasks'
COUNTDOWN = FIXTURES / 'countdown_completions.jsonl'
GSM8K = FIXTURES / 'gsm8k_completions.jsonl'
MATH500 = FIXTURES / 'math500_completions.jsonl'
SUDOKU = FIXTURES / 'sudoku_completions.jsonl'


def run(*arguments):
    """Runs the command; returns (exit code, last line of standard output, standard error)."""
    code, out, error = finish(start_module('spg_jax.score', *map(str, arguments)))
    return code, (out.splitlines() or [''])[-1], error


def test_countdown_file():
    code, last, error = run('--task=countdown', COUNTDOWN)
    cases = [json.loads(line) for line in COUNTDOWN.read_text().splitlines()]
    right = sum(case['score'] for case in cases)
    assert (code, error) == (0, '')
    assert json.loads(last) == {
        'task': 'countdown',
        'accuracy': right / len(cases),
        'correct': right,
        'total': len(cases),
        'files': [str(COUNTDOWN)],
        'scorer': 'published',
        'card': None,
    }


def test_sudoku_pools_cells_over_files(tmp_path):
    """With files of 8 and 12 empty cells, the mean of the two shares would be another number."""
    first, second = tmp_path / 'first.jsonl', tmp_path / 'second.jsonl'
    truth = '1342423124133124'
    record = {
        'question': '0040423100030104',
        'ground_truth': truth,
        'completion': f'<answer>{truth}</answer>',
    }
    first.write_text(json.dumps(record) + '\n\n')
    record |= {'question': '0000420000030004', 'completion': '<answer>1300</answer>'}
    second.write_text(json.dumps(record))
    figures = score.score('sudoku', [str(first), str(second)])
    assert (figures['correct'], figures['total'], figures['accuracy']) == (10, 20, 0.5)
    assert figures['grid_accuracy'] == 0.5 and figures['files'] == [str(first), str(second)]


def test_the_published_layout_gives_the_same(tmp_path):
    path = tmp_path / 'generations.json'
    cases = [json.loads(line) for line in COUNTDOWN.read_text().splitlines()]
    generations = [
        {
            'question': case['question'],
            'ground_truth': case['ground_truth'],
            'generations': case['completion'],
        }
        for case in cases
    ]
    path.write_text(json.dumps({'generations': generations, 'metrics': {}}, indent=2))
    assert score.score('countdown', [str(path)])['correct'] == sum(case['score'] for case in cases)


def test_another_judge_needs_its_package(monkeypatch):
    monkeypatch.setattr(judge.importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(
        ValueError, match=r"needs the package math-verify; pip install -e '.\[math\]'"
    ):
        score.score('math500', [str(MATH500)], 'math-verify')


def test_another_judge_is_named_and_cannot_hang(tmp_path, monkeypatch):
    """A stand-in for the package agrees with the text 'right' and never returns from 'hang'."""
    (tmp_path / 'math_verify.py').write_text(
        'import time\n'
        'def parse(text, **_): return text\n'
        'def verify(gold, text, **_):\n'
        '    while text == "hang": time.sleep(1)\n'
        '    if text == "raise": raise KeyError(text)\n'
        '    if text == "die": raise SystemExit\n'
        '    return gold == "$4$" and text == "right"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(judge, 'TIMEOUT', 4.0)
    path = tmp_path / 'file.jsonl'
    record = {'question': '', 'ground_truth': '4'}
    texts = ['right', 'hang', 'right', 'raise', 'die', 'right', 'wrong']
    path.write_text('\n'.join(json.dumps(record | {'completion': text}) for text in texts))
    judge._judge.cache_clear()
    figures = score.score('math500', [str(path)], 'math-verify')
    assert (figures['correct'], figures['total']) == (3, 7)
    assert figures['scorer'] == 'math-verify'
    judge._judge.cache_clear()


@pytest.mark.parametrize('path', [COUNTDOWN, GSM8K, MATH500, SUDOKU], ids=lambda path: path.stem)
def test_verify_agrees(path):
    result = score.verify(str(path))
    assert result['disagreements'] == 0
    assert result['checked'] == len(path.read_text().splitlines()) >= 20


def test_verify_shows_disagreements_and_skipped_tasks(tmp_path):
    path = tmp_path / 'verdicts.jsonl'
    cases = [json.loads(line) for line in COUNTDOWN.read_text().splitlines()]
    cases[1]['score'] = not cases[1]['score']
    path.write_text('\n'.join(json.dumps(case) for case in [*cases, {'task': 'chess'}]))
    code, out, _ = finish(start_module('spg_jax.score', '--verify', str(path)))
    lines = out.splitlines()
    assert code == 1
    assert lines[0] == f'{path}:2: countdown: scored True here, recorded as False'
    assert lines[1].startswith('task chess: 1 skipped, because it has no scorer here')
    assert json.loads(lines[2])['disagreements'] == 1


GOOD = '{"question": "", "ground_truth": [[2, 4, 3], 5], "completion": "2*4-3"}\n'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'the file is empty'),
        ('\n \n', 'the file is empty'),
        (GOOD + 'nonsense', ":2: found 'nonsense', expected JSON"),
        (GOOD + '[1]', ':2: found [1], expected a JSON object'),
        (GOOD + '{"question": ""}', ':2: found '),
        (GOOD + GOOD.replace('[2, 4, 3]', '[]'), ':2: found ground_truth'),
        (GOOD + GOOD.replace('[2, 4, 3]', '[true, 4, 3]'), ':2: found ground_truth'),
        (GOOD + GOOD.replace('"2*4-3"', '7'), ':2: completion is 7, expected text'),
        (GOOD + '[' * 100_000, ':2: found '),
        (GOOD + '{"a": ' + '9' * 10_000 + '}', ':2: found '),
        ('{"generations": []}', 'generations is [], expected a list'),
        ('{"generations": [7]}', 'generations[0]: found 7, expected question'),
        (b'\xff\xfe', 'byte 0 is not UTF-8'),
        (None, 'cannot be read (No such file or directory)'),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / 'file.jsonl'
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        score.score('countdown', [str(path)])
    shown = str(error.value)
    assert shown.startswith(str(path)) and message in shown
    assert '\n' not in shown and len(shown) < 400


def test_a_sudoku_without_a_puzzle_is_a_wrong_line(tmp_path):
    path = tmp_path / 'file.jsonl'
    path.write_text('{"question": "123", "ground_truth": "1342423124133124", "completion": ""}')
    with pytest.raises(
        ValueError, match=":1: found question '123'.*expected a puzzle of 16 digits"
    ):
        score.score('sudoku', [str(path)])


def test_a_run_that_has_not_ended_holds_no_completions_yet(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='holds no completions yet.* again to go on'):
        score.score('countdown', [str(tmp_path)])


WRONG = [
    (['--task=countdown', 'nowhere.jsonl'], 'nowhere.jsonl: cannot be read'),
    (
        ['--task=chess', COUNTDOWN],
        "task is 'chess'; use one of countdown, gsm8k, math500, sudoku",
    ),
    (['--task=countdown'], 'expected RUN..., or --task=NAME FILE'),
    ([COUNTDOWN], 'has no card, which would name its task; add --task=NAME'),
    (['--task=sudoku', '--verify', SUDOKU], 'expected RUN..., or --task=NAME FILE'),
    (['--task=sudoku', COUNTDOWN], 'found question'),
    (['--task=sudoku', '--judge=math-verify', SUDOKU], '--task=math500 and gsm8k, not sudoku'),
    (['--task=countdown', COUNTDOWN, COUNTDOWN], 'the same file as'),
    (['task=countdown', COUNTDOWN], 'did you mean --task=countdown?'),
    (['--task=countdown', '--fields=answer:x', COUNTDOWN], '--fields is'),
    (['--tusk=countdown', COUNTDOWN], "Unknown command line flag 'tusk'"),
    (['--task=countdown', '--rules=new', COUNTDOWN], 'flag --rules=new'),
    (
        ['--task=math500', '--judge=math-verify', '--rules=mended', MATH500],
        'found --judge=math-verify and --rules=mended, each of which names a scorer; give one',
    ),
    (
        ['--task=math500', '--judge=published', '--rules=mended', MATH500],
        'found --judge=published and --rules=mended, each of which names a scorer; give one',
    ),
    (['--verify', SUDOKU, '--judge=math-verify'], 'expected RUN..., or --task=NAME'),
]


@pytest.fixture(scope='module')
def refusals():
    """What every wrong command leaves, by its place in WRONG."""
    commands = [
        ('spg_jax.score', REPOSITORY, [str(argument) for argument in arguments])
        for arguments, _ in WRONG
    ]
    return forks.run_all(commands)


@pytest.mark.parametrize('number', range(len(WRONG)), ids=[message for _, message in WRONG])
def test_a_wrong_command_is_one_line_and_exit_1(refusals, number):
    code, out, error = refusals[number]
    message = WRONG[number][1]
    assert (code, out) == (1, '')
    assert message in error and error.count('\n') == 1 and 'Traceback' not in error


RECORDS = [
    {'question': 'q', 'ground_truth': 18, 'completion': r'\boxed{18}'},
    {'question': 'q, "too"', 'ground_truth': '2,125', 'completion': 'so\n\\boxed{2,125}'},
]


def as_table(delimiter):
    def quoted(value):
        return '"' + str(value).replace('"', '""') + '"'

    rows = [list(RECORDS[0]), *(record.values() for record in RECORDS)]
    return '\n'.join(delimiter.join(map(quoted, row)) for row in rows)


@pytest.mark.parametrize(
    'text',
    [
        '\n'.join(map(json.dumps, RECORDS)),
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=1),
        json.dumps({'metrics': {}, 'generations': RECORDS}),
        as_table(','),
        as_table(';'),
        '\ufeff' + as_table('\t'),
        '\ufeff' + '\r\n'.join(map(json.dumps, RECORDS)),
    ],
    ids=['lines', 'list', 'pretty list', 'document', 'CSV', 'semicolons', 'BOM, tabs', 'BOM, CRLF'],
)
def test_every_form_of_a_file(tmp_path, text):
    path = tmp_path / 'file'
    path.write_text(text, encoding='utf-8')
    for rules, correct in (('released', 1), ('mended', 2)):
        figures = score.score('gsm8k', [str(path)], rules=rules)
        assert (figures['correct'], figures['total']) == (correct, 2)
        assert figures['scorer'] == ('mended' if rules == 'mended' else 'published')


def test_own_keys(tmp_path):
    path = tmp_path / 'file.jsonl'
    record = {'prompt': 'q', 'reward': {'truth': [18]}, 'output': r'\boxed{18}', 'completion': ''}
    path.write_text(json.dumps(record))
    fields = 'question:prompt,ground_truth:reward.truth,completion:output'
    assert score.score('gsm8k', [str(path)], fields=fields)['correct'] == 1
    with pytest.raises(ValueError, match='file.jsonl:1: found .*, expected question, ground_truth'):
        score.score('gsm8k', [str(path)])


def test_verify_drops_a_byte_order_mark(tmp_path):
    """Fault F63."""
    path = tmp_path / 'verdicts.jsonl'
    path.write_text('\ufeff' + COUNTDOWN.read_text(), encoding='utf-8')
    assert score.verify(str(path))['checked'] == len(COUNTDOWN.read_text().splitlines())


def test_a_file_is_given_once_by_whatever_path(tmp_path):
    link, copy = tmp_path / 'link', tmp_path / 'copy'
    link.symlink_to(COUNTDOWN)
    copy.write_bytes(COUNTDOWN.read_bytes())
    with pytest.raises(ValueError, match='link: the same file as .*countdown_completions.jsonl'):
        score.score('countdown', [str(COUNTDOWN), str(link)])
    single = score.score('countdown', [str(COUNTDOWN)])
    assert score.score('countdown', [str(COUNTDOWN), str(copy)])['total'] == 2 * single['total']


def test_flags_may_stand_after_files():
    orders = ([str(COUNTDOWN), '--task=countdown'], ['--task=countdown', str(COUNTDOWN)])
    after, before = forks.run_all([('spg_jax.score', REPOSITORY, order) for order in orders])
    assert after == before and after.code == 0 and after.out


@pytest.mark.parametrize('arguments', [['--task=countdown', COUNTDOWN], ['--verify', COUNTDOWN]])
def test_a_result_that_cannot_be_written_is_one_line(arguments):
    words = shlex.join([sys.executable, '-m', 'spg_jax.score', *map(str, arguments)])
    done = run_command(['bash', '-c', f'{words} > /dev/full'])
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'standard output cannot be written (No space left on device)' in done.stderr


def test_a_reader_that_has_gone_is_one_line():
    command = f'{sys.executable} -m spg_jax.score --task=countdown {COUNTDOWN}'
    script = f'set -o pipefail; {command} | true'
    done = run_command(['bash', '-c', script])
    # `true` may end before or after the result is written.
    assert 'Traceback' not in done.stderr and done.stderr.count('\n') <= 1


def test_importing_the_module_defines_no_flags():
    code = (
        'from absl import flags, app, logging; before = set(flags.FLAGS); import spg_jax.score; '
        'print(sorted(set(flags.FLAGS) - before))'
    )
    done = run_command([sys.executable, '-c', code])
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize(
    ('task', 'record'),
    [
        ('countdown', {'ground_truth': [[30, 100], 10**400]}),
        ('countdown', {'ground_truth': [[30, 10**400], 130]}),
        ('gsm8k', {'ground_truth': 10**400}),
        ('gsm8k', {'ground_truth': ''}),
        ('math500', {'ground_truth': 10**400}),
        ('math500', {'ground_truth': ' '}),
        ('sudoku', {'ground_truth': 10**400}),
        ('sudoku', {'question': '1342423124133124', 'ground_truth': '1342423124133124'}),
    ],
)
def test_references_that_ask_for_nothing_or_too_much_are_refused(tmp_path, task, record):
    path = tmp_path / 'file.jsonl'
    path.write_text(json.dumps({'question': 'q', 'completion': r'\boxed{}'} | record))
    with pytest.raises(ValueError, match='file.jsonl:1: found .*ground_truth') as error:
        score.score(task, [str(path)])
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
