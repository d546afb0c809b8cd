"""DTM, discrete tilt matching (arXiv 2604.18739; yuyuanchen0/dtm @ 901c244): no policy gradient.

The policy learns the teacher pi_a tilted by e^{h R}, where R is the raw reward of a completion that
the teacher sampled; then it becomes the teacher, a grows by h, and a new phase begins, until a is
100. With W the masked positions of the active block and v over the vocabulary,

    loss = mean_j mean_{i in W_j} -sum_v target_{i,v} log pi(v),
    target_i = c pi_a(. | masked) + (e^{h R} - c) onehot(x_i)

which is not normalised: its mass is e^{h R}. For h -> 0 and c = 1 the target is the teacher's
distribution. Only the readout sees distributions, at temperature 1, and gives two numbers a
position, the cross-entropy with the teacher and the log-probability of the token.

Corruption: k ~ U{1..C} a row; the last (k - 1) div b blocks are masked, and (k - 1) mod b + 1
random positions of the block before them, which is the active one; prompts stay clean, and tokens
after the EOS are like others. Updates take random rows of a ring of completions, which is refreshed
in order and built anew in every phase. At the end of a phase, with a decaying average both teacher
and policy become the average of the policy, without one the teacher becomes the policy; Adam's
moments are cleared and the learning rate starts again: 5 % linear warm-up, constant, the last 10 %
linear down to `final_share`.

The defaults are those of Countdown; on Sudoku the released run has tilt 5 for rewards up to 2,
which is 10 for rewards up to 1, phases of 256 updates, no average, a final share of 1/3, rollouts
at temperature 0, one completion of each prompt, and refreshes every 32 updates. The released code
attends to the padding of prompts; here it is masked as everywhere.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Moment,
    Objective,
    Phase,
    Protocol,
    Ring,
    View,
    never,
    setting,
    token_log_probs,
)
from spg_jax.rl.rollout import Rollout

END = 100.0  # the tilt that all phases reach together
RECIPE = {
    'rl.group_size': 6,
    'rl.prompts': 80,
    'dtm.update_rows': 768,
    'optimizer.learning_rate': 4e-6,
    'optimizer.grad_clip': 2.0,
    'sampling.temperature': 1.0,
    'train.steps': 20400,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of DTM on Countdown."""

    tilt: float = setting(6.0, 'h, by which the tilt grows in a phase; the last phase ends at 100')
    c: float = setting(1.0, "share of the teacher's distribution in the target")
    phase: int = setting(1200, 'updates of a phase')
    average: float = setting(0.95, 'decay per update of the averaged policy; 0 keeps no average')
    final_share: float = setting(0.5, 'share of the learning rate that a phase ends with')
    positions: str = setting('active', 'masked positions in the loss: of the active block, or all')
    ring: int = setting(4, 'batches of rl.prompts prompts in the ring')
    every: int = setting(25, 'updates between two refreshes of a batch of prompts')
    update_rows: int = setting(0, 'rows of an update; 0 takes as many as a batch of prompts has')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: a setting has no meaning, or the ring has fewer rows than an update.
    """
    _check(settings)
    batching = protocol.batching
    rows = settings.update_rows or batching.rows
    if settings.ring * batching.rows < rows:
        raise ValueError(
            f'dtm.ring {settings.ring} x {batching.rows} rows (rl.prompts x rl.group_size) hold '
            f'fewer than dtm.update_rows {rows}; use dtm.ring={-(-rows // batching.rows)} or more'
        )
    tilts = jnp.asarray(tilts_of_phases(settings.tilt), jnp.float32)

    def loss(readouts: dict[str, Array], batch: Batch) -> Loss:
        """readouts: 'teacher' and 'token', [b, 1, C] in nats."""
        phase = jnp.minimum(batch.step // settings.phase, len(tilts) - 1)
        reward = jnp.maximum(batch.rows.reward, 0.0)
        extra = jnp.exp(tilts[phase] * reward)[:, None, None] - settings.c  # [b, 1, 1]
        value = settings.c * readouts['teacher'] + extra * readouts['token']
        per_row = jnp.where(batch.target, value, 0.0).sum((1, 2)) / batch.target.sum((1, 2))
        number = jnp.float32(len(reward))
        mass = jnp.exp(tilts[phase] * reward).sum()
        return Loss(-per_row.sum(), number, {'tilt_mass': (mass, number)})

    kept = {'teacher': never}
    if settings.average:
        kept['average'] = _decay(settings.average)
    return Objective(
        corruption=_last_blocks(protocol.sampling.block_length, settings.positions),
        draws=1,
        loss=loss,
        advantage=lambda reward, group_size: reward,
        readout=read_distributions,
        teacher='teacher',
        kept=kept,
        sampled_by='teacher',
        experience=Ring(settings.ring * batching.prompts, settings.every, rows),
        phase=Phase(settings.phase, _end_of_phase),
        rate=lambda count: share_of_rate(count, settings.phase, settings.final_share),
        compares=False,
        refuses={
            'rl.advantage': 'it tilts its teacher by the raw reward and compares no completions'
        },
    )


def tilts_of_phases(tilt: float) -> np.ndarray:
    """h of each phase: `tilt`, and in the last phase what is left to END."""
    phases = math.ceil(END / tilt)
    return np.minimum(tilt, END - tilt * np.arange(phases))


def share_of_rate(count: Array, phase: int, final_share: float) -> Array:
    """The learning rate after `count` updates of a phase, as a share of its highest."""
    warmup, fall = max(1, phase // 20), max(1, phase // 10)
    up = (count + 1) / warmup
    down = 1 - (1 - final_share) * (count - (phase - fall)) / max(1, fall - 1)
    return jnp.clip(jnp.minimum(up, down), 0.0, 1.0)


def read_distributions(logits: Array, view: View) -> dict[str, Array]:
    """The readouts [M, C]: sum_v pi_a(v) log pi(v), and log pi of the token, in nats."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    teacher = jax.nn.softmax(view.teacher.astype(jnp.float32))
    return {
        'teacher': (teacher * log_probs).sum(-1),
        'token': token_log_probs(logits, view),
    }


def _last_blocks(block_length: int, positions: str):
    """The corruption; its loss is taken in the active block, or at all masked positions."""

    def corruption(row: Rollout, moment: Moment) -> Draws:
        length = row.completion.size
        how_many, which = jax.random.split(moment.row)
        k = jax.random.randint(how_many, (), 1, length + 1)
        block_of_position = jnp.arange(length) // block_length
        active = length // block_length - 1 - (k - 1) // block_length
        # Positions of the active block come first, in random order.
        noise = jax.random.uniform(which, (length,))
        rank = jnp.argsort(jnp.argsort(noise + 2.0 * (block_of_position != active)))
        chosen = (block_of_position == active) & (rank <= (k - 1) % block_length)
        masked = chosen | (block_of_position > active)
        clean = jnp.zeros(row.prompt_mask.shape, bool)
        target = chosen if positions == 'active' else masked
        return Draws(masked=jnp.concatenate([clean, masked])[None], target=target[None])

    return corruption


def _decay(rate: float):
    def refresh(step: Array, kept, trained):
        return jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, kept, trained)

    return refresh


def _end_of_phase(trained, kept):
    new = kept.get('average', trained)
    return new, dict.fromkeys(kept, new)


def _check(settings: Settings) -> None:
    """Raises ValueError for a setting that has no meaning."""
    for name, value, fine, words in (
        ('tilt', settings.tilt, 0 < settings.tilt <= END, f'a number above 0, at most {END:g}'),
        ('c', settings.c, 0 <= settings.c <= 1, 'a share within [0, 1]'),
        ('phase', settings.phase, settings.phase >= 1, 'a positive integer'),
        ('average', settings.average, 0 <= settings.average < 1, 'a decay of at least 0, below 1'),
        ('final_share', settings.final_share, 0 <= settings.final_share <= 1, 'a share in [0, 1]'),
        ('ring', settings.ring, settings.ring >= 1, 'a positive integer'),
        ('every', settings.every, settings.every >= 1, 'a positive integer'),
        (
            'update_rows',
            settings.update_rows,
            settings.update_rows >= 0,
            '0, or the rows of an update',
        ),
        ('positions', settings.positions, settings.positions in ('active', 'all'), 'active or all'),
    ):
        if not fine:
            raise ValueError(f'dtm.{name} is {value}; use {words}')
