"""Completes a prompt with a policy; --trace shows in which order the tokens were committed.

    python -m spg_jax.generate --workdir=DIR --trace --prompt='100 93 30 = 23 :'
    python -m spg_jax.generate --workdir=DIR --temperature=0.9 --seed=1
    python -m spg_jax.generate --config=configs/countdown.py:llada_8b --checkpoint=DIR

Without --prompt the command completes the first test problem of the task. A published checkpoint
gets the prompt as one user turn of its chat template.
"""

import dataclasses

import jax
import numpy as np
from absl import flags
from rich.console import Console

from spg_jax.assembly import assemble
from spg_jax.data.batches import left_pad, padded_length
from spg_jax.method import complete
from spg_jax.process import cli
from spg_jax.process.trace import show_trace
from spg_jax.random import SEEDS, Purpose, example_keys
from spg_jax.rl.collection import make_generate
from spg_jax.runs import policies
from spg_jax.runs.directory import chosen_policy

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    config, directory, adapter = chosen_policy(
        FLAGS.workdir, FLAGS.checkpoint, FLAGS.adapter, FLAGS.config
    )
    parts, mesh = assemble(config), cli.chosen_mesh(config.mesh)
    # Fail early: these two calls read no weights.
    tokenizer = policies.load_tokenizer(directory)
    policies.check_policy(directory, mesh, adapter)
    cli.compile_cache()
    task = parts.evaluation_task
    prompt = FLAGS.prompt or task.prompt(task.source('test', config.task.data_dir)[0])
    ids = tokenizer.encode_prompt(prompt, task.prefill)
    tokens, valid = left_pad([ids], padded_length(len(ids), parts.prompt_lengths), tokenizer.pad_id)
    decoding = dataclasses.replace(parts.evaluation.headline, temperature=FLAGS.temperature)
    with jax.set_mesh(mesh):
        policy, _, variables = policies.load_policy(directory, mesh, adapter, **parts.execution)
        keys = example_keys(FLAGS.seed, Purpose.SAMPLE, 0, np.zeros(1, np.uint32))
        completion = make_generate(policy, decoding)(variables, tokens, valid, keys)
    tokens, commit_step = np.asarray(completion.tokens)[0], np.asarray(completion.commit_step)[0]
    if FLAGS.trace:
        show_trace(tokens, commit_step, lambda token: tokenizer.decode([token], True), Console())
    print(tokenizer.decode(tokens.tolist()))


if __name__ == '__main__':
    cli.define_policy_flags(complete)
    flags.DEFINE_string(
        'prompt', '', "The prompt, in the format of the run; '' is the first test problem."
    )
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
