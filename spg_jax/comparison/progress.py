"""How long a comparison still takes, said before each of its runs."""

import os
import time
from collections.abc import Collection, Mapping, Sequence

from spg_jax.comparison.plan import Comparison, Job
from spg_jax.comparison.records import FINISHED, Line
from spg_jax.planning.duration import cpu_seconds


class Progress:
    """Says which run begins, and how long all runs of this start still take.

    The first estimate is a formula. Each run that ends corrects it by the time that it took.
    """

    def __init__(self, comparison: Comparison, cells: Sequence[tuple[str, str]]):
        """Begins to measure time.

        Args:
          comparison: what is run.
          cells: the pairs (task, arm) of this start.
        """
        self._comparison, self._cells = comparison, cells
        self._expected: dict[tuple[str, str, str], float] = {}
        self._began = time.monotonic()
        self._taken = self._foreseen = 0.0

    def tell(self, job: Job, lines: Mapping[Job, Line], failures: Collection[Job]) -> None:
        """Prints which run begins."""
        self._began = time.monotonic()
        left = self.jobs_left(lines, failures)
        seconds = sum(self.expected(each) for each in left)
        if self._foreseen:
            seconds *= self._taken / self._foreseen
        minutes = max(1, round(seconds / 60))
        duration = f'{minutes} min' if minutes < 120 else f'{minutes / 60:.1f} h'
        updates = self._comparison.updates_of(job)
        print(
            f'{job.name}: {updates} updates; up to {len(left)} runs and about {duration} left',
            flush=True,
        )

    def count(self, job: Job) -> None:
        """Takes the time since the run began as that of the run, which has ended."""
        self._taken += time.monotonic() - self._began
        self._foreseen += self.expected(job)

    def jobs_left(self, lines: Mapping[Job, Line], failures: Collection[Job]) -> list[Job]:
        """The runs that are left, if every learning rate of the grid has to be tried."""
        comparison, left = self._comparison, []
        for task, method in self._cells:
            done = {
                job
                for job, line in lines.items()
                if (job.task, job.method) == (task, method) and line['status'] == FINISHED
            }
            seeds = comparison.jobs(task, method, comparison.rates[0])
            begun = {job.seed for job in done if job.role == seeds[0].role}
            left += [job for job in seeds if job.seed not in begun]
            if len(comparison.rates) > 1 and not begun:
                tuning = [comparison.tuning_job(task, method, rate) for rate in comparison.rates]
                left += [job for job in tuning if job not in done and job not in failures]
        return left

    def expected(self, job: Job) -> float:
        """The seconds of a run by a formula, within a factor of about two."""
        kind = job.task, job.method, job.role
        if kind not in self._expected:
            config = self._comparison.config_of(job)
            parts = self._comparison.parts(job.task, job.method)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
            self._expected[kind] = cpu_seconds(config, parts, cores, base_exists=True)
        return self._expected[kind]
