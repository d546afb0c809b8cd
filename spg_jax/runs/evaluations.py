"""What an evaluation leaves on disk: its completions, and the card of each file of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from spg_jax.assembly import assemble
from spg_jax.diffusion.samplers import REGISTRY
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.process.files import write_whole
from spg_jax.rl.evaluator import Evaluation, Transcript
from spg_jax.runs import policies
from spg_jax.tasks.card import (
    CARDS,
    COMPLETIONS,
    RESULT,
    TEST,
    Card,
    problems_digest,
    scorer_version,
    to_records,
    unlike,
    wording,
)
from spg_jax.tasks.task import Example

__all__ = ['TEST', 'Card', 'card_of', 'chosen_by', 'unlike', 'write_evaluation']

# The settings of a decoding that change completions, and the rules that read them; () is any rule.
_SETTINGS = {
    'schedule': (),
    'commit': ('autoedit',),  # drafts by it; elsewhere it is the name of the rule
    'threshold': ('threshold', 'llada2', 'llada21', 'remask'),
    'factor': ('factor',),
    'entropy_bound': ('entropy_bounded',),
    'remasks': ('remask',),
    'edit_threshold': ('llada21', 'autoedit'),
    'post_steps': ('llada21',),
    'edit_rounds': ('autoedit',),
    'keep_threshold': ('autoedit',),
    'cache': (),
    'refresh': (),  # read with a cache only
    'guidance': (),
    'top_k': (),
    'top_p': (),
}


def card_of(
    config: ml_collections.ConfigDict,
    examples: Sequence[Example],
    checkpoint: str,
    decoding: SamplingConfig | None = None,
    samples: int = 1,
) -> Card:
    """The card of a figure that a configuration gives on some problems.

    Args:
      config: the settings of the run or of the evaluation.
      examples: the problems.
      checkpoint: what chose the checkpoint, one of `tasks.card.RULES`; see `chosen_by`.
      decoding: how completions are decoded; None is the headline decoding of the settings.
      samples: the number of completions of each problem.

    Raises:
      ValueError: the settings cannot work.
    """
    parts = assemble(config)
    task, decoding = parts.evaluation_task, decoding or parts.evaluation.headline
    return Card(
        task=task.name,
        prompt=wording(task),
        shots=config.task.shots,
        length=decoding.length,
        steps=decoding.steps,
        block=decoding.block_length,
        temperature=decoding.temperature,
        sampler=_sampler(decoding),
        samples=samples,
        problems=problems_digest(task, examples),
        count=len(examples),
        scorer=task.scorer,
        version=scorer_version(task),
        checkpoint=checkpoint,
    )


def chosen_by(policy: Path) -> str:
    """What chose the policy in a directory: 'validation' in a run here, else 'none'."""
    return 'validation' if 'best' in policies.policy_notes(policy) else 'none'


def write_evaluation(
    folder: Path,
    config: ml_collections.ConfigDict,
    examples: Sequence[Example],
    transcripts: Sequence[Transcript],
    checkpoint: str,
    figures: dict[str, Any],
) -> Card:
    """Writes the completions of an evaluation, and then result.json with figures and cards.

    The completions of the headline length are in completions.jsonl, which `spg_jax.score` reads;
    those of each other length or temperature are in a file of their own.

    Args:
      folder: where to write; it is created if it does not exist.
      config: the settings of the evaluation.
      examples: the problems.
      transcripts: of `Evaluator.report`.
      checkpoint: as in `card_of`.
      figures: JSON values for result.json.

    Returns:
      The card of the headline figures.

    Raises:
      OSError: the files cannot be written.
    """
    parts = assemble(config)
    folder.mkdir(parents=True, exist_ok=True)
    # Without a result.json nobody takes the new completions for those of older cards.
    (folder / RESULT).unlink(missing_ok=True)
    headline = card_of(config, examples, checkpoint)
    records = to_records(parts.evaluation_task, examples)
    cards = {}
    for place, transcript in enumerate(transcripts):
        name = _file_name(place, transcript, parts.evaluation)
        cards[name] = card_of(
            config, examples, checkpoint, transcript.decoding, transcript.samples
        ).to_json()
        write_whole(folder / name, _lines(records, transcript))
    if COMPLETIONS in cards:
        headline = Card(**cards[COMPLETIONS])
    contents = figures | {'card': headline.to_json(), CARDS: cards}
    write_whole(folder / RESULT, json.dumps(contents, indent=1))
    return headline


def _file_name(place: int, transcript: Transcript, evaluation: Evaluation) -> str:
    """The name of the file of a transcript; decodings come first, in the order of the settings."""
    if place >= len(evaluation.decodings):
        return f'completions_pass_at_{transcript.samples}.jsonl'
    decoding = evaluation.decodings[place]
    if decoding == evaluation.headline:
        return COMPLETIONS
    return f'completions_{decoding.length}_{decoding.steps}.jsonl'


def _lines(records: Sequence[tuple[Any, Any]], transcript: Transcript) -> str:
    """The contents of a file of completions, one JSON object a line."""
    lines = []
    for row, text in enumerate(transcript.texts):
        question, ground_truth = records[row // transcript.samples]
        line = {'question': question, 'ground_truth': ground_truth, 'completion': text}
        lines.append(json.dumps(line) + '\n')
    return ''.join(lines)


def _sampler(decoding: SamplingConfig) -> str:
    """The rule of commitment, and those settings that it reads and that are not usual."""
    usual = SamplingConfig(
        decoding.length, decoding.steps, decoding.block_length, decoding.temperature
    )
    rule = decoding.rule_name
    words = [rule]
    for name, rules in _SETTINGS.items():
        value = getattr(decoding, name)
        is_read = rule in rules or not rules or rule not in REGISTRY
        if name == 'refresh' and not decoding.cache:
            continue
        if is_read and (rule in rules or value != getattr(usual, name)):
            words.append(f'{name} {value}')
    return ', '.join(words)
