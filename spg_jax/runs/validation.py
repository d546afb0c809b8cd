"""The loss of a conversion on problems that it does not learn from, and its best policies."""

import shutil
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from spg_jax.data.tokenizers import Tokenizer
from spg_jax.models.policy import Policy
from spg_jax.process import distributed
from spg_jax.runs import policies
from spg_jax.runs.examples import Examples
from spg_jax.runs.run import Run
from spg_jax.training.conversion import make_validation
from spg_jax.training.merging import best_steps
from spg_jax.training.phases import WHOLE, Conversion
from spg_jax.training.train_state import TrainState


class Validation:
    """Measures the loss on problems that are not learned from, and keeps the best policies.

    Phases of the whole length are measured by the loss of the whole length, and the others by that
    of the blocks of the last phase, so that figures can be compared from phase to phase.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        conversion: Conversion,
        run: Run,
        policy: Policy,
        tokenizer: Tokenizer,
        examples: Examples,
        mesh: Mesh,
    ):
        self._conversion, self._run, self._mesh = conversion, run, mesh
        self._policy, self._tokenizer, self._examples = policy, tokenizer, examples
        self._keep = config.convert.keep_best
        self._loss_of = {
            block: make_validation(policy, block, config.base.seed)
            for block in {WHOLE, conversion.final_block}
        }
        run.record.setdefault('candidates', {})
        run.record.setdefault('validated', [])

    def chooses(self, number: int) -> bool:
        """Whether the policies of a phase, by its number, can become part of the result."""
        return number == len(self._conversion.phases) - 1

    def look_at(self, state: TrainState, number: int) -> None:
        """Writes the loss of a policy, and in the last phase the policy if it is among the best."""
        phase, final = self._conversion.phases[number], self._conversion.final_block
        block = WHOLE if phase.block == WHOLE else final
        losses = [
            float(self._loss_of[block](state.variables, batch))
            for batch in self._examples.held_out()
        ]
        loss, run = float(np.mean(losses)), self._run
        run.flush()
        run.write({loss_name(block): loss, 'block': phase.block})
        figures = {
            'phase': number,
            'update': run.step,
            'block': phase.block,
            loss_name(block): loss,
        }
        # Only the last figure of each phase is kept, beside all of them in metrics.jsonl.
        before = [row for row in run.record['validated'] if row['phase'] != number]
        run.record['validated'] = [*before, figures]
        if self.chooses(number) and np.isfinite(loss):
            self._keep_if_good(state, loss)

    def _keep_if_good(self, state: TrainState, loss: float) -> None:
        step = self._run.step
        losses = {int(key): x for key, x in self._run.record['candidates'].items()} | {step: loss}
        chosen = best_steps(losses, self._keep)
        if step in chosen:
            place = self._place(step)
            policies.save_policy(
                place, state.variables, self._policy.config, self._tokenizer, {'loss': loss}
            )
        self._run.record['candidates'] = {str(key): losses[key] for key in chosen}

    def tidy(self) -> None:
        """Deletes policies that are no longer among the best, once a checkpoint says so."""
        if not distributed.is_leader():
            return
        for place in (self._run.directory / 'candidates').glob('*'):
            if place.name not in self._run.record['candidates']:
                shutil.rmtree(place, ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self._run.directory / 'candidates' / str(step)

    def best(self) -> list[int]:
        """The updates after which the policies are the best ones.

        Raises:
          FloatingPointError: no policy of the last phase has a finite loss.
        """
        steps = sorted(map(int, self._run.record['candidates']))
        if not steps:
            raise FloatingPointError(
                f'{self._run.directory}: no policy of the last phase has a finite loss on '
                'validation; lower convert.learning_rate in another --workdir'
            )
        return steps

    def parameters(self, step: int) -> Any:
        """The parameters of one of the best policies."""
        return policies.load_policy(self._place(step), self._mesh)[2]['params']


def loss_name(block: int) -> str:
    """The name of the validation loss for blocks of a size."""
    return f'validation_loss_{f"block_{block}" if block else "whole"}'
