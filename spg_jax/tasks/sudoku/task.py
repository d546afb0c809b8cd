"""Sudoku's prompts, demonstrations, reward and scores, compact and as published."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spg_jax.tasks import extraction, mended, reading
from spg_jax.tasks.arithmetic import MAX_CHARACTERS
from spg_jax.tasks.formats import Format, FormattedTask
from spg_jax.tasks.source import Example
from spg_jax.tasks.sudoku import problems
from spg_jax.tasks.sudoku.problems import CELLS
from spg_jax.tasks.sudoku.solver import UNITS, work_out
from spg_jax.tasks.task import Score

_WORDING = Path(__file__).with_name('published_prompt.txt').read_text(encoding='utf-8')
_COMPLETION = '\nI fill in each row.\n</reasoning>\n<answer>\n{answer}\n</answer>'

# The first puzzles of the train split, which a model may know, since it is trained on them.
_WORKED = ('0201130030002140', '0003401021340001', '0204143240000140')
_EXAMPLES = tuple(
    f'Puzzle: {puzzle}\n<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{grid}\n</answer>\n\n'
    for puzzle in _WORKED
    for reasoning, grid in [work_out(puzzle)]
)

_ENDS = ('<|eot_id|>', '<|endoftext|>')
_FENCE = re.compile(r'```([\d\s]++)```')
_BEFORE_CLOSE = re.compile(r'(\d{16})\s*+</answer>')
_ALONE = re.compile(r'\b(\d{16})\b')
_PUZZLE = re.compile(r'[0-9.]{16,}')
_NAMED_PUZZLE = re.compile(r'Sudoku puzzle: ([0-9.]{16,})')
# What may stand between the cells of a grid that somebody draws: rows, bars and a code block.
_DRAWN = re.compile(r'[\s,;|+\-`$\[\]]+')
_MENDED_FENCE = re.compile(r'```(?:text)?\n([^`]*+)```')
_CELLS = re.compile(r'[0-4._]{16}')


class Sudoku(FormattedTask):
    """Examples: {'puzzle': 16 digits, 0 where empty, 'solution': 16 digits, 'index': int}.

    A compact completion is the whole grid, `<answer> 4 3 1 2 … </answer>`. In every format the
    reward is the share of the empty cells that are right. Under `rules='mended'` `mended_score`
    judges, for reward and score alike.
    """

    name = 'sudoku'
    usual_columns = problems.COLUMNS
    placeholders = ('puzzle',)
    formats = {
        'compact': Format(
            template='{puzzle} :',
            completion='<answer> {answer} </answer>',
            separator=' ',
            scorer='compact',
        ),
        'published_train': Format(
            template=_WORDING,
            completion=f'<reasoning>{_COMPLETION}',
            separator='',
            scorer='published',
            examples=_EXAMPLES,
        ),
        'published_eval': Format(
            template=_WORDING,
            completion=_COMPLETION,
            separator='',
            scorer='published',
            prefill='<reasoning>',
            examples=_EXAMPLES,
        ),
    }
    vocabulary = ('<answer>', '</answer>', ':', *'01234')
    solved_figure = 'grid_accuracy'
    preparation = f'making {sum(problems.SIZES.values()):,} (less than a minute)'

    def fields(self, example: Example) -> dict[str, str]:
        return {'puzzle': self.formats[self.format].separator.join(example['puzzle'])}

    def reward(self, completion: str, example: Example) -> float:
        if self.rules == 'mended':
            score = mended_score(completion, example)
        else:
            score = count_right(answer_digits(completion), example)
        return score.right / score.total if score.total else 0.0

    def score(self, completion: str, example: Example) -> Score:
        """Returns the verdict; the compact scorer reads the last answer tag, as the reward does."""
        if self.rules == 'mended':
            return mended_score(completion, example)
        cells_of = answer_digits if self.scorer == 'compact' else published_cells
        return count_right(cells_of(completion), example)

    def right_answer(self, example: Example) -> str:
        return ' '.join(example['solution'])

    def shortcut_answer(self, example: Example) -> str:
        """Fills each row with its missing digits in ascending order, ignoring columns and boxes."""
        puzzle = example['puzzle']
        cells = []
        for row in (puzzle[start : start + 4] for start in range(0, CELLS, 4)):
            missing = iter(sorted(set('1234') - set(row)))
            cells += [next(missing) if cell == '0' else cell for cell in row]
        return ' '.join(cells)

    def wrong_answer(self, example: Example, rng: np.random.Generator) -> str:
        """Returns the solution with a mistake in the empty cells of one row; the clues stay.

        The mistake is one of four kinds: two cells are swapped, a cell gets the digit of another,
        the cells are shifted by one, or they are filled in ascending order. Where that changes
        nothing, because the row has one empty cell or none, a cell gets another digit.
        """
        puzzle, cells = example['puzzle'], list(example['solution'])
        start = 4 * int(rng.integers(4))
        places = [place for place in range(start, start + 4) if puzzle[place] == '0']
        digits = [cells[place] for place in places]
        mistake = ('swap', 'copy', 'shift', 'ascend')[int(rng.integers(4))]
        if len(places) > 1:
            i, j = rng.choice(len(places), 2, replace=False)
            match mistake:
                case 'swap':
                    digits[i], digits[j] = digits[j], digits[i]
                case 'copy':
                    digits[i] = digits[j]
                case 'shift':
                    digits = [*digits[1:], digits[0]]
                case _:
                    digits = sorted(digits)
        for place, digit in zip(places, digits, strict=True):
            cells[place] = digit
        if cells == list(example['solution']) and '0' in puzzle:
            place = int(rng.choice([place for place, clue in enumerate(puzzle) if clue == '0']))
            cells[place] = str(rng.choice(sorted(set('1234') - {cells[place]})))
        return ' '.join(cells)

    def builder(self) -> type:
        # The import is lazy because TFDS takes half a second to import.
        from spg_jax.tasks.sudoku.sudoku_dataset_builder import Builder

        return Builder

    def read_published(self, path: str | Path) -> list[Example]:
        return problems.read_published(path, self.columns)

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns the puzzle that starts the question or follows 'Sudoku puzzle: ' in it."""
        text = problems.cells_of(question) if isinstance(question, list) else str(question)
        named_puzzle = _NAMED_PUZZLE.search(text)
        first_digits = _PUZZLE.match(text)
        digits = first_digits[0] if first_digits else named_puzzle[1] if named_puzzle else ''
        puzzle, solution = problems.cells_of(digits), problems.cells_of(ground_truth)
        if not problems.another_size(puzzle, solution):
            puzzle = puzzle[:CELLS]
        if not problems.is_problem(puzzle, solution):
            raise ValueError(
                f'found question {reading.shown(question)} with '
                f'ground_truth {reading.shown(ground_truth)}, '
                f'{problems.another_size(puzzle, solution)}'
                'expected a puzzle of 16 digits, some of them 0, and its solution'
            )
        return {'puzzle': puzzle, 'solution': solution}

    def to_record(self, example: Example) -> tuple[str, str]:
        return f'Solve the following Sudoku puzzle: {example["puzzle"]}\n', example['solution']


def answer_digits(completion: str) -> str:
    """Returns the digits of the last answer tag, or '' without such a tag.

    As released, every Unicode digit takes up a cell, although only 1 to 4 can be right.
    """
    return ''.join(filter(str.isdigit, extraction.last_answer(completion) or ''))


def published_cells(completion: str) -> str:
    """Returns the text that the published scorer reads as the grid, without white space, or ''."""
    return ''.join(next(filter(None, map(str.strip, _candidates(completion))), '').split())


def _candidates(completion: str) -> Iterator[str]:
    """Yields the texts that may hold the grid, in the published order; each may be blank."""
    _, opened, inside = completion.partition(extraction.OPEN)
    _, closed, after = completion.partition(extraction.CLOSE)
    if opened:
        # As released, the code block may also follow the closing tag.
        fence = _FENCE.search(inside)
        yield fence[1] if fence else ''
        yield extraction.until(inside, (extraction.CLOSE, *_ENDS)) or ''
    if closed:
        end = extraction.until(after, _ENDS)
        yield after if end is None else end
    for pattern in (_BEFORE_CLOSE, _ALONE):
        match = pattern.search(completion)
        yield match[1] if match else ''


def count_right(cells: str, example: Example) -> Score:
    """Counts the empty cells that `cells` fills rightly, after padding with 0 or a cut to 16."""
    cells = cells[:CELLS].ljust(CELLS, '0')
    empty = [place for place, clue in enumerate(example['puzzle']) if clue == '0']
    right = sum(cells[place] == example['solution'][place] for place in empty)
    return Score(right=right, total=len(empty), solved=right == len(empty))


def mended_score(completion: str, example: Example) -> Score:
    """Returns the verdict of the mended rules on the grid that a completion answers with.

    - The answer, or the code block in it, is a grid of 16 cells and nothing else. The released
      rules collect the digits of any text, also of words about another grid, and pad what is short.
    - A grid that changes a clue has no right cell: it solves another puzzle. The released rules do
      not look at the clues.
    - A grid is right if no digit occurs twice in a row, column or box, whatever the recorded
      solution: a user's puzzle may have several solutions.
    - Any other grid has the cells right that equal the recorded solution, but never all of them.
    """
    puzzle = example['puzzle']
    answer = mended.final_answer(completion) or ''
    fenced = _MENDED_FENCE.search(answer)
    answer = fenced[1] if fenced else answer
    cells = _DRAWN.sub('', answer) if len(answer) <= MAX_CHARACTERS else ''
    total = puzzle.count('0')
    keeps_clues = _CELLS.fullmatch(cells) is not None and all(
        clue in ('0', cell) for clue, cell in zip(puzzle, cells, strict=True)
    )
    if not keeps_clues:
        return Score(right=0, total=total, solved=False)
    if total and all({cells[place] for place in unit} == set('1234') for _, unit in UNITS):
        return Score(right=total, total=total, solved=True)
    right = min(count_right(cells, example).right, total - 1)
    return Score(right=max(right, 0), total=total, solved=False)
