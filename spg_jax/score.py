"""Verdicts of the published scorers on completions from any source.

python -m spg_jax.score --task=countdown FILE...    # scores completions
python -m spg_jax.score RUN... EVALUATION...        # scores those of runs and evaluations again
python -m spg_jax.score --apart RUN... FILE...      # has a column for each protocol
python -m spg_jax.score --verify FILE               # reproduces the verdicts that a file holds
python -m spg_jax.score --task=gsm8k --rules=mended FILE...          # rules of docs/scoring.md
python -m spg_jax.score --task=math500 --judge=math-verify FILE...   # a better judge, extra 'math'

A FILE or pipe holds records with question, ground_truth and completion, as JSON lines, as a JSON
list, as a table or as Parquet, or it is one JSON document as the published evaluation writes it,
{"generations": [{question, ground_truth, generations}, ...]}. Other keys are named by
--fields=completion:KEY,ground_truth:KEY. The last line printed is one JSON object; accuracies in it
are fractions.

The completions of `spg_jax.evaluate` and `spg_jax.train` come with a card, which names the protocol
(docs/scoring.md) and the task. Files whose cards are unlike do not stand in one column.
"""

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import app, flags

from spg_jax import tasks
from spg_jax.process.files import with_home
from spg_jax.tasks import card as cards
from spg_jax.tasks import judge as math_verify
from spg_jax.tasks import reading
from spg_jax.tasks.card import Card
from spg_jax.tasks.task import RULES, Example, Score, Task

FORMAT = 'published_eval'  # the format whose scorer is the published one
SHOWN = 5  # disagreements printed
COLUMNS = {
    'question': ('question',),
    'ground_truth': ('ground_truth',),
    'completion': ('completion', 'generations'),
}
USAGE = 'expected RUN..., or --task=NAME FILE..., or --verify FILE, and nothing else'
APART = 'add --apart to give each protocol a column of its own'


class Scored(NamedTuple):
    """The verdicts on one file of completions."""

    path: str  # as the user gave it
    task: Task
    card: Card | None  # of these verdicts; None if nothing says how the completions were made
    scores: list[Score]


def define_flags() -> None:
    """Defines the flags of this command; a mere import of this module defines none."""
    flags.DEFINE_string(
        'task', None, f'task of the completions: {", ".join(tasks.TASKS)} or a dotted path'
    )
    flags.DEFINE_enum(
        'judge',
        None,
        ['published', math_verify.NAME],
        f'scorer that judges; {math_verify.NAME} judges MATH500 and GSM8K only; by default that of '
        'the card, or published',
    )
    flags.DEFINE_enum(
        'rules',
        None,
        RULES,
        'rules of the scorer, see docs/scoring.md; by default those of the card, or released',
    )
    flags.DEFINE_bool('apart', False, 'give each protocol a column of its own')
    flags.DEFINE_string('fields', '', 'keys of the files, such as completion:output,question:q')
    flags.DEFINE_string('verify', None, 'file with completions and verdicts to reproduce')


def read(path: str, columns: reading.Columns = COLUMNS) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields (its place in the file, record) for every completion; reads the file once.

    Raises:
      ValueError: the file cannot be read, the file is empty, or a line is not JSON.
    """
    return reading.records(path, columns, list_key='generations')


def judge(task: Task, record: Any, where: str, columns: reading.Columns = COLUMNS) -> Score:
    """Returns the verdict on one record with the keys `columns`.

    Raises:
      ValueError: a value is missing or wrong; the message names the place `where`.
    """
    for keys in columns.values():
        # A ground truth of null is a value; it stands for a reference that could not be read.
        if not any(key in record for key in keys) and reading.pick(record, keys) is None:
            raise ValueError(
                f'{where}: found {reading.shown(record)}, '
                f'expected {", ".join(keys[0] for keys in columns.values())}'
            )
    question, truth, text = (reading.pick(record, keys) for keys in columns.values())
    if not isinstance(text, str):
        key = next((key for key in columns['completion'] if key in record), 'completion')
        raise ValueError(f'{where}: {key} is {reading.shown(text)}, expected text')
    try:
        example: Example = task.read_record(question, truth)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    return task.score(text, example)


def score(
    name: str | None,
    paths: Sequence[str],
    judged_by: str | None = None,
    rules: str | None = None,
    fields: str = '',
    apart: bool = False,
) -> dict[str, Any]:
    """Scores files together: cells (Sudoku) or answers are pooled over all of them.

    Args:
      name: the name of the task; None if all files have cards, which name it.
      paths: the paths of files, or of folders of runs and evaluations.
      judged_by: 'published', or 'math-verify' for MATH500 and GSM8K; None is the judge of the card,
        or 'published'.
      rules: the rules of the scorer, 'released' or 'mended'; None is those of the card, or
        'released'.
      fields: the user's own keys in the files, as NAME:KEY pairs with commas between them.
      apart: whether files with unlike cards have columns of their own, and are not refused.

    Returns:
      The figures with 'files' and 'card', and 'rows' with the figures of each file if there are
      several with a card. If `apart`, all of that for each column, as the list 'columns'.

    Raises:
      ValueError: the task is unknown, the judge cannot judge it or is not installed, judge and
        rules name two scorers, a file is given twice, cards are unlike, keys are given for a file
        with a card, or a file or a line is wrong; the message is one line that says which.
    """
    if judged_by and rules and (judged_by, rules) != ('published', 'released'):
        raise ValueError(
            f'found --judge={judged_by} and --rules={rules}, each of which names a scorer; give one'
        )
    columns = reading.with_own_keys(COLUMNS, fields, '--fields')
    files = [str(cards.completions_at(Path(path))) for path in paths]
    _check_distinct(files)
    scored = [
        _scored(path, file, name, judged_by, rules, columns)
        for path, file in zip(paths, files, strict=True)
    ]
    if apart:
        return {'columns': [_column(each) for each in _columns(scored)]}
    cards.check_alike({each.path: each.card for each in scored}, APART)
    return _column(scored)


def _scored(
    path: str,
    file: str,
    name: str | None,
    judged_by: str | None,
    rules: str | None,
    columns: reading.Columns,
) -> Scored:
    """The verdicts on one file, by the scorer of its card unless another is asked for."""
    card = cards.card_beside(Path(file))
    if card is None:
        if (Path(path) / 'config.json').exists() and not Path(file).exists():
            raise ValueError(
                f'{path} holds no completions yet, which the end of a run writes; run its command '
                'again to go on, or spg_jax.evaluate'
            )
        if not Path(file).exists():
            raise ValueError(f'{file}: cannot be read (No such file or directory); check the path')
        if not name:
            raise ValueError(f'{path} has no card, which would name its task; add --task=NAME')
        task = _task(name, None, judged_by, rules)
        scores = [judge(task, record, where, columns) for where, record in read(file, columns)]
        return Scored(path, task, None, scores)
    if name and card.task != name:
        raise ValueError(
            f'{path} has completions of task {card.task} by its card, found --task={name}; leave '
            '--task out'
        )
    if columns != COLUMNS:
        raise ValueError(
            f'{path} has a card, and so the keys that evaluations write, found --fields; leave '
            '--fields out, or score files with other keys by themselves'
        )
    task = _task(card.task, card.scorer, judged_by, rules)
    examples, scores = [], []
    for where, record in read(file):
        example, text = _read_evaluated(task, record, where)
        examples.append(example)
        scores.append(task.score(text, example))
    _check_whole(path, task, card, examples)
    new_card = dataclasses.replace(card, scorer=task.scorer, version=cards.scorer_version(task))
    return Scored(path, task, new_card, scores)


def _task(name: str, scorer: str | None, judged_by: str | None, rules: str | None) -> Task:
    """The task with the scorer that is asked for, or else with that of a card."""
    is_chosen = judged_by is not None or rules is not None
    if scorer == 'compact' and not is_chosen:
        return tasks.get(name, 'compact')
    if not is_chosen:
        rules = 'mended' if scorer == 'mended' else None
        judged_by = math_verify.NAME if scorer == math_verify.NAME else None
    task = tasks.get(name, FORMAT, rules=rules or 'released')
    return math_verify.judged(task) if judged_by == math_verify.NAME else task


def _read_evaluated(task: Task, record: Any, where: str) -> tuple[Example, str]:
    """The problem and the completion of a line that an evaluation wrote."""
    text = record.get('completion')
    if not isinstance(text, str):
        raise ValueError(f'{where}: completion is {reading.shown(text)}, expected text')
    try:
        example = cards.from_record(task, record.get('question'), record.get('ground_truth'))
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    return example, text


def _check_whole(path: str, task: Task, card: Card, examples: Sequence[Example]) -> None:
    """Refuses completions that are not those that their card is about."""
    expected = (card.count or 0) * (card.samples or 0)
    if len(examples) != expected:
        raise ValueError(
            f'{path}: found {len(examples)} completions, expected {expected} by its card; '
            f'{cards.REMEDY}'
        )
    if cards.problems_digest(task, examples) != card.problems:
        raise ValueError(f'{path}: its problems are not those of its card; {cards.REMEDY}')


def _columns(scored: Sequence[Scored]) -> list[list[Scored]]:
    """The files of each column. A file without a card has a column of its own."""
    columns = [
        [each for each in scored if each.card and not cards.unlike([first, each.card])]
        for first in cards.columns(each.card for each in scored if each.card)
    ]
    return columns + [[each] for each in scored if each.card is None]


def _column(scored: Sequence[Scored]) -> dict[str, Any]:
    """The figures of files that may stand in one column."""
    column_cards = cards.columns(each.card for each in scored if each.card)
    figures = scored[0].task.figures([score for each in scored for score in each.scores])
    figures |= {
        'files': [each.path for each in scored],
        'card': column_cards[0].to_json() if column_cards else None,
    }
    if column_cards and len(scored) > 1:
        figures['rows'] = [each.task.figures(each.scores) | {'file': each.path} for each in scored]
    return figures


def show(result: dict[str, Any]) -> None:
    """Prints a table with a row for each file and a column for each protocol on standard error."""
    # The import is lazy because most files are scored alone, and have no table.
    from rich.console import Console
    from rich.table import Table

    columns = result.get('columns', [result])
    carded = [cards.from_json(each['card'], 'card') for each in columns if each['card']]
    names = cards.headings(carded) + ['no card'] * (len(columns) - len(carded))
    table = Table('file', *names)
    for place, column in enumerate(columns):
        rows = column.get('rows', [column | {'file': ', '.join(column['files'])}])
        for row in rows:
            cells = [''] * len(columns)
            cells[place] = f'{row["accuracy"]:.3f}'
            table.add_row(row['file'], *cells)
    Console(stderr=True).print(table)


def _check_distinct(paths: Sequence[str]) -> None:
    """Refuses a file that is given twice, by whatever path: its completions would count twice."""
    names: dict[Any, str] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # The reader says what is wrong with such a path.
            continue
        name = names.setdefault((status.st_dev, status.st_ino), path)
        if name is not path:
            raise ValueError(f'{path}: the same file as {name}; give each file once')


def verify(path: str) -> dict[str, Any]:
    """Judges every completion of a known task and compares the result with the recorded verdict.

    A verdict is true or false, or [right, total] where a completion answers several items. The
    function prints the first disagreements, and the number of completions that were skipped because
    their task is not known here.

    Raises:
      ValueError: as `score`, or no completion in the file is of a known task.
    """
    known_tasks = {name: tasks.get(name, FORMAT) for name in tasks.TASKS}
    scores: dict[str, list[Score]] = {}
    skipped: Counter[str] = Counter()
    disagreements = 0
    for where, record in reading.json_lines(path):
        name = str(record.get('task'))
        if name not in known_tasks:
            skipped[name] += 1
            continue
        recorded_verdict = record.get('score')
        new_score = judge(known_tasks[name], record, where)
        scores.setdefault(name, []).append(new_score)
        is_single = isinstance(recorded_verdict, bool)
        verdict = new_score.solved if is_single else [new_score.right, new_score.total]
        if verdict != recorded_verdict:
            disagreements += 1
            if disagreements <= SHOWN:
                print(
                    f'{where}: {name}: scored {verdict} here, '
                    f'recorded as {reading.shown(recorded_verdict)}'
                )
    known_names = ', '.join(known_tasks)
    for name, count in skipped.items():
        print(
            f'task {name}: {count} skipped, because it has no scorer here; '
            f'known tasks are {known_names}'
        )
    if not scores:
        raise ValueError(
            f'{path}: no completion of a known task; expected completions of {known_names}'
        )
    checked = sum(map(len, scores.values()))
    return {
        'verified': path,
        'checked': checked,
        'disagreements': disagreements,
        'skipped': sum(skipped.values()),
        'tasks': [known_tasks[name].figures(verdicts) for name, verdicts in scores.items()],
    }


def main(argv: Sequence[str]) -> None:
    values, paths = flags.FLAGS, argv[1:]
    scoring = ('judge', 'rules', 'fields', 'apart')
    try:
        for word in paths:
            # A word such as task=countdown is a forgotten flag, unless a file has that name.
            name, equals, _ = word.partition('=')
            if equals and name in ('task', 'verify', *scoring) and not Path(word).exists():
                raise ValueError(f'{word}: no such file; did you mean --{word}?')
        paths = [with_home(path) for path in paths]
        if values.verify and not (
            values.task or paths or any(values[name].present for name in scoring)
        ):
            result = verify(with_home(values.verify))
        elif paths and not values.verify:
            result = score(
                values.task, paths, values.judge, values.rules, values.fields, values.apart
            )
            if 'rows' in result or 'columns' in result:
                show(result)
        else:
            raise ValueError(USAGE)
        print(json.dumps(result), flush=True)
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        # What is still in the buffer could not be written either, so nobody tries again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f'standard output cannot be written ({error.strerror}); the result is lost')
    if result.get('disagreements'):
        sys.exit(1)


def _parse(arguments: list[str]) -> list[str]:
    """Parses flags, which may also stand after files; a wrong flag is one line."""
    flags.FLAGS.set_gnu_getopt(True)
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        _fail(f'{" ".join(str(error).split())}; see --help')


def _fail(message: str) -> NoReturn:
    print(f'score: {message}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
    define_flags()
    app.run(main, flags_parser=_parse)
