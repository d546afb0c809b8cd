"""JSON files with a fault are refused in one line that names file and key, at once.

The faults that were seen are the `json` cases of tests/reference/faults.jsonl, which also say what
is expected. The others here are their neighbours.
"""

import base64
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import pytest
from msgspec import Meta
from safetensors.numpy import load_file, save_file

from spg_jax.config import default_config
from spg_jax.data.chat_template import PROBES, ChatTemplate
from spg_jax.data.hf_tokenizer import HFTokenizer
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.models import peft, weights
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.process import json_files
from spg_jax.process.cli import MENDABLE
from spg_jax.runs import policies
from spg_jax.runs.directory import run_config
from spg_jax.runs.report import check_record, read_result
from spg_jax.sharding import abstract_params
from tests.processes import HANG_SECONDS
from tests.published import END, MASK, OWN_TEMPLATE, TINY, save_tokenizer

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / 'reference' / 'faults.jsonl').read_text().splitlines()
]
DEEP = ('[' * 100_000, '{"a":' * 100_000, '{"a": ' + '[' * 100 + ']' * 100 + '}')


class File(NamedTuple):
    """A file of one kind in a directory that holds all that its reader needs."""

    path: Path
    read: Callable[[], Any]


def zeros_of(model: Transformer, collection: str = 'params') -> Any:
    shapes = abstract_params(model, collection=collection)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def published(directory: Path) -> File:
    shutil.copytree(TINY, directory)
    return File(directory / 'config.json', lambda: weights.check_checkpoint(directory))


def index(directory: Path) -> File:
    file = published(directory)
    _, _, tensors = file.read()
    path = directory / 'model.safetensors.index.json'
    path.write_text(json.dumps({'weight_map': dict.fromkeys(tensors, 'model.safetensors')}))
    return File(path, file.read)


def policy(directory: Path) -> File:
    tokenizer = WordTokenizer(['1', '2', '+'])
    config = TransformerConfig(
        vocab_size=tokenizer.size, width=8, layers=2, heads=2, kv_heads=2, mlp_width=8
    )
    variables = {'params': zeros_of(Transformer(config))}
    policies.save_policy(directory, variables, config, tokenizer, {'made': 'here'})
    return File(directory / 'policy.json', lambda: policies.load_tokenizer(directory))


def adapter(directory: Path) -> File:
    config, _, _ = weights.check_checkpoint(TINY)
    lora = LoRA(rank=2, alpha=4.0, targets=('query',))
    adapted = dataclasses.replace(config, lora=lora)
    adapters = zeros_of(Transformer(adapted), COLLECTION)
    peft.save_adapter(directory, adapters, adapted, 'the/base')
    return File(directory / 'adapter_config.json', lambda: peft.check_adapter(directory, config))


def tokenizer(directory: Path) -> File:
    save_tokenizer(directory)
    return File(directory / 'tokenizer_config.json', lambda: HFTokenizer(directory, MASK, END, END))


def run(directory: Path) -> File:
    directory.mkdir()
    path = directory / 'config.json'
    path.write_text(default_config().to_json())
    return File(path, lambda: run_config(directory))


def result(directory: Path) -> File:
    directory.mkdir()
    path = directory / 'result.json'
    figures = {'base_accuracy': 0.5, 'accuracy': 1.0, 'seconds': 3, 'scorer': 'x', 'steps': 8}
    path.write_text(json.dumps(figures))
    return File(path, lambda: read_result(path))


def record(directory: Path) -> File:
    """Orbax reads the text of a record; only its values are read here."""
    directory.mkdir()
    path = directory / '7'
    figures = {'accuracy': 0.5, 'reward': 0.1}
    contents = {
        'prompts': {},
        'prompt_length': 8,
        'base': figures,
        'best': figures | {'step': 3},
        'seconds': 1.5,
        'last_row': {},
    }
    path.write_text(json.dumps(contents))
    return File(path, lambda: check_record(json.loads(path.read_text()), path))


FILES = {
    'published config.json': published,
    'model.safetensors.index.json': index,
    'policy.json': policy,
    'adapter_config.json': adapter,
    'tokenizer_config.json': tokenizer,
    'config.json of a run': run,
    'result.json of a run': result,
    'checkpoint custom metadata': record,
}
READ_HERE = [name for name in FILES if name != 'checkpoint custom metadata']


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """Makes the files of each kind once, and returns the directory of a kind."""
    folder, made = tmp_path_factory.mktemp('originals'), {}

    def original(kind):
        if kind not in made:
            made[kind] = FILES[kind](folder / str(len(made)))
        return made[kind]

    return original


@pytest.fixture
def good(originals):
    """A function that returns a file of a kind; after the test it has its good contents again."""
    changed = []

    def of_kind(kind):
        file = originals(kind)
        changed.append((file.path, file.path.read_bytes()))
        return file

    yield of_kind
    for path, content in changed:
        path.write_bytes(content)


class Raw(NamedTuple):
    """The text of a JSON value."""

    text: str


def set_key(path: Path, key: str, value: Any) -> str:
    """Sets the value at 'a.b' ('*' is the first entry); returns the last key on the way."""
    contents = json.loads(path.read_text())
    *parents, last = key.split('.')
    holder = contents
    for name in parents:
        holder = holder[name]
    last = next(iter(holder)) if last == '*' else last
    holder[last] = '<value>' if isinstance(value, Raw) else value
    text = json.dumps(contents)
    path.write_text(text.replace('"<value>"', value.text) if isinstance(value, Raw) else text)
    return last


def refusal(file: File, *parts: str) -> str:
    """The message with which a file is refused; it has one line and the given parts."""
    started = time.monotonic()
    with pytest.raises(MENDABLE) as error:
        file.read()
    message = str(error.value)
    assert time.monotonic() - started < HANG_SECONDS
    assert '\n' not in message and len(message) < 1000
    for part in parts:
        assert part in message
    return message


# --- faults that were seen ------------------------------------------------------------------------


def cases() -> list[Any]:
    """(kind of file, what is done to it, what is expected) of every row about a file read here."""
    found = []
    for row in ROWS:
        case = row.get('case', {})
        if 'json' not in case:
            continue
        change, kinds = case['json'], case['json']['file']
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            if kind == 'metrics.jsonl of a run, one line':  # tests/runs/test_metrics.py
                continue
            found.append(pytest.param(kind, change, case['expect'], id=f'{row["id"]} {kind}'))
    return found


@pytest.mark.parametrize(('kind', 'change', 'expected'), cases())
def test_a_fault_that_was_seen(good, kind, change, expected):
    file = good(kind)
    if 'key' not in change:
        text, times = change.get('repeat') or (change.get('text'), 1)
        content = base64.b64decode(change['base64']) if 'base64' in change else text * times
        file.path.write_bytes(content if isinstance(content, bytes) else content.encode())
        refusal(file, str(file.path))
        return
    values = change['values'] if 'values' in change else [change.get('value')]
    values = [Raw(change['raw_value'])] if 'raw_value' in change else values
    if 'without' in change:
        contents = json.loads(file.path.read_text())
        del contents[change['without']]
        file.path.write_text(json.dumps(contents))
    for value in values:
        key = set_key(file.path, change['key'], value)
        if expected == 'read':
            file.read()
        else:
            place = file.path.parent if kind == 'tokenizer_config.json' else file.path
            names = isinstance(value, str) and kind == 'model.safetensors.index.json'
            refusal(file, str(place), value if names else key)


def test_every_row_about_a_file_is_tried():
    tried = {param.id.split()[0] for param in cases()}
    files = {row['id'] for row in ROWS if 'json' in row.get('case', {})}
    assert files - tried == {'F03', 'F04', 'F05'}  # lines of metrics.jsonl
    assert len(tried) >= 24


# --- neighbours: any file -------------------------------------------------------------------------


@pytest.mark.parametrize('kind', FILES)
def test_a_good_file_is_read(good, kind):
    good(kind).read()


@pytest.mark.parametrize('kind', READ_HERE)
def test_contents_that_are_no_object_are_refused(good, kind):
    file = good(kind)
    for text in ('', ' ', '[]', 'null', '5', '"x"', 'true', '{', '{"a": 1}x', '\0', *DEEP):
        file.path.write_text(text)
        refusal(file, str(file.path))
    for content in (b'\x80\x81', b'{"a": "\xff"}', '{"a": 1}'.encode('utf-16')):
        file.path.write_bytes(content)
        refusal(file, str(file.path))


@pytest.mark.parametrize('kind', READ_HERE)
@pytest.mark.parametrize(
    ('text', 'part'),
    [
        ('NaN', 'unused is nan'),
        ('Infinity', 'unused is inf'),
        ('-Infinity', 'unused is -inf'),
        ('1e400', 'unused is inf'),
        ('9' * 5000, 'digits'),
        ('{"b": 1, "b": 2}', "'b' is there twice"),
    ],
)
def test_what_is_no_json_is_refused_under_any_key(good, kind, text, part):
    file = good(kind)
    set_key(file.path, 'unused', Raw(text))
    refusal(file, str(file.path), part)


@pytest.mark.parametrize('kind', [kind for kind in READ_HERE if kind != 'tokenizer_config.json'])
def test_a_byte_order_mark_is_left_out(good, kind):
    file = good(kind)
    expected = file.read()
    file.path.write_bytes(b'\xef\xbb\xbf' + file.path.read_bytes())
    contents = file.read()
    if kind in ('result.json of a run', 'config.json of a run'):
        assert contents == expected


def test_a_file_that_is_too_large_is_refused(good, monkeypatch):
    monkeypatch.setattr(json_files, 'MOST_BYTES', 100)
    refusal(good('published config.json'), 'more than 100 bytes')


@pytest.mark.parametrize(
    ('value', 'shape'),
    [(1.5, int), (1.0, int), (True, int), ('1', int), (None, int), ('1', float), (True, float)]
    + [(1, bool), (0, bool), (1, str), (None, str), ({}, list), ([], dict)],
)
def test_types_are_strict(value, shape):
    with pytest.raises(ValueError, match='^the file: a.key is .*, expected .*; mend it$'):
        json_files.check_json(
            {'a': {'key': value}}, dict[str, dict[str, shape]], 'the file', 'mend it'
        )


def test_a_message_shows_the_value_that_was_found():
    """These messages are typed from what a user needs to see."""

    def message(value, shape):
        with pytest.raises(ValueError) as error:
            json_files.check_json(value, shape, 'a.json', 'mend it')
        return str(error.value)

    limited = dict[str, Annotated[int, Meta(le=9)]]
    assert message({'k': 10}, limited) == 'a.json: k is 10, expected int <= 9; mend it'
    assert message({'j': 1, 'k': 'x'}, limited) == "a.json: k is 'x', expected int; mend it"
    assert message([1], limited) == 'a.json: it is [1], expected object; mend it'
    assert message({'k': ['a', 5]}, dict[str, list[str]]) == (
        'a.json: k.1 is 5, expected str; mend it'
    )


# --- neighbours: one key --------------------------------------------------------------------------

NO_NUMBERS = ('2', True, [], {}, Raw('Infinity'), Raw('NaN'), Raw('1e400'))
NO_SIZES = (*NO_NUMBERS, 1.5, -1, 0, 10**9, 10**30)
NO_BOOLS = ('x', 'true', 1, 0, 1.0, [], {})
WRONG = {
    'published config.json': {
        **dict.fromkeys(('d_model', 'n_heads', 'n_layers'), (*NO_SIZES, None)),
        **dict.fromkeys(('embedding_size', 'n_kv_heads', 'mlp_hidden_size'), NO_SIZES),
        **dict.fromkeys(
            ('eos_token_id', 'mask_token_id', 'pad_token_id'),
            (*NO_NUMBERS, None, 1.5, -1, 256, 10**30),
        ),
        **dict.fromkeys(('rope_theta', 'rms_norm_eps'), (*NO_NUMBERS, None, -1, 0, 10**30)),
        **dict.fromkeys(('weight_tying', 'scale_logits'), (*NO_BOOLS, None)),
        'alibi': (0, 'false', [], None),
        'block_group_size': (True, '1', 1.5),
        'torch_dtype': (5, [], 'float16', None),
    },
    'model.safetensors.index.json': {
        'weight_map': (None, 5, 'x', [], ['a']),
        'weight_map.*': (5, None, 1.5, True, [], {}),
    },
    'policy.json': {
        'model': (None, 5, [], 'x'),
        'model.layers': (*NO_SIZES, None),
        'model.rope_theta': (*NO_NUMBERS, None, -1, 0, 10**30),
        'model.tie_embeddings': NO_BOOLS,
        'model.dtype': (5, 'float16', None),
        'model.depth': (2,),
        'words': (5, 'abc', [], [5], ['a', 'a'], ['a b'], list(map(str, range(9)))),
        'hf_tokenizer': (5, None, [], {'mask_id': 1}),
        'notes': (None, [], 'x'),
        'base': (5, None, []),
    },
    'adapter_config.json': {
        'r': (*NO_SIZES, None),
        'lora_alpha': (*NO_NUMBERS, None, -1, 0, 10**30),
        'lora_dropout': (*NO_NUMBERS, None, -1, 1),
        'peft_type': (None, 5, [], 'IA3'),
    },
    'tokenizer_config.json': {
        'tokenizer_class': (5, [], True),
        'chat_template': (5, {}, [5], True),
        'eos_token': (5, [], True, {'content': 5}, {}),
        'added_tokens_decoder': (5, [], {'x': {'content': 'a'}}, {'5': 5}, {'9' * 30: {}}),
    },
    'config.json of a run': {
        'rl': (5, None, [], 'x'),
        'rl.beta': ('x', None, True, []),
        'rl.objective': (5, None, [], '', 'spgg', 'nowhere.spg', 'json'),
        'spg.beta': ('x', None, True, []),
        'train.steps': ('5', 1.5, None, True, []),
        'model.remat': (1, 'x', None),
        'evaluation.lengths': (5, '12', None, {}),
        'task.name': (5, None, []),
    },
    'result.json of a run': dict.fromkeys(
        ('accuracy', 'base_accuracy', 'seconds'), ('1', None, True, [], {})
    )
    | {'scorer': (5, None)},
    'checkpoint custom metadata': {
        'prompts': (None, 5, [], 'x'),
        'prompt_length': ('8', None, 1.5, True, 0, -1, 10**30),
        'best': (None, [], {}),
        'best.accuracy': ('x', None),
        'best.step': (1.5, None),
        'seconds': ('x', None),
        'last_row': (None, []),
    },
}


@pytest.mark.parametrize(
    ('kind', 'key'), [(kind, key) for kind, values in WRONG.items() for key in values]
)
def test_a_wrong_value_is_refused_by_its_key(good, kind, key):
    file = good(kind)
    content = file.path.read_bytes()
    for value in WRONG[kind][key]:
        file.path.write_bytes(content)
        name = set_key(file.path, key, value)
        refusal(file, str(file.path), {'torch_dtype': 'dtype'}.get(name, name))


@pytest.mark.parametrize('kind', ['policy.json', 'result.json of a run', 'config.json of a run'])
def test_a_missing_key_is_named(good, kind):
    file = good(kind)
    contents = json.loads(file.path.read_text())
    for key in set(WRONG[kind]) & set(contents) - {'rl', 'hf_tokenizer', 'base'}:
        file.path.write_text(json.dumps({k: v for k, v in contents.items() if k != key}))
        refusal(file, str(file.path), key)


# --- neighbours: what a file is about -------------------------------------------------------------


@pytest.mark.parametrize('name', ['..', '/model.safetensors', 'a/../../b.safetensors', '../x/y'])
def test_a_file_outside_of_the_checkpoint_is_refused(good, name):
    file = good('model.safetensors.index.json')
    set_key(file.path, 'weight_map.*', name)
    refusal(file, str(file.path), repr(name), 'outside of the checkpoint')


def test_a_link_inside_of_the_checkpoint_is_followed(good, tmp_path):
    """The cache of the Hugging Face Hub holds links to the files of another folder."""
    file = good('model.safetensors.index.json')
    weights_file = file.path.parent / 'model.safetensors'
    (tmp_path / 'blob').write_bytes(weights_file.read_bytes())
    (file.path.parent / 'linked.safetensors').symlink_to(tmp_path / 'blob')
    contents = json.loads(file.path.read_text())
    links = dict.fromkeys(contents['weight_map'], 'linked.safetensors')
    file.path.write_text(json.dumps({'weight_map': links}))
    file.read()


@pytest.mark.parametrize(
    'dtypes',
    [
        {'dtype': 'bfloat16'},
        {'dtype': 'torch.bfloat16'},
        {'torch_dtype': 'torch.bfloat16'},
        {'dtype': 'bfloat16', 'torch_dtype': None},
    ],
)
def test_the_type_is_read_as_any_version_of_transformers_writes_it(good, dtypes):
    file = good('published config.json')
    contents = json.loads(file.path.read_text())
    del contents['torch_dtype']
    file.path.write_text(json.dumps(contents | dtypes))
    config, _, _ = file.read()
    assert (config.dtype, config.param_dtype) == ('bfloat16', 'bfloat16')


def test_a_policy_that_adapts_itself_is_refused(good):
    file = good('policy.json')
    directory = file.path.parent
    set_key(file.path, 'base', str(directory))
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor')
    )
    refusal(File(file.path, lambda: policies.check_policy(directory, mesh)), str(file.path), 'base')


def test_a_special_id_outside_of_the_embedding_is_refused(good):
    file = good('policy.json')
    set_key(file.path, 'hf_tokenizer', {'mask_id': 6, 'eos_id': 1, 'pad_id': 2})
    refusal(file, str(file.path), 'hf_tokenizer.mask_id is 6, expected less than')


# What PEFT 0.21 writes for an adapter of q_proj with the defaults of LoraConfig.
PEFT_DEFAULTS = {
    'alora_invocation_tokens': None,
    'alpha_pattern': {},
    'arrow_config': None,
    'auto_mapping': None,
    'base_model_name_or_path': 'GSAI-ML/LLaDA-8B-Instruct',
    'bias': 'none',
    'corda_config': None,
    'ensure_weight_tying': False,
    'eva_config': None,
    'exclude_modules': None,
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'kasa_config': None,
    'layer_replication': None,
    'layers_pattern': None,
    'layers_to_transform': None,
    'loftq_config': {},
    'lora_alpha': 4,
    'lora_bias': False,
    'lora_dropout': 0.0,
    'lora_ga_config': None,
    'megatron_config': None,
    'megatron_core': 'megatron.core',
    'modules_to_save': None,
    'monteclora_config': None,
    'peft_type': 'LORA',
    'peft_version': '0.21.2',
    'qalora_group_size': 16,
    'r': 2,
    'rank_pattern': {},
    'revision': None,
    'target_modules': ['q_proj'],
    'target_parameters': None,
    'task_type': 'CAUSAL_LM',
    'trainable_token_indices': None,
    'use_bdlora': None,
    'use_dora': False,
    'use_qalora': False,
    'use_rslora': False,
    'velora_config': None,
}


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'init_lora_weights': False},
        {'init_lora_weights': 'gaussian'},
        {'init_lora_weights': 'eva', 'eva_config': {'rho': 1.0}},
        {'init_lora_weights': 'orthogonal'},
        {'auto_mapping': {'base_model_class': 'LLaDAModelLM'}, 'revision': 'main'},
        {'layers_to_transform': [0, 1], 'layers_pattern': 'blocks'},
        {'a_later_setting': None, 'another': False, 'a_third': {}},
    ],
)
def test_an_adapter_with_settings_that_leave_the_mathematics_alone_is_read(good, changes):
    file = good('adapter_config.json')
    file.path.write_text(json.dumps(PEFT_DEFAULTS | changes))
    lora, _ = file.read()
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (2, 4.0, 0.0, ('query',))


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        *(
            ('init_lora_weights', name)
            for name in ('pissa', 'pissa_niter_16', 'olora', 'corda', 'loftq', 'lora_ga', 'new', 5)
        ),
        ('alora_invocation_tokens', [5, 6]),
        ('use_qalora', True),
        ('use_dora', True),
        ('use_rslora', True),
        ('lora_bias', True),
        ('fan_in_fan_out', True),
        ('bias', 'all'),
        ('bias', 'lora_only'),
        ('rank_pattern', {'q_proj': 2}),
        ('alpha_pattern', {'q_proj': 2}),
        ('modules_to_save', ['wte']),
        ('trainable_token_indices', [1]),
        ('target_parameters', ['x']),
        ('layer_replication', [[0, 2], [1, 2]]),
        ('megatron_config', {'a': 1}),
        ('loftq_config', {'loftq_bits': 4}),
        ('corda_config', {'corda_method': 'ipm'}),
        ('lora_ga_config', {'scale': 'stable'}),
        ('velora_config', {'scale': 1.0}),
        ('arrow_config', {'top_k': 3}),
        ('kasa_config', {'beta': 1.0}),
        ('monteclora_config', {'num_samples': 2}),
        ('use_bdlora', {'nblocks': 2}),
        ('a_later_setting', True),
        ('a_later_setting', 'x'),
        ('a_later_setting', 0.5),
    ],
)
def test_an_adapter_that_is_not_plain_is_refused(good, key, value):
    file = good('adapter_config.json')
    file.path.write_text(json.dumps(PEFT_DEFAULTS | {key: value}))
    refusal(file, str(file.path), f'{key} is {value!r}, ')


def test_an_adapter_saved_otherwise_is_told_how_to_save_it(tmp_path):
    file = adapter(tmp_path / 'adapter')
    path = file.path.parent / 'adapter_model.safetensors'
    renamed = {
        name.replace('.weight', '.default.weight'): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path)
    refusal(file, str(path), "lora_A.default.weight'", 'save_pretrained')
    path.rename(path.with_name('adapter_model.bin'))
    refusal(file, str(path.with_name('adapter_model.bin')), 'is a pickle', 'save_pretrained')


# --- neighbours: chat templates -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('template', 'part'),
    [
        ("{{ 'x' * 10**10 }}", 'memory'),
        ("{{ 'x'.center(10**10) }}", 'memory'),
        ("{{ '%9000000000d' % 1 }}", ''),
        ('{{ 10 ** (10 ** 9) }}', 'memory'),
        ('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}', '3 s'),
        ('{% for a in range(60000) %}xx{% endfor %}', 'writes 120000 characters for one turn'),
        ("{{ messages[0].content.replace(' ', messages[0].content) }}", 'characters for one turn'),
        ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'RecursionError'),
        ("{% if messages[0].content %}{{ 'x' * 10**10 }}{% endif %}", 'memory'),
        ("{{ strftime_now('%d %b') }}", "'strftime_now' is undefined"),
        ("{{ raise_exception('no system turn') }}", 'no system turn'),
        ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
        ('{{ namespace(__call__=1) }}', 'SecurityError'),
        ('{% set n = namespace() %}{% set n.__class__ = 1 %}', 'SecurityError'),
    ],
)
def test_a_template_that_would_not_end_or_change_is_refused(good, template, part):
    file = good('tokenizer_config.json')
    set_key(file.path, 'chat_template', template)
    refusal(file, str(file.path), 'chat_template', part)


def test_a_template_that_fails_for_another_prompt_is_one_line(good):
    file = good('tokenizer_config.json')
    template = "{% if '#' in messages[0].content %}{{ raise_exception('no\nturn') }}{% endif %}x"
    set_key(file.path, 'chat_template', template)
    tokenizer = file.read()
    assert tokenizer.encode_prompt('a')
    with pytest.raises(ValueError, match='the chat_template cannot be used .*no turn') as error:
        tokenizer.encode_prompt('#')
    assert str(file.path) in str(error.value) and '\n' not in str(error.value)


def test_a_template_is_rendered_without_its_byte_order_mark_and_without_the_date(tmp_path):
    file = tokenizer(tmp_path / 'tokenizer')
    expected = file.read().encode_prompt('a b')
    (file.path.parent / 'chat_template.jinja').write_bytes(
        b'\xef\xbb\xbf'
        + b"{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
        + OWN_TEMPLATE.encode()
    )
    set_key(file.path, 'chat_template', None)
    assert file.read().encode_prompt('a b') == expected


TEMPLATES = (
    OWN_TEMPLATE,
    '{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ "é<>" | tojson }}',
    '{% for m in messages %}\n  {% if m.role == "x" %}\n{% continue %}{% endif %}{{ m }}'
    '{% endfor %}{% generation %}{{ messages[0].content }}{% endgeneration %}',
    '{{ tools is none }}{{ unk_token }}{{ messages[0]["content"] | trim | upper }}',
    '{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}\n'
    '{{ ns.n }} {{ eos_token }} {{ dict(a=1) }} {{ documents }} {{ add_generation_prompt }}',
    "{{ dict.fromkeys(['a']) }} {{ namespace(self=2).self }} {{ namespace({'a': 1}).a }}",
)


@pytest.mark.parametrize('template', TEMPLATES)
def test_templates_are_rendered_as_by_transformers(originals, template):
    hf = originals('tokenizer_config.json').read()._hf
    for content in (*PROBES, ' é 試\n ', '{{ 1 }}'):
        turn = [{'role': 'user', 'content': content}]
        expected = hf.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert ChatTemplate(template, hf.special_tokens_map).render(content) == expected


@pytest.mark.parametrize('name', ['RagTokenizer', 'NoSuchTokenizer', 'AutoTokenizer', '', 'os'])
def test_a_tokenizer_of_another_class_is_read_or_refused(good, name):
    file = good('tokenizer_config.json')
    set_key(file.path, 'tokenizer_class', name)
    try:
        assert file.read().encode_prompt('a')
    except ValueError:
        refusal(file, str(file.path.parent))


@pytest.mark.parametrize('name', ['tokenizer.json', 'special_tokens_map.json', 'added_tokens.json'])
def test_the_other_files_of_a_tokenizer_are_read_or_refused(tmp_path, name):
    file = tokenizer(tmp_path / 'tokenizer')
    path = file.path.parent / name
    for text in ('[]', '5', '', '{"eos_token": 5}', '{"a": "b"}', '[' * 100_000):
        path.write_text(text)
        try:
            assert file.read().encode_prompt('a')
        except ValueError:
            refusal(file, str(file.path.parent))
