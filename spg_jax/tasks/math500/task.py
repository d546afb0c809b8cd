"""MATH's prompts, demonstrations, reward and score, as published for MATH500."""

from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, mended, reading
from spg_jax.tasks.equivalence import equivalent, equivalent_by_mended_rules
from spg_jax.tasks.formats import Format
from spg_jax.tasks.math500 import problems
from spg_jax.tasks.source import Example
from spg_jax.tasks.task import Score
from spg_jax.tasks.word_problems import WORKED_START, WordProblems

RIGHT_REWARD = 2.0
FORM_REWARD = 0.5  # earned by an answer tag, and again by a box inside it
NO_BOX = 0.5  # the share of the second FORM_REWARD that is earned without a box

_WORDING = (Path(__file__).parent / 'published_prompt.txt').read_text(encoding='utf-8')


class Math500(WordProblems):
    r"""The reward is 2 for a right answer, and up to 1 for the form.

    The score is whether the content of the last box has the same normal form as the reference. The
    released reward looks for a box inside the answer tag with a pattern that never matches (`\b` is
    a backspace there), so that a box earns no more than no box. `rules='mended'` finds the box, and
    takes one answer and one judgement, `equivalent_by_mended_rules`, for reward and score alike.
    """

    name = 'math500'
    usual_columns = problems.COLUMNS
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

    def reward(self, completion: str, example: Example) -> float:
        if self.rules == 'mended':
            right = _is_right_by_mended_rules(completion, example)
        else:
            answer = extraction.last_box(completion)
            right = equivalent(completion if answer is None else answer, example['answer'])
        _, tag, inside = completion.partition(extraction.OPEN)
        boxed = extraction.BOX in inside.partition(extraction.CLOSE)[0]
        box_share = 1.0 if boxed and self.rules == 'mended' else NO_BOX
        return RIGHT_REWARD * right + FORM_REWARD * (bool(tag) + box_share)

    def score(self, completion: str, example: Example) -> Score:
        if self.rules == 'mended':
            right = _is_right_by_mended_rules(completion, example)
        else:
            answer = published_answer(completion)
            right = answer is not None and equivalent(answer, example['answer'])
        return Score(right=int(right), total=1, solved=right)

    def builder(self) -> type:
        # The import is lazy because TFDS takes half a second to import.
        from spg_jax.tasks.math500.math500_dataset_builder import Builder
        from spg_jax.tasks.published_files import with_columns

        return with_columns(Builder, self.columns)

    def read_published(self, path: str | Path) -> list[Example]:
        return problems.read_published(path, self.columns)

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns a problem whose ground truth is text, a number or a list of one.

        An empty reference is refused: by the released rules an empty box would be right.
        """
        answer = reading.text_of(ground_truth)
        if answer is None:
            raise ValueError(
                f'found ground_truth {reading.shown(ground_truth)}, expected text that is not '
                'empty, or a number'
            )
        return {'question': str(question), 'answer': answer, 'solution': ''}


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


def _is_right_by_mended_rules(completion: str, example: Example) -> bool:
    answer = mended.final_answer(completion)
    return answer is not None and equivalent_by_mended_rules(answer, example['answer'])
