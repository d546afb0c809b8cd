"""Countdown's prompts, demonstrations, reward and scores, compact and as published."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spg_jax.tasks import extraction, mended, reading
from spg_jax.tasks.arithmetic import MAX_CHARACTERS, evaluate, exact_value
from spg_jax.tasks.countdown import problems, worked
from spg_jax.tasks.countdown.solver import solve
from spg_jax.tasks.formats import Format, FormattedTask
from spg_jax.tasks.source import Example
from spg_jax.tasks.task import Score

TOLERANCE = 1e-5
FORMAT_REWARD = 0.1  # earned by an answer tag whose content is wrong

_HERE = Path(__file__).parent
_WORKED_START = '\nThe expression {answer} uses each number once.\n</reasoning>\n<answer>\n'

_INTEGER = re.compile(r'[0-9]+')
# The pattern finds `expression = number`. Its look-behind lets a match start only where a run of
# these characters starts, so that a long run without `=` is read only once.
_EQUATION = re.compile(r'(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]')
_LATEX = {r'\div': '/', r'\times': '*', r'\cdot': '*'}


class Countdown(FormattedTask):
    """Examples: {'numbers': list of int, 'target': int, 'index': int}.

    A completion is compact as `<answer> 30 + 93 - 100 </answer>`. In the format 'worked' the steps
    `30 + 93 = 123 ; 123 - 100 = 23 ;` stand before it, and are not judged. The reward is 1 for a
    right expression, 0.1 for an answer tag with anything else and 0 without one, in every format.
    Under `rules='mended'` `final_answer` reads the expression and `is_right_by_mended_rules` judges
    it, for reward and score alike.
    """

    name = 'countdown'
    usual_columns = problems.COLUMNS
    placeholders = ('numbers', 'target')
    formats = {
        'compact': Format(
            template='{numbers} = {target} :',
            completion='<answer> {answer} </answer>',
            separator=' ',
            scorer='compact',
        ),
        'worked': Format(
            template='{numbers} = {target} :',
            completion='{steps} <answer> {answer} </answer>',
            separator=' ',
            scorer='compact',
        ),
        # Training asks for the bare expression, which the reward expects, and evaluation asks for
        # a box, which the score expects.
        'published_train': Format(
            template=(_HERE / 'published_train_prompt.txt').read_text(encoding='utf-8'),
            completion=f'<reasoning>{_WORKED_START}{{answer}}\n</answer>',
            separator=', ',
            scorer='published',
        ),
        'published_eval': Format(
            template=(_HERE / 'published_eval_prompt.txt').read_text(encoding='utf-8'),
            completion=f'{_WORKED_START}\\boxed{{{{answer}}}}\n</answer>',
            separator=', ',
            scorer='published',
            prefill='<reasoning>',
        ),
    }
    preparation = f'making {sum(problems.SIZES.values()):,} (less than a minute)'

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of prompts and answers, which are more where partial results are written."""
        words = ('<answer>', '</answer>', '=', ':', *'+-*/()', *map(str, range(101)))
        if self.format == 'worked':
            words += (';', *map(str, range(101, worked.LARGEST + 1)))
        return words

    def fields(self, example: Example) -> dict[str, str]:
        separator = self.formats[self.format].separator
        return {
            'numbers': separator.join(map(str, self.listed(example))),
            'target': str(example['target']),
        }

    def listed(self, example: Example) -> tuple[int, ...]:
        """Returns the numbers in the order of the prompt; small models see the largest first.

        The order of the numbers means nothing. A small model that sees only one of the six orders
        has six times fewer problems to learn.
        """
        numbers = example['numbers']
        is_small = self.formats[self.format].scorer == 'compact'
        return tuple(sorted(numbers, reverse=True) if is_small else numbers)

    def answer_fields(self, answer: str) -> dict[str, str]:
        fields = super().answer_fields(answer)
        return fields | {'steps': worked.lines(answer)} if self.format == 'worked' else fields

    def reward(self, completion: str, example: Example) -> float:
        if self.rules == 'mended':
            expression, judge = mended.final_answer(completion), is_right_by_mended_rules
        else:
            expression, judge = extraction.last_answer(completion), is_right
        if expression is None:
            return 0.0
        return 1.0 if judge(expression, example) else FORMAT_REWARD

    def score(self, completion: str, example: Example) -> Score:
        """Returns the verdict; the compact scorer reads the last answer tag, as the reward does."""
        if self.rules == 'mended':
            solved = self.reward(completion, example) == 1.0
            return Score(right=int(solved), total=1, solved=solved)
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

    def check_corrections(self, wrong_share: float) -> None:
        super().check_corrections(wrong_share)
        if wrong_share and self.format == 'worked':
            raise ValueError(
                f'base.edit_weight with base.wrong_share {wrong_share} shows wrong answers, and '
                'task.format worked cannot write their steps, which may leave remainders; use '
                'task.format compact, or base.wrong_share 0'
            )

    def wrong_answer(self, example: Example, rng: np.random.Generator) -> str:
        """Returns the canonical expression with a mistake, in as many words.

        The mistake is one of four kinds: two numbers are swapped, an operator is another one, a
        number is off by one, or the answer is the shortcut. Where the kind drawn gives a right
        answer, or another number of words, another one is taken.
        """
        right = self.right_answer(example)
        words = right.split()
        numbers = [i for i, word in enumerate(words) if word.isdigit()]
        signs = [i for i, word in enumerate(words) if word in '+-*/']
        i, j = (int(place) for place in rng.choice(numbers, 2, replace=False))
        sign, number = int(rng.choice(signs)), int(rng.choice(numbers))
        # The vocabulary of the compact format ends with 100.
        off_by_one = int(words[number]) + (
            -1 if words[number] == '100' else int(rng.choice((-1, 1)))
        )
        mistakes = [
            _replaced(words, {i: words[j], j: words[i]}),
            _replaced(words, {sign: str(rng.choice([x for x in '+-*/' if x != words[sign]]))}),
            _replaced(words, {number: str(off_by_one)}),
            self.shortcut_answer(example),
        ]
        for place in rng.permutation(len(mistakes)):
            is_wrong = not is_right(mistakes[place], example)
            if is_wrong and len(mistakes[place].split()) == len(words):
                return mistakes[place]
        return mistakes[2]

    def builder(self) -> type:
        # The import is lazy because TFDS takes half a second to import.
        from spg_jax.tasks.countdown.countdown_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        return problems.read_published(path, self.columns)

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns the problem that the ground truth holds: `[[30, 100, 93], 23]`.

        It may also be that list as text, or an object such as TinyZero's
        `{"numbers": [30, 100, 93], "target": 23}`.
        """
        value = ground_truth
        if isinstance(value, str):
            try:
                value = reading.parse_json(value, 'ground_truth')
            except reading.NotJson:
                value = None
        if isinstance(value, dict):
            value = [reading.pick(value, problems.COLUMNS[name]) for name in problems.COLUMNS]
        match value:
            case [given_numbers, given_target]:
                numbers = reading.integers_of(given_numbers)
                target = reading.integer_of(given_target)
                if numbers and target is not None:
                    return {'numbers': numbers, 'target': target}
        raise ValueError(
            f'found ground_truth {reading.shown(ground_truth)}, expected [[30, 100, 93], 23] with '
            'numbers of at most 15 digits'
        )

    def to_record(self, example: Example) -> tuple[str, list[Any]]:
        numbers, target = example['numbers'], example['target']
        return f'Numbers: {numbers}\nTarget: {target}', [numbers, target]


def _replaced(words: list[str], changes: dict[int, str]) -> str:
    """Returns words, some of which are replaced, by their places, as text."""
    return ' '.join(changes.get(place, word) for place, word in enumerate(words))


def is_right(expression: str, example: Example) -> bool:
    """Whether an expression uses each number of the problem once and makes the target."""
    if not _same_integers(expression, example['numbers']):
        return False
    value = evaluate(expression)
    return value is not None and abs(value - example['target']) < TOLERANCE


def is_right_by_mended_rules(answer: str, example: Example) -> bool:
    """Whether an answer is school arithmetic that uses each number once and is exactly the target.

    Typeset signs and LaTeX's spellings are read as + - * / and brackets. Each rule stands against
    an answer that the released rules count as right:

    - Only integers count, without leading zeros: `1.5*2` joins 1 and 5, and `21.999999` is 22
      within the tolerance and uses one operation that is no operation, the point.
    - The value is an exact fraction: `7+10**-99` is 7 within the tolerance.
    - `**`, `//` and chains of signs are no operations of the game: `9*3**-2`, `100//93*30`,
      `3++++5`.
    - Every side of an equation has to be the target, and one of them uses the numbers:
      `30+93-100=99` claims something false. The released score drops what follows `=`.

    The other way round, `5×3` is right here although the released rules do not read it.
    """
    text = mended.plain_arithmetic(answer).strip().removesuffix('.')
    if len(text) > MAX_CHARACTERS:
        return False
    sides = text.split('=')
    return any(_same_integers(side, example['numbers']) for side in sides) and all(
        exact_value(side) == example['target'] for side in sides
    )


def published_expression(completion: str) -> str:
    """Returns the expression that the published scorer evaluates."""
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
    integers = _INTEGER.findall(expression)
    # int() raises an error for an integer with too many digits.
    too_long = any(len(digits) > MAX_CHARACTERS for digits in integers)
    if too_long or len(integers) != len(numbers):
        return False
    return Counter(map(int, integers)) == Counter(numbers)
