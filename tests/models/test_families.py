"""Published families against the outputs of their own classes on tiny random models.

The numbers in tests/reference/families were computed in float32 by the published PyTorch classes;
docs/families.md says which. Tolerances are those of the classes against float64, three times over.
"""

import dataclasses
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from spg_jax.diffusion.samplers.prediction import timestep_commits
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.experts import RoutedExperts
from spg_jax.models.families import FAMILIES, find_family, read_config
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.peft import check_adapter, load_adapter, save_adapter
from spg_jax.models.policy import Policy
from spg_jax.models.published import SpecialIds
from spg_jax.models.quantized import is_quantized
from spg_jax.models.transformer import Transformer, check_heads
from spg_jax.models.visibility import Visibility
from spg_jax.models.weights import load_checkpoint, save_checkpoint, tensor_shapes
from spg_jax.models.windows import Window
from spg_jax.rl.collection import make_generate
from spg_jax.sharding import abstract_params, param_shardings, put_batch
from tests.meshes import mesh_of

pytestmark = pytest.mark.numerical

REFERENCE = Path(__file__).parents[1] / 'reference' / 'families'
AUTOREGRESSIVE = (
    'tiny_qwen2/untied',
    'tiny_qwen2/tied',
    'tiny_llama/untied',
    'tiny_llama/tied',
    'tiny_llama/tied_llama3rope',
)
MIXTURES = ('tiny_llada2_moe', 'tiny_llada_moe', 'tiny_llada_moe_options')
# What config.json of the published mixtures does not say and the reference files do.
EXTRA = {
    'tiny_llada2_moe': {'mask_token_id': 104, 'block_length': 8},
    'tiny_llada_moe': {'mask_token_id': 120},
    'tiny_llada_moe_options': {'mask_token_id': 90},
}
ALL = (*AUTOREGRESSIVE, 'tiny_dream', *MIXTURES)
LOGITS = {'atol': 1e-4, 'rtol': 0}


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes a copy of a tiny checkpoint with other settings in config.json."""

    def copy(name, **config):
        shutil.copytree(REFERENCE / name, tmp_path / name, dirs_exist_ok=True)
        path = tmp_path / name / 'config.json'
        contents = json.loads(path.read_text()) | EXTRA.get(name, {}) | config
        path.write_text(json.dumps({key: x for key, x in contents.items() if x != 'absent'}))
        return tmp_path / name

    return copy


def golden(name, file='logits'):
    return np.load(REFERENCE / name / f'{file}.npz')


@partial(jax.jit, static_argnums=0)
def run(config, params, tokens, valid):
    """Logits, and what routers sow: one program for all that a test asks of a configuration."""
    return Transformer(config).apply({'params': params}, tokens, valid, mutable=['intermediates'])


def logits_of(config, params, tokens, valid=None):
    valid = np.ones(tokens.shape, bool) if valid is None else valid
    return np.asarray(run(config, params, tokens, valid)[0])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def seeing(config, block, shift=False):
    """The model with other attention, and by default with outputs where they were computed."""
    return dataclasses.replace(config, visible_block=block, shift_logits=shift)


@struct.dataclass
class RowsByBlock(Visibility):
    """Rows that see blocks of different lengths, so that one program has the rows of each length.

    tests/models/test_visibility.py has the masks that a `Visibility` makes itself.
    """

    lengths: jax.Array | None = None  # [B] int32, of the blocks of each row

    def mask(self):
        block = jnp.arange(self.valid.shape[1])[None, :] // self.lengths[:, None]  # [B, L]
        return self.valid[:, None, :] & (block[:, None, :] <= block[:, :, None])


def logits_by_block(config, params, tokens, lengths):
    """Logits of `tokens` [B, L] for each of the lengths, where they were computed; 0 sees all."""
    rows, width = tokens.shape
    visible = RowsByBlock(
        np.ones((rows * len(lengths), width), bool),
        lengths=np.repeat([length or width for length in lengths], rows),
    )
    logits = logits_of(seeing(config, 0), params, np.tile(tokens, (len(lengths), 1)), visible)
    return logits.reshape(len(lengths), rows, width, -1)


@pytest.mark.parametrize('name', AUTOREGRESSIVE)
def test_logits_of_qwen2_and_llama(checkpoint, name):
    """Causal, with blocks, and without."""
    numbers = golden(name)
    config, _, params = load_checkpoint(checkpoint(name))
    assert (config.visible_block, config.shift_logits) == (1, True)
    tokens, block = numbers['tokens'], int(numbers['block'])
    lengths = {'logits_causal': 1, f'logits_block{block}': block, 'logits_full': 0}
    keys = [key for key in lengths if key in numbers]
    assert len(keys) == (1 if name == 'tiny_llama/tied_llama3rope' else 3)
    outputs = logits_by_block(config, params, tokens, [lengths[key] for key in keys])
    for key, logits in zip(keys, outputs, strict=True):
        assert_allclose(logits, numbers[key], **LOGITS)
    log_prob = log_softmax(outputs[0, :, :-1])
    nll = -np.take_along_axis(log_prob, tokens[:, 1:, None], 2)[:, :, 0]
    assert_allclose(nll, numbers['next_token_nll'], **LOGITS)


def test_an_autoregressive_model_is_causal_and_shifted_as_it_is_read(checkpoint):
    """The output at a position predicts the token of that position. One token more therefore
    changes no logits, and shows those after the last one. What the model sees is the same for both
    families, which the test above asserts of their configurations."""
    numbers = golden('tiny_qwen2/untied')
    config, _, params = load_checkpoint(checkpoint('tiny_qwen2/untied'))
    logits = logits_of(config, params, np.pad(numbers['tokens'], ((0, 0), (0, 1))))
    assert_allclose(logits[:, 1:], numbers['logits_causal'], **LOGITS)


def test_logits_of_dream_are_shifted_by_one(checkpoint):
    """Rows with and without padding in one batch. The padded logits were published unshifted, so
    that each row gets a position more, which no other one sees."""
    numbers = golden('tiny_dream')
    config, ids, params = load_checkpoint(checkpoint('tiny_dream'))
    assert ids == SpecialIds(mask=120, eos=121, pad=121)
    rows, length = numbers['tokens'].shape
    tokens, valid = with_padded_rows(numbers)
    is_valid = valid[rows:]
    one_more = ((0, 0), (0, 1))
    outputs = logits_of(config, params, np.pad(tokens, one_more), np.pad(valid, one_more))
    logits = outputs[:rows, :length]
    assert_allclose(logits, numbers['logits_shifted'], **LOGITS)
    labels = numbers['labels']
    nll = -np.take_along_axis(log_softmax(logits), np.maximum(labels, 0)[:, :, None], 2)[:, :, 0]
    assert_allclose(np.where(labels >= 0, nll, 0), numbers['ce_per_token_shifted'], **LOGITS)
    logits = np.where(is_valid[:, :, None], outputs[rows:, 1:], 0)
    assert_allclose(logits, numbers['logits_padded'], **LOGITS)


def with_padded_rows(numbers):
    """Tokens and validity of the rows without padding, and below them of those with it."""
    tokens, is_valid = numbers['tokens'], numbers['attention_mask'].astype(bool)
    valid = np.concatenate([np.ones(tokens.shape, bool), is_valid])
    return np.concatenate([tokens, numbers['tokens_padded']]), valid


@pytest.mark.parametrize('name', MIXTURES[1:])
def test_logits_of_llada_moe(checkpoint, name):
    """Rows with and without padding in one batch."""
    numbers = golden(name)
    config, ids, params = load_checkpoint(checkpoint(name))
    assert (ids.mask, ids.eos) == (numbers['mask_id'], numbers['eos_id'])
    tokens, valid = with_padded_rows(numbers)
    logits, sown = run(config, params, tokens, valid)
    rows = len(numbers['tokens'])
    is_valid = valid[rows:]
    assert_allclose(logits[:rows], numbers['logits'], **LOGITS)
    logits = np.where(is_valid[:, :, None], logits[rows:], 0)
    assert_allclose(logits, numbers['logits_padded'], **LOGITS)
    check_router(config, sown, numbers['router_idx'], numbers['router_w'])


def test_logits_of_llada2(checkpoint):
    """With blocks of 8, with larger ones than half of the row, and without blocks, by one program.

    Where `visible_block` of a configuration acts is in the published completions below.
    """
    numbers, training = golden('tiny_llada2_moe'), golden('tiny_llada2_moe', 'train')
    config, ids, params = load_checkpoint(checkpoint('tiny_llada2_moe'))
    assert (ids.mask, ids.eos) == (numbers['mask_id'], numbers['eos_id'])
    assert config.visible_block == numbers['block'] == 8
    tokens, noisy, labels = numbers['tokens'], training['noisy'], training['labels']
    (rows, width), length = tokens.shape, noisy.shape[1]
    # Below the rows in blocks and without there are one row in large blocks, and those of a
    # training without blocks, which are shorter.
    batch = [tokens, tokens, tokens[1:2], np.pad(noisy, ((0, 0), (0, width - length)))]
    counts = (rows, rows, 1, len(noisy))
    block8, full, block32, train = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    valid = np.ones((sum(counts), width), bool)
    valid[train, length:] = False
    visible = RowsByBlock(valid, lengths=np.repeat([8, width, 32, width], counts))
    logits, sown = run(seeing(config, 0), params, np.concatenate(batch), visible)
    for index, name in ((block8, 'block8'), (full, 'full'), (block32, 'block32_row1')):
        assert_allclose(logits[index], numbers[f'logits_{name}'], **LOGITS)
    for index, name in ((block8, 'block8'), (full, 'full')):
        router = numbers[f'router_idx_{name}'], numbers[f'router_w_{name}']
        check_router(config, sown, *router, first=index[0])
    log_prob = log_softmax(logits[train, :length])
    nll = -np.take_along_axis(log_prob, np.maximum(labels, 0)[:, :, None], 2)[:, :, 0]
    assert_allclose(np.where(labels >= 0, nll, 0), training['mdlm_ce_per_token'], **LOGITS)


def check_router(config, sown, index, weight, first=0):
    """The experts chosen as a set, with their weights; neighbours in the order can be too close.

    Args:
      sown: what routers sowed, for at least the rows that follow.
      index, weight: the published numbers, [layers, B, L, k].
      first: the row of `sown` that is the first of them.
    """
    (_, chosen, weights), *_ = jax.tree.leaves(sown, is_leaf=lambda x: isinstance(x, tuple))[0]
    layers, B, L, k = index.shape

    def table(chosen, weights):
        dense = np.full((layers, B, L, config.experts.count), -1.0)
        np.put_along_axis(dense, chosen.astype(int), weights, axis=-1)
        return dense

    expected = table(index, weight)
    sown_rows = (np.asarray(x).reshape(layers, -1, L, k) for x in (chosen, weights))
    actual = table(*(x[:, first : first + B] for x in sown_rows))
    assert_array_equal(actual < 0, expected < 0)
    assert_allclose(actual, expected, atol=1e-5, rtol=0)


def test_a_window_has_the_states_of_the_whole_row(checkpoint):
    """With a shift, blocks and experts at once; each row has a window of its own.

    Layers without experts come before the window is cut, and are in the published completions.
    """
    name = 'tiny_llada_moe'
    config, _, params = load_checkpoint(checkpoint(name))
    config = seeing(config, 4, shift=True)
    tokens = golden(name)['tokens'][:3, :12]
    valid = np.arange(12)[None, :] >= np.array([[0], [2], [5]])

    @jax.jit
    def states(params, starts):
        def hidden(window):
            model = Transformer(config)
            return model.apply({'params': params}, tokens, valid, None, window, method='hidden')

        return hidden(None), hidden(Window(starts, 4))

    starts = jnp.array([0, 1, 8])
    whole, windows = states(params, starts)
    for row, start in enumerate(starts.tolist()):
        real = valid[row, start : start + 4]
        expected = whole[row, start : start + 4][real]
        assert_allclose(windows[row][real], expected, atol=2e-5, rtol=0)


def token_nll(logits, labels):
    log_prob = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_prob, jnp.maximum(labels, 0)[:, :, None], 2)[:, :, 0]


def test_block_diffusion_losses_and_gradients_of_llada2(checkpoint):
    numbers = golden('tiny_llada2_moe', 'train')
    config, _, params = load_checkpoint(checkpoint('tiny_llada2_moe'))
    clean, length = numbers['clean'], numbers['clean'].shape[1]
    valid = jnp.ones((len(clean), 2 * length), bool)
    halves = Visibility(valid, block_length=int(numbers['block']), halves=True)
    assert_array_equal(halves.mask()[0], numbers['mask_2L'])

    def losses(params, noisy, labels):
        tokens = jnp.concatenate([noisy, clean], axis=1)
        logits = Transformer(config).apply({'params': params}, tokens, halves)[:, :length]
        nll = jnp.where(labels >= 0, token_nll(logits, labels), 0.0)
        return nll.sum() / (labels >= 0).sum(), (logits, nll)

    value_and_grad = jax.jit(jax.value_and_grad(losses, has_aux=True))
    (mean, (logits, nll)), gradient = value_and_grad(params, numbers['noisy'], numbers['labels'])
    assert_allclose(logits, numbers['logits_noisy'], **LOGITS)
    assert_allclose(nll, numbers['ce_per_token'], **LOGITS)
    assert_allclose(mean, numbers['ce_mean'], atol=2e-5)
    maskable = length - numbers['prompt_len']
    by_row = np.asarray(nll).sum(1) / (numbers['t'] * maskable)
    assert_allclose(by_row, numbers['loss_inv_t_rows'], atol=2e-5)
    layers = gradient['layers']
    for actual, key in (
        (layers['experts']['router'][0].T, 'grad_gate'),
        (layers['experts']['down'][0, 0].T, 'grad_expert0_down'),
        (layers['shared_gate']['kernel'][0].T, 'grad_shared_gate_proj'),
        (gradient['dense_layers']['query_norm']['scale'][0], 'grad_query_layernorm'),
    ):
        scale = np.abs(numbers[key]).max()
        assert_allclose(actual, numbers[key], atol=1e-4 * scale, rtol=0)
    assert_array_equal(layers['experts']['bias'], 0)  # a buffer in the published class
    norm = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
    assert_allclose(norm, numbers['grad_norm_pad_row_included'], rtol=1e-4)
    complement = numbers['noisy_complement'], numbers['labels_complement']
    (mean, _), _ = value_and_grad(params, *complement)
    assert_allclose(mean, numbers['ce_mean_complement'], atol=2e-5)


def left_padded(prompts, width):
    """Tokens and validity [B, width]."""
    rows = [np.concatenate([np.zeros(width - len(p), np.int32), p]) for p in prompts]
    valid = [np.arange(width) >= width - len(p) for p in prompts]
    return jnp.asarray(np.stack(rows)), jnp.asarray(np.stack(valid))


def policy_of(config, ids):
    return Policy(config, ids.mask, ids.eos, np.ones(config.vocab_size, bool))


def completions(policy, params, prompts, valid, decoding):
    keys = jax.random.split(jax.random.key(0), len(prompts))
    return make_generate(policy, decoding)({'params': params}, prompts, valid, keys)


@pytest.mark.parametrize(
    ('cases', 'threshold', 'steps_per_block'),
    [
        # The EOS of these cases is the last token of one row, and the other rows have none.
        (['v20_t0.5_s8', 'v20_eos_stop', 'v20_eos_nostop'], 0.5, 8),
        # A step for each token and the high threshold are each in one of the other cases.
        (['v20_t0.95_s5'], 0.95, 5),
    ],
)
def test_completions_of_llada2(checkpoint, cases, threshold, steps_per_block):
    """Three prompts of different lengths in one batch, none of them a multiple of the block. The
    published completions with an EOS are equal whether the loop stops there or not."""
    numbers = golden('tiny_llada2_moe', 'generate')
    config, ids, params = load_checkpoint(checkpoint('tiny_llada2_moe'))
    if 'v20_eos_stop' in cases:
        assert (numbers['eos_case_threshold'], numbers['eos_case_steps']) == (0.5, 8)
        ids = ids._replace(eos=int(numbers['eos_case_id']))
    length, block = int(numbers['gen_length']), int(numbers['block'])
    blocks = -(-length // block)
    prompts, valid = left_padded([numbers[f'prompt{i}'] for i in range(3)], 14)
    decoding = SamplingConfig(
        blocks * block, blocks * steps_per_block, block, 0.0, sampler='llada2', threshold=threshold
    )
    tokens = completions(policy_of(config, ids), params, prompts, valid, decoding).tokens
    compared = set()
    for case, (row, actual) in itertools.product(cases, enumerate(np.asarray(tokens)[:, :length])):
        key = f'{case}/prompt{row}/completion'
        if key not in numbers:  # The cases with an EOS have one prompt only.
            continue
        compared.add(case)
        expected = numbers[key]
        assert_array_equal(actual[: len(expected)], expected)
        # The published completion is cut after the first EOS.
        assert len(expected) == length or expected[-1] == ids.eos
    assert compared == set(cases)


@pytest.mark.parametrize(
    ('cases', 'settings'),
    [
        # Few edits. Two of the rows have the EOS and are compared through its block.
        (['v21_t0.95_e0.9', 'v21_eos_stop'], (0.95, 0.9, 16)),
        # Many edits, and blocks that end because no further round is allowed.
        (['v21_t0.5_e0_p3'], (0.5, 0.0, 3)),
    ],
)
def test_completions_and_edits_of_llada21(checkpoint, cases, settings):
    """Three prompts in one batch; every state between two rounds is rebuilt from the record."""
    numbers = golden('tiny_llada2_moe', 'generate')
    config, ids, params = load_checkpoint(checkpoint('tiny_llada2_moe'))
    if 'v21_eos_stop' in cases:
        ids = ids._replace(eos=int(numbers['eos_case_id_v21']))
    length, size = int(numbers['gen_length']), int(numbers['block'])
    whole = -(-length // size) * size
    prompts, valid = left_padded([numbers[f'prompt{i}'] for i in range(3)], 14)
    threshold, edit_threshold, post_steps = settings
    decoding = SamplingConfig(
        whole, whole, size, 0.0, sampler='llada21', threshold=threshold,
        edit_threshold=edit_threshold, post_steps=post_steps,
    )  # fmt: skip
    completion = completions(policy_of(config, ids), params, prompts, valid, decoding)
    completion = jax.device_get(completion)
    rounds, compared = 0, set()
    for case, row in itertools.product(cases, range(3)):
        key, first = f'{case}/prompt{row}', len(numbers[f'prompt{row}'])
        if f'{key}/completion' not in numbers:  # The cases with an EOS have one prompt only.
            continue
        compared.add(case)
        expected = numbers[f'{key}/completion']
        if ids.eos in expected:
            expected = expected[: expected.tolist().index(ids.eos) + 1]
        assert_array_equal(completion.tokens[row][: len(expected)], expected)
        draft, edits = (np.asarray(completion.extras[name][row]) for name in ('draft', 'edits'))
        turn_of = np.asarray(completion.commit_step[row]) % size
        blocks, turn = numbers[f'{key}/round_block'], 0
        place = first + np.arange(whole)  # of each position of the completion in the canvas
        place = place[place < numbers[f'{key}/canvas_after'].shape[1]]
        blocks = blocks[blocks <= place[len(expected) - 1] // size]
        for number, block in enumerate(blocks):
            turn = turn + 1 if number and blocks[number - 1] == block else 0
            mine = place // size == block
            within = place[mine] % size
            i = np.flatnonzero(mine)
            committed = numbers[f'{key}/committed'][number][within]
            edited = numbers[f'{key}/edited'][number][within]
            assert_array_equal(turn_of[i] == turn, committed)
            assert_array_equal(edits[i, turn] >= 0, edited)
            written = np.where(committed, draft[i], edits[i, turn])
            after = numbers[f'{key}/canvas_after'][number][place[mine]]
            changed = committed | edited
            assert_array_equal(written[changed], after[changed])
            rounds += changed.any()
        assert (edits[:, turn + 1 :][place // size == block] < 0).all()
    assert rounds > 10 and compared == set(cases)


@pytest.mark.parametrize(
    ('algorithm', 'commit', 'steps'),
    [
        ('maskgit_plus', 'low_confidence', 6),
        ('topk_margin', 'margin', 12),
        ('entropy', 'entropy', 6),
    ],
)
def test_completions_of_dream(checkpoint, algorithm, commit, steps):
    """The schedule of a number of steps is the same for every algorithm."""
    numbers = golden('tiny_dream', 'generate')
    config, ids, params = load_checkpoint(checkpoint('tiny_dream'))
    valid = numbers['batch_attention_mask'].astype(bool)
    decoding = SamplingConfig(
        12, steps, 12, 0.0, commit=commit, schedule='timesteps', stop_early=False
    )
    completion = completions(
        policy_of(config, ids), params, numbers['batch_prompt'], valid, decoding
    )
    case = f'{algorithm}_s{steps}/batch'
    assert_array_equal(completion.tokens, numbers[f'{case}/sequence'])
    states = numbers[f'{case}/states'][:, :, -12:]  # [steps, B, C]
    for step in range(steps):
        is_known = np.asarray(completion.commit_step) <= step
        assert_array_equal(states[step] != ids.mask, is_known)


def test_the_schedule_of_dream_loses_one():
    assert timestep_commits(12, 6).tolist() == [1, 2, 2, 2, 2, 3]
    assert timestep_commits(7, 1).tolist() == [7]


def test_an_autoregressive_model_decodes_from_left_to_right(checkpoint):
    """Against a loop that appends the likeliest next token to the row itself, without padding.

    Decoding sees of a family that it is autoregressive, and no more, so one family shows it.
    """
    config, ids, params = load_checkpoint(checkpoint('tiny_qwen2/untied'))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, length).astype(np.int32) for length in (3, 6)]
    prompts, valid = left_padded(rows, 7)
    # Blocks and steps that a diffusion model would use do not change what is decoded.
    decoding = SamplingConfig(8, 4, 4, 0.0, stop_early=False)
    tokens = completions(policy_of(config, ids), params, prompts, valid, decoding).tokens
    raw = seeing(config, 1)
    for row, actual in zip(rows, np.asarray(tokens), strict=True):
        for position in range(8):
            logits = logits_of(raw, params, np.pad(row, (0, 20 - len(row)))[None])
            best = logits[0, len(row) - 1].copy()
            best[ids.mask] = -np.inf
            assert actual[position] == best.argmax()
            row = np.append(row, actual[position])


@pytest.mark.parametrize('name', ALL)
def test_export_of_an_import_is_the_identity(checkpoint, tmp_path, name):
    """Over two devices once for a mixture and once for a dense model: the host stacks the layers
    of the others, which takes no compiling."""
    directory = checkpoint(name)
    is_split = name in ('tiny_llada_moe', 'tiny_qwen2/untied')
    _, _, params = load_checkpoint(directory, mesh_of(1, 2, 1) if is_split else None)
    save_checkpoint(tmp_path / 'out', params, directory, shard_bytes=20_000)
    assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 2
    expected, actual = load_file(directory / 'model.safetensors'), {}
    for file in (tmp_path / 'out').glob('*.safetensors'):
        actual |= load_file(file)
    assert actual.keys() == expected.keys()
    for tensor in expected:
        assert_array_equal(actual[tensor], expected[tensor])
    _, _, again = load_checkpoint(tmp_path / 'out')
    jax.tree.map(assert_array_equal, again, jax.device_get(params))


LLADA2_MINI = {
    'num_hidden_layers': 20,
    'hidden_size': 2048,
    'intermediate_size': 5120,
    'num_attention_heads': 16,
    'num_key_value_heads': 4,
    'head_dim': 128,
    'num_experts': 256,
    'num_experts_per_tok': 8,
    'moe_intermediate_size': 512,
    'n_group': 8,
    'topk_group': 4,
    'vocab_size': 157184,
    'pad_token_id': 156892,
    'mask_token_id': 'absent',
    'block_length': 'absent',
}
DREAM_7B = {
    'num_hidden_layers': 28,
    'hidden_size': 3584,
    'num_attention_heads': 28,
    'num_key_value_heads': 4,
    'intermediate_size': 18944,
    'vocab_size': 152064,
    'mask_token_id': 151666,
    'eos_token_id': 151643,
    'pad_token_id': 151643,
}
LLADA_MOE_7B = {
    'num_hidden_layers': 16,
    'hidden_size': 2048,
    'num_attention_heads': 16,
    'num_key_value_heads': 16,
    'num_experts': 64,
    'num_experts_per_tok': 8,
    'expert_intermediate_size': 1024,
    'moe_layer_freq': [1] * 16,
    'vocab_size': 157184,
    'eos_token_id': 156892,
    'pad_token_id': 156892,
    'mask_token_id': 'absent',
}


@pytest.mark.parametrize(
    ('name', 'sizes', 'tensors', 'numbers', 'ids'),
    [
        # Tensors and numbers are those of the published index files; LLaDA-MoE's number is
        # 14,032 MiB of bfloat16.
        ('tiny_llada2_moe', LLADA2_MINI, 14_813, 16_255_643_392, (156895, 156892, 156892)),
        ('tiny_dream', DREAM_7B, 339, 7_615_616_512, (151666, 151643, 151643)),
        ('tiny_llada_moe', LLADA_MOE_7B, None, 7_356_880_896, (156895, 156892, 156892)),
    ],
)
def test_sizes_are_those_of_the_published_checkpoints(
    checkpoint, name, sizes, tensors, numbers, ids
):
    config, special = read_config(checkpoint(name, **sizes) / 'config.json')
    shapes = tensor_shapes(config)
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == numbers
    assert tensors in (None, len(shapes))
    assert special == SpecialIds(*ids)
    if name == 'tiny_llada2_moe':
        assert config.visible_block == 32 and config.rotary_dims == 64
        assert shapes['model.layers.0.mlp.gate_proj.weight'] == (5120, 2048)
        assert shapes['model.layers.19.mlp.experts.255.down_proj.weight'] == (2048, 512)
        assert shapes['model.layers.1.attention.query_key_value.weight'] == (3072, 2048)
        assert shapes['model.layers.1.mlp.gate.expert_bias'] == (256,)


def test_experts_over_a_mesh_change_nothing(checkpoint):
    """Outputs and gradients of one mixture, on one device and with rows and experts split.

    Routers choose before experts are split, so that what splits them is the same for every rule.
    tests/test_sharding.py has the rest of a layer, and tests/test_families_runs.py a whole update.
    """
    config, _, params = load_checkpoint(checkpoint('tiny_llada_moe'))
    model, mesh = RoutedExperts(config.experts, gain=1.0), mesh_of(1, 2, 2)
    params = jax.tree.map(lambda leaf: leaf[0], params['layers']['experts'])
    x = np.random.default_rng(0).normal(size=(4, 16, config.width)).astype(np.float32)

    def loss(params, x):
        mixed = model.apply({'params': params}, x)
        return jnp.sin(mixed).sum(), mixed

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, expected), expected_gradients = value_and_grad(params, x)
    shardings = param_shardings(Transformer(config), mesh)['layers']['experts']
    params = jax.tree.map(
        lambda leaf, of_stack: jax.device_put(leaf, NamedSharding(mesh, P(*of_stack.spec[1:]))),
        params,
        shardings,
    )
    E, D, F = params['gate'].shape
    assert params['gate'].addressable_shards[0].data.shape == (E // 2, D // 2, F)
    with jax.set_mesh(mesh):
        (_, actual), gradients = value_and_grad(params, put_batch(mesh, x))
    assert actual.addressable_shards[0].data.shape[0] == 2
    assert_allclose(actual, expected, **LOGITS)
    actual, expected = (jax.tree.leaves(tree) for tree in (gradients, expected_gradients))
    assert len(actual) == len(expected) == 5  # of the router, three kernels and x
    for gradient, leaf in zip(actual, expected, strict=True):
        assert_allclose(gradient, leaf, atol=1e-4 * np.abs(leaf).max(), rtol=0)


@pytest.mark.parametrize('name', ['tiny_llada2_moe', 'tiny_llada_moe', 'tiny_dream'])
def test_adapters_have_the_names_of_peft_and_come_back(checkpoint, tmp_path, name):
    """Those of a mixture are merged as PEFT does, also in its first layer, which has no experts."""
    directory = checkpoint(name)
    config, _ = read_config(directory / 'config.json')
    lora = LoRA(rank=3, alpha=6.0).for_kernels(config.adapted_kernels)
    adapted = dataclasses.replace(config, lora=lora)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        abstract_params(Transformer(adapted), collection=COLLECTION),
    )
    save_adapter(tmp_path / 'adapter', adapters, adapted, 'the/base')
    names = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors').keys()
    module = {
        'tiny_llada2_moe': 'model.layers.1.attention.query_key_value',
        'tiny_llada_moe': 'model.layers.1.self_attn.q_proj',
        'tiny_dream': 'model.layers.1.mlp.gate_proj',
    }[name]
    assert f'base_model.model.{module}.lora_A.weight' in names
    again, restored = load_adapter(tmp_path / 'adapter', config)
    assert again == lora
    jax.tree.map(assert_array_equal, restored, adapters)
    if name == 'tiny_llada2_moe':
        _, _, params = load_checkpoint(directory)
        save_checkpoint(tmp_path / 'out', params, directory, adapters=adapters, lora=lora)
        expected = load_file(directory / 'model.safetensors')
        factors = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
        for factor in factors:
            if factor.endswith('.lora_A.weight'):
                module = factor.removesuffix('.lora_A.weight')
                product = factors[f'{module}.lora_B.weight'] @ factors[factor]
                kernel = module.removeprefix('base_model.model.') + '.weight'
                expected[kernel] = expected[kernel] + 6.0 / 3 * product
        merged = load_file(tmp_path / 'out' / 'model.safetensors')
        assert merged.keys() == expected.keys()
        for tensor in expected:
            assert_allclose(merged[tensor], expected[tensor], atol=1e-5)


def test_adapters_of_experts_are_refused(checkpoint, tmp_path):
    config, _ = read_config(checkpoint('tiny_llada2_moe') / 'config.json')
    lora = LoRA(rank=2, alpha=2.0, targets=('attention_out',))
    adapted = dataclasses.replace(config, lora=lora)
    adapters = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        abstract_params(Transformer(adapted), collection=COLLECTION),
    )
    save_adapter(tmp_path, adapters, adapted, 'base')
    path = tmp_path / 'adapter_model.safetensors'
    name = 'base_model.model.model.layers.1.mlp.experts.0.up_proj.lora_A.weight'
    save_file(load_file(path) | {name: np.zeros((2, 32), np.float32)}, path)
    with pytest.raises(ValueError, match='experts.0.*surplus.*experts have no adapters here'):
        check_adapter(tmp_path, config)
    with pytest.raises(ValueError, match='queries, keys and values of this model are one kernel'):
        dataclasses.replace(config, lora=LoRA(rank=2, alpha=2.0, targets=('query', 'gate')))


def test_a_quantised_base_computes_with_the_kernels_that_its_codes_stand_for(checkpoint):
    """A mixture; tests/models/test_quantized.py has a dense model, and formats of fewer bits."""
    pytest.importorskip('qwix')
    name = 'tiny_llada_moe'
    directory, batch = checkpoint(name), with_padded_rows(golden(name))
    config, _, plain = load_checkpoint(directory)
    quantised, _, params = load_checkpoint(directory, mesh_of(1, 1, 2), quantize='int8')

    def decoded(leaf):
        """The kernels [..., in, out] of one parameter, computed in numpy."""
        if not is_quantized(leaf):
            return np.asarray(leaf)
        return np.asarray(leaf.qvalue).astype(np.float32) * np.asarray(leaf.scale)

    kernels = jax.tree.map(decoded, params, is_leaf=is_quantized)
    are_quantised = jax.tree.map(is_quantized, params, is_leaf=is_quantized)['layers']
    assert are_quantised['experts']['gate'] and not are_quantised['experts']['router']
    for kernel, exact in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        # A code of 8 bits is off by half a step, 1/254 of the largest entry of its column.
        step = np.abs(exact).max(axis=-2, keepdims=True) / 254 if exact.ndim > 1 else 0
        assert np.all(np.abs(kernel - exact) <= 1.01 * step + 1e-7)
    expected = logits_of(config, kernels, *batch)  # by a program that a test above has compiled
    with jax.set_mesh(mesh_of(1, 1, 2)):
        actual = logits_of(quantised, params, *batch)
    is_valid = batch[1]
    assert_allclose(actual[is_valid], expected[is_valid], **LOGITS)


@pytest.mark.parametrize(
    ('name', 'config', 'message'),
    [
        (
            'tiny_dream',
            {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2'},
            'GPT2LMHeadModel.*gpt2.*expected one of LLaDAModelLM .LLaDA.*LLaDA2MoeModelLM.*'
            'LLaDAMoEModelLM.*DreamModel.*Qwen2ForCausalLM.*LlamaForCausalLM',
        ),
        ('tiny_dream', {'use_sliding_window': True}, 'use_sliding_window is True, expected False'),
        ('tiny_dream', {'mask_token_id': 'absent'}, 'mask_token_id is missing'),
        ('tiny_dream', {'hidden_size': '48'}, "hidden_size is '48', expected int"),
        ('tiny_dream', {'rope_scaling': {'rope_type': 'yarn'}}, "type 'yarn', expected 'llama3'"),
        ('tiny_llama/untied', {'mlp_bias': True}, 'mlp_bias is True, expected False'),
        ('tiny_llada2_moe', {'use_qk_norm': False}, 'use_qk_norm is False, expected True'),
        ('tiny_llada2_moe', {'n_group': 3}, '16 experts in 3 groups'),
        (
            'tiny_llada2_moe',
            {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4.0}},
            "scaled by 'yarn', which is not supported",
        ),
        ('tiny_llada2_moe', {'num_experts_per_tok': 9}, '9 experts per token of 8'),
        ('tiny_llada2_moe', {'num_experts': 12}, 'experts.12.*is surplus.*num_experts 12'),
        ('tiny_llada2_moe', {'mask_token_id': 'absent'}, 'no tokenizer beside it has <.mask.>'),
        ('tiny_llada2_moe', {'rms_norm_eps': 'absent'}, 'rms_norm_eps is missing'),
        ('tiny_llada_moe', {'moe_layer_freq': [1, 0, 1]}, 'moe_layer_freq is .1, 0, 1.'),
    ],
)
def test_what_is_not_supported_is_named(checkpoint, name, config, message):
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(checkpoint(name, **config))
    assert '\n' not in str(error.value)


def test_a_mesh_that_does_not_divide_the_experts_is_refused(checkpoint):
    config, _ = read_config(checkpoint('tiny_llada_moe') / 'config.json')
    with pytest.raises(ValueError, match='mesh.tensor is 8.*the 12 experts'):
        check_heads(config, mesh_of(1, 1, 8))


def test_blocks_of_another_length_are_refused(checkpoint):
    config, ids = read_config(checkpoint('tiny_llada2_moe') / 'config.json')
    with pytest.raises(ValueError, match='block_length is 4, but .* see blocks of 8'):
        make_generate(policy_of(config, ids), SamplingConfig(16, 16, 4, 0.0))


def test_families_are_told_apart_by_architectures_first(checkpoint):
    """LLaDA-MoE says that its model_type is 'llada'."""
    found = {name: find_family(checkpoint(name) / 'config.json') for name in ALL}
    families = ('qwen2', 'qwen2', 'llama', 'llama', 'llama', 'dream')
    expected = dict(zip(ALL, (*families, 'llada2', 'llada_moe', 'llada_moe'), strict=True))
    assert found == {name: FAMILIES[family] for name, family in expected.items()}
