"""MATH's prompts, demonstrations, reward and score, as published for MATH500."""

from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.equivalence import equivalent
from spg_jax.tasks.math500 import problems
from spg_jax.tasks.task import Example, Format, Score
from spg_jax.tasks.word_problems import WORKED_START, WordProblems

RIGHT_REWARD = 2.0
FORM_REWARD = 0.5  # earned by an answer tag, and again by a box inside it
NO_BOX = 0.5  # the share of the second FORM_REWARD that is earned without a box

_WORDING = (Path(__file__).parent / 'published_prompt.txt').read_text(encoding='utf-8')


class Math500(WordProblems):
    r"""The reward is 2 for a right answer, and up to 1 for the form.

    The score is whether the content of the last box has the same normal form as the reference. The
    released reward looks for a box inside the answer tag with a pattern that never matches (`\b` is
    a backspace there), so that a box earns no more than no box. `rules='mended'` finds the box.
    """

    name = 'math500'
    formats = {
        'published_train': Format(
            template=_WORDING,
            completion=f'<reasoning>{WORKED_START}\\boxed{{{{answer}}}}\n</answer>',
            separator='',
            scorer='published',
        ),
        'published_eval': Format(
            template=_WORDING,
            completion=f'{WORKED_START}\\boxed{{{{answer}}}}\n</answer>',
            separator='',
            scorer='published',
            prefill='<reasoning>',
        ),
    }
    known_rules = ('released', 'mended')

    def reward(self, completion: str, example: Example) -> float:
        answer = extraction.last_box(completion)
        right = equivalent(completion if answer is None else answer, example['answer'])
        _, tag, inside = completion.partition(extraction.OPEN)
        boxed = extraction.BOX in inside.partition(extraction.CLOSE)[0]
        box_share = 1.0 if boxed and self.rules == 'mended' else NO_BOX
        return RIGHT_REWARD * right + FORM_REWARD * (bool(tag) + box_share)

    def score(self, completion: str, example: Example) -> Score:
        answer = published_answer(completion)
        right = answer is not None and equivalent(answer, example['answer'])
        return Score(right=int(right), total=1, solved=right)

    def builder(self) -> type:
        # The import is lazy because TFDS takes half a second to import.
        from spg_jax.tasks.math500.math500_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        return problems.read_published(path)

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        if not isinstance(ground_truth, str):
            raise ValueError(f'found ground_truth {reading.shown(ground_truth)}, expected text')
        return {'question': str(question), 'answer': ground_truth, 'solution': ''}


def published_answer(completion: str) -> str | None:
    """Returns the text that the published scorer takes for the answer, or None.

    That is the content of the last box, or else of the first answer tag, which counts even if it is
    empty.
    """
    answer = extraction.last_box(completion)
    if not answer:
        tag = extraction.first_answer(completion)
        answer = answer if tag is None else tag
    return answer
