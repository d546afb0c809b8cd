"""The table of docs/scoring.md: what three scorers say of the reported cases.

python -m benchmarks.scoring                        # the cases of tests/reference/faults.jsonl
python -m benchmarks.scoring --faults=FILE          # those of another file

It needs the extra 'math'.

A case is judged by the released rules, by the mended rules, and by math-verify where that knows the
task. Countdown and Sudoku count as right by the released rules if either the reward or the score
does. The last column says whether the answer is right.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from spg_jax import tasks
from spg_jax.process import cli
from spg_jax.tasks import judge
from spg_jax.tasks.task import RULES

FAULTS = Path(__file__).parents[1] / 'tests' / 'reference' / 'faults.jsonl'
WORDS = {True: 'right', False: 'wrong', None: '–'}
# The file tells this fault in words only. The digits between the words fill every empty cell as in
# the solution and change every clue.
OWN_CASES = {
    'F51': {
        'task': 'sudoku',
        'question': '0040423100030104',
        'ground_truth': '1342423124133124',
        'completion': '<answer>1st: 312. Then 1112, then 2411 and 3221</answer>',
        'right': False,
    }
}


def verdicts(case: dict[str, Any]) -> tuple[bool | None, ...]:
    """Returns whether the released rules, the mended rules and math-verify call a case right."""
    released, mended = (tasks.get(case['task'], 'published_train', rules=name) for name in RULES)
    example = released.read_record(case['question'], case['ground_truth'])
    results: list[bool | None] = [
        task.score(case['completion'], example).solved for task in (released, mended)
    ]
    if case['task'] in ('countdown', 'sudoku'):
        # The published score reads another part of the completion than the reward.
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
        case = row.get('case', {}).get('verdict') or OWN_CASES.get(row['id'])
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
    cli.define_path_flag('faults', str(FAULTS), 'File with reported cases.')
    cli.run(main)
