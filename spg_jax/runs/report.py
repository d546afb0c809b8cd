"""What a run says of itself: its record, result.json, rows of validations, and the last lines."""

import shlex
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from spg_jax.process.json_files import check_json, read_json
from spg_jax.rl.evaluator import Figures
from spg_jax.runs import guard, policies
from spg_jax.runs.claim import has_checkpoint
from spg_jax.runs.identity import Settings
from spg_jax.runs.run import Run

RESULT = 'result.json'
# What editing is worth, where it edits: accuracy before it, and how many problems it changes.
EDIT_FIGURES = ('draft_accuracy', 'wrong_to_right', 'right_to_wrong')


class _Figures(TypedDict):
    accuracy: float
    reward: float


class _Best(_Figures):
    step: int


class _Record(TypedDict):
    """What is read of the record of a checkpoint when a run goes on."""

    prompts: dict[str, Any]
    prompt_length: Annotated[int, Meta(ge=1, le=10**6)]
    base: _Figures
    best: _Best
    seconds: float
    last_row: dict[str, Any]
    origins: NotRequired[dict[str, str]]  # Older records have none.


def check_record(record: dict[str, Any], checkpoint: Path) -> None:
    """Raises ValueError unless the record of a checkpoint has all that a run needs to go on."""
    check_json(record, _Record, f'{checkpoint}, its record', 'restore the checkpoint')


def summary(config: Settings, run: Run, final: Figures, base_policy: Path) -> dict[str, Any]:
    """The contents of result.json.

    Args:
      config: every setting of the run.
      run: its record holds the figures of the base policy and the best validation.
      final: figures of the best policy on the test split. Accuracies are fractions.
      base_policy: the directory of the base policy.
    """
    samples = f'pass_at_{config["evaluation"]["samples"]}'
    base, best = run.record['base'], run.record['best']
    result = {
        'task': config['task']['name'],
        'objective': config['rl']['objective'],
        'scorer': final['scorer'],
        'base_accuracy': base['accuracy'],
        'accuracy': final['accuracy'],
        'base_reward': base['reward'],
        'reward': final['reward'],
        f'base_{samples}': base[samples],
        samples: final[samples],
        'best_step': best['step'],
        'validation_accuracy': best['accuracy'],
        'steps': config['train']['steps'],
        'seconds': run.seconds,
        'base_seconds': policies.policy_notes(base_policy).get('seconds'),
        'seed': config['train']['seed'],
        'updates': run.step,
        'learning_rate_scale': run.record.get('learning_rate_scale', 1.0),
        'guard': guard.result(run.record['guard']),
        'config': config,
    }
    if 'grid_accuracy' in final:
        result |= {
            'base_grid_accuracy': base['grid_accuracy'],
            'grid_accuracy': final['grid_accuracy'],
        }
    if 'draft_accuracy' in final:  # before editing
        result |= {f'base_{name}': base[name] for name in EDIT_FIGURES}
        result |= {name: final[name] for name in EDIT_FIGURES}
    return result


def quality(figures: Figures) -> tuple[float, float]:
    """The figures that are compared to find the best policy: first accuracy, then reward."""
    return figures['accuracy'], figures['reward']


def validation_row(figures: Figures) -> dict[str, float]:
    """The figures of a validation under the names that they have in metrics.jsonl."""
    names = ('accuracy', 'grid_accuracy', 'reward', 'draft_accuracy')
    return {f'validation_{name}': figures[name] for name in names if name in figures}


class Result(TypedDict):
    """What is read of result.json."""

    base_accuracy: float
    accuracy: float
    base_grid_accuracy: NotRequired[float]
    grid_accuracy: NotRequired[float]
    steps: int  # updates that the run was to make
    seconds: float
    scorer: str
    guard: NotRequired[dict[str, Any]]  # `guard.result`; older results have none


def read_result(path: Path) -> Result:
    """The result of a finished run.

    Raises:
      OSError, ValueError: if the file cannot be read or is damaged; the message names it.
    """
    return read_json(path, Result, 'restore it, or move it away and run the same command again')


def is_finished(workdir: Path, steps: int) -> bool:
    """Whether the run in a directory has its result, of as many updates as are asked for.

    Raises:
      FileNotFoundError: the run is to be made longer and has no checkpoint to go on from.
      OSError, ValueError: as `read_result`.
    """
    path = workdir / RESULT
    if not path.is_file():
        return False
    steps_done = read_result(path)['steps']
    if steps_done < steps and not has_checkpoint(workdir):
        raise FileNotFoundError(
            f'{workdir} holds the result of {steps_done} updates and no checkpoint, from which it '
            f'could go on to {steps}; restore checkpoints/, or use another --workdir'
        )
    return steps_done >= steps


def closing_lines(result: Result, workdir: Path) -> str:
    """The last lines on the screen: what the run achieved, its files, and what to do next."""
    figures = f'{result["base_accuracy"]:.3f} -> {result["accuracy"]:.3f}'
    if 'grid_accuracy' in result and 'base_grid_accuracy' in result:
        grids = f'{result["base_grid_accuracy"]:.3f} -> {result["grid_accuracy"]:.3f}'
        figures = f'cells {figures}, grids {grids}'
    else:
        figures = f'accuracy {figures}'
    signal = ''
    if not result.get('guard', {}).get('had_signal', True):
        signal = (
            'no group of the whole run had completions of different rewards, so nothing was '
            'learned from them: use easier problems, a larger rl.group_size or a better base\n'
        )
    quoted = shlex.quote(str(workdir))
    return (
        f'{signal}finished: '
        f'test {figures} in {result["seconds"]:.0f} s ({result["scorer"]} scorer)\n'
        f'curves    {workdir}/curves.png\nresult    {workdir}/result.json\n'
        f'look      python -m spg_jax.generate --workdir={quoted} --trace\n'
        f'evaluate  python -m spg_jax.evaluate --workdir={quoted}'
    )
