"""GSM8K's prompts, demonstrations, reward and score, as published."""

import re
from collections.abc import Iterator
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, mended, reading
from spg_jax.tasks.arithmetic import MAX_CHARACTERS, exact_value
from spg_jax.tasks.formats import Format
from spg_jax.tasks.gsm8k import problems
from spg_jax.tasks.source import Example
from spg_jax.tasks.task import Score
from spg_jax.tasks.word_problems import WORKED_START, WordProblems

TAG_REWARD = 0.125  # earned by each of four tags in its place
FORM_REWARD = 0.5  # earned by each of the two forms, and by an answer in digits
RIGHT_REWARD = 2.0
PENALTY = 0.001  # lost by each character after the answer
_TAGS = ('<reasoning>\n', '\n</reasoning>\n', '\n<answer>\n', '\n</answer>')

_HERE = Path(__file__).parent
_NUMBER = re.compile(r'-?\d+\.?\d*')
_BOX = re.compile(r'\\boxed\{([^}]*+)\}')
_SEAM = re.compile(r'</reasoning>\s*+<answer>')
_STRICT = re.compile(
    # Each pair of tags holds one line.
    r'<reasoning>\n[^\n]*\n</reasoning>\n<answer>\n[^\n]*\n</answer>\n\n?'
)


# One run of what numbers are written with, and the numbers among such runs.
_RUN = re.compile(r'\.?[0-9](?:[0-9.,]*[0-9])?')
_PLAIN_NUMBER = re.compile(r'(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?')
_RATIO = re.compile(r'(-?)[( ]*([0-9]{1,15})[) ]*/[( ]*([0-9]{1,15})[) ]*')
_CURRENCY = re.compile(r'\\(?=[$%])')
# Whatever else stands beside a number makes it another one, as in `5!`, `2^3` and `>7`.
_BESIDE = re.compile(r"[A-Za-z\s$€£¥%.,:;()'\"_-]*")
_WORD = re.compile('[a-z]+')
# Words beside which the number is not the answer, and words that make another number of it: all of
# them anywhere, others right before it.
_HEDGES = frozenset('or nor not no never either neither isn wrong except'.split())
_OPERATIONS = frozenset('minus negative squared cubed root'.split())
_LAST_BEFORE = frozenset('than least most twice double triple'.split())
_MILLIONS = re.compile(r'\s*[MB](?![A-Za-z])')  # `5M`; metres are written m
# What may stand between a minus and its number: currencies, brackets, quotation marks.
_CODE = re.compile(r'(?:\b[A-Z]{2,3}|\bRs\.?)$')
_BETWEEN = ' \t\n$€£¥("\''
_MINUS = re.compile(r'(?:(?:^|(?<=[\s:($"\']))-|\b(?:[Mm]inus|[Nn]egative))$')


class GSM8K(WordProblems):
    """The reward is the sum of five parts; the score is whether the number is right.

    All five parts together earn 3.5. There is no lower limit, because text after the answer costs.
    Under `rules='mended'` `mended_number` reads the answer for reward and score alike, and the
    penalty never exceeds what the tags earn: a right answer earns 2 or more, any other less.
    """

    name = 'gsm8k'
    usual_columns = problems.COLUMNS
    formats = {
        # Training asks for the bare number, which the reward expects, and evaluation asks for a
        # box, which the score looks for first.
        'published_train': Format(
            template=(_HERE / 'published_train_prompt.txt').read_text(encoding='utf-8'),
            completion=f'<reasoning>{WORKED_START}{{answer}}\n</answer>',
            separator='',
            scorer='published',
        ),
        'published_eval': Format(
            template=(_HERE / 'published_eval_prompt.txt').read_text(encoding='utf-8'),
            completion=f'{WORKED_START}\\boxed{{{{answer}}}}\n</answer>',
            separator='',
            scorer='published',
            prefill='<reasoning>',
        ),
    }

    def reward(self, completion: str, example: Example) -> float:
        if self.rules == 'mended':
            number = mended_number(completion)
            tags = max(0.0, tag_reward(completion))
            forms = (has_soft_form(completion), has_strict_form(completion), number is not None)
            right = number is not None and number == _reference(example)
            return tags + FORM_REWARD * sum(forms) + RIGHT_REWARD * right
        answer = extraction.after_last_tag(completion)
        forms = (has_soft_form(completion), has_strict_form(completion), answer.isdigit())
        right = RIGHT_REWARD * (answer == example['answer'] != '')
        return tag_reward(completion) + FORM_REWARD * sum(forms) + right

    def score(self, completion: str, example: Example) -> Score:
        if self.rules == 'mended':
            number, reference = mended_number(completion), _reference(example)
        else:
            number = published_number(completion)
            reference = problems.answer_number(example['answer'])
        right = number is not None and number == reference
        return Score(right=int(right), total=1, solved=right)

    def builder(self) -> type:
        # The import is lazy because TFDS takes half a second to import.
        from spg_jax.tasks.gsm8k.gsm8k_dataset_builder import Builder
        from spg_jax.tasks.published_files import with_columns

        return with_columns(Builder, self.columns)

    def read_published(self, path: str | Path) -> list[Example]:
        return problems.read_published(path, self.columns)

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns a problem whose ground truth is a number, text or a list with it, or null.

        It is null where the published evaluation failed to read a reference. Then no answer is
        right.
        """
        answer = '' if ground_truth is None else reading.text_of(ground_truth) or 'none'
        number = problems.answer_number(answer.rpartition('####')[2])
        if answer and (number is None or not abs(number) < problems.LARGEST_ANSWER):
            raise ValueError(
                f'found ground_truth {reading.shown(ground_truth)}, expected a number or null'
            )
        answer = answer.rpartition('####')[2].strip()
        return {'question': str(question), 'answer': answer, 'solution': ''}


def tag_reward(completion: str) -> float:
    """Returns the reward of the tags less the penalty for text after the answer, as released.

    The first penalty counts from the opening answer tag, so that the answer itself costs a little.
    The second leaves out one character: a closing tag without text after it gains 0.001.
    """
    reward = sum(TAG_REWARD for tag in _TAGS if completion.count(tag) == 1)
    *_, opening, closing = _TAGS
    if completion.count(opening) == 1:
        reward -= PENALTY * len(completion.partition(opening)[2])
    if completion.count(closing) == 1:
        reward -= PENALTY * (len(completion.partition(closing)[2]) - 1)
    return reward


def has_soft_form(completion: str) -> bool:
    """Whether a completion starts with reasoning tags and then answer tags, each pair on one line.

    Only white space may stand between the two pairs; it may contain line breaks.
    """
    if not completion.startswith('<reasoning>'):
        return False
    line = completion.partition('\n')[0]
    # A seam is a place where the two pairs meet. The first seam leaves the answer most room on this
    # line, and only the last can contain a line break. Trying all seams would take quadratic time.
    seams = [seam.end() for seam in _SEAM.finditer(completion) if seam.start() < len(line)]
    return any(
        extraction.CLOSE in completion[end:].partition('\n')[0] for end in {*seams[:1], *seams[-1:]}
    )


def has_strict_form(completion: str) -> bool:
    """Whether a completion is exactly the form asked for.

    That form has one line in each pair of tags and ends with a line break.
    """
    return _STRICT.fullmatch(completion) is not None


def published_number(completion: str) -> float | None:
    """Returns the number that the published scorer takes for the answer, or None."""
    for box in _boxes(completion):
        number = _number(box, position=0)
        if number is not None:  # A box that is empty or holds only dots has no number.
            return number
    for text in (extraction.first_answer(completion), extraction.after_last_tag(completion)):
        number = _number(text or '', position=-1)
        if number is not None:
            return number
    return None


def _boxes(completion: str) -> Iterator[str]:
    r"""Yields the stripped content of each `\boxed{…}` on a line, up to the first `}`."""
    for line in completion.split('\n'):
        # Every box that opens before the last brace also closes, which makes the search linear.
        for box in _BOX.finditer(line[: line.rfind('}') + 1]):
            yield box[1].strip()


def _number(text: str, position: int) -> float | None:
    """Returns the whole text as a number as Python reads it, or else the number at `position`."""
    try:
        return float(text)
    except ValueError:
        numbers = _NUMBER.findall(text)
    return float(numbers[position]) if numbers else None


def mended_number(completion: str) -> Fraction | None:
    """Returns the number that a completion answers with, by the mended rules, or None.

    - The answer holds one number. The released rules take the first or the last of several, so
      that `20-18` is -18 and a list of candidates is one of them.
    - Thousands may be grouped, and a currency or a unit may stand beside the number. The released
      reward wants the very text of the reference, and the released score takes 2 for `2,125`
      (open-compass/opencompass#2647, AISBench/benchmark#359).
    - A fraction of integers counts in lowest terms.
    - An equation counts if all its sides with numbers are equal, exactly: `6*3 = 18`.
    - `not 18`, `18 or so many`, `more than 18`, `2 million` and `3!` are not the number that they
      contain. `-$18`, `-(18)` and `minus 18` are negative.
    """
    answer = mended.final_answer(completion)
    if answer is None or len(answer) > MAX_CHARACTERS:
        return None
    answer = _CURRENCY.sub('', mended.without_thousands(answer))
    *others, last = mended.plain_arithmetic(answer).split('=')
    number = _only_number(last)
    for side in filter(_RUN.search, others):
        if exact_value(mended.without_thousands(side)) != number:
            return None
    return number


def _only_number(text: str) -> Fraction | None:
    """Returns the only number of a text, or None if there is none, several or an expression."""
    text = text.strip(' \n\t*_`')
    ratio = _RATIO.fullmatch(text.removeprefix('(').removesuffix(')'))
    if ratio:
        top, bottom = int(ratio[2]), int(ratio[3])
        if bottom < 2 or gcd(top, bottom) != 1:
            return None
        return Fraction(-top if ratio[1] else top, bottom)
    runs = list(_RUN.finditer(text))
    if len(runs) != 1 or not _PLAIN_NUMBER.fullmatch(runs[0][0]):
        return None
    before, after = text[: runs[0].start()], text[runs[0].end() :]
    if not (_BESIDE.fullmatch(before) and _BESIDE.fullmatch(after)) or _MILLIONS.match(after):
        return None
    words = set(_WORD.findall(f'{before} {after}'.lower()))
    if words & (_HEDGES | mended.SCALES):
        return None
    before = before.rstrip(_BETWEEN)
    before = _CODE.sub('', before).rstrip(_BETWEEN)
    minus = _MINUS.search(before)
    if minus:
        before = before[: minus.start()]
    earlier = _WORD.findall(before.lower())
    if earlier and earlier[-1] in _LAST_BEFORE or before.rstrip(_BETWEEN).endswith('-'):
        return None
    if {*earlier, *_WORD.findall(after.lower())} & _OPERATIONS:
        return None
    number = Fraction(runs[0][0].replace(',', ''))
    return -number if minus else number


def _reference(example: Example) -> Fraction | None:
    """Returns the number of a reference such as '1,800', exactly, or None for ''."""
    try:
        return Fraction(example['answer'].replace(',', '').strip())
    except ValueError:
        return None
