"""How long a run takes on CPU cores, roughly, said before it starts."""

import ml_collections

from spg_jax.assembly import Parts, model_of
from spg_jax.data.tokenizers import word_tokenizer
from spg_jax.planning.costs import forward
from spg_jax.rl.experience import collections_due

# What one core got done in the main jobs of docs/results.md, with their work counted as below.
FLOPS_OF_ONE_CORE = 33e9
# Two cores did the work of 1.5, since small models leave some of their time idle.
EXPONENT_OF_CORES = 0.6
# A forward and a backward pass cost about three forward passes.
TRAINING_PASSES = 3


def cpu_seconds(
    config: ml_collections.ConfigDict, parts: Parts, cores: int, base_exists: bool
) -> float:
    """Seconds that a run on a model trained here takes, within a factor of about two.

    Args:
      config: of the run, without `base.checkpoint`.
      parts: what it describes.
      cores: that compute.
      base_exists: whether the base policy is there already.
    """
    model = model_of(config, word_tokenizer(parts.task).size, 'cpu')
    sampling, batching, evaluation = parts.sampling, parts.batching, parts.evaluation
    prompt = parts.prompt_lengths[-1]

    def decoding(length: int, steps: int, unembedded: int) -> float:
        return steps * forward(model, prompt + length, unembedded).total

    trained = TRAINING_PASSES * forward(model, prompt + sampling.length, sampling.length).total
    updates = config.train.steps
    objective = parts.objective
    rollouts = sum(collections_due(objective, batching, step) for step in range(updates))
    rows = objective.experience.rows if objective.experience else batching.rows
    headline = evaluation.headline
    shape = headline.length, headline.steps, headline.block_length
    # Base and best policy are both reported: every length once, and the samples of pass@k.
    report = sum(decoding(d.length, d.steps, d.block_length) for d in evaluation.decodings)
    report += evaluation.samples * decoding(*shape)
    flops = (
        updates * rows * objective.draws * trained
        + rollouts
        * batching.rows
        * decoding(sampling.length, sampling.steps, sampling.positions_read)
        + (1 + updates // config.evaluation.every) * config.evaluation.problems * decoding(*shape)
        + 2 * config.evaluation.problems * report
    )
    if not base_exists:
        steps = sum(stage.steps for stage in parts.stages)
        flops += steps * config.base.batch_size * trained
    return flops / (FLOPS_OF_ONE_CORE * cores**EXPONENT_OF_CORES)
