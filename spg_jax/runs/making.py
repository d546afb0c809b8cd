"""What the trainings that make a policy directory share: its place, its restart, and its saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spg_jax.process.interruption import Interruption
from spg_jax.process.json_files import check_json
from spg_jax.runs import policies
from spg_jax.runs.claim import claimed
from spg_jax.runs.identity import Settings
from spg_jax.runs.run import Run
from spg_jax.training.train_state import TrainState


def training_of(directory: Path) -> Path:
    """Where a training that makes a policy keeps what it goes on from."""
    return directory.with_name(directory.name + '.training')


def make_at(
    directory: Path,
    settings: Settings,
    make: Callable[[Path], bool],
    waiting: Interruption | None = None,
) -> bool:
    """Makes a policy directory, unless it is there already.

    Args:
      directory: where the policy goes.
      settings: of the training; another one in the same place is refused.
      make: trains in the directory that it is given, writes the policy, and returns whether it
        finished.
      waiting: if given, another process that is making the policy is waited for.

    Returns:
      Whether the policy is there. If not, a stop was requested and everything is saved.

    Raises:
      ValueError, BlockingIOError: the directory is another training's or no policy's, or a training
        is at work in it.
    """
    is_taken = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    finished = policies.is_policy(directory)
    if is_taken and not finished:
        raise ValueError(
            f'{directory} is no policy and would be replaced by one, expected a policy, an empty '
            'directory or none; use another --workdir, or move it away'
        )
    training = training_of(directory)
    with claimed(training, settings, finished, waiting) as is_free:
        if not is_free:
            return False
        if policies.is_policy(directory):  # perhaps only since another process has made it
            return True
        return make(training)


def restored_state(
    run: Run, state: TrainState, record: type, patience: int, remedy: str
) -> TrainState:
    """The train state of the newest checkpoint, with the frozen parameters of this start.

    Args:
      run: has checkpoints to go on from.
      state: gives shapes, shardings and frozen parameters.
      record: the type of the record of a checkpoint.
      patience, remedy: as `Run.check_progress`.

    Raises:
      ValueError: no checkpoint is whole, or its record lacks something.
      FloatingPointError: the training only skips updates.
    """

    def target(saved: dict[str, Any]) -> TrainState:
        check_json(saved, record, f'{run.directory}/checkpoints', 'restore the checkpoint')
        return state.replace(frozen={})

    restored = run.restore(target).replace(frozen=state.frozen)
    run.check_progress(patience, remedy)
    return restored


def follow_update(
    run: Run,
    total: int,
    due: bool,
    save: Callable[[], None],
    patience: int,
    remedy: str,
    interruption: Interruption,
) -> bool:
    """Does what follows an update that was just pushed: saves if it is time to.

    Args:
      run: the training.
      total: its updates.
      due: whether a checkpoint is due in any case.
      save: writes a checkpoint.
      patience, remedy: as `Run.check_progress`.
      interruption: looked at after every update.

    Returns:
      Whether the training stops here, because a stop was requested; it is then saved.

    Raises:
      FloatingPointError: the training only skips updates; it is saved.
    """
    if run.step == total:
        run.flush()
    stuck, stop = run.skipped(patience), interruption.requested()
    if stuck or stop or due:
        save()
    if stuck:
        run.check_progress(patience, remedy)
    if stop:
        print(f'stopped at step {run.step} of {total}, saved; the same command goes on')
    return stop
