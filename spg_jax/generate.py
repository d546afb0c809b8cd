"""Completes a prompt with a policy; --trace shows in which order the tokens were committed.

    python -m spg_jax.generate --workdir=DIR --trace --prompt='100 93 30 = 23 :'
    python -m spg_jax.generate --workdir=DIR --temperature=0.9 --seed=1
    python -m spg_jax.generate --config=configs/countdown.py:llada_8b --checkpoint=DIR
    python -m spg_jax.generate --workdir=DIR --prompts=FILE > completions.jsonl

Without --prompt the command completes the first test problem of the task. A published checkpoint
gets the prompt as one user turn of its chat template.

--prompts completes a file, evaluation.batch prompts at a time, and prints one JSON object for each.
A FILE has a prompt on each line, or JSON lines such as {"prompt": "100 93 30 = 23 :"}, or problems
of the task in any form that `evaluate --data` reads: JSON lines, a JSON list, a table whose header
has the keys of the task, or Parquet. Completions of problems are printed as `spg_jax.score` reads
them.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.console import Console

from spg_jax.assembly import assemble
from spg_jax.data.batches import left_pad, padded_length
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.diffusion.samplers.editing import DRAFT
from spg_jax.diffusion.sampling import Completion
from spg_jax.method import complete
from spg_jax.process import cli
from spg_jax.process.progress import track
from spg_jax.process.trace import show_trace
from spg_jax.random import SEEDS, Purpose, example_keys
from spg_jax.rl.collection import decode, make_generate
from spg_jax.runs import policies
from spg_jax.runs.directory import chosen_policy
from spg_jax.sharding import own_values, put_batch, row_shards
from spg_jax.tasks import reading
from spg_jax.tasks.card import to_records
from spg_jax.tasks.formats import FormattedTask
from spg_jax.tasks.task import Task

FLAGS = flags.FLAGS
TABLES = ('.csv', '.tsv', '.parquet')  # files that hold problems and no prompts
_LIST = re.compile(r'\s*\[\s*\{')  # the start of a list of problems; a prompt may begin with [


def main(_: list[str]) -> None:
    if FLAGS.prompts and (FLAGS.prompt or FLAGS.trace):
        raise ValueError(
            f'--prompts given with {"--prompt" if FLAGS.prompt else "--trace"}, which is for one '
            'prompt; give one of the two'
        )
    config, directory, adapter = chosen_policy(
        FLAGS.workdir, FLAGS.checkpoint, FLAGS.adapter, FLAGS.config
    )
    parts, mesh = assemble(config), cli.chosen_mesh(config.mesh)
    # Fail early: these two calls read no weights.
    tokenizer = policies.load_tokenizer(directory)
    policies.check_policy(directory, mesh, adapter)
    cli.compile_cache()
    task = parts.evaluation_task
    decoding = dataclasses.replace(parts.evaluation.headline, temperature=FLAGS.temperature)
    if FLAGS.prompts:
        requests = read_requests(FLAGS.prompts, task)
        encoded = encode_requests(requests, task, tokenizer)
        with jax.set_mesh(mesh):
            policy, _, variables = policies.load_policy(directory, mesh, adapter, **parts.execution)
            generate = partial(make_generate(policy, decoding), variables)
            for line in completed(
                generate,
                requests,
                encoded,
                task,
                tokenizer,
                mesh,
                batch=parts.evaluation.batch,
                buckets=parts.prompt_lengths,
                seed=FLAGS.seed,
            ):
                print(json.dumps(line), flush=True)
        return
    prompt = FLAGS.prompt or task.prompt(task.source('test', config.task.data_dir)[0])
    ids = tokenizer.encode_prompt(prompt, task.prefill)
    tokens, valid = left_pad([ids], padded_length(len(ids), parts.prompt_lengths), tokenizer.pad_id)
    with jax.set_mesh(mesh):
        policy, _, variables = policies.load_policy(directory, mesh, adapter, **parts.execution)
        keys = example_keys(FLAGS.seed, Purpose.SAMPLE, 0, np.zeros(1, np.uint32))
        completion = make_generate(policy, decoding)(variables, tokens, valid, keys)
    if FLAGS.trace:
        steps = np.asarray(completion.commit_step)[0]
        committed = np.asarray(completion.extras.get(DRAFT, completion.tokens))[0]
        show_trace(committed, steps, lambda token: tokenizer.decode([token], True), Console())
    print(tokenizer.decode(np.asarray(completion.tokens)[0].tolist()))


class Request(NamedTuple):
    """A prompt to complete, and what to print beside its completion."""

    where: str  # its place in the file, for messages
    prompt: str
    line: dict[str, Any]  # JSON values
    is_problem: bool  # whether a scorer is to read the completion


def read_requests(path: str, task: Task) -> list[Request]:
    """The prompts of a file, or the problems of the task in it.

    Raises:
      ValueError: the file cannot be read, or a line of it is wrong; the message names the line.
    """
    if Path(path).is_fifo():
        raise ValueError(f'--prompts={path} is a pipe, and the file is read twice; save it first')
    columns = task.columns if isinstance(task, FormattedTask) else {}
    if Path(path).suffix in TABLES or reading.is_table(path, columns):
        return _problems(path, task)
    text = reading.read_text(path)
    if _LIST.match(text):
        return _problems(path, task)
    lines = [
        (f'{path}:{number}', line)
        for number, line in enumerate(text.split('\n'), 1)
        if line.strip()
    ]
    first_where, first = lines[0]
    if not first.lstrip().startswith('{'):
        return [Request(where, line, {'prompt': line}, is_problem=False) for where, line in lines]
    if 'prompt' not in reading.parse_json(first, first_where):
        return _problems(path, task)
    return [_request(where, line) for where, line in lines]


def _request(where: str, text: str) -> Request:
    """The request in one JSON line; its other keys are printed beside the completion."""
    line = reading.parse_json(text, where)
    prompt = line.get('prompt') if isinstance(line, dict) else None
    if not reading.is_text(prompt):
        raise ValueError(f'{where}: found {reading.shown(line)}, expected {{"prompt": text}}')
    return Request(where, prompt, line, is_problem=False)


def _problems(path: str, task: Task) -> list[Request]:
    examples = task.read_published(path)
    return [
        Request(
            f'{path}, problem {number}',
            task.prompt(example),
            {'question': question, 'ground_truth': ground_truth},
            is_problem=True,
        )
        for number, (example, (question, ground_truth)) in enumerate(
            zip(examples, to_records(task, examples), strict=True), 1
        )
    ]


def encode_requests(
    requests: Sequence[Request], task: Task, tokenizer: Tokenizer
) -> list[list[int]]:
    """The tokens of each prompt.

    Raises:
      ValueError: the tokenizer cannot express a prompt; the message names its place in the file.
    """
    encoded = []
    for request in requests:
        try:
            encoded.append(tokenizer.encode_prompt(request.prompt, task.prefill))
        except ValueError as error:
            raise ValueError(f'{request.where}: {error}') from None
    return encoded


def completed(
    generate: Callable[..., Completion],
    requests: Sequence[Request],
    encoded: Sequence[Sequence[int]],
    task: Task,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    batch: int,
    buckets: Sequence[int],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yields the line of each request with its 'completion', in the order of the requests.

    The key of a completion is that of its place in the file, so that a completion does not depend
    on the size of the batches. All prompts are padded to one length, so that one program serves all
    of them.

    Args:
      generate: (prompt [B, P], prompt_mask [B, P], keys [B]) -> Completion.
      requests: the prompts.
      encoded: the tokens of each prompt.
      task: its scorer says whether completions of problems keep special tokens.
      tokenizer: the tokenizer of the policy.
      mesh: the devices.
      batch: prompts that are completed at once; rounded up so that rows split over the devices.
      buckets: lengths that prompts may be padded to.
      seed: of the choice of tokens.
    """
    length = padded_length(max(map(len, encoded)), buckets)
    shards = row_shards(mesh)
    rows = -(-min(batch, len(requests)) // shards) * shards
    batches = range(-(-len(requests) // rows))
    for number in track(batches, f'batches of {rows} prompts', lambda: ''):
        places = np.arange(number * rows, (number + 1) * rows)
        # The last batch is filled up with its last prompt, so that one program serves every batch.
        filled = np.minimum(places, len(requests) - 1)
        tokens, valid = left_pad([encoded[place] for place in filled], length, tokenizer.pad_id)
        placed = put_batch(mesh, {'prompt': tokens, 'valid': valid})
        keys = example_keys(seed, Purpose.SAMPLE, 0, filled.astype(np.uint32))
        completion = generate(placed['prompt'], placed['valid'], keys)
        finished = requests[places[0] : places[-1] + 1]
        values = own_values(completion.tokens)[: len(finished)]
        for request, row in zip(finished, values, strict=True):
            # Published scorers look for the end of the turn in the text, see `Evaluator`.
            specials = request.is_problem and task.scorer == 'published'
            (text,) = decode(tokenizer, row[None], keep_specials=specials)
            yield request.line | {'completion': text}


if __name__ == '__main__':
    cli.define_policy_flags(complete)
    flags.DEFINE_string(
        'prompt', '', "The prompt, in the format of the run; '' is the first test problem."
    )
    cli.define_path_flag('prompts', '', 'A file of prompts, or of problems of the task.')
    flags.DEFINE_float(
        'temperature',
        0.0,
        'Temperature of the choice of tokens; 0 takes the likeliest.',
        lower_bound=0.0,
    )
    flags.DEFINE_integer(
        'seed',
        0,
        'Seed of the choice of tokens at a temperature above 0.',
        lower_bound=0,
        upper_bound=SEEDS - 1,
    )
    flags.DEFINE_bool('trace', False, 'Show the completion after every denoising step.')
    cli.run(main)
