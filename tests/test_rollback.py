"""A run that collapses goes back to its last sound checkpoint, also if it is cut meanwhile.

The loop, its checkpoints and the guard are real; instead of a model, an update adds the number of
the batch of prompts to a parameter, times the share of the learning rate. With checkpoints and
windows of two updates, which is what each rollout gets, rollouts of little reward come before
updates 2, 10 and 14. After the first nothing is sound, and the run begins anew at update 4. After
the second checkpoint 8 is sound, to which it goes back at update 12. After the third no rollback is
left, and the run ends at update 16.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from optax import ScaleByScheduleState

from configs import countdown
from spg_jax import train
from spg_jax.assembly import assemble
from spg_jax.process.interruption import Interruption
from spg_jax.rl.rollout import empty_rollout, rollout_shapes
from spg_jax.runs import guard
from spg_jax.runs.metrics import read_rows
from spg_jax.runs.preparation import Programs
from spg_jax.runs.saved import RATE
from spg_jax.training import optimizers
from spg_jax.training.train_state import TrainState
from tests.meshes import mesh_of

BAD, ENDS = (2, 10, 14), 16


class Prompts:
    """Batches 0, 1, 2 …"""

    def __init__(self):
        self.number = -1

    def __next__(self):
        self.number += 1
        return SimpleNamespace(number=self.number, examples=[{'batch': self.number}])

    def get_state(self):
        return {'number': self.number}

    def set_state(self, state):
        self.number = state['number']


def first_state():
    return TrainState(
        step=jnp.int32(0),
        trained={'params': {'w': jnp.zeros(3)}},
        frozen={},
        opt_state={'adam': jnp.int32(0), 'rate': ScaleByScheduleState(jnp.int32(0))},
        average=None,
        skipped=jnp.int32(0),
    )


def update_at(share):
    def update(state, rollout):
        added = share * rollout.prompt[0, 0]
        state = state.replace(
            step=state.step + 1,
            trained=jax.tree.map(lambda x: x + added, state.trained),
            opt_state=jax.tree.map(lambda count: count + 1, state.opt_state),
        )
        names = ('loss', 'reward', 'gradient_norm', 'groups_with_signal')
        return state, {name: (rollout.reward.sum(), len(rollout.reward)) for name in names}

    return update


def programs_of(config, mesh):
    batching = assemble(config).batching

    def collect(state, batch, step):
        rollout = empty_rollout(batching.rows, 6, config.sampling.length, mesh)
        reward = jnp.full_like(rollout.reward, 0.1 if step in BAD else 1.0)
        prompt = jnp.full_like(rollout.prompt, batch.number)
        return rollout.replace(prompt=prompt, reward=reward), ['text']

    return Programs(
        policy=None,
        tokenizer=None,
        prompts=Prompts(),
        collect=collect,
        gap=lambda state, rollout, step: {},
        due=lambda step: int(step % 2 == 0),
        shapes=lambda prompt: rollout_shapes(batching.rows, prompt, config.sampling.length),
        keep=lambda experience, fresh, step, collected: fresh,
        update=update_at(1.0),
        update_at=update_at,
        begin=first_state,
        diagnosis=None,
        evaluator=SimpleNamespace(report=lambda *_: {'accuracy': 0.0, 'reward': 0.0}),
    )


class Validation:
    """Validates nothing."""

    def __init__(self, config, run, *_):
        self.run = run

    def look_at(self, state, figures=None):
        self.run.record['best'] = {'step': 0, 'accuracy': 0.0, 'reward': 0.0}


def start(workdir, rollbacks, patch, updates=0):
    """A start that is cut after so many updates, never after 0; (finished, its run in the end)."""
    config, mesh, ends = countdown.get_config('tiny'), mesh_of(), {}
    config.train.steps = ENDS + 2
    config.checkpoint.every = config.guard.window = 2
    config.guard.rollbacks = rollbacks
    config.optimizer.schedule = 'linear'
    patch.setattr(train, 'find_or_make_base', lambda *_: workdir)
    problems = SimpleNamespace(validation=[], test=[])
    programs = programs_of(config, mesh)
    patch.setattr(train, 'prepare', lambda *_: (first_state(), problems, programs))
    patch.setattr(train, 'fit_to_model', lambda config, parts, model: parts)
    patch.setattr(train.policies, 'model_of_policy', lambda _: None)
    patch.setattr(train, 'update_ahead', lambda programs, *_: programs)
    figures = {'report': programs.evaluator.report(None, None), 'validation': {}}
    patch.setattr(train, 'figures_of_base', lambda *_: figures)
    patch.setattr(train, 'origins_of', lambda *_: {})
    patch.setattr(train, 'Validation', Validation)
    patch.setattr(train.policies, 'is_policy', lambda _: True)
    patch.setattr(train.policies, 'load_trained', lambda *_: {})
    patch.setattr(train, 'report', lambda config, parts, run, *_: ends.update(run=run))

    class Cut(Interruption):
        asked = 0

        def requested(self):
            self.asked += 1
            return self.asked == updates

    return train.train(config, workdir, mesh, Cut()), ends.get('run')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that goes back twice; its states when saved, by step, and the messages."""
    workdir, saved = tmp_path_factory.mktemp('whole'), {}
    with pytest.MonkeyPatch.context() as patch:
        save = train.Run.save

        def watched(self, arrays, **record):
            saved[self.step] = jax.device_get(arrays[0])
            save(self, arrays, **record)

        patch.setattr(train.Run, 'save', watched)
        finished, run = start(workdir, 2, patch)
    assert finished
    return workdir, run, saved


def test_parameters_come_back_the_rate_is_halved_and_prompts_go_on(whole):
    """Each batch of prompts is used twice, and adds its number at the share of the rate. What the
    rollbacks took away is gone: batches 0 and 1, and then batches 4 and 5."""
    saved = whole[-1]
    expected = {
        2: 0,  # batch 0
        4: 2 * 1,  # batch 1, whose rewards are bad
        6: 2 * 2 / 2,  # begun anew at half the rate: batch 2
        8: 2 * (2 + 3) / 2,
        10: 2 * (2 + 3 + 4) / 2,
        12: 2 * (2 + 3 + 4 + 5) / 2,  # bad
        14: 2 * (2 + 3) / 2 + 2 * 6 / 4,  # from checkpoint 8, at a quarter
        16: 2 * (2 + 3) / 2 + 2 * (6 + 7) / 4,
    }
    assert {step: float(state.trained['params']['w'][0]) for step, state in saved.items()} == (
        expected
    )
    assert [int(saved[step].step) for step in saved] == list(saved)
    # Moments come back with their count, while the schedule of the learning rate goes on.
    counts = {step: int(state.opt_state['adam']) for step, state in saved.items()}
    assert counts == {2: 2, 4: 4, 6: 2, 8: 4, 10: 6, 12: 8, 14: 6, 16: 8}
    assert [int(saved[step].opt_state['rate'].count) for step in saved] == list(saved)


def test_all_is_counted_for_the_result(whole):
    workdir, run, _ = whole
    assert guard.result(run.record['guard']) == {
        'rollbacks': 2,
        'told': {'reward': 3, 'collapse': 3},
        'first_sign': {'step': 3, 'sign': 'reward'},
        'had_signal': True,
    }
    assert run.record[RATE] == 0.25 and run.step == ENDS
    rows = read_rows(workdir / 'metrics.jsonl')
    assert [row['step'] for row in rows] == list(range(1, ENDS + 1))
    assert [row.get('rollbacks', 0) for row in rows] == 4 * [0] + 8 * [1] + 4 * [2]
    batches = [row['example']['batch'] for row in read_rows(workdir / 'completions.jsonl')]
    assert batches == list(range(8))


def test_the_sound_checkpoint_is_kept_beside_the_newest(whole):
    """The two newest, of which 14 is sound for all that is known, and 8, on which 14 goes back."""
    names = sorted(int(path.name) for path in (whole[0] / 'checkpoints').iterdir())
    assert names == [8, 14, 16]


def test_cuts_change_nothing(whole, tmp_path, monkeypatch):
    """Between two updates on a rollout, and between two rollouts just before a rollback; the first
    one begins anew and the second goes back to a checkpoint."""
    for updates in (3, 1, 8):
        finished, _ = start(tmp_path, 2, monkeypatch, updates)
        assert not finished
        monkeypatch.undo()
    finished, run = start(tmp_path, 2, monkeypatch)
    assert finished and run.record['guard'] == whole[1].record['guard']
    for name in ('metrics.jsonl', 'completions.jsonl'):
        rows, expected = (read_rows(path / name) for path in (tmp_path, whole[0]))
        assert [row | {'seconds': 0} for row in rows] == [row | {'seconds': 0} for row in expected]


def test_a_run_that_only_warns_is_not_changed(tmp_path, monkeypatch):
    finished, run = start(tmp_path, 0, monkeypatch)
    assert finished and run.step == ENDS + 2 and run.record['guard']['told']['collapse'] == 3
    assert run.record['guard']['rollbacks'] == 0 and RATE not in run.record


def test_a_sound_checkpoint_that_is_gone_is_no_end(tmp_path, monkeypatch, capsys):
    """Cut just before the rollback to checkpoint 8, which is then damaged."""
    assert not start(tmp_path, 2, monkeypatch, 12)[0]
    monkeypatch.undo()
    for file in (tmp_path / 'checkpoints' / '8').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    assert start(tmp_path, 2, monkeypatch)[0]
    out = capsys.readouterr().out
    assert 'begins anew from its base policy' in out and 'it goes back to its base policy' in out


def test_half_of_the_learning_rate_gives_half_of_an_update():
    """Exactly, at every step of a schedule; weight decay is at the learning rate, too."""
    settings = optimizers.AdamW(1e-3, 0.3, 0.9, 0.99, 0.1, 1.0, 'cosine', 0.1)
    params, rng = {'w': jnp.arange(4.0)}, np.random.default_rng(0)
    halved = optimizers.AdamW(**vars(settings) | {'learning_rate': 0.5e-3})
    both = [optimizers.for_rl(each, 10) for each in (settings, halved)]
    states = [optimizer.init(params) for optimizer in both]

    @jax.jit
    def update_both(gradient, states):
        pairs = zip(both, states, strict=True)
        results = [optimizer.update(gradient, state, params) for optimizer, state in pairs]
        return tuple(zip(*results, strict=True))

    for _ in range(10):
        updates, states = update_both({'w': rng.normal(size=4).astype(np.float32)}, states)
        assert_allclose(updates[1]['w'], 0.5 * updates[0]['w'], rtol=1e-6)
    jax.tree.map(assert_array_equal, *states)


def test_a_schedule_goes_on_where_the_run_is_and_ends_at_its_last_share():
    """After 2 of 10 updates an older state goes on from update 9, in an optimiser as it is."""
    settings = optimizers.AdamW(1e-3, 0.0, 0.9, 0.99, 0.0, 1.0, 'linear', 0.1)
    optimizer, params = optimizers.for_rl(settings, 10), {'w': jnp.arange(4.0)}
    gradient, state = {'w': jnp.ones(4)}, optimizer.init(params)
    for _ in range(2):
        _, state = optimizer.update(gradient, state, params)
    late = optimizers.with_schedules_at(state, lambda: jnp.int32(9))
    early, after = (optimizer.update(gradient, each, params)[0]['w'] for each in (state, late))
    assert_allclose(early / after, (1 - 0.9 * 0.2) / (1 - 0.9 * 0.9), rtol=1e-5)
