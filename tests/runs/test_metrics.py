"""Rows in the files of a run appear once and in order, wherever the run was cut and resumed."""

import json

import jax.numpy as jnp
import pytest

from spg_jax.runs import plots
from spg_jax.runs.metrics import MetricsWriter, SampleWriter, read, read_rows

pytestmark = pytest.mark.fast


def test_sums_are_divided_by_their_weights_and_empty_ones_left_out():
    metrics = {'a': (jnp.float32(6), jnp.float32(4)), 'b': (jnp.float32(0), jnp.float32(0))}
    assert read(metrics) == {'a': 1.5}


def test_metrics_come_one_update_late_and_all_of_them(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.push(step, {'loss': (jnp.float32(step), jnp.float32(1))})
        assert writer.last_row.get('step', 0) == step - 1
    writer.close()
    assert [row['loss'] for row in read_rows(tmp_path / 'metrics.jsonl')] == [1, 2, 3]


def test_resuming_drops_later_rows_and_restores_a_lost_one(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    writer = MetricsWriter(tmp_path, start=1)
    writer.write({'step': 2, 'loss': float('nan')})
    writer.close()
    assert read_rows(path) == [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': None}]
    MetricsWriter(tmp_path, start=3, last_row={'step': 3, 'loss': 3.0}).close()
    assert [row['step'] for row in read_rows(path)] == [1, 2, 3]


def test_a_file_that_was_lost_is_begun_again_with_a_word(tmp_path, capsys):
    MetricsWriter(tmp_path).close()
    assert capsys.readouterr().err == ''
    (tmp_path / 'metrics.jsonl').unlink()
    MetricsWriter(tmp_path, start=3).close()
    assert 'metrics.jsonl is gone; it begins again after step 3' in capsys.readouterr().err


def test_a_row_that_is_not_finite_comes_back_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.push(1, {'loss': (jnp.float32(jnp.nan), jnp.float32(1))})
    writer.flush()
    MetricsWriter(tmp_path, start=1, last_row=writer.last_row).close()
    rows = read_rows(tmp_path / 'metrics.jsonl')
    assert [(row['step'], row['loss']) for row in rows] == [(1, None)]


def test_samples_of_a_rollout_that_comes_again_are_not_doubled(tmp_path):
    path = tmp_path / 'completions.jsonl'
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n')
    SampleWriter(tmp_path, start=4)
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [0, 2]


@pytest.mark.parametrize('text', ['', '{"step": 1'])
def test_a_file_cut_short_reads_as_far_as_it_goes(tmp_path, text):
    path = tmp_path / 'rows.jsonl'
    path.write_text(text)
    assert read_rows(path) == []


@pytest.mark.parametrize(
    'line',
    [
        *('{"step": 3, "lo#s": ', '{"a": 1}', '5', '[' * 100_000, '\xff\xfe'),
        *('{"step": -1}', '{"step": 1' + '0' * 400 + '}'),
    ],
)
def test_damaged_rows_are_set_aside_and_the_others_stay(tmp_path, capsys, line):
    """F02 to F05."""
    rows = [json.dumps({'step': step}) for step in range(1, 101)]
    rows[2] = line
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes('\n'.join(rows).encode('latin-1') + b'\n')
    MetricsWriter(tmp_path, start=100).close()
    assert [row['step'] for row in read_rows(path)] == [1, 2, *range(4, 101)]
    place = tmp_path / 'metrics.jsonl.damaged'
    assert place.read_bytes() == line.encode('latin-1') + b'\n'
    assert capsys.readouterr().out == f'{path}: 1 damaged lines set aside in {place}\n'


def test_a_kill_while_rows_are_dropped_loses_none(tmp_path, monkeypatch):
    """F91: the file is replaced as a whole."""
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(json.dumps({'step': step}) + '\n' for step in range(16)))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('spg_jax.process.files.os.fsync', killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, start=11)
    assert len(read_rows(path)) == 16


def test_events_are_on_disk_when_a_checkpoint_is(tmp_path):
    """G29."""
    writer = MetricsWriter(tmp_path)
    writer.write({'step': 1, 'loss': 2.0})
    (events,) = (tmp_path / 'events').iterdir()
    before = events.stat().st_size
    writer.flush_events()
    assert events.stat().st_size > before
    writer.close()


def test_curves_leave_out_what_is_no_number(tmp_path):
    values = ('0.5', '"x"', '[1.0]', '{}', 'Infinity', 'NaN', '1' + '0' * 400, '1e300')
    rows = [f'{{"step": {step}, "reward": {value}}}' for step, value in enumerate(values)]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(rows))
    assert plots.curves(tmp_path).stat().st_size > 0
