"""What a task is: prompts, rewards, scores, demonstrations and problems, in one interface."""

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from spg_jax.tasks.source import Example, Source

EXAMPLES = 'examples'  # the placeholder of worked examples, which a prompt may have besides
# Only {name} is a placeholder: braces around anything else, as in \boxed{}, are text.
_PLACEHOLDER = re.compile(r'\{([A-Za-z_]+)\}')


class Score(NamedTuple):
    """The verdict on one completion."""

    right: int  # items answered rightly: Sudoku cells; the whole of a Countdown expression
    total: int  # items asked for
    solved: bool  # every item right


@dataclass(frozen=True)
class Format:
    """How problem and answer are written, and who scores them."""

    template: str  # of the prompt, with the task's placeholders
    completion: str  # of a demonstration, with {answer}; word problems have {reasoning}, too
    separator: str  # between the numbers or cells of a prompt
    scorer: str  # 'compact' | 'published'; figures name it
    prefill: str = ''  # what a completion starts from; goes after the chat template, if any
    examples: tuple[str, ...] = ()  # worked ones; the prompt shows the first `shots`


@dataclass(frozen=True)
class Task(abc.ABC):
    """A family of problems in one format. Build one with `spg_jax.tasks.get`; every method is pure.

    Methods that see a completion take hostile text: they never raise, never hang and never return
    NaN.
    """

    format: str
    template: str  # wording of the prompt, with placeholders
    rules: str  # of the reward, one of `known_rules`

    name: ClassVar[str]
    formats: ClassVar[Mapping[str, Format]]
    placeholders: ClassVar[tuple[str, ...]]
    vocabulary: ClassVar[tuple[str, ...]]  # every word the compact format needs
    known_rules: ClassVar[tuple[str, ...]] = ('released',)  # and 'mended', where those slip
    solved_figure: ClassVar[str] = ''  # name of the share solved, where an answer has several items

    @property
    def scorer(self) -> str:
        """'compact' or 'published': the name that belongs beside every figure of this task."""
        return self.formats[self.format].scorer

    @property
    def prefill(self) -> str:
        """Text the completion is made to start with; '' in most formats. Not part of `prompt`."""
        return self.formats[self.format].prefill

    def prompt(self, example: Example) -> str:
        """Returns the problem in this task's wording, without any chat template."""
        return fill(self.template, self.fields(example))

    def demonstration(self, example: Example, rng: np.random.Generator, right_share: float) -> str:
        """Returns a completion to imitate: right with probability `right_share`, else a shortcut.

        This mixture defines the base policy that RL starts from: a model that knows how to answer
        but often prefers not to. Both answers are functions of the problem alone, so that what a
        small model has to learn is a choice between two ways, not the noise of a demonstrator.
        """
        answer = self.right_answer if rng.random() < right_share else self.shortcut_answer
        return fill(self.formats[self.format].completion, {'answer': answer(example)})

    def source(self, split: str, data_dir: str | Path) -> Source:
        """Returns the examples of a split (`source.SPLITS`), made under `data_dir` on first use.

        Raises:
          ValueError: unknown split, or data that cannot be read; the message says what to do.
        """
        return Source(self.builder(), split, Path(data_dir))

    def figures(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Returns what is reported of a set of verdicts: items right / items asked for, pooled.

        Raises:
          ValueError: no verdict, or none that asks for anything.
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
        """Returns the training reward, as published, on the scale published for the task."""

    @abc.abstractmethod
    def score(self, completion: str, example: Example) -> Score:
        """Returns the evaluation verdict of this format's scorer."""

    @abc.abstractmethod
    def right_answer(self, example: Example) -> str:
        """Returns the one canonical right answer."""

    @abc.abstractmethod
    def shortcut_answer(self, example: Example) -> str:
        """Returns the answer of one who does not do the work."""

    @abc.abstractmethod
    def builder(self) -> Callable[..., Any]:
        """Returns the TFDS builder class of this task's problems."""

    @abc.abstractmethod
    def read_published(self, path: str | Path) -> list[Example]:
        """Returns the problems of the published test set.

        Raises:
          ValueError: a wrong line; names file, line, what was found and what was expected.
        """

    @abc.abstractmethod
    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns the problem behind one line of published generations.

        Raises:
          ValueError: saying what was found and what was expected.
        """


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Returns `template` with each {name} replaced; names not in `fields` stay as they are."""
    return _PLACEHOLDER.sub(lambda found: fields.get(found[1], found[0]), template)


def read_template(
    path: str | Path, placeholders: tuple[str, ...], optional: tuple[str, ...] = ()
) -> str:
    """Returns the wording in a `task.prompt_template` file, verbatim.

    Args:
      path: the file.
      placeholders: what it must hold, each in braces.
      optional: what it may hold besides.

    Raises:
      ValueError: no such file, or its placeholders are not exactly the task's.
    """
    known = ' and '.join(f'{{{name}}}' for name in placeholders)
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'task.prompt_template: {path} cannot be read ({_reason(error)}); '
            f"give a UTF-8 text file with {known}, or '' for the built-in wording"
        ) from error
    found = set(_PLACEHOLDER.findall(text))
    for name in sorted(found - {*placeholders, *optional}):
        raise ValueError(
            f'{path}: unknown placeholder {{{name}}}; this task fills in {known} '
            '(inside literal braces, put a space)'
        )
    for name in placeholders:
        if name not in found:
            raise ValueError(f'{path}: placeholder {{{name}}} is missing; this task needs {known}')
    return text


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or type(error).__name__
