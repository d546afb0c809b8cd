"""The commands of the README, run one after the other in their `:tiny` forms.

`.ci/run` runs the two that install, as they stand.
"""

import json
import re
import sys
from pathlib import Path

from tests import processes

REPOSITORY = Path(__file__).parent.parent
# The beginnings of commands that need hours, a download, or a machine, and what runs them small.
ELSEWHERE = {
    'pytest': '.ci/run',
    'spg_jax.compare': 'tests/test_compare.py',
    'spg_jax.plan --config=configs/gsm8k.py:llada_8b': 'tests/planning/test_report.py',
    'spg_jax.train --config=configs/gsm8k.py:llada_8b': 'tests/test_adapted_run.py',
    'spg_jax.evaluate --config=configs/gsm8k.py:llada_8b': 'tests/test_published.py',
    'spg_jax.export': 'tests/test_adapted_run.py',
}
PROBLEMS = [{'input': '30,100,93', 'output': '23'}, {'input': '1,2,3', 'output': '6'}]
GENERATION = {
    'question': '',
    'ground_truth': [[30, 100, 93], 23],
    'completion': r'\boxed{93 + 30 - 100}',
}


def commands() -> list[str]:
    """What follows `python -m` in the README's blocks of commands, without comments."""
    blocks = re.findall(r'```bash\n(.*?)```', (REPOSITORY / 'README.md').read_text(), re.DOTALL)
    lines = [line.split('  #')[0] for block in blocks for line in block.splitlines()]
    return [
        part.strip().removeprefix('python -m ')
        for line in lines
        for part in line.split('&&')
        if part.strip().startswith('python -m ')
    ]


def runs_here(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in ELSEWHERE)


def run(command: str, workdir: str, directory: Path) -> str:
    """Runs the small form of a command in a directory; returns what it printed."""
    command = re.sub(r'(configs/\w+\.py)(?!:)', r'\1:tiny', command).replace('DIR', workdir)
    # Splits at spaces outside of quotes, as a shell would.
    words = [re.sub(r"'", '', word) for word in re.findall(r"(?:'[^']*'|\S)+", command)]
    done = processes.run(
        [sys.executable, '-m', *words],
        cwd=directory,
        env=processes.environment(),
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_every_command_is_run_here_or_elsewhere():
    for beginning, place in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in commands()), beginning
        assert (REPOSITORY / place).is_file()


def test_the_commands_work_in_the_order_of_the_page(tmp_path):
    (tmp_path / 'configs').symlink_to(REPOSITORY / 'configs')
    processes.share_with_runs_in(tmp_path)
    (tmp_path / 'countdown_test.jsonl').write_text('\n'.join(map(json.dumps, PROBLEMS)))
    (tmp_path / 'generations.jsonl').write_text(json.dumps(GENERATION) + '\n')
    workdir, printed = '', {}
    for command in filter(runs_here, commands()):
        out = printed[command] = run(command, workdir, tmp_path)
        if not workdir:  # the main job, which the other commands look at
            workdir = re.search('^workdir (.*)$', out, re.MULTILINE)[1]
    modules = [command.split()[0] for command in printed]
    assert modules.count('spg_jax.train') == 2 and modules.count('spg_jax.evaluate') == 2
    for command, out in printed.items():
        last = out.splitlines()[-1]
        if command.startswith(('spg_jax.evaluate', 'spg_jax.score')):
            figures = json.loads(last)
            assert 0 <= figures['accuracy'] <= 1
        if '--data=countdown_test.jsonl' in command:
            stated = {'task': 'countdown', 'total': len(PROBLEMS), 'scorer': 'compact'}
            stated['files'] = ['countdown_test.jsonl']
            assert figures | stated == figures
            assert figures['accuracy'] == figures['correct'] / 2 and 0 <= figures['pass_at_2'] <= 1
        if command.startswith('spg_jax.train'):
            assert 'finished: test ' in out and 'spg_jax.evaluate' in last
        if command.startswith('spg_jax.generate'):
            assert 'step' in out
    score = next(out for command, out in printed.items() if command.startswith('spg_jax.score'))
    assert json.loads(score.splitlines()[-1])['accuracy'] == 1.0
