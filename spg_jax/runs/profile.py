"""A trace of one rollout and one update: what the devices and the host do, on one time line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from spg_jax.data.batches import PromptBatch
from spg_jax.process import distributed, libtpu
from spg_jax.rl.rollout import Rollout
from spg_jax.runs.preparation import Programs, Update
from spg_jax.training.train_state import TrainState

FOLDER = 'profile'  # in the directory of a run


def prepare_tracing() -> None:
    """Keeps a libtpu without a TPU out of the traces; call it before JAX looks for devices.

    JAX also asks the tracers of the plugins that it has loaded, and one of another version than
    JAX expects ends the process.
    """
    has_cuda = Path('/proc/driver/nvidia/version').exists()
    if libtpu.is_installed() and libtpu.surely_absent() and not has_cuda:
        if not jax.config.jax_platforms:
            jax.config.update('jax_platforms', 'cpu')


def profiled(programs: Programs, update: int, workdir: Path) -> Programs:
    """Programs that trace the first rollout from an update on, and the update that follows it.

    The phases are named `rollout`, in it `generate` and `decode and reward`, and `update`. Of
    several processes the leader alone traces, because they share the folder.

    Args:
      programs: of the run.
      update: the number of the update, from 1; 0 traces nothing.
      workdir: gets the folder FOLDER. If it is there already, nothing is traced.
    """
    folder = workdir / FOLDER
    if not update or folder.exists() or not distributed.is_leader():
        return programs
    trace = _Trace(folder, update)

    def collect(state: TrainState, prompts: PromptBatch, step: int) -> tuple[Rollout, list[str]]:
        trace.begin(step)
        with jax.profiler.TraceAnnotation('rollout'):
            return programs.collect(state, prompts, step)

    def traced(update: Update) -> Callable[..., Any]:
        def run(state: TrainState, experience: Rollout) -> Any:
            if not trace.is_on:
                return update(state, experience)
            with jax.profiler.StepTraceAnnotation('update', step_num=trace.step):
                result = jax.block_until_ready(update(state, experience))
            trace.end()
            return result

        return run

    return programs._replace(
        collect=collect,
        update=traced(programs.update),
        update_at=lambda share: traced(programs.update_at(share)),
    )


class _Trace:
    """The trace, which is taken once."""

    def __init__(self, folder: Path, update: int):
        self._folder, self._update = folder, update
        self.step = 0  # updates done before the one that is traced
        self.is_on = self._is_over = False

    def begin(self, step: int) -> None:
        """Starts the trace if the rollout before this update is the first that is asked for."""
        if self.is_on or self._is_over or step + 1 < self._update:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Every call of Python would hide the phases.
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self.step, self.is_on = step, True

    def end(self) -> None:
        """Writes the trace, and says how to open it."""
        jax.profiler.stop_trace()
        self.is_on, self._is_over = False, True
        (file,) = self._folder.rglob('perfetto_trace.json.gz')
        print(
            f'profile   {file}: open it at https://ui.perfetto.dev, or pip install xprof and '
            f'run xprof {self._folder}',
            flush=True,
        )
