"""Countdown's prompts, demonstrations, reward and scores, compact and as published."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.arithmetic import MAX_CHARACTERS, evaluate
from spg_jax.tasks.countdown.solver import solve
from spg_jax.tasks.task import Example, Format, Score, Task

TOLERANCE = 1e-5
FORMAT_REWARD = 0.1  # an answer tag with anything wrong inside


_HERE = Path(__file__).parent
_SPOKEN = '\nThe expression {answer} uses each number once.\n</reasoning>\n<answer>\n'

_INTEGER = re.compile(r'[0-9]+')
_NUMBERS = re.compile(r'[0-9]{1,9}(,[0-9]{1,9})*')
# `expression = number`. The look-behind starts a match only where a run of such characters starts,
# so that a long run without `=` is read once.
_EQUATION = re.compile(r'(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]')
_LATEX = {r'\div': '/', r'\times': '*', r'\cdot': '*'}


class Countdown(Task):
    """Examples: {'numbers': list of int, 'target': int, 'index': int}.

    A completion is compact as `<answer> 30 + 93 - 100 </answer>`. The reward is 1 for a right
    expression, 0.1 for an answer tag with anything else and 0 without one, in every format.
    """

    name = 'countdown'
    placeholders = ('numbers', 'target')
    formats = {
        'compact': Format(
            template='{numbers} = {target} :',
            completion='<answer> {answer} </answer>',
            separator=' ',
            scorer='compact',
        ),
        # Training asks for the bare expression, which the reward wants; evaluation for a box, which
        # the score wants.
        'published_train': Format(
            template=(_HERE / 'published_train_prompt.txt').read_text(encoding='utf-8'),
            completion=f'<reasoning>{_SPOKEN}{{answer}}\n</answer>',
            separator=', ',
            scorer='published',
        ),
        'published_eval': Format(
            template=(_HERE / 'published_eval_prompt.txt').read_text(encoding='utf-8'),
            completion=f'{_SPOKEN}\\boxed{{{{answer}}}}\n</answer>',
            separator=', ',
            scorer='published',
            prefill='<reasoning>',
        ),
    }
    vocabulary = ('<answer>', '</answer>', '=', ':', *'+-*/()', *map(str, range(101)))

    def fields(self, example: Example) -> dict[str, str]:
        separator = self.formats[self.format].separator
        return {
            'numbers': separator.join(map(str, self.listed(example))),
            'target': str(example['target']),
        }

    def listed(self, example: Example) -> tuple[int, ...]:
        """Returns the numbers in the order of the prompt: as given, or largest first in compact.

        Their order means nothing, and a small model that sees only one of the six has six times
        fewer problems to learn.
        """
        numbers = example['numbers']
        return tuple(sorted(numbers, reverse=True) if self.format == 'compact' else numbers)

    def reward(self, completion: str, example: Example) -> float:
        expression = extraction.last_answer(completion)
        if expression is None:
            return 0.0
        return 1.0 if is_right(expression, example) else FORMAT_REWARD

    def score(self, completion: str, example: Example) -> Score:
        """The compact scorer reads what the reward reads: the last answer tag, bare."""
        if self.scorer == 'compact':
            expression = extraction.last_answer(completion)
        else:
            expression = published_expression(completion)
        solved = expression is not None and is_right(expression, example)
        return Score(right=int(solved), total=1, solved=solved)

    def right_answer(self, example: Example) -> str:
        """Returns the canonical expression (see `solver`).

        Raises:
          ValueError: the problem has no answer.
        """
        answer = solve(self.listed(example), example['target'])
        if answer is None:
            raise ValueError(
                f'{example["numbers"]} cannot make {example["target"]} with exact integer steps'
            )
        return answer

    def shortcut_answer(self, example: Example) -> str:
        """Returns the numbers in the order of the prompt, added up."""
        return ' + '.join(map(str, self.listed(example)))

    def builder(self) -> type:
        # Here and not above: TFDS takes half a second to import.
        from spg_jax.tasks.countdown.countdown_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        """Reads `{"input": "30,100,93", "output": "23"}` lines."""
        examples = []
        for where, record in reading.json_lines(path):
            numbers, target = str(record.get('input')), str(record.get('output'))
            if not _NUMBERS.fullmatch(numbers) or not re.fullmatch('[0-9]{1,9}', target):
                expected = '{"input": "30,100,93", "output": "23"}'
                raise ValueError(f'{where}: found {reading.shown(record)}, expected {expected}')
            examples.append(
                {
                    'numbers': [int(n) for n in numbers.split(',')],
                    'target': int(target),
                    'index': len(examples),
                }
            )
        return examples

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """The ground truth alone says the problem: `[[30, 100, 93], 23]`."""
        match ground_truth:
            case [[*numbers], target] if numbers and all(
                type(n) is int for n in [*numbers, target]
            ):
                return {'numbers': numbers, 'target': target}
        raise ValueError(
            f'found ground_truth {reading.shown(ground_truth)}, expected [[30, 100, 93], 23]'
        )


def is_right(expression: str, example: Example) -> bool:
    """Whether the integers are exactly the given ones, as a multiset, and make the target."""
    if not _same_integers(expression, example['numbers']):
        return False
    value = evaluate(expression)
    return value is not None and abs(value - example['target']) < TOLERANCE


def published_expression(completion: str) -> str:
    """Returns the expression the published scorer looks at."""
    text = extraction.last_box(completion)
    if text is None:
        text = extraction.first_answer(completion)
    if text is None:
        text = completion
    for latex, symbol in _LATEX.items():
        text = text.replace(latex, symbol)
    equation = _EQUATION.search(text)
    return equation[1].strip() if equation else text


def _same_integers(expression: str, numbers: Sequence[int]) -> bool:
    found = _INTEGER.findall(expression)
    too_long = any(len(digits) > MAX_CHARACTERS for digits in found)  # int() may refuse them
    if too_long or len(found) != len(numbers):
        return False
    return Counter(map(int, found)) == Counter(numbers)
