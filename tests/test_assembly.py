"""What an objective asks of the sampler and of the corruption, and what is refused at assembly."""

import dataclasses

import pytest

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.rl.objectives import REGISTRY

pytestmark = pytest.mark.fast


@pytest.fixture
def objective_with(monkeypatch):
    """A function that gives the objective of default_config other fields."""

    def change(**fields):
        method = REGISTRY['spg']

        def build(settings, protocol):
            return dataclasses.replace(method.build(settings, protocol), **fields)

        monkeypatch.setitem(REGISTRY, 'spg', dataclasses.replace(method, build=build))

    return change


def test_the_sampler_records_what_the_objective_asks_for(objective_with):
    assert assemble(default_config()).sampling.records == ()
    objective_with(records=('kept', 'entropy'))
    parts = assemble(default_config())
    assert parts.sampling.records == ('entropy', 'kept')
    assert not any(decoding.records for decoding in parts.evaluation.decodings)


def test_an_objective_that_needs_the_law_refuses_a_sampler_that_does_not_record_it(objective_with):
    objective_with(needs_law=True)
    config = default_config()
    with pytest.raises(
        ValueError, match="rl.objective 'spg' needs the law of .* 0.9; use"
    ) as error:
        assemble(config)
    assert '\n' not in str(error.value)
    for commit in ('random', 'left_to_right', 'entropy', 'margin'):
        config.sampling.commit = commit
        assert assemble(config).sampling.records == ('log_prob',)
    config.sampling.update(commit='low_confidence', temperature=0.0)
    assert assemble(config).sampling.exact_law
