"""MATH's prompts, demonstrations, reward and score, as published for MATH500."""

from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.equivalence import equivalent
from spg_jax.tasks.task import Example, Format, Score
from spg_jax.tasks.word_problems import SPOKEN, WordProblems, texts

RIGHT_REWARD = 2.0
FORM_REWARD = 0.5  # times: 1 for an answer tag, and 1 or NO_BOX for a box inside it or none
NO_BOX = 0.5

_WORDING = (Path(__file__).parent / 'published_prompt.txt').read_text(encoding='utf-8')


class Math500(WordProblems):
    r"""The reward is 2 for a right answer, and up to 1 for the form; the score is whether the last
    box holds what normalises to the reference.

    The released reward looks for a box inside the answer tag with a pattern that matches nothing
    (`\b` is a backspace there), so that a box earns as much as none. `rules='mended'` finds it.
    """

    name = 'math500'
    formats = {
        'published_train': Format(
            template=_WORDING,
            completion=f'<reasoning>{SPOKEN}\\boxed{{{{answer}}}}\n</answer>',
            separator='',
            scorer='published',
        ),
        'published_eval': Format(
            template=_WORDING,
            completion=f'{SPOKEN}\\boxed{{{{answer}}}}\n</answer>',
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
        box = 1.0 if boxed and self.rules == 'mended' else NO_BOX
        return RIGHT_REWARD * right + FORM_REWARD * (bool(tag) + box)

    def score(self, completion: str, example: Example) -> Score:
        answer = published_answer(completion)
        right = answer is not None and equivalent(answer, example['answer'])
        return Score(right=int(right), total=1, solved=right)

    def builder(self) -> type:
        # Here and not above: TFDS takes half a second to import.
        from spg_jax.tasks.math500.math500_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        r"""Reads `{"problem": …, "solution": …, "answer": …}` lines.

        Without an answer it is what the last `\boxed{…}` of the solution holds; without a solution
        demonstrations have no reasoning.
        """
        examples = []
        for where, record in reading.json_lines(path):
            found = texts(record, ('problem', 'answer')) or _boxed(record)
            if found is None:
                expected = r'{"problem": text, "answer": text} or "solution": text with \boxed{…}'
                raise ValueError(f'{where}: found {reading.shown(record)}, expected {expected}')
            question, answer = found
            (solution,) = texts(record, ('solution',)) or ('',)
            examples.append(
                {
                    'question': question,
                    'answer': answer,
                    'solution': solution.strip(),
                    'index': len(examples),
                }
            )
        return examples

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        if not isinstance(ground_truth, str):
            raise ValueError(f'found ground_truth {reading.shown(ground_truth)}, expected text')
        return {'question': str(question), 'answer': ground_truth, 'solution': ''}


def published_answer(completion: str) -> str | None:
    """Returns what the published scorer takes for the answer: the last box, or else the first
    answer tag, which counts even when empty."""
    answer = extraction.last_box(completion)
    if not answer:
        tag = extraction.first_answer(completion)
        answer = answer if tag is None else tag
    return answer


def _boxed(record: dict[str, Any]) -> tuple[str, str] | None:
    """Returns (problem, boxed answer of its solution), or None if there is none."""
    found = texts(record, ('problem', 'solution'))
    answer = extraction.last_box(found[1]) if found and extraction.BOX in found[1] else None
    return (found[0], answer) if answer else None
