"""A tiny published checkpoint: the reference weights, and a tokenizer trained here on a few lines.

The special tokens have the ids that tiny_llada/config.json gives them where it gives any.
"""

import json
import os
import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spg_jax import tasks

TINY = Path(__file__).parent / 'reference' / 'tiny_llada'
START, END, HEADER, HEADER_END, TURN_END = range(5)
SPECIALS = (
    '<|startoftext|>',
    '<|endoftext|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
    '<|eot_id|>',
)
MASK, SIZE = 250, 240
# Writes what the template of LLaDA-8B-Instruct writes.
OWN_TEMPLATE = (
    '{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>'
    '\n\n{{ turn.content.strip() }}<|eot_id|>{% endfor %}'
    '{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}'
)


def template() -> str:
    """The chat template of LLaDA-8B-Instruct where it is at hand, else our own."""
    folder = os.environ.get('SPG_JAX_REFERENCE')
    if not folder:
        return OWN_TEMPLATE
    path = Path(folder) / 'reference' / 'llada_8b_instruct' / 'tokenizer_config.json'
    return json.loads(path.read_text())['chat_template']


def byte_pairs(specials: tuple[str, ...] = SPECIALS) -> tokenizers.Tokenizer:
    """A byte-pair tokenizer that puts a start token before everything unless told not to."""
    lines = [tasks.get(name, 'published_eval').template for name in tasks.TASKS]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    ascii = [chr(code) for code in range(33, 127)]
    made.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=SIZE,
            special_tokens=list(specials),
            initial_alphabet=[*ascii, 'Ġ', 'Ċ'],  # space and line break, as byte-level writes them
            show_progress=False,
        ),
    )
    if not specials:
        return made
    start = (specials[0], made.token_to_id(specials[0]))
    made.post_processor = processors.TemplateProcessing(
        single=f'{start[0]} $A', pair=f'{start[0]} $A $B', special_tokens=[start]
    )
    return made


def save_tokenizer(directory: Path, **changes) -> tokenizers.Tokenizer:
    """Writes tokenizer files as published; `changes` replace what they say."""
    settings = dict(
        bos_token=SPECIALS[START],
        eos_token=SPECIALS[END],
        pad_token=SPECIALS[END],
        chat_template=template(),
        backend=changes.pop('backend', None) or byte_pairs(),
    )
    settings |= changes
    backend, chat = settings.pop('backend'), settings.pop('chat_template')
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    hf.save_pretrained(directory)
    # Versions of transformers save the template in different places; LLaDA has it in this one.
    path = directory / 'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'chat_template': chat}))
    return backend


def save_checkpoint(directory: Path) -> tokenizers.Tokenizer:
    """A published checkpoint directory, as one downloads it."""
    shutil.copytree(TINY, directory, dirs_exist_ok=True)
    return save_tokenizer(directory)


def asked(backend: tokenizers.Tokenizer, text: str, prefill: str = '') -> list[int]:
    """The ids of a prompt, put together by hand: one user turn, then the opening of the answer."""

    def plain(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return [
        *(START, HEADER, *plain('user'), HEADER_END, *plain('\n\n' + text.strip()), TURN_END),
        *(HEADER, *plain('assistant'), HEADER_END, *plain('\n\n' + prefill)),
    ]
