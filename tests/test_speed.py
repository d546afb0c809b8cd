"""The benchmark of speed: what it counts, against numbers by hand, and that all of it runs."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.speed import growth, machine, pairs, programs, report, start
from benchmarks.speed.counts import backward_flops, forward_flops, slope
from benchmarks.speed.machine import measure_machine, times
from spg_jax.models.policy import Policy
from tests.meshes import mesh_of
from tests.parameters import start_from_random_params

# N = 2 heads of 2 numbers, K = 1 key/value head.
MODEL = SimpleNamespace(vocab_size=10, width=4, layers=3, heads=2, kv_heads=1, mlp_width=8)
TINY = programs.Preset(8, 1, 2, 8, 16, prompt=4, completion=4, steps=4, block=2, rows=16, group=4)


@pytest.mark.fast
def test_flops_are_those_counted_by_hand():
    queries, keys, values, output = 2 * 4 * 4, 2 * 4 * 2, 2 * 4 * 2, 2 * 4 * 4
    mlp = 2 * 4 * 8 + 2 * 4 * 8 + 2 * 8 * 4
    scores, mean = 2 * (2 * 2 * 5), 2 * (2 * 5 * 2)  # heads x product of one query with 5 keys
    token = queries + keys + values + output + mlp + scores + mean  # of one layer
    logits = 2 * 4 * 10
    # In the last layer three of five tokens give keys and values alone.
    row = 5 * 2 * token + 2 * token + 3 * (keys + values) + 2 * logits
    assert forward_flops(MODEL, rows=7, length=5, scored=2) == 7 * row
    assert backward_flops(MODEL, 7, 5, 2) == 2 * forward_flops(MODEL, 7, 5, 2)


@pytest.mark.fast
@pytest.mark.parametrize('power', [0.0, 1.0, 1.5])
def test_a_power_law_has_its_power_as_slope(power):
    sizes = [24, 48, 96]
    assert slope(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.fast
def test_the_first_call_counts_only_where_it_is_the_only_one():
    calls = []
    assert len(times(lambda: calls.append(0), budget=0.0, most=5)) == len(calls) == 1
    calls.clear()
    assert len(times(lambda: calls.append(0), budget=60.0, most=5)) == 5
    assert len(calls) == 6


@pytest.mark.fast
def test_the_peak_of_a_call_is_that_of_the_fastest_product_right_before_and_after(monkeypatch):
    def call():
        pass

    products = iter([1.0, 4.0, 8.0, 2.0])  # seconds around the call that does not count, and two
    last = iter([1.0, 3.0, 5.0])
    monkeypatch.setattr(machine, 'PRODUCTS', 1)
    monkeypatch.setattr(machine, '_seconds', lambda run: next(last if run is call else products))
    assert machine.times_and_peaks(call, budget=7.0, most=5, matrix=2) == ([3.0, 5.0], [4.0, 8.0])


@pytest.mark.fast
def test_a_pair_is_before_over_after_and_rows_of_one_tree_are_left_out():
    def measured(update, rollout=None):
        rows = [{'preset': 'small', 'what': 'update', 'seconds': update}]
        if rollout:
            rows.append({'preset': 'small', 'what': 'rollout', 'seconds': rollout})
        return {'rows': rows}

    reports = [(measured(6.0), measured(2.0, 1.0)), (measured(4.0), measured(4.0, 1.0))]
    reports.append((measured(2.0), measured(1.0)))
    assert pairs.paired(reports) == [
        {
            'preset': 'small',
            'what': 'update',
            'before': 4.0,
            'after': 2.0,
            'ratio': 2.0,  # of 3, 1 and 2
            'least': 1.0,
            'most': 3.0,
            'pairs': 3,
        }
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    ('code', 'out', 'message'),
    [
        (1, '', 'failed: no such kernel'),
        (0, json.dumps({'protocol': 0, 'rows': []}), 'speaks protocol 0, expected'),
    ],
)
def test_a_tree_that_cannot_be_compared_is_one_line(tmp_path, code, out, message):
    result = SimpleNamespace(returncode=code, stdout=out, stderr='Traceback\nno such kernel\n')
    with pytest.raises(ValueError, match=message):
        pairs._measure(tmp_path, [], tmp_path, run=lambda *_, **__: result)


@pytest.mark.fast
def test_a_start_is_over_with_the_first_row_of_an_update(tmp_path):
    metrics = tmp_path / 'metrics.jsonl'
    assert not start._has_updated(metrics)
    metrics.write_text('{"step": 0, "validation_accuracy": 0.1}\n{"step": 1, "lo')
    assert not start._has_updated(metrics)
    metrics.write_text('{"step": 0, "validation_accuracy": 0.1}\n{"step": 1, "loss": 0.1}\n')
    assert start._has_updated(metrics)


@pytest.mark.fast
def test_the_rollouts_end_as_their_names_say():
    policy = Policy(None, mask_id=0, eos_id=1, allowed=np.arange(16) > 0)
    never = programs._allowing(policy, None, with_eos=False).allowed
    assert not never[:2].any() and never[2:].all()
    some = programs._allowing(policy, 3, with_eos=True).allowed
    assert np.flatnonzero(some).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(programs._allowing(policy, 0, with_eos=True).allowed).tolist() == [1]


@pytest.mark.fast
def test_a_quarter_of_the_groups_has_advantages_of_both_signs():
    groups = programs.advantages(16, 4, live_share=0.25).reshape(4, 4)
    assert (groups != 0).sum(1).tolist() == [4, 0, 0, 0]
    assert groups.sum() == 0 and np.abs(groups).max() == 0.5
    assert programs.advantages(16, 4, live_share=1.0).all()


@pytest.mark.fast
def test_growth_is_that_within_a_round_whatever_the_speed_of_the_machine(monkeypatch):
    rounds = itertools.count()

    def work(program, preset):
        def run():  # The machine is slower from round to round.
            return 3 * preset.rows**1.5 * 2 ** (next(rounds) // 3)

        return programs.Work(run, {'bytes': 5 * preset.rows}, None)

    monkeypatch.setattr(growth, '_work', work)
    monkeypatch.setattr(machine, '_seconds', lambda run: run())
    grown = growth.measure_growth('batch of an update')
    assert grown['sizes'] == [48, 96, 192]
    # The first of six rounds does not count; the third of the others is the median.
    assert grown['seconds'] == [3 * rows**1.5 * 2**3 for rows in (48, 96, 192)]
    assert (grown['slope'], grown['memory_slope']) == pytest.approx((1.5, 1.0))


def test_everything_runs_and_is_reported(monkeypatch, tmp_path, capsys):
    mesh = mesh_of()  # Programs for one device compile in less time.
    start_from_random_params(monkeypatch)
    monkeypatch.setattr(programs.sharding, 'make_mesh', lambda _: mesh)
    bench = programs.Bench(TINY)
    with jax.set_mesh(mesh):
        works = bench.rollout(False), bench.update(1.0), bench.pretraining_step()
        rows = [programs.measured(work, 0.0) for work in works]
    rows = [{'preset': 'tiny'} | row for row in rows]
    by_name = {row['what']: row for row in rows}
    assert all(row['seconds'] > 0 for row in rows)
    model = SimpleNamespace(vocab_size=16, width=8, layers=1, heads=2, kv_heads=2, mlp_width=8)
    assert by_name['rollout, none ends early']['flops'] == 4 * forward_flops(model, 16, 8, 2)
    assert by_name['update, dense']['flops'] == 3 * forward_flops(model, 32, 8, 4)
    assert by_name['update, dense']['bytes'] > 0
    grown = {'axis': 'batch', 'sizes': [1, 2], 'seconds': [0.1, 0.2], 'slope': 1.0}
    measured = measure_machine(matrix=64, numbers=1000, budget=0.0)
    whole = {'machine': measured, 'rows': rows, 'growth': [grown], 'peak_bytes': 2**20}
    report.print_report(json.loads(json.dumps(whole)))
    out = capsys.readouterr().out
    assert 'update, dense' in out and 'slope' in out
    report.draw(whole, tmp_path / 'speed.png')
    assert (tmp_path / 'speed.png').stat().st_size > 1000
    assert jax.devices()[0].platform in measured['device']
