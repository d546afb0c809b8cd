"""Completes a prompt with a policy, and shows in which order the tokens were committed.

    python -m spg_jax.generate --workdir=DIR --trace --prompt='100 93 30 = 23 :'
    python -m spg_jax.generate --workdir=DIR --temperature=0.9 --seed=1
    python -m spg_jax.generate --config=configs/countdown.py:llada_8b --checkpoint=DIR

Without a prompt it takes the first test problem of the task. A published checkpoint gets the prompt
as one user turn of its chat template.
"""

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spg_jax.config import evaluation_sampling, evaluation_task, execution_of, prompt_buckets
from spg_jax.data.batches import left_pad, padded_length
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.diffusion.sampling import Completion
from spg_jax.process import cli
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.evaluator import headline_length
from spg_jax.rl.rollout import make_generate
from spg_jax.runs import policies
from spg_jax.runs.directory import chosen_policy

FLAGS = flags.FLAGS


def show_trace(completion: Completion, tokenizer: Tokenizer, console: Console) -> None:
    """One line a denoising step: what was committed so far, the newest tokens in colour, the rest
    as dots."""
    tokens, committed = np.asarray(completion.tokens)[0], np.asarray(completion.commit_step)[0]
    table = Table('step', 'completion', show_edge=False)
    for step in range(committed.max() + 1):
        line = Text()
        for token, at in zip(tokens.tolist(), committed.tolist(), strict=True):
            # Tokens filled in after an early stop have step -1 and were never predicted.
            known = 0 <= at <= step
            word = tokenizer.decode([token], keep_specials=True) if known else '·'
            line.append(
                word.replace('\n', '\\n') + ' ',
                style='bold green' if at == step else '' if known else 'dim',
            )
        table.add_row(str(step), line)
    console.print(table)


def main(_: list[str]) -> None:
    config, directory, adapter = chosen_policy(
        FLAGS.workdir, FLAGS.checkpoint, FLAGS.adapter, FLAGS.config
    )
    mesh = cli.chosen_mesh(config)
    # Both say what is wrong before any work.
    tokenizer = policies.load_tokenizer(directory)
    policies.check_policy(directory, mesh, adapter)
    cli.compile_cache()
    task = evaluation_task(config)
    prompt = FLAGS.prompt or task.prompt(task.source('test', config.task.data_dir)[0])
    row = tokenizer.encode_prompt(prompt, task.prefill)
    length = padded_length(len(row), prompt_buckets(config))
    tokens, valid = left_pad([row], length, tokenizer.pad_id)
    with jax.set_mesh(mesh):
        policy, _, variables = policies.load_policy(
            directory, mesh, adapter, **execution_of(config)
        )
        length, steps = headline_length(config)
        generate = make_generate(
            policy, evaluation_sampling(config, length, steps, FLAGS.temperature)
        )
        keys = example_keys(FLAGS.seed, Purpose.SAMPLE, 0, np.zeros(1, np.uint32))
        completion = generate(variables, tokens, valid, keys)
    if FLAGS.trace:
        show_trace(completion, tokenizer, Console())
    print(tokenizer.decode(np.asarray(completion.tokens)[0].tolist()))


if __name__ == '__main__':
    cli.define_policy_flags()
    flags.DEFINE_string('prompt', '', "The prompt, in the run's format; '' is a test problem.")
    flags.DEFINE_float(
        'temperature', 0.0, 'Of the choice of tokens; 0 takes the likeliest.', lower_bound=0.0
    )
    flags.DEFINE_integer('seed', 0, 'Seed of the choice of tokens at a temperature above 0.')
    flags.DEFINE_bool('trace', False, 'Show the completion after every denoising step.')
    cli.run(main)
