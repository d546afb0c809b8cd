"""Accuracy of a policy by the published protocol: temperature 0, low-confidence commitment."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spg_jax.data.batches import left_pad, padded_length
from spg_jax.data.prompts import prompt_tokens
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.diffusion.samplers.editing import DRAFT
from spg_jax.diffusion.sampling import Completion, SamplingConfig
from spg_jax.models.policy import Policy, Variables
from spg_jax.process import distributed
from spg_jax.process.progress import track_if_long
from spg_jax.random import Purpose
from spg_jax.rl.collection import (
    check_rewards,
    decode,
    decoding_of,
    make_generate,
    make_keys,
)
from spg_jax.rl.slots import can_refill, can_stream, in_order, make_stream
from spg_jax.sharding import own_rows, own_values, put_batch, row_shards
from spg_jax.tasks import reading
from spg_jax.tasks.task import Example, Score, Task

Figures = dict[str, Any]  # JSON values; accuracies are fractions in [0, 1]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How accuracy is measured."""

    decodings: tuple[SamplingConfig, ...]  # greedy, one for each completion length
    trained_length: int  # C of the rollouts
    temperature: float  # of the completions that pass@k looks at, as in rollouts
    samples: int  # k of pass@k
    batch: int  # rows that are generated at once, over all devices
    compact: bool  # as `Batching.compact`, where it can be
    prompt_lengths: tuple[int, ...]  # lengths that prompts are padded to, ascending
    seed: int  # of the random numbers at a temperature above 0

    @property
    def headline(self) -> SamplingConfig:
        """The decoding whose figures choose checkpoints and stand for the policy.

        It is the decoding at the length of training if there is one, and otherwise the first. It is
        never chosen by its figures on the test split.
        """
        matching = (each for each in self.decodings if each.length == self.trained_length)
        return next(matching, self.decodings[0])


class _Completions(NamedTuple):
    """The completions of an evaluation that this process decodes and scores."""

    total: int  # rows over all processes
    rows: np.ndarray  # [n] row numbers, ascending
    tokens: np.ndarray  # [n, C] int32
    commit_step: np.ndarray  # [n, C] int32
    draft: np.ndarray | None  # [n, C] int32, the tokens before a sampler edited them

    def of_all_processes(self, values: np.ndarray) -> np.ndarray:
        """Merges the values [n, ...] that each process has for its rows -> [total, ...]."""
        merged = np.zeros((self.total, *values.shape[1:]), values.dtype)
        is_local = np.zeros(self.total, bool)
        merged[self.rows], is_local[self.rows] = values, True
        return distributed.merge(merged, is_local)


class Transcript(NamedTuple):
    """All completions of one decoding of the problems, as the scorer read them."""

    decoding: SamplingConfig  # as the model decodes: an autoregressive one commits token by token
    samples: int  # completions of each example, next to each other
    texts: list[str]  # of the rows of all processes


class Evaluator:
    """Decodes and scores problems with a policy's current parameters.

    A program is compiled once for each decoding and each length of prompts.
    """

    def __init__(
        self, policy: Policy, task: Task, tokenizer: Tokenizer, evaluation: Evaluation, mesh: Mesh
    ):
        self._policy, self._task, self._tokenizer = policy, task, tokenizer
        self._evaluation, self._mesh = evaluation, mesh
        self._programs: dict[SamplingConfig, Callable[..., Completion]] = {}
        self._keys = make_keys(evaluation.seed, Purpose.EVALUATE)

    def report(
        self,
        variables: Variables,
        examples: Sequence[Example],
        transcripts: list[Transcript] | None = None,
    ) -> Figures:
        """Figures at the headline length, its pass@k, and the accuracy at every length.

        Args:
          variables: the parameters of the policy.
          examples: the problems.
          transcripts: a list to which the completions behind these figures are added; None keeps
            none. With several processes, either all give a list or none does.
        """
        evaluation = self._evaluation
        figures = {
            decoding: self.greedy(variables, examples, decoding, transcripts)
            for decoding in evaluation.decodings
        }
        return figures[evaluation.headline] | {
            'length': evaluation.headline.length,
            'accuracy_by_length': {
                str(decoding.length): figures[decoding]['accuracy'] for decoding in figures
            },
            f'pass_at_{evaluation.samples}': self.pass_at(variables, examples, transcripts),
        }

    def validate(self, variables: Variables, examples: Sequence[Example]) -> Figures:
        """Figures at the headline length only, which are cheap enough to compute often."""
        return self.greedy(variables, examples, self._evaluation.headline)

    def greedy(
        self,
        variables: Variables,
        examples: Sequence[Example],
        decoding: SamplingConfig,
        transcripts: list[Transcript] | None = None,
    ) -> Figures:
        """The task's figures and the mean reward of one completion for each example."""
        completions = self._generate(variables, examples, decoding, samples=1)
        self._keep(completions, decoding, 1, transcripts)
        texts = decode(self._tokenizer, completions.tokens)
        rewards = [
            self._task.reward(text, examples[row])
            for row, text in zip(completions.rows, texts, strict=True)
        ]
        check_rewards(self._task, rewards, texts)
        scores = self._scores(completions, examples, samples=1)
        figures = self._task.figures(scores)
        mean_reward = completions.of_all_processes(np.array(rewards)).mean()
        figures |= {'reward': float(mean_reward)}
        if completions.draft is None:
            return figures
        drafts = completions._replace(tokens=completions.draft)
        scores_of_drafts = self._scores(drafts, examples, samples=1)
        changed = np.mean(completions.tokens != drafts.tokens, axis=-1)
        return figures | {
            'draft_accuracy': self._task.figures(scores_of_drafts)['accuracy'],
            'draft_solved': sum(score.solved for score in scores_of_drafts),
            **edit_figures(scores_of_drafts, scores),
            'edited': float(completions.of_all_processes(changed).mean()),
        }

    def pass_at(
        self,
        variables: Variables,
        examples: Sequence[Example],
        transcripts: list[Transcript] | None = None,
    ) -> float:
        """Share of problems that at least one of k completions solves, which are sampled at the
        temperature of rollouts by the rule of evaluations."""
        evaluation, samples = self._evaluation, self._evaluation.samples
        decoding = dataclasses.replace(evaluation.headline, temperature=evaluation.temperature)
        completions = self._generate(variables, examples, decoding, samples)
        self._keep(completions, decoding, samples, transcripts)
        solved = [score.solved for score in self._scores(completions, examples, samples)]
        return float(np.reshape(solved, (-1, samples)).any(axis=1).mean())

    def texts(
        self,
        variables: Variables,
        examples: Sequence[Example],
        decoding: SamplingConfig,
        samples: int,
    ) -> list[str]:
        """The texts of `samples` completions of each example, next to each other.

        With several processes, each gets the texts of the rows that it has.
        """
        completions = self._generate(variables, examples, decoding, samples)
        return decode(self._tokenizer, completions.tokens)

    def trace(self, variables: Variables, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """The headline completion of one example as it was committed, before any edit: tokens [C]
        and commit steps [C], both int32."""
        completions = self._generate(variables, [example], self._evaluation.headline, samples=1)
        drafts = completions.tokens if completions.draft is None else completions.draft
        return drafts[0], completions.commit_step[0]

    def _keep(
        self,
        completions: _Completions,
        decoding: SamplingConfig,
        samples: int,
        transcripts: list[Transcript] | None,
    ) -> None:
        """Adds the completions of all processes to `transcripts`, if there is such a list."""
        if transcripts is None:
            return
        tokens = completions.of_all_processes(completions.tokens)
        decoding = decoding_of(self._policy.config, decoding)
        transcripts.append(Transcript(decoding, samples, self._scored_texts(tokens)))

    def _scored_texts(self, tokens: np.ndarray) -> list[str]:
        """The text of each row [C] of tokens as the scorer reads it."""
        # Published scorers look for the end of the turn in the text; published rewards do not.
        specials = self._task.scorer == 'published'
        return decode(self._tokenizer, tokens, keep_specials=specials)

    def _scores(
        self, completions: _Completions, examples: Sequence[Example], samples: int
    ) -> list[Score]:
        """The verdicts on all rows; each process scores the rows that it has."""
        texts = self._scored_texts(completions.tokens)
        scores = [
            self._task.score(text, examples[row // samples])
            for row, text in zip(completions.rows, texts, strict=True)
        ]
        check_scores(self._task, scores)
        table = np.array(scores, np.int32).reshape(-1, len(Score._fields))
        return [
            Score(int(right), int(total), bool(solved))
            for right, total, solved in completions.of_all_processes(table)
        ]

    def _generate(
        self,
        variables: Variables,
        examples: Sequence[Example],
        decoding: SamplingConfig,
        samples: int,
    ) -> _Completions:
        """Completions of N examples: N * samples rows, of which each process gets a part."""
        program, shards = self._program(decoding), row_shards(self._mesh)
        batch, total = -(-self._evaluation.batch // shards) * shards, len(examples) * samples
        if self._refills(decoding):  # The slots take a batch of all rows, so that none waits.
            batch = max(batch, total)
        first_rows, local_rows = np.arange(0, total, batch), own_rows(self._mesh, batch)
        # The last batch is filled up with its last row, so that one program serves every batch.
        batches = np.minimum(first_rows[:, None] + local_rows[None, :], total - 1)
        prompts = self._prompts(examples, np.unique(batches // samples))
        tokens, commit_steps, drafts = [], [], []
        label = f'{total} completions of {decoding.length} tokens, batches'
        for number in track_if_long(len(batches), label):
            rows = batches[number]
            encoded = [prompts[row // samples] for row in rows]
            index = [examples[row // samples]['index'] for row in rows]
            member = (rows % samples).astype(np.uint32)
            placed = put_batch(
                self._mesh,
                {
                    'prompt': np.stack([prompt for prompt, _ in encoded]),
                    'prompt_mask': np.stack([valid for _, valid in encoded]),
                    'example_id': np.array(index, np.uint32) * np.uint32(samples) + member,
                },
            )
            keys = self._keys(0, placed['example_id'])
            completion = program(variables, placed['prompt'], placed['prompt_mask'], keys)
            tokens.append(completion.tokens)
            commit_steps.append(completion.commit_step)
            if DRAFT in completion.extras:
                drafts.append(completion.extras[DRAFT])
        rows, first = np.unique(batches, return_index=True)  # Drops the rows of the filling.
        return _Completions(
            total,
            rows,
            np.concatenate(tokens)[first],
            np.concatenate(commit_steps)[first],
            np.concatenate(drafts)[first] if drafts else None,
        )

    def _program(self, decoding: SamplingConfig) -> Callable[..., Completion]:
        """A function of the arguments of `Generate`, whose result has host arrays of local rows."""
        if decoding in self._programs:
            return self._programs[decoding]
        if self._in_slots(decoding):
            program = in_order(make_stream(self._policy, decoding, self._evaluation.batch))
        else:
            generate = make_generate(self._policy, decoding)

            def program(*arguments: Any) -> Completion:
                return jax.tree.map(own_values, generate(*arguments))

        self._programs[decoding] = program
        return program

    def _in_slots(self, decoding: SamplingConfig) -> bool:
        return self._evaluation.compact and can_stream(self._policy, decoding, self._mesh)

    def _refills(self, decoding: SamplingConfig) -> bool:
        return self._in_slots(decoding) and can_refill(decoding)

    def _prompts(
        self, examples: Sequence[Example], places: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Tokens and validity, each [P], of the prompts at these places.

        No prompt is left out or cut, however long it is, because an accuracy over fewer or other
        problems would be another figure.
        """
        rows = [prompt_tokens(self._task, self._tokenizer, examples[place]) for place in places]
        longest = distributed.largest(max(map(len, rows), default=0))
        length = padded_length(longest, self._evaluation.prompt_lengths)
        encoded = left_pad(rows, length, self._tokenizer.pad_id)
        return dict(zip(places.tolist(), zip(*encoded, strict=True), strict=True))


def edit_figures(before: Sequence[Score], after: Sequence[Score]) -> Figures:
    """How many problems editing solved, and how many it spoiled."""
    pairs = list(zip(before, after, strict=True))
    return {
        'wrong_to_right': sum(not old.solved and new.solved for old, new in pairs),
        'right_to_wrong': sum(old.solved and not new.solved for old, new in pairs),
    }


def check_scores(task: Task, scores: Sequence[Any]) -> None:
    """Refuses verdicts of another type, which the task of a user may give by mistake.

    Raises:
      ValueError: a verdict is no Score.
    """
    for score in scores:
        if not isinstance(score, Score):
            raise ValueError(
                f'the score of task {task.name} is {reading.shown(score)}; return a '
                'spg_jax.tasks.Score'
            )
