"""The arrays of a run of RL, as checkpoints hold them, and the way back to an older checkpoint."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spg_jax.assembly import Parts
from spg_jax.rl.diagnostics import Probe, probe_shapes
from spg_jax.rl.rollout import Rollout, zeros_like
from spg_jax.runs.checkpoints import Record
from spg_jax.runs.guard import Guard
from spg_jax.runs.preparation import Programs
from spg_jax.runs.report import check_record
from spg_jax.runs.run import Run
from spg_jax.training.optimizers import with_schedules_at
from spg_jax.training.train_state import TrainState

RATE = 'learning_rate_scale'  # in a record: the share of the learning rate after rollbacks


class Arrays(NamedTuple):
    """What a run carries from one update to the next."""

    state: TrainState
    rollout: Rollout | None  # or a ring of rows; None before the first
    probe: Probe | None  # None without diagnoses

    def to_save(self) -> tuple[Any, ...]:
        """What a checkpoint holds: all but the parameters that do not change."""
        probe = [] if self.probe is None else [self.probe]
        return (self.state.replace(frozen={}), self.rollout, *probe)


def restored_by(
    run: Run, state: TrainState, parts: Parts, programs: Programs, mesh: Mesh
) -> tuple[Callable[[Record], Any], Callable[[Any], Arrays]]:
    """How `Arrays` come back from a checkpoint.

    Args:
      run: whose checkpoints they are.
      state: a train state on the devices of this start, which gives the frozen parameters.
      parts, programs: of the run.
      mesh: the devices.

    Returns:
      (record -> arrays like those of its checkpoint, arrays that were read -> `Arrays`). The first
      raises ValueError if the record lacks something.
    """
    rows, length = parts.batching.rows, parts.sampling.length

    def target(record: Record) -> tuple[Any, ...]:
        check_record(record, run.directory / 'checkpoints')
        probe = None
        if prompt_length := record.get('probe_length'):
            vocabulary = programs.policy.config.vocab_size
            probe = zeros_like(probe_shapes(rows, prompt_length, length, vocabulary), mesh)
        rollout = zeros_like(programs.shapes(record['prompt_length']), mesh)
        return Arrays(state, rollout, probe).to_save()

    def arrays(read: Any) -> Arrays:
        saved, rollout, *probe = read
        return Arrays(saved.replace(frozen=state.frozen), rollout, probe[0] if probe else None)

    return target, arrays


def go_back(
    run: Run, guard: Guard, arrays: Arrays, parts: Parts, programs: Programs, mesh: Mesh
) -> tuple[Arrays, Programs]:
    """Goes back to the parameters of the last sound checkpoint, at half the learning rate.

    Parameters, moments of the optimiser, experience and probe are those of the checkpoint; without
    a sound one the run begins anew from its base policy. Updates go on counting, a falling learning
    rate with them, and prompts go on where they are, so that a run has its number of updates in
    all, ends with the share of the rate that it was to end with, and meets other prompts.
    """
    collapse, step, memory = guard.collapse, guard.sound, None
    target, restored = restored_by(run, arrays.state, parts, programs, mesh)
    if step is not None:
        try:
            read, record = run.load(step, target)
        except ValueError as error:
            print(f'{error}: the run begins anew from its base policy', flush=True)
        else:
            before, memory = restored(read), record['guard']
    if memory is None:
        probe = arrays.probe and arrays.probe.replace(before=arrays.probe.base)
        before = Arrays(programs.begin(), arrays.rollout, probe)
    sharding = before.state.step.sharding

    def placed(number: int) -> jax.Array:
        return jax.device_put(np.int32(number), sharding)

    state = before.state.replace(step=placed(run.step), skipped=placed(0))
    # A rate that is constant has a warm-up only, which comes again with moments that begin anew.
    if parts.optimizer.schedule != 'constant' or parts.objective.rate:
        phase = parts.objective.phase  # The optimiser starts anew with each.
        count = run.step % phase.length if phase else run.step
        opt_state = with_schedules_at(state.opt_state, lambda: placed(count))
        state = state.replace(opt_state=opt_state)
    guard.go_back(run.step, memory)
    run.record[RATE] = run.record.get(RATE, 1.0) / 2
    where = 'its base policy' if memory is None else f'checkpoint {step}'
    print(
        f'update {run.step}: the run has collapsed ({collapse}); it goes back to {where}, with '
        f'{run.record[RATE]:g} of optimizer.learning_rate and the next prompts',
        flush=True,
    )
    return before._replace(state=state), slowed(programs, run.record)


def slowed(programs: Programs, record: Record) -> Programs:
    """The programs with the learning rate that a run with this record has after its rollbacks."""
    share = record.get(RATE, 1.0)
    return programs if share == 1 else programs._replace(update=programs.update_at(share))
