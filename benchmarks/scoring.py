"""The table of docs/scoring.md: what three scorers say of the reported cases.

python -m benchmarks.scoring                        # the cases of tests/reference/faults.jsonl
python -m benchmarks.scoring --faults=FILE          # those of another file

It needs the extra 'math'.

A case is judged by the released rules, by the mended rules, and by math-verify where that knows the
task. Countdown counts as right by the released rules if either its reward or its score does. The
last column says whether the answer is right.
"""

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from spg_jax import tasks
from spg_jax.tasks import judge
from spg_jax.tasks.task import RULES

FAULTS = Path(__file__).parents[1] / 'tests' / 'reference' / 'faults.jsonl'
WORDS = {True: 'right', False: 'wrong', None: '–'}


def verdicts(case: dict[str, Any]) -> tuple[bool | None, ...]:
    """Returns whether the released rules, the mended rules and math-verify call a case right."""
    released, mended = (tasks.get(case['task'], 'published_train', rules=name) for name in RULES)
    example = released.read_record(case['question'], case['ground_truth'])
    results: list[bool | None] = [
        task.score(case['completion'], example).solved for task in (released, mended)
    ]
    if case['task'] == 'countdown':
        # The published score reads a box or the whole text; the reward reads the tag.
        results[0] = bool(results[0]) or released.reward(case['completion'], example) == 1
        return (*results, None)
    return *results, judge.judged(released).score(case['completion'], example).solved


def table(path: Path) -> str:
    """Returns the Markdown table of the cases of a file, each distinct case once."""
    lines = [
        '| case | task | reference | completion | released | mended | math-verify | truth |',
        '|---|---|---|---|---|---|---|---|',
    ]
    names: dict[str, list[str]] = {}
    cases: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        case = row.get('case', {}).get('verdict')
        if case:
            key = json.dumps([case[name] for name in ('task', 'ground_truth', 'completion')])
            names.setdefault(key, []).append(row['id'])
            cases[key] = case
    agreed = [0, 0, 0]
    known = [0, 0, 0]
    for key, case in cases.items():
        results = verdicts(case)
        for place, result in enumerate(results):
            known[place] += result is not None
            agreed[place] += result == case['right']
        cells = [', '.join(names[key]), case['task'], code(case['ground_truth'])]
        cells += [code(case['completion']), *map(WORDS.get, results), WORDS[case['right']]]
        lines.append(f'| {" | ".join(map(str, cells))} |')
    shares = [f'{right} of {total}' for right, total in zip(agreed, known, strict=True)]
    lines.append(f'| in agreement | | | | {" | ".join(shares)} | |')
    return '\n'.join(lines)


def code(value: Any) -> str:
    """Returns a value as code in a cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f'`{text}`'.replace('|', '\\|')


def main(_: list[str]) -> None:
    print(table(Path(flags.FLAGS.faults)))


if __name__ == '__main__':
    flags.DEFINE_string('faults', str(FAULTS), 'File with reported cases.')
    app.run(main)
