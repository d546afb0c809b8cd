"""A small run compiled for four TPU chips: its memory, whether it fits, and remedies if not."""

import dataclasses
import json
import math
import re

import jax
import pytest

from configs import gsm8k
from spg_jax import sharding
from spg_jax.method import set_objective
from spg_jax.planning import report as reports
from spg_jax.planning.collectives import read_traffic
from spg_jax.planning.machines import find_machine
from spg_jax.planning.memory import Resident
from spg_jax.planning.programs import compile_program, lower_for_cuda, make_plan, program
from spg_jax.planning.report import make_report, remedy, summary, times
from spg_jax.planning.tables import heading, table, verdict
from spg_jax.rl.scores import LARGEST_LOGITS, logit_pieces

pytestmark = pytest.mark.compiled_as_users_do

WIDTH = 128  # half of the other plans', which halves the time of compiling
MODEL = {'width': WIDTH, 'heads': 1, 'kv_heads': 1, 'mlp_width': 384}
# A quarter of the rows of the other plans, which halves the time of compiling once more.
ROWS = {'rl.prompts': 2, 'rl.microbatch': 8, 'evaluation.batch': 16}
MESH = {'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.tensor': 1, **ROWS} | {
    f'model.{name}': size for name, size in MODEL.items()
}
# The rollout attends as on TPUs by default, and the update by einsum, so that one program of each
# attention is compiled.
ATTENTION = {'rollout': 'auto', 'update': 'einsum'}


@pytest.fixture(scope='module')
def compiled():
    """Programs by name, which are compiled when they are first needed."""
    return {}


@pytest.fixture
def report(plan_of, compiled, config, slice_of_four, monkeypatch):
    def once(_, name):
        name = 'rollout' if name == 'evaluation' else name  # Both have the same shapes here.
        if name not in compiled:
            plan = plan_of(MESH | {'model.attention': ATTENTION[name]})
            compiled[name] = compile_program(plan, name)
        return compiled[name]

    plan_of(MESH)  # changes the configuration
    monkeypatch.setattr(reports, 'compile_program', once)
    return make_report(config, slice_of_four)


def smaller(machine, memory):
    return machine._replace(chip=machine.chip._replace(memory=memory))


def test_what_fits_and_what_does_not(report, config, slice_of_four):
    """A chip with a byte less than the largest peak is too small; a message says what to change."""
    peak = report.peak(report.largest)
    assert report.largest == 'update' and report.fits(slice_of_four.chip)
    assert report.fits(smaller(slice_of_four, peak).chip)
    small = smaller(slice_of_four, peak - 1)
    assert not report.fits(small.chip)
    sentence = remedy(report, config, small.chip)
    assert re.search(r'update needs .* GiB of the .* GiB .*: use rl.microbatch below 8', sentence)
    assert verdict(report, config, small, 0.4) == f'does not fit: {sentence}'
    config.model.remat = False
    assert remedy(report, config, small.chip).endswith('use model.remat=True')
    tiny = smaller(slice_of_four, report.resident.total)
    assert 'larger mesh.fsdp or mesh.tensor, or more chips' in remedy(report, config, tiny.chip)


def test_a_compiler_that_runs_out_of_memory_is_a_verdict(
    plan_of, config, slice_of_four, monkeypatch
):
    def compile_program(plan, name):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 330.00G exceeds 15.75G.\nSee more')

    monkeypatch.setattr(reports, 'compile_program', compile_program)
    plan_of(MESH)
    report = make_report(config, slice_of_four)
    assert not report.fits(slice_of_four.chip)
    sentence = remedy(report, config, slice_of_four.chip)
    assert '330.00G exceeds 15.75G' in sentence and 'use ' in sentence and '\n' not in sentence


def test_times_are_the_longest_limit_over_the_efficiency(report, config, slice_of_four):
    chip = slice_of_four.chip
    config.train.steps, config.rl.inner_updates = 10, 4
    recipe = times(report, config, chip, 0.5)
    rollout, update = report.programs['rollout'], report.programs['update']
    seconds = max(
        update.flops / chip.flops, update.bytes / chip.bandwidth, update.received / chip.links
    )
    assert recipe.update == pytest.approx(2 * seconds)
    assert recipe.hours == pytest.approx((3 * recipe.rollout + 10 * recipe.update) / 3600)
    assert rollout.received > 0 and update.received > 0
    assert times(report, config, chip, 0.25).hours == pytest.approx(2 * recipe.hours)
    config.rl.generation_batch = 4  # of 16 rows: the program runs four times
    assert times(report, config, chip, 0.5).rollout == pytest.approx(4 * recipe.rollout)


def test_json_says_what_the_table_says(report, config, slice_of_four):
    values = json.loads(json.dumps(summary(report, config, slice_of_four, 0.4)))
    assert (
        values['fits']
        and values['chips'] == 4
        and set(values['peak']) == set(('rollout', 'evaluation', 'update'))
    )
    assert values['resident'] == dataclasses.asdict(report.resident)
    assert table(report, slice_of_four).row_count == 3
    assert 'mesh data=1 x fsdp=4 x tensor=1' in heading(report, config, slice_of_four)


def test_logits_are_of_the_scored_positions_of_a_microbatch_and_no_more(report, compiled, plan_of):
    """The update is searched for the largest array, except tables, that has an axis of size V."""
    vocabulary = plan_of(MESH).policy.config.vocab_size
    shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', compiled['update'].text)
    positions = largest_logits(shapes, vocabulary, {WIDTH, WIDTH // 4})
    # A microbatch has 8 rows over 4 shards, and a completion has 128 positions.
    assert positions == plan_of(MESH).rows_at_once // 4 * 128 == 8 // 4 * 128


def test_logits_of_llada_8b_are_of_few_of_the_scored_positions():
    """The update is traced only, so that shapes are of all devices; a pass has one draw."""
    config = gsm8k.get_config('llada_8b_v5e8')
    plan = make_plan(config, sharding.make_mesh(config.mesh), 'tpu')
    run, arguments = program(plan, 'update')
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', str(jax.make_jaxpr(run)(*arguments)))
    positions = largest_logits(shapes, 126_464, {4096})
    shards, tensor = sharding.row_shards(plan.mesh), plan.mesh.shape['tensor']
    pieces = logit_pieces(plan.rows_at_once // shards, config.sampling.length, 126_464 // tensor)
    assert positions == plan.rows_at_once * config.sampling.length // pieces
    assert 4 * positions // shards * 126_464 // tensor <= LARGEST_LOGITS


@pytest.mark.parametrize(
    ('objective', 'draws', 'change'),
    [
        ('spg', 1, 'rl.microbatch below 32'),
        ('spg', 2, 'rl.draws_per_pass=1'),
        ('d1', 2, 'rl.microbatch below 32'),  # which has one draw of its own
        ('bgpo', 1, 'rl.draws_per_pass=1'),  # which has 16 of its own
    ],
)
def test_passes_are_advised_where_the_objective_has_several_draws(
    config, slice_of_four, objective, draws, change
):
    with config.unlocked():
        set_objective(config, objective)
    config.corruption.draws, config.rl.draws_per_pass = draws, 0
    update = reports.Program(0.0, 0.0, {'saved': 2.0**40}, None, '', 0, {}, 0.0)
    resident = Resident(weights=0, adapters=0, optimizer=0)
    report = reports.Report('v5e:2x2', {}, 'einsum', resident, {'update': update})
    assert f'most of it saved: use {change}' in remedy(report, config, slice_of_four.chip)


@pytest.mark.parametrize('informed', [True, False])
def test_what_is_read_at_arrival_sees_what_the_sampler_recorded(config, informed):
    """The influence of tokens with informed masks, and otherwise drafts and their edits; the shapes
    are those of the rollout that updates learn from."""
    config.rl.clip, config.corruption.informed = 'ppo', informed
    if not informed:
        config.sampling.sampler = 'autoedit'
        with config.unlocked():
            set_objective(config, 'autoedit')
    plan = make_plan(config, sharding.make_mesh({}, jax.devices()[:1]), 'cpu')
    run, arguments = program(plan, 'arrival')
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        arrived = jax.eval_shape(run, *arguments)
    found, expected = (
        jax.tree.map(lambda x: (x.shape, x.dtype), each) for each in (arrived, plan.rollout)
    )
    assert found == expected
    placed = jax.tree.leaves(jax.tree.map(lambda x: x.sharding, arguments[1]))
    assert set(placed) == {sharding.batch_sharding(plan.mesh)}


def largest_logits(shapes, vocabulary, widths):
    """The positions in the largest array [..., V] that has no axis of a table of embeddings."""
    sizes = set()
    for shape in shapes:
        axes = [int(size) for size in shape.split(',')]
        if vocabulary in axes and not widths & set(axes):
            sizes.add(math.prod(axes) // vocabulary)
    return max(sizes)


def test_on_tpus_no_scores_of_attention_are_in_memory(report, compiled):
    """The rollout is compiled with the splash kernel, which pads L from 144 to 256."""
    rollout = compiled['rollout'].text
    assert 'tpu_custom_call' in rollout and read_traffic(rollout)
    scores = re.compile(r'\[(\d+,)*(144,144|256,256)\]')
    assert not scores.search(rollout)
    assert scores.search(compiled['update'].text)  # by einsum


def test_for_cuda_programs_are_lowered_and_memory_is_an_estimate(config, monkeypatch):
    """The estimate is for the attention of cuDNN, which JAX cannot trace here."""
    sizes = {}

    def noted(plan, name):
        # The evaluation has the shapes of the rollout here, which is lowered already.
        lowered = sizes.get('rollout') if name == 'evaluation' else lower_for_cuda(plan, name)
        return sizes.setdefault(name, lowered)

    monkeypatch.setattr(reports, 'lower_for_cuda', noted)
    config.model.attention = 'auto'
    config.mesh.update(data=1, fsdp=4, tensor=1)
    report = make_report(config, find_machine('a100:4'))
    assert report.attention == 'cudnn'
    assert all(report.deviation(name) is None for name in ('rollout', 'evaluation', 'update'))
    assert 'an estimate' in verdict(report, config, find_machine('a100:4'), 0.4)
    assert set(sizes) == {'rollout', 'evaluation', 'update'} and sizes['update'] > 10_000


def test_on_one_gpu_llada_8b_is_fine_tuned_by_adapters_or_not_at_all(monkeypatch):
    """All parameters, two moments, their average and two gradients are six times 14.9 GiB."""
    machine = find_machine('h100:1')
    monkeypatch.setattr(reports, 'lower_for_cuda', lambda plan, name: 0)
    config = gsm8k.get_config('llada_8b_h100')
    config.base.batch_size = 8
    report = make_report(config, machine, fine_tuning=True)
    assert list(report.programs) == ['fine-tuning'] and report.fits(machine.chip)
    assert report.resident.kept == report.resident.adapters
    sentence = verdict(report, config, machine, 0.4)
    assert 'all of base.stages' in sentence and 'rollout' not in sentence
    config.lora.rank = 0
    report = make_report(config, machine, fine_tuning=True)
    assert report.peak('fine-tuning') > 6 * report.resident.weights
    sentence = verdict(report, config, machine, 0.4)
    assert 'does not fit' in sentence and 'use lora.rank above 0 and model.quantize=nf4' in sentence
