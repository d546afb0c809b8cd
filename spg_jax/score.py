"""Verdicts of the published scorers on completions from any source.

python -m spg_jax.score --task=countdown FILE...    # scores completions
python -m spg_jax.score --verify FILE               # reproduces the verdicts that a file holds
python -m spg_jax.score --task=math500 --judge=math-verify FILE...   # a better judge, extra 'math'

A FILE holds one JSON object a line, {question, ground_truth, completion}, or it is one JSON
document as the published evaluation writes it, {"generations": [{question, ground_truth,
generations}, ...]}. The last line printed is one JSON object; accuracies in it are fractions.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from spg_jax import tasks
from spg_jax.tasks import reading
from spg_jax.tasks.math500 import judge as math_verify
from spg_jax.tasks.task import Example, Score, Task

FORMAT = 'published_eval'  # the format whose scorer is the published one
SHOWN = 5  # disagreements printed

_TASK = flags.DEFINE_string('task', None, f'task of the completions: {", ".join(tasks.TASKS)}')
_JUDGE = flags.DEFINE_enum(
    'judge',
    'published',
    ['published', math_verify.NAME],
    f'scorer that judges; {math_verify.NAME} judges MATH500 only',
)
_VERIFY = flags.DEFINE_string('verify', None, 'file with completions and verdicts to reproduce')


def read(path: str) -> Iterator[tuple[str, Any, str]]:
    """Yields (its place in the file, record, key of its completion) for every completion.

    Raises:
      ValueError: the file cannot be read, the file is empty, or a line is not JSON.
    """
    document = _document(path)
    if document is None:
        yield from ((where, record, 'completion') for where, record in reading.json_lines(path))
        return
    if not isinstance(document, list) or not document:
        raise ValueError(
            f'{path}: generations is {reading.shown(document)}, expected a list of completions'
        )
    for index, record in enumerate(document):
        yield f'{path}: generations[{index}]', record, 'generations'


def _document(path: str) -> Any:
    """Returns the value of 'generations' if the whole file is one such document, else None."""
    try:
        document = reading.parse_json(reading.read_text(path), path)
    except reading.NotJson:
        return None
    return document.get('generations') if isinstance(document, dict) else None


def judge(task: Task, record: Any, completion: str, where: str) -> Score:
    """Returns the verdict on one record, whose completion is under the key `completion`."""
    try:
        question, truth, text = (record[key] for key in ('question', 'ground_truth', completion))
    except (KeyError, TypeError):
        raise ValueError(
            f'{where}: found {reading.shown(record)}, '
            f'expected question, ground_truth and {completion}'
        ) from None
    if not isinstance(text, str):
        raise ValueError(f'{where}: {completion} is {reading.shown(text)}, expected text')
    try:
        example: Example = task.read_record(question, truth)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    return task.score(text, example)


def score(name: str, paths: Sequence[str], judged_by: str = 'published') -> dict[str, Any]:
    """Scores files together: cells (Sudoku) or answers are pooled over all of them.

    Args:
      name: the name of the task.
      paths: the paths of the files.
      judged_by: 'published', or 'math-verify' for MATH500.

    Raises:
      ValueError: the task is unknown, the judge cannot judge it or is not installed, or a file or a
        line is wrong; the message is one line that says which.
    """
    task = tasks.get(name, FORMAT)
    if judged_by == math_verify.NAME:
        task = math_verify.judged(task)
    scores = [
        judge(task, record, key, where) for path in paths for where, record, key in read(path)
    ]
    return task.figures(scores) | {'files': list(paths)}


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
        new_score = judge(known_tasks[name], record, 'completion', where)
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
    paths = argv[1:]
    try:
        if _VERIFY.value and not (_TASK.value or paths or _JUDGE.present):
            result = verify(_VERIFY.value)
        elif _TASK.value and paths and not _VERIFY.value:
            result = score(_TASK.value, paths, _JUDGE.value)
        else:
            raise ValueError('expected --task=NAME FILE... or --verify FILE, and nothing else')
    except ValueError as error:
        print(f'score: {error}', file=sys.stderr)
        sys.exit(1)
    print(json.dumps(result))
    if result.get('disagreements'):
        sys.exit(1)


if __name__ == '__main__':
    app.run(main)
