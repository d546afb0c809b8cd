"""The guard of a run: signs of collapse, which checkpoints are sound, and when to go back to one.

The guard reads the row of metrics of every update. It compares means over the newest `guard.window`
updates with the first ones and with the best ones of the run:

| sign | meaning |
|---|---|
| reward | reward has lost half of the share of its best that `guard.reward_fall` allows |
| accuracy | so has accuracy on validation |
| commonest_token | one token has come half of the way to being the only one |
| repeats | tokens that equal their neighbour have come half of the way to all |
| eos_rate | completions that end have fallen to half of their share |
| entropy | entropy at masked positions has fallen to a tenth |
| kl_step | the policy moves ten times as far between two diagnoses as it did at its calmest |
| skipped | the last update was not finite |
| no_signal | no group had completions of different rewards, so no update had a gradient |

A sign is told in one sentence when it first appears. It is a warning and changes nothing. A run has
*collapsed* when the reward has lost the share `guard.reward_fall` of its best, or the accuracy the
share `guard.accuracy_fall` of its best beyond what chance explains, or `guard.skipped` updates in a
row were not finite.

A checkpoint is *sound* if no sign was there when it was written or in `guard.window` updates after
it. Two signs do not count: no_signal, which a policy that answers all right has as well, and
kl_step, which comes first but also without a collapse. A collapse shows only after a while, so that
the newest checkpoints may all be unsound.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Memory = dict[str, Any]  # JSON values

# Means over the window of these metrics are compared with their means in the first window.
RISING, HALVING, VANISHING = ('commonest_token', 'repeats'), ('eos_rate',), ('entropy',)
RARE = (*VANISHING, 'kl_step')  # The newest value of these stands for the window.
WATCHED = ('reward', 'groups_with_signal', 'gradient_norm', *RISING, *HALVING)
CALM = 'kl_step'
HARMLESS = {'no_signal', CALM}
DEVIATIONS = 3  # of chance, by which an accuracy has to fall before its fall counts


@dataclasses.dataclass(frozen=True)
class Rules:
    """The settings of the group `guard`."""

    rollbacks: int  # how often a run may go back; 0 only warns
    window: int  # updates
    reward_fall: float  # share of the best mean reward of a window
    accuracy_fall: float  # share of the best accuracy on validation
    skipped: int  # updates in a row that are not finite


class Guard:
    """Watches a run.

    Everything that it knows is in its memory, which is saved with the checkpoints, so that a run
    that was cut goes on as one that was not.

    Attributes:
      memory: JSON values.
    """

    def __init__(self, rules: Rules, problems: int, tell: Callable[[str], None] = print):
        """
        Args:
          rules: when a run has collapsed.
          problems: how many problems a validation has, for the error of its accuracy.
          tell: takes the sentences about signs.
        """
        self._rules, self._problems, self._say = rules, problems, tell
        self.memory: Memory = _new_memory()

    def read(self, row: Row) -> dict[str, float]:
        """Takes the row of an update, tells signs that are new, and returns figures to add to it.

        `gradient_norm_variation` is the standard deviation of the gradient's norm over the window
        by its mean.
        """
        memory, window = self.memory, self._rules.window
        recent = memory['recent']
        for name in WATCHED:
            if row.get(name) is not None:
                recent[name] = (recent.get(name, []) + [row[name]])[-window:]
                if len(recent[name]) == window:
                    memory['first'].setdefault(name, statistics.fmean(recent[name]))
        for name in RARE:
            if row.get(name) is not None:
                recent[name] = [row[name]]
                memory['first'].setdefault(name, row[name])
        if row.get(CALM) is not None:
            memory['calmest'] = _extreme(min, row[CALM], memory['calmest'])
        memory['skipped'] = row.get('skipped_in_a_row') or 0
        # A method that does not compare completions can learn from equal rewards.
        signals = [row.get('groups_with_signal') or 0, row.get('gradient_norm') or 0]
        memory['had_signal'] |= max(signals) > 0
        reward = self._mean('reward')
        if reward is not None:
            memory['best_reward'] = _extreme(max, reward, memory['best_reward'])
        self._tell_new(row['step'])
        figures = {}
        norms = recent.get('gradient_norm', [])
        if len(norms) > 1 and (mean := statistics.fmean(norms)):
            figures['gradient_norm_variation'] = statistics.stdev(norms) / mean
        if memory['rollbacks']:
            figures['rollbacks'] = memory['rollbacks']
        return figures

    def read_validation(self, step: int, accuracy: float) -> None:
        """Takes the accuracy of a validation, and tells signs that are new."""
        self.memory['accuracy'] = accuracy
        self.memory['best_accuracy'] = _extreme(max, accuracy, self.memory['best_accuracy'])
        self._tell_new(step)

    @property
    def signs(self) -> dict[str, str]:
        """The signs that are there now, each with what is seen, in words."""
        memory, signs = self.memory, {}
        if words := self._fallen('reward', self._rules.reward_fall / 2):
            signs['reward'] = words
        if words := self._fallen('accuracy', self._rules.accuracy_fall / 2):
            signs['accuracy'] = words
        for names, limit_of, side in (
            (RISING, lambda first: (1 + first) / 2, 1),
            (HALVING, lambda first: first / 2, -1),
            (VANISHING, lambda first: first / 10, -1),
        ):
            for name in names:
                first, now = memory['first'].get(name), self._mean(name)
                if first is not None and now is not None and side * (now - limit_of(first)) > 0:
                    signs[name] = f'{name} is {now:.3g}, after {first:.3g} at first'
        step, calmest = self._mean(CALM), memory['calmest']
        if step is not None and calmest is not None and step > 10 * calmest:
            signs[CALM] = f'{CALM} is {step:.3g} nats, after {calmest:.3g} at its calmest'
        if memory['skipped']:
            signs['skipped'] = f'{memory["skipped"]:.0f} updates in a row were not finite'
        if self._mean('groups_with_signal') == 0:
            signs['no_signal'] = (
                f'in {self._rules.window} updates no group had completions of different rewards'
            )
        return signs

    @property
    def collapse(self) -> str:
        """What says that the run has collapsed, in words; '' if it has not."""
        if self.memory['skipped'] >= self._rules.skipped:
            return self.signs['skipped']
        return self._fallen('reward', self._rules.reward_fall) or self._fallen(
            'accuracy', self._rules.accuracy_fall
        )

    @property
    def sound(self) -> int | None:
        """The step of the last sound checkpoint; None before there is one."""
        return self.memory['sound']

    @property
    def needed(self) -> list[int]:
        """Steps of the checkpoints to keep beside the newest: the last sound one, and the next."""
        steps = (self.memory['sound'], self.memory['candidate'])
        return [step for step in steps if step is not None]

    def mark(self, step: int) -> None:
        """Takes note of a checkpoint that is about to be written, and which ones are sound."""
        memory = self.memory
        if self._harmful():
            return
        candidate = memory['candidate']
        if candidate is not None and memory['last_sign'] < candidate:
            if step - candidate < self._rules.window:
                return
            memory['sound'] = candidate
        memory['candidate'] = step

    def goes_back(self) -> bool:
        """Whether the run has collapsed and a rollback is left."""
        return bool(self.collapse) and self.memory['rollbacks'] < self._rules.rollbacks

    def has_given_up(self) -> bool:
        """Whether the run has collapsed after its last rollback; never without rollbacks."""
        return bool(self.collapse) and 0 < self._rules.rollbacks <= self.memory['rollbacks']

    def go_back(self, step: int, memory: Memory | None) -> None:
        """Takes the memory of the checkpoint that a run goes back to, but keeps all counts.

        Args:
          step: the updates done, which go on counting.
          memory: of the checkpoint; None if the run begins anew.
        """
        counts = {name: self.memory[name] for name in ('told', 'first_sign', 'had_signal')}
        rollbacks, sound = self.memory['rollbacks'] + 1, self.memory['sound']
        self.memory = _new_memory() | (memory or {}) | counts
        # What the checkpoint took for sound may be gone from the disk; it is sound itself.
        self.memory |= {'rollbacks': rollbacks, 'candidate': None}
        self.memory |= {'sound': sound if memory else None, 'present': [], 'last_sign': step}

    def _tell_new(self, step: int) -> None:
        """Tells the signs that were never there before."""
        memory, signs = self.memory, self.signs
        if collapse := self.collapse:
            signs['collapse'] = collapse
        for name in signs:
            if name in memory['present']:
                continue
            memory['told'][name] = memory['told'].get(name, 0) + 1
            if memory['first_sign'] is None and name != 'no_signal':
                memory['first_sign'] = {'step': step, 'sign': name}
            if memory['told'][name] == 1:
                self._say(_sentence(step, name, signs[name], self._rules, self.sound))
        memory['present'] = sorted(signs)
        if self._harmful():
            memory['last_sign'] = step

    def _harmful(self) -> bool:
        return bool(self.signs.keys() - HARMLESS)

    def _mean(self, name: str) -> float | None:
        """The mean of a metric over the window; None before there are enough values."""
        values = self.memory['recent'].get(name, [])
        full = 1 if name in RARE else self._rules.window
        return statistics.fmean(values) if len(values) == full else None

    def _fallen(self, name: str, share: float) -> str:
        """Whether reward or accuracy has lost a share of its best, in words; '' if not."""
        best = self.memory[f'best_{name}']
        now = self._mean(name) if name == 'reward' else self.memory[name]
        if best is None or now is None or now >= best - share * abs(best):
            return ''
        if name == 'accuracy':
            chance = (best * (1 - best) / self._problems) ** 0.5
            if best - now < DEVIATIONS * chance:
                return ''
        return f'{name} is {now:.3g}, after {best:.3g} at best'


def result(memory: Memory) -> dict[str, Any]:
    """What result.json says: how often each sign appeared, which came first, and rollbacks."""
    return {name: memory[name] for name in ('rollbacks', 'told', 'first_sign', 'had_signal')}


def _new_memory() -> Memory:
    return {
        'recent': {},  # metric -> its newest values
        'first': {},  # metric -> its mean in the first window
        'best_reward': None,  # the best mean of a window
        'accuracy': None,  # of the newest validation
        'best_accuracy': None,
        'calmest': None,  # the smallest kl_step of a diagnosis
        'skipped': 0,  # updates in a row that were not finite
        'present': [],  # signs that are there
        'last_sign': -1,  # the last step with a harmful sign
        'candidate': None,  # step of the checkpoint that may turn out to be sound
        'sound': None,  # step of the last sound checkpoint
        'told': {},  # sign -> how often it appeared
        'first_sign': None,  # {'step', 'sign'} of the first sign but no_signal
        'had_signal': False,  # whether rewards of a group ever differed, or anything had a gradient
        'rollbacks': 0,
    }


def _extreme(choose: Callable[[float, float], float], value: float, before: float | None) -> float:
    return value if before is None else choose(value, before)


def _sentence(step: int, name: str, words: str, rules: Rules, sound: int | None) -> str:
    if name != 'collapse':
        return f'warning: after update {step}, {words} (sign {name})'
    where = 'the base policy' if sound is None else f'checkpoint {sound}, the last sound one'
    advice = '' if rules.rollbacks else f'; with guard.rollbacks=3 the run goes back to {where}'
    return f'warning: after update {step} the run has collapsed: {words}{advice}'
