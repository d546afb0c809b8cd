"""GSM8K's prompts, demonstrations, reward and score, as published."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.task import Example, Format, Score
from spg_jax.tasks.word_problems import SPOKEN, WordProblems, texts

TAG_REWARD = 0.125  # for each of four tags in its place
FORM_REWARD = 0.5  # for each of the two forms, and for an answer in digits
RIGHT_REWARD = 2.0
PENALTY = 0.001  # for each character after the answer
_TAGS = ('<reasoning>\n', '\n</reasoning>\n', '\n<answer>\n', '\n</answer>')

_HERE = Path(__file__).parent
_MARK = '####'  # before the answer in the published solutions
_LARGEST = 1e15  # number that can be a reference; NaN is none
_CALCULATOR = re.compile(r'<<[^<>\n]*>>')  # their annotations, not meant to be read

_NUMBER = re.compile(r'-?\d+\.?\d*')
_BOX = re.compile(r'\\boxed\{([^}]*+)\}')
_SEAM = re.compile(r'</reasoning>\s*+<answer>')
_STRICT = re.compile(
    r'<reasoning>\n[^\n]*\n</reasoning>\n<answer>\n[^\n]*\n</answer>\n\n?'  # of one line each
)


class GSM8K(WordProblems):
    """The reward is the sum of five parts, from 3.5 for all of them down without a limit, since
    text after the answer costs; the score is whether the number is right."""

    name = 'gsm8k'
    formats = {
        # Training asks for the bare number, which the reward wants; evaluation for a box, which the
        # score looks for first.
        'published_train': Format(
            template=(_HERE / 'published_train_prompt.txt').read_text(encoding='utf-8'),
            completion=f'<reasoning>{SPOKEN}{{answer}}\n</answer>',
            separator='',
            scorer='published',
        ),
        'published_eval': Format(
            template=(_HERE / 'published_eval_prompt.txt').read_text(encoding='utf-8'),
            completion=f'{SPOKEN}\\boxed{{{{answer}}}}\n</answer>',
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
        found = published_number(completion)
        right = found is not None and found == _number(_without_commas(example['answer']))
        return Score(right=int(right), total=1, solved=right)

    def builder(self) -> type:
        # Here and not above: TFDS takes half a second to import.
        from spg_jax.tasks.gsm8k.gsm8k_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        """Reads `{"question": …, "answer": "<solution> #### 18"}` lines."""
        examples = []
        for where, record in reading.json_lines(path):
            found = texts(record, ('question', 'answer'))
            question, worked = found or ('', '')
            solution, _, answer = worked.partition(_MARK)
            number = _number(_without_commas(answer))
            if number is None or not abs(number) < _LARGEST:
                expected = '{"question": text, "answer": "its solution #### 18"}'
                raise ValueError(f'{where}: found {reading.shown(record)}, expected {expected}')
            examples.append(
                {
                    'question': question,
                    'answer': answer.strip(),
                    'solution': _CALCULATOR.sub('', solution).strip(),
                    'index': len(examples),
                }
            )
        return examples

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """The ground truth is a number, or null where the published evaluation failed to read a
        reference: then nothing is right."""
        known = type(ground_truth) in (int, float) and abs(ground_truth) < _LARGEST
        if ground_truth is not None and not known:
            raise ValueError(
                f'found ground_truth {reading.shown(ground_truth)}, expected a number or null'
            )
        answer = repr(ground_truth).removesuffix('.0') if known else ''
        return {'question': str(question), 'answer': answer, 'solution': ''}


def tag_reward(completion: str) -> float:
    """Returns what the tags earn, less the penalty for text after the answer, as released.

    The first penalty counts from the opening answer tag, so that the answer itself costs a little;
    the second allows for one character, so that none at all earns 0.001.
    """
    reward = sum(TAG_REWARD for tag in _TAGS if completion.count(tag) == 1)
    *_, opening, closing = _TAGS
    if completion.count(opening) == 1:
        reward -= PENALTY * len(completion.partition(opening)[2])
    if completion.count(closing) == 1:
        reward -= PENALTY * (len(completion.partition(closing)[2]) - 1)
    return reward


def has_soft_form(completion: str) -> bool:
    """Whether a completion starts with reasoning tags and then answer tags, each on one line.

    Only white space may stand between the two, line breaks included.
    """
    if not completion.startswith('<reasoning>'):
        return False
    line = completion.partition('\n')[0]
    # Of the places where the two meet the first leaves the answer most room on this line, and only
    # the last can lie before a line break; trying all of them would be quadratic.
    seams = [seam.end() for seam in _SEAM.finditer(completion) if seam.start() < len(line)]
    return any(
        extraction.CLOSE in completion[end:].partition('\n')[0] for end in {*seams[:1], *seams[-1:]}
    )


def has_strict_form(completion: str) -> bool:
    """Whether a completion is nothing but the form asked for, with one line in each pair of
    tags and a line break at its end."""
    return _STRICT.fullmatch(completion) is not None


def published_number(completion: str) -> float | None:
    """Returns the number that the published scorer takes for the answer, or None."""
    for box in _boxes(completion):
        number = _number(box, which=0)
        if number is not None:  # an empty box has none, nor have dots
            return number
    for text in (extraction.first_answer(completion), extraction.after_last_tag(completion)):
        number = _number(text or '', which=-1)
        if number is not None:
            return number
    return None


def _boxes(completion: str) -> Iterator[str]:
    r"""Yields what stands in each `\boxed{…}`, up to the first `}` and within a line, stripped."""
    for line in completion.split('\n'):
        # Up to the last brace whatever opens also closes, which makes the search linear.
        for box in _BOX.finditer(line[: line.rfind('}') + 1]):
            yield box[1].strip()


def _number(text: str, which: int | None = None) -> float | None:
    """Returns text as a number: the whole of it as Python reads it, else its number at `which`."""
    try:
        return float(text)
    except ValueError:
        found = [] if which is None else _NUMBER.findall(text)
    return float(found[which]) if found else None


def _without_commas(answer: str) -> str:
    return answer.replace(',', '')
