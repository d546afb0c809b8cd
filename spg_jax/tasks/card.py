"""Protocol cards: what must be the same before two figures may stand in one column.

A figure of another length, another wording or another set of problems is another quantity. A card
names everything that such a figure depends on, apart from the policy.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from spg_jax.process.json_files import check_json, read_json
from spg_jax.tasks.reading import shown
from spg_jax.tasks.source import Example
from spg_jax.tasks.task import Task

TEST = 'test'  # the folder of a run that holds the completions of the test problems
COMPLETIONS = 'completions.jsonl'  # of the headline length
RESULT = 'result.json'  # holds the cards of the completions in its folder
CARDS = 'cards'  # the key of these cards in it
REMEDY = 'restore the file, or evaluate again'
NOT_STATED = 'not stated'

# A person raises the version of a scorer whenever a change of its rules changes a verdict. A digest
# of the source would change with every comment, and old figures would lose their column for
# nothing. tests/tasks/test_card.py holds each version to the verdicts on recorded completions.
VERSIONS = {'published': '1', 'compact': '1', 'mended': '3', 'math-verify': '1'}

# What chose the checkpoint of a figure. 'none' is a policy that was not chosen among several. No
# choice can have flattered its figure, so that it may stand beside those chosen on validation.
RULES = ('validation', 'none', 'test')

_Count = Annotated[int, Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class Card:
    """The protocol of a figure. None stands for what the source of a figure does not state."""

    task: str
    prompt: str | None = None  # the format, and a digest of the wording with its worked examples
    shots: Annotated[int, Meta(ge=0)] | None = None  # worked examples in the prompt
    # C, tokens of a completion. Publications also give the best of several lengths.
    length: _Count | Literal['best'] | None = None
    steps: _Count | None = None  # denoising steps
    block: _Count | None = None  # positions of a block
    temperature: Annotated[float, Meta(ge=0)] | None = None
    sampler: str | None = None  # the rule of commitment, and settings that are not usual
    samples: _Count | None = None  # completions of each problem
    problems: str | None = None  # a digest of the problems, whatever their order
    count: _Count | None = None  # the number of problems
    scorer: str | None = None
    version: str | None = None  # of the scorer
    checkpoint: str | None = None  # what chose the checkpoint: one of RULES

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Card))


def from_json(value: Any, name: object) -> Card:
    """Returns the card that JSON values describe.

    Args:
      value: what `Card.to_json` returned.
      name: the file that it comes from, for the message.

    Raises:
      ValueError: a field is missing or of another type; the message is one line.
    """
    return check_json(value, Card, name, REMEDY)


def completions_at(path: Path) -> Path:
    """Returns the file of completions that a path stands for.

    Args:
      path: such a file, or the folder of an evaluation or of a run. The completions.jsonl of a run
        holds a few completions of its rollouts, so that those in its test/ are taken.
    """
    if not path.is_dir():
        return path
    is_run = (path / 'config.json').is_file()
    return path / TEST / COMPLETIONS if is_run else path / COMPLETIONS


def card_beside(path: Path) -> Card | None:
    """Returns the card of a file of completions, from the result.json beside it, if it has one.

    Raises:
      ValueError: the result.json is no JSON, or the card in it is damaged; the message is one line.
    """
    result = path.with_name(RESULT)
    if not result.is_file():
        return None
    contents = read_json(result, Any, REMEDY)
    cards = contents.get(CARDS) if isinstance(contents, dict) else None
    if not isinstance(cards, dict) or path.name not in cards:
        return None
    return from_json(cards[path.name], f'{result}, {CARDS}.{path.name}')


def unlike(cards: Sequence[Card]) -> list[str]:
    """Returns the names of the fields in which cards differ, in the order of FIELDS.

    What a source does not state differs from every stated value, and from nothing else.
    """
    return [name for name in FIELDS if len({_comparable(name, card) for card in cards}) > 1]


def check_alike(cards: Mapping[str, Card | None], remedy: str) -> None:
    """Refuses figures that may not stand in one column.

    Args:
      cards: the card of each figure by the name of the figure; None is a figure without a card,
        which may stand beside others without one only.
      remedy: what to do about it; it ends the message.

    Raises:
      ValueError: cards are unlike; the message is one line that names the fields.
    """
    carded = {name: card for name, card in cards.items() if card is not None}
    without = [name for name in cards if name not in carded]
    if carded and without:
        raise ValueError(
            f'{without[0]} has no card, which {next(iter(carded))} has, so that nothing says '
            f'whether they may stand in one column; {remedy}'
        )
    for name, card in list(carded.items())[1:]:
        first_name, first = next(iter(carded.items()))
        fields = unlike([first, card])
        if fields:
            differences = ', '.join(
                f'{field} {_stated(first, field)} and {_stated(card, field)}' for field in fields
            )
            raise ValueError(
                f'{first_name} and {name} may not stand in one column, because their cards '
                f'differ: {differences}; {remedy}'
            )


def columns(cards: Iterable[Card]) -> list[Card]:
    """Returns the card of each column that figures need, in the order of appearance.

    The card of a column says 'validation' if any of its figures was chosen on validation.
    """
    column_cards: list[Card] = []
    for card in cards:
        place = next((n for n, other in enumerate(column_cards) if not unlike([other, card])), None)
        if place is None:
            column_cards.append(card)
        elif card.checkpoint == 'validation':
            column_cards[place] = card
    return column_cards


def headings(cards: Sequence[Card]) -> list[str]:
    """Returns a heading for each card: the fields in which they differ, or the task."""
    fields = unlike(cards) if len(cards) > 1 else ['task']
    return [', '.join(f'{field} {_stated(card, field)}' for field in fields) for card in cards]


def scorer_version(task: Task) -> str:
    """Returns the version of a task's scorer: one of VERSIONS, or a digest of the user's files."""
    own_files = task.defining_files()
    if own_files:
        return _digest([[name, path.read_bytes().hex()] for name, path in own_files.items()])
    version = VERSIONS[task.scorer]
    if task.scorer == 'math-verify':
        return f'{version}, math-verify {importlib.metadata.version("math-verify")}'
    return version


def wording(task: Task) -> str:
    """Returns the format of a task and a digest of its wording, worked examples included."""
    own_files = task.defining_files()
    text = [task.template, task.prefill, scorer_version(task) if own_files else '']
    return f'{task.format} {_digest(text)}'


def problems_digest(task: Task, examples: Iterable[Example]) -> str:
    """Returns a digest of problems that does not depend on their order.

    A problem that occurs twice counts once, since several completions of it are one problem.
    """
    return _digest(sorted({json.dumps(pair) for pair in to_records(task, examples)}))


def to_records(task: Task, examples: Iterable[Example]) -> list[tuple[Any, Any]]:
    """Returns (question, ground_truth) of each problem, as completions.jsonl has them.

    A task in a file of the user may derive from one of the package and have other problems. Its
    ground truth is the problem itself, so that `from_record` needs no part of the task.
    """
    if task.defining_files():
        return [Task.to_record(task, example) for example in examples]
    return [task.to_record(example) for example in examples]


def from_record(task: Task, question: Any, ground_truth: Any) -> Example:
    """Returns the problem of a pair that `to_records` returned.

    Raises:
      ValueError: the values are wrong; the message says what was found and expected.
    """
    if not task.defining_files():
        return task.read_record(question, ground_truth)
    if not isinstance(ground_truth, dict):
        raise ValueError(
            f'found ground_truth {shown(ground_truth)}, expected a problem of task {task.name} as '
            'evaluations write it'
        )
    return ground_truth


def _comparable(field: str, card: Card) -> Any:
    value = getattr(card, field)
    return 'validation' if (field, value) == ('checkpoint', 'none') else value


def _stated(card: Card, field: str) -> str:
    value = getattr(card, field)
    return NOT_STATED if value is None else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
