"""The board: completions scored here and published figures, one column for each protocol.

    python -m benchmarks.board                                     # docs/board.md from its records
    python -m benchmarks.board --completions=llada_generations.jsonl   # scores that file again
    python -m benchmarks.board --policies=NAME:DIR,NAME:DIR        # adds runs and evaluations

docs/results/board.jsonl holds the figures of completions that were scored here, with their cards,
and docs/results/published.jsonl the figures that others published. Figures whose cards are unlike
never share a column.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from absl import flags

from spg_jax import score, tasks
from spg_jax.process import cli
from spg_jax.process.files import with_home, write_whole
from spg_jax.process.json_files import check_json
from spg_jax.tasks import reading
from spg_jax.tasks.card import Card, columns, problems_digest, scorer_version, unlike
from spg_jax.tasks.task import RULES

DOCS = Path(__file__).parents[1] / 'docs'
BOARD = DOCS / 'board.md'
SCORED = DOCS / 'results' / 'board.jsonl'
PUBLISHED = DOCS / 'results' / 'published.jsonl'
NAMES = {'countdown': 'Countdown', 'sudoku': 'Sudoku 4 x 4', 'gsm8k': 'GSM8K', 'math500': 'MATH500'}
PUBLISHED_POLICY = 'LLaDA-8B-Instruct, published completions'
OPENING = """# Board

Accuracies in %, one column for each protocol. A letter stands for the card of a column, and the
cards are below each table; what a card does not name is not stated. Figures of different columns
are different quantities: do not compare them. On Sudoku, 0-shot and 3-shot are two protocols. Sets
of problems are the same if their digests are. `python -m benchmarks.board` writes this page, and
[scoring.md](scoring.md) says what a card is.

## Scored here

These completions were scored by the scorers of this repository. The published completions of
LLaDA-8B-Instruct come with a verdict each, but nothing says how they were decoded. "As stored" says
how many of these verdicts our scorer gives as well.
"""
CITED = """
## Published figures

These figures are cited as others published them, and were not measured here. The last columns say
where a figure was read. A figure of a repository was read off a picture, and a report is what
somebody else writes about a method. SPG's publication chose its checkpoints on the test set; what
the others did is not stated. Two kinds of figures have no column. Reruns by DARE have other data
and settings: coupled-GRPO 77.9, CJ-GRPO 65.2, SPG 10.1, BGPO 10.0 and d1 10.7 on Countdown. AGRPO
publishes only what it gains over its base: 59.4 on Countdown, 69.7 on Sudoku, 9.9 on GSM8K and 4.6
on MATH500.
"""


class ScoredRow(TypedDict):
    """A line of SCORED."""

    name: str  # of the policy
    card: dict[str, Any]
    accuracy: float  # in [0, 1]
    correct: int
    total: int
    grid_accuracy: NotRequired[float]
    as_stored: NotRequired[int]  # verdicts that are equal to those that came with the completions
    stored: NotRequired[int]  # verdicts that came with the completions


class PublishedRow(TypedDict):
    """A line of PUBLISHED."""

    name: str  # of the policy or method
    card: dict[str, Any]
    accuracy: float  # in per cent
    source: str
    note: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A figure of the board."""

    name: str
    card: Card
    accuracy: float  # orders the figures of a column
    figure: str
    remarks: tuple[str, ...]  # the cells that follow the figures


def rescored(path: str) -> list[ScoredRow]:
    """The figures of published completions, by the published and by the mended rules.

    Args:
      path: JSON lines with task, question, ground_truth, completion and score, the stored verdict.

    Raises:
      ValueError: the file cannot be read, or a line is wrong.
    """
    lines: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for where, line in reading.json_lines(path):
        lines.setdefault(str(line.get('task')), []).append((where, line))
    rows = []
    for name in filter(lines.get, tasks.TASKS):
        for rules in RULES:
            task = tasks.get(name, score.FORMAT, rules=rules)
            scores = [score.judge(task, line, where) for where, line in lines[name]]
            examples = [
                task.read_record(line['question'], line['ground_truth']) for _, line in lines[name]
            ]
            card = Card(
                task=name,
                samples=1,
                problems=problems_digest(task, examples),
                count=len(examples),
                scorer=task.scorer,
                version=scorer_version(task),
                checkpoint='none',
            )
            row = {'name': PUBLISHED_POLICY, 'card': card.to_json()} | {
                key: value
                for key, value in task.figures(scores).items()
                if key in ScoredRow.__annotations__
            }
            if rules == 'released':
                verdicts = [
                    verdict.solved
                    if isinstance(line.get('score'), bool)
                    else [verdict.right, verdict.total]
                    for verdict, (_, line) in zip(scores, lines[name], strict=True)
                ]
                stored = [line.get('score') for _, line in lines[name]]
                equal = sum(map(lambda new, old: new == old, verdicts, stored))
                row |= {'as_stored': equal, 'stored': len(stored)}
            rows.append(row)
    return rows


def measured(name: str, folder: str) -> ScoredRow:
    """The figures of a run or an evaluation, whose completions are scored again.

    Raises:
      ValueError: the folder has no completions, or they have no card.
    """
    figures = score.score(None, [folder])
    row = {key: value for key, value in figures.items() if key in ScoredRow.__annotations__}
    return {'name': name} | row


def merged(old: Sequence[ScoredRow], new: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The old rows, of which new ones of the same policy and protocol take the place."""
    places = {_key(row): row for row in old} | {_key(row): row for row in new}
    return list(places.values())


def page(scored: Sequence[ScoredRow], published: Sequence[PublishedRow]) -> str:
    """The text of docs/board.md."""
    sections = [OPENING]
    entries = [_scored_entry(row) for row in scored]
    for task, title in NAMES.items():
        of_task = [entry for entry in entries if entry.card.task == task]
        if of_task:
            sections.append(f'\n### {title}\n\n{table(of_task, ["as stored"])}\n')
    sections.append(CITED)
    entries = [_published_entry(row) for row in published]
    for task, title in NAMES.items():
        of_task = [entry for entry in entries if entry.card.task == task]
        sections.append(f'\n### {title}, published\n\n{table(of_task, ["source", "note"])}\n')
    return ''.join(sections)


def table(entries: Sequence[Entry], remarks: Sequence[str]) -> str:
    """The Markdown table of figures, with a column for each protocol, and the cards below it.

    Args:
      entries: of one task.
      remarks: the headings of the columns that follow the figures.
    """
    cards = columns([entry.card for entry in entries])
    letters = [chr(ord('A') + place) for place in range(len(cards))]
    headings = [
        letter if card.shots is None else f'{letter}, {card.shots}-shot'
        for letter, card in zip(letters, cards, strict=True)
    ]
    lines = [
        f'| policy | {" | ".join([*headings, *remarks])} |',
        '|---' * (1 + len(letters) + len(remarks)) + '|',
    ]
    for card in cards:
        of_column = [entry for entry in entries if not unlike([card, entry.card])]
        for entry in sorted(of_column, key=lambda entry: -entry.accuracy):
            cells = [entry.figure if other is card else '' for other in cards]
            lines.append(f'| {" | ".join([entry.name, *cells, *entry.remarks])} |')
    lines.append('')
    for letter, card in zip(letters, cards, strict=True):
        lines.append(f'- **{letter}**: {described(card)}')
    return '\n'.join(lines)


def described(card: Card) -> str:
    """The fields of a card that are stated, apart from its task, in one line."""
    stated = {name: value for name, value in card.to_json().items() if value is not None}
    del stated['task']
    return ', '.join(f'{name} {value}' for name, value in stated.items()) or 'nothing is stated'


def _scored_entry(row: ScoredRow) -> Entry:
    figure = f'{100 * row["accuracy"]:.1f} ({row["correct"]:,} of {row["total"]:,})'
    if 'grid_accuracy' in row:
        figure = f'cells {figure}, grids {100 * row["grid_accuracy"]:.1f}'
    stored = f'{row["as_stored"]:,} of {row["stored"]:,}' if 'as_stored' in row else '–'
    return Entry(row['name'], _card(row, SCORED), row['accuracy'], figure, (stored,))


def _published_entry(row: PublishedRow) -> Entry:
    remarks = (row['source'], row.get('note', ''))
    accuracy = row['accuracy']
    return Entry(row['name'], _card(row, PUBLISHED), accuracy, f'{accuracy:.1f}', remarks)


def _card(row: Any, path: Path) -> Card:
    return check_json(row['card'], Card, path, 'restore the file')


def _key(row: ScoredRow) -> str:
    return json.dumps([row['name'], row['card']], sort_keys=True)


def _rows(path: Path, shape: Any) -> list[Any]:
    """The lines of a file of figures; [] without a file."""
    if not path.is_file():
        return []
    lines = reading.json_lines(path)
    return [check_json(line, shape, where, 'restore the file') for where, line in lines]


def main(_: list[str]) -> None:
    new: list[ScoredRow] = []
    if flags.FLAGS.completions:
        new += rescored(flags.FLAGS.completions)
    for pair in flags.FLAGS.policies:
        name, colon, folder = pair.partition(':')
        if not colon or not folder:
            raise ValueError(f'--policies has {pair!r}; use NAME:DIR, with a comma between two')
        new.append(measured(name, with_home(folder)))
    rows = merged(_rows(SCORED, ScoredRow), new)
    if new:
        write_whole(SCORED, ''.join(json.dumps(row) + '\n' for row in rows))
    write_whole(BOARD, page(rows, _rows(PUBLISHED, PublishedRow)))
    print(BOARD)


if __name__ == '__main__':
    cli.define_path_flag('completions', '', 'Published completions with stored verdicts.')
    flags.DEFINE_list('policies', [], 'Runs and evaluations to add, as NAME:DIR.')
    cli.run(main)
