"""Samples completions of reward 1 from a run's base policy, for rejection-sampling fine-tuning.

    python -m benchmarks.rejection_sampling --workdir=RUN --seconds=60 --out=rewarded.jsonl
    python -m spg_jax.pretrain --config=… --config.base.checkpoint=BASE --workdir=DIR \\
        --demonstrations=rewarded.jsonl

The command goes through the training problems and samples completions as the rollouts of the run.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.pretrain import base_directory
from spg_jax.process import cli
from spg_jax.process.files import write_whole
from spg_jax.rl.evaluator import Evaluator
from spg_jax.runs import policies
from spg_jax.runs.directory import policy_of_run, run_config

PROMPTS_AT_ONCE = 256
FLAGS = flags.FLAGS


def main(_: Sequence[str]) -> None:
    config = run_config(Path(FLAGS.workdir))
    checkpoint = config.base.checkpoint
    base = policy_of_run(Path(checkpoint)) if checkpoint else base_directory(config)
    cli.compile_cache()
    mesh = sharding.make_mesh({'data': -1})
    parts = assemble(config)
    problems = list(parts.task.source('train', config.task.data_dir))
    group_size = parts.batching.group_size
    demonstrations, sampled, deadline = [], 0, time.monotonic() + FLAGS.seconds
    with jax.set_mesh(mesh):
        policy, tokenizer, variables = policies.load_policy(base, mesh, **parts.execution)
        evaluator = Evaluator(policy, parts.task, tokenizer, parts.evaluation, mesh)
        while time.monotonic() < deadline and sampled + PROMPTS_AT_ONCE <= len(problems):
            examples = problems[sampled : sampled + PROMPTS_AT_ONCE]
            sampled += PROMPTS_AT_ONCE
            texts = evaluator.texts(variables, examples, parts.sampling, group_size)
            for row, text in enumerate(texts):
                example = examples[row // group_size]
                if parts.task.reward(text, example) == 1:
                    demonstrations.append({'example': example, 'completion': text})
    write_whole(Path(FLAGS.out), ''.join(json.dumps(row) + '\n' for row in demonstrations))
    count = sampled * group_size
    print(f'{FLAGS.out}: {len(demonstrations)} of {count} completions have reward 1')


if __name__ == '__main__':
    cli.define_path_flag('workdir', None, 'A run of spg_jax.train.')
    flags.DEFINE_float('seconds', None, 'Seconds to sample for.', lower_bound=0.0)
    cli.define_path_flag(
        'out', None, 'The file to write: JSON lines for spg_jax.pretrain --demonstrations.'
    )
    flags.mark_flags_as_required(['workdir', 'seconds', 'out'])
    cli.run(main)
