"""The interface of every task: prompts, rewards, scores, demonstrations and problems."""

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from spg_jax.tasks import mended
from spg_jax.tasks.reading import Columns, with_own_keys
from spg_jax.tasks.source import Example, Source

RULES = ('released', 'mended')
EXAMPLES = 'examples'  # the placeholder that worked examples replace, if a prompt has it
# Only {name} is a placeholder: braces around anything else, as in \boxed{}, are text.
_PLACEHOLDER = re.compile(r'\{([A-Za-z_]+)\}')


class Score(NamedTuple):
    """The verdict on one completion."""

    right: int  # items that are right; an item is a Sudoku cell or a whole Countdown expression
    total: int  # items asked for
    solved: bool  # True if every item is right


@dataclass(frozen=True)
class Format:
    """How problem and answer are written, and which scorer judges the answer."""

    template: str  # the prompt, with the task's placeholders
    completion: str  # a demonstration, with {answer}; that of word problems has {reasoning} too
    separator: str  # the text between the numbers or cells of a prompt
    scorer: str  # 'compact' | 'published'; the name that figures carry
    prefill: str = ''  # the start of every completion; it follows the chat template, if any
    examples: tuple[str, ...] = ()  # worked examples, of which the prompt shows the first `shots`


@dataclass(frozen=True)
class Task(abc.ABC):
    """A family of problems in one format. Build one with `spg_jax.tasks.get`; every method is pure.

    A completion is hostile text. Methods that take one never raise, never hang and never return
    NaN.
    """

    format: str
    template: str  # the wording of the prompt, with placeholders
    rules: str  # of reward and score: one of RULES
    own_keys: str = ''  # the setting task.fields: the keys of given files where they are not usual

    name: ClassVar[str]
    formats: ClassVar[Mapping[str, Format]]
    placeholders: ClassVar[tuple[str, ...]]
    vocabulary: ClassVar[tuple[str, ...]]  # every word the compact format needs
    usual_columns: ClassVar[Columns]  # the keys of a problem in given files
    # The name of the share of examples solved; '' where an answer is a single item.
    solved_figure: ClassVar[str] = ''
    # What making the problems means; a line on the screen says so on the first run.
    preparation: ClassVar[str] = 'making them'

    @property
    def scorer(self) -> str:
        """'compact', 'published' or 'mended': the name that stands beside every figure."""
        if self.rules == 'mended':
            return mended.SCORER
        return self.formats[self.format].scorer

    @property
    def prefill(self) -> str:
        """The text every completion starts with; `prompt` leaves it out. '' in most formats."""
        return self.formats[self.format].prefill

    @property
    def columns(self) -> Columns:
        """The keys under which given files have the values of a problem.

        Raises:
          ValueError: the setting task.fields is not a list of pairs with known names.
        """
        return with_own_keys(self.usual_columns, self.own_keys)

    def prompt(self, example: Example) -> str:
        """Returns the problem in this task's wording, without any chat template."""
        return fill(self.template, self.fields(example))

    def demonstration(self, example: Example, rng: np.random.Generator, right_share: float) -> str:
        """Returns a completion to imitate: right with probability `right_share`, else a shortcut.

        This mixture defines the base policy that RL starts from: a model that knows how to answer
        but often does not. Both answers depend on the problem alone, so that a small model learns
        a choice between two ways of answering and not the noise of a demonstrator.
        """
        answer_of = self.right_answer if rng.random() < right_share else self.shortcut_answer
        return fill(self.formats[self.format].completion, {'answer': answer_of(example)})

    def source(self, split: str, data_dir: str | Path) -> Source:
        """Returns the examples of a split (`source.SPLITS`), made under `data_dir` on first use.

        Raises:
          ValueError: the split is unknown, or the data cannot be read; the message says what to do.
        """
        folder = Path(data_dir)
        return Source(self.builder(), split, folder, self.preparation, self.given_files)

    def given_files(self, data_dir: Path) -> list[Path]:
        """Returns the files under `data_dir` that the problems are made of, if there are any."""
        return []

    def figures(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Returns the figures of a set of verdicts; accuracy is items right / items asked for.

        Raises:
          ValueError: there is no verdict, or none of them asks for an item.
        """
        correct, total = sum(score.right for score in scores), sum(score.total for score in scores)
        if not total:
            raise ValueError(
                f'nothing to score: {len(scores)} completions of {self.name} ask for no answer'
            )
        figures = {
            'task': self.name,
            'accuracy': correct / total,
            'correct': correct,
            'total': total,
        }
        if self.solved_figure:
            figures[self.solved_figure] = sum(score.solved for score in scores) / len(scores)
        return figures | {'scorer': self.scorer}

    @abc.abstractmethod
    def fields(self, example: Example) -> dict[str, str]:
        """Returns the text for each placeholder."""

    @abc.abstractmethod
    def reward(self, completion: str, example: Example) -> float:
        """Returns the training reward on the scale published for the task, by the task's rules."""

    @abc.abstractmethod
    def score(self, completion: str, example: Example) -> Score:
        """Returns the evaluation verdict of `scorer`; mended rules agree with the reward."""

    @abc.abstractmethod
    def right_answer(self, example: Example) -> str:
        """Returns the one canonical right answer."""

    @abc.abstractmethod
    def shortcut_answer(self, example: Example) -> str:
        """Returns the answer of a model that avoids the work."""

    @abc.abstractmethod
    def builder(self) -> Callable[..., Any]:
        """Returns the TFDS builder class of this task's problems."""

    @abc.abstractmethod
    def read_published(self, path: str | Path) -> list[Example]:
        """Returns the problems of the published test set.

        Raises:
          ValueError: a line is wrong; the message names file and line, and quotes the line.
        """

    @abc.abstractmethod
    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns the problem behind one line of published generations.

        Raises:
          ValueError: the values are wrong; the message says what was found and expected.
        """


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Returns `template` with each {name} replaced; names not in `fields` stay as they are."""
    return _PLACEHOLDER.sub(lambda match: fields.get(match[1], match[0]), template)


def read_template(
    path: str | Path, placeholders: tuple[str, ...], optional: tuple[str, ...] = ()
) -> str:
    """Returns the wording in a `task.prompt_template` file, verbatim but for a byte order mark.

    Args:
      path: the file.
      placeholders: the names that it must hold in braces.
      optional: further names that it may hold in braces.

    Raises:
      ValueError: the path is a pipe, the file cannot be read, or its placeholders are not those of
        the task.
    """
    required = ' and '.join(f'{{{name}}}' for name in placeholders)
    try:
        if Path(path).is_fifo():
            raise ValueError(
                f'task.prompt_template: {path} is a pipe, and the wording is read several times; '
                'save it in a file'
            )
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'task.prompt_template: {path} cannot be read ({_reason(error)}); '
            f"give a UTF-8 text file with {required}, or '' for the built-in wording"
        ) from error
    names = set(_PLACEHOLDER.findall(text))
    for name in sorted(names - {*placeholders, *optional}):
        raise ValueError(
            f'{path}: unknown placeholder {{{name}}}; this task fills in {required} '
            '(inside literal braces, put a space)'
        )
    for name in placeholders:
        if name not in names:
            raise ValueError(
                f'{path}: placeholder {{{name}}} is missing; this task needs {required}'
            )
    return text


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or type(error).__name__
