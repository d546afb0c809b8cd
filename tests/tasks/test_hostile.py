"""Rewards and scores of hostile completions are finite numbers and take little time."""

import itertools
import math
import time

import pytest

from spg_jax import tasks
from spg_jax.tasks.task import RULES
from tests.processes import LINEAR_SECONDS

EXAMPLES = {
    'countdown': {'numbers': [9, 9, 9], 'target': 9},
    'gsm8k': {'question': '', 'answer': '7', 'solution': ''},
    'math500': {'question': '', 'answer': '7', 'solution': ''},
    'sudoku': {'puzzle': '0040423100030104', 'solution': '1342423124133124'},
}
RIGHT = {'countdown': 1, 'gsm8k': 2, 'math500': 2, 'sudoku': 1}  # least rewards of right answers
LONG = 50_000
CONTENTS = {
    'letters': 'a' * LONG,
    'digits': '9' * LONG,
    'digits and spaces': '9 ' * (LONG // 2),
    'deep parentheses': '(' * (LONG // 2) + ')' * (LONG // 2),
    'numbers in deep parentheses': '(' * 20_000 + '9+9-9' + ')' * 20_000,
    'tower of powers': '9**9**9',
    'larger tower': '9**(9**9)',
    'long tower': '9**' * (LONG // 3) + '9',
    'unicode digits': '\u0669' * LONG,
    'unicode tower': '\uff19+\uff19-\uff19',
    'division by zero': '9/(9-9)',
    'NUL bytes': '\0' * LONG,
    'NUL in an expression': '9+9-9\0',
    'white space': ' \n\t' * (LONG // 3),
    'equals signs': '=' * LONG,
    'equations': '1=1' * (LONG // 3),
    'opening tags': '<answer>' * (LONG // 8),
    'closing tags': '</answer>' * (LONG // 9),
    'both tags': '<answer></answer>' * (LONG // 17),
    'fences': '```' * (LONG // 3),
    'open fences': '``` 1' * (LONG // 5),
    'a fence that never closes': '```' + '1 ' * (LONG // 2),
    'boxes': '\\boxed{' * (LONG // 7),
    'spaced boxes': '\\boxed ' * (LONG // 7),
    'braces': '{' * (LONG // 2) + '}' * (LONG // 2),
    'half a surrogate pair': '\ud800' * 1000,
    'sixteen digits each': '1234123412341234 ' * (LONG // 17),
    'minus signs': '-' * LONG + '9',
    'boxes and one brace': '\\boxed{' * (LONG // 7) + '}',
    'empty boxes': '\\boxed{}' * (LONG // 8),
    'lines of boxes': '\\boxed{\n' * (LONG // 8) + '}',
    'meeting tags': '<reasoning>' + '</reasoning> <answer>' * (LONG // 21),
    'apart by white space': '<reasoning>' + '</reasoning>' * 1000 + ' \n' * (LONG // 2),
    'tags on lines': '<reasoning>\n' + '\n</reasoning>\n<answer>\n' * (LONG // 23),
    'fractions': '\\frac' * (LONG // 5),
    'fractions of one': '\\frac1' * (LONG // 6),
    'roots': '\\sqrt' * (LONG // 5),
    'units': '\\text{ ' * (LONG // 7),
    'backslashes': '\\' * LONG,
    'dots': '.' * LONG,
    'a long fraction': '9' * (LONG // 2) + '/' + '9' * (LONG // 2),
    'not a number': 'nan',
    'infinity': '-inf',
    'a large exponent': '9e999999999',
    'underscores': '1_' * (LONG // 2) + '1',
    'nested fractions': '\\frac{' * 80 + '9' + '}{1}' * 80,
    'many nested fractions': '\\frac{1}{' * (LONG // 9) + '1' + '}' * (LONG // 9),
    'decimals': '9.' * 499 + 'x',
    'digits within the limit': '9' * 999 + 'x',
    'commas within the limit': '999,' * 249 + 'x',
    'products': '9*' * 499 + '9',
    'quotients': '9/' * 499 + '8',
    'equations within the limit': '9=' * 499 + '9',
    'brackets within the limit': '(' * 499 + '9' + ')' * 499,
    'letters within the limit': 'a' * 999,
    'spaces within the limit': ' \\' * 490,
    'units within the limit': '9' + '\\text{ a' * 120,
    'minus signs between numbers': '-9' * 400,
    'thin spaces': '9' + '\\,999' * (LONG // 5),
}
WRAPPERS = [
    '{}',
    '<answer>{}',
    '<reasoning>\n{}\n</reasoning>\n<answer>\n',
    '<answer>{}</answer>',
    '{}</answer>',
    '\\boxed{{{}}}',
    '\\boxed{{{}',
]


@pytest.mark.parametrize(
    ('name', 'format'),
    [
        (name, format)
        for name, task in sorted(tasks.TASKS.items())
        # One format for each scorer: the others differ in the wording of their prompts.
        for format in {each.scorer: format for format, each in task.formats.items()}.values()
    ],
)
@pytest.mark.parametrize('rules', RULES)
def test_hostile_completions(rules, name, format):
    task, example = tasks.get(name, format, rules=rules), EXAMPLES[name]
    # GSM8K takes reward off for text after the answer, unless its rules are mended.
    least = -math.inf if name == 'gsm8k' and rules != 'mended' else 0
    for content, wrapper in itertools.product(CONTENTS, WRAPPERS):
        completion, case = wrapper.format(CONTENTS[content]), (content, wrapper)
        start = time.process_time()
        reward, score = task.reward(completion, example), task.score(completion, example)
        assert time.process_time() - start < LINEAR_SECONDS, case
        assert isinstance(reward, float) and math.isfinite(reward), case
        assert least <= reward < RIGHT[name], case
        assert 0 <= score.right <= score.total and not score.solved, case
