"""GSM8K's prompts, demonstrations, reward and score, as published."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.gsm8k import problems
from spg_jax.tasks.task import Example, Format, Score
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


class GSM8K(WordProblems):
    """The reward is the sum of five parts; the score is whether the number is right.

    All five parts together earn 3.5. There is no lower limit, because text after the answer costs.
    """

    name = 'gsm8k'
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
        answer = extraction.after_last_tag(completion)
        forms = (has_soft_form(completion), has_strict_form(completion), answer.isdigit())
        right = RIGHT_REWARD * (answer == example['answer'] != '')
        return tag_reward(completion) + FORM_REWARD * sum(forms) + right

    def score(self, completion: str, example: Example) -> Score:
        number = published_number(completion)
        right = number is not None and number == problems.answer_number(example['answer'])
        return Score(right=int(right), total=1, solved=right)

    def builder(self) -> type:
        # The import is lazy because TFDS takes half a second to import.
        from spg_jax.tasks.gsm8k.gsm8k_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        return problems.read_published(path)

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns a problem whose ground truth is a number or null.

        It is null where the published evaluation failed to read a reference. Then no answer is
        right.
        """
        is_number = (
            type(ground_truth) in (int, float) and abs(ground_truth) < problems.LARGEST_ANSWER
        )
        if ground_truth is not None and not is_number:
            raise ValueError(
                f'found ground_truth {reading.shown(ground_truth)}, expected a number or null'
            )
        answer = repr(ground_truth).removesuffix('.0') if is_number else ''
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
