"""A run of an objective that carries more than SPG does is cut, and goes on bit for bit.

`tests/every_mechanism.py` replays states of the rollout, couples groups, looks at four other
policies, and learns from a ring in phases. `benchmarks.every_method` does the same with every
objective there is.
"""

import json

import jax
import numpy as np
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from spg_jax.method import set_objective
from spg_jax.process.interruption import Interruption
from spg_jax.runs import policies
from spg_jax.train import train
from tests import adapted
from tests.meshes import mesh_of


class CutAt(Interruption):
    """Asks to stop after some updates."""

    def __init__(self, updates: int):
        super().__init__()
        self._left = updates

    def requested(self) -> bool:
        self._left -= 1
        return self._left <= 0


def updates_of(workdir):
    """The metrics of the updates, without their clock."""
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{name: row[name] for name in row if name != 'seconds'} for row in rows if 'loss' in row]


def keep_one_layer(checkpoint):
    """Drops the second layer of the tiny checkpoint, since compiling time goes with layers."""
    config_file = checkpoint / 'config.json'
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {'n_layers': 1}))
    weights = checkpoint / 'model.safetensors'
    tensors = load_file(weights)
    first_layer = {name: x for name, x in tensors.items() if '.blocks.1.' not in name}
    assert len(first_layer) < len(tensors)
    save_file(first_layer, weights)


def test_a_run_that_is_cut_goes_on_bit_for_bit(tmp_path, monkeypatch):
    adapted.simplify(monkeypatch)
    adapted.sample_without_the_model(monkeypatch)
    adapted.skip_evaluation(monkeypatch)
    adapted.share_programs(monkeypatch, {})
    config = adapted.get_config()
    with config.unlocked():
        set_objective(config, 'tests.every_mechanism')
    config.train.update(steps=4, diagnose_every=2)
    config.lora.targets = ('query',)
    config.lora.dropout = 0.0
    config.checkpoint.every = 4
    config.update_from_flattened_dict(adapted.prepare(tmp_path))
    keep_one_layer(tmp_path / 'published')
    mesh, found = mesh_of(), {}
    for name, cuts in (('whole', ()), ('cut', (3,))):
        workdir = tmp_path / name
        with jax.set_mesh(mesh):
            for updates in cuts:
                with CutAt(updates) as cut:
                    assert not train(config, workdir, mesh, cut)
            with Interruption() as interruption:
                assert train(config, workdir, mesh, interruption)
        policy, _, variables = policies.load_policy(workdir / 'best', mesh)
        found[name] = updates_of(workdir), jax.device_get(variables['lora'])
    (updates, params), (cut_updates, cut_params) = found['whole'], found['cut']
    assert len(updates) == 4 and all(row['gradient_norm'] > 0 for row in updates)
    assert cut_updates == updates
    for leaf, expected in zip(jax.tree.leaves(cut_params), jax.tree.leaves(params), strict=True):
        assert_array_equal(np.asarray(leaf), np.asarray(expected))
