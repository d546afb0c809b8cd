"""The interface of every task: prompts, rewards, scores and problems, and what else it may have."""

import abc
import functools
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from spg_jax.errors import check_one_of
from spg_jax.tasks import listed
from spg_jax.tasks.source import SPLITS, Example

RULES = ('released', 'mended')
FORMATS = ('compact', 'published_train', 'published_eval')
_PACKAGE = __name__.partition('.')[0]


class Score(NamedTuple):
    """The verdict on one completion."""

    right: int  # items that are right; an item is a Sudoku cell or a whole Countdown expression
    total: int  # items asked for
    solved: bool  # True if every item is right


@dataclass(frozen=True)
class Task(abc.ABC):
    """A family of problems. Build one with `spg_jax.tasks.get`; every method is pure.

    A subclass needs `prompt`, `reward`, `score` and `problems`. Every other part is optional, and
    whatever needs a part that is missing says so in one line.

    A completion is hostile text. Methods that take one never raise, never hang and never return
    NaN.
    """

    format: str = 'compact'  # one of FORMATS; a task with one wording need not look at it
    template: str = ''  # the wording of the prompt, with placeholders, if the prompt has a template
    rules: str = 'released'  # of reward and score: one of RULES
    own_keys: str = ''  # the setting task.fields: the keys of given files where they are not usual

    name: ClassVar[str] = ''  # a task in a file of the user has the name of its module
    # The problems of a task without a source of its own, or a method that returns them: a list of
    # dictionaries of JSON values, the path of a JSON-lines file from the folder of the task's file,
    # or a dictionary with one of these for each split that the user has cut.
    problems: ClassVar[Any] = None
    # Every word of prompts and answers. A task without it needs the tokenizer of a checkpoint.
    vocabulary: ClassVar[tuple[str, ...]] = ()
    # The name of the share of examples solved; '' where an answer is a single item.
    solved_figure: ClassVar[str] = ''

    @classmethod
    def with_settings(
        cls,
        format: str,
        prompt_template: str = '',
        shots: int = 0,
        rules: str = 'released',
        fields: str = '',
    ) -> Self:
        """Returns the task as the settings of the group `task` ask for it; see `tasks.get`.

        Raises:
          ValueError: a setting asks for something that the task does not have.
        """
        check_one_of('task.format', format, FORMATS)
        for setting, value, only_value in (
            ('task.prompt_template', prompt_template, ''),
            ('task.shots', shots, 0),
            ('task.rules', rules, 'released'),
            ('task.fields', fields, ''),
        ):
            if value != only_value:
                raise ValueError(
                    f'{setting} is {value!r}, which task {cls.name} has no part for; use '
                    f'{only_value!r}, or change the prompt, rules or problems in its file'
                )
        return cls(format)

    @property
    def scorer(self) -> str:
        """The name of the scorer, which stands beside every figure."""
        return 'own'

    @property
    def prefill(self) -> str:
        """The text every completion starts with; `prompt` leaves it out. '' in most formats."""
        return ''

    @abc.abstractmethod
    def prompt(self, example: Example) -> str:
        """Returns the problem in this task's wording, without any chat template."""

    @abc.abstractmethod
    def reward(self, completion: str, example: Example) -> float:
        """Returns the training reward on the scale published for the task, by the task's rules."""

    @abc.abstractmethod
    def score(self, completion: str, example: Example) -> Score:
        """Returns the evaluation verdict of `scorer`; mended rules agree with the reward."""

    def source(self, split: str, data_dir: str | Path) -> Sequence[Example]:
        """Returns the examples of a split (`source.SPLITS`), cut from `problems` by a fixed rule.

        Args:
          split: one of SPLITS.
          data_dir: the folder of prepared problems, which `problems` does not need.

        Raises:
          ValueError: the split is unknown, or the problems cannot be used; the message is one line.
        """
        check_one_of('split', split, SPLITS)
        return self._splits[split]

    @functools.cached_property
    def _splits(self) -> dict[str, listed.Listed]:
        return listed.cut(_problems_of(self), self._folder, f'task {self.name}')

    @property
    def _folder(self) -> Path:
        return Path(inspect.getfile(type(self))).parent

    def given_files(self, data_dir: Path) -> list[Path]:
        """Returns the files under `data_dir` that the problems are made of, if there are any."""
        return []

    def defining_files(self) -> dict[str, Path]:
        """Returns the files of the user that define the task, by their paths from its folder.

        They are the modules of its class and of the tasks that it derives from, and the files of
        its problems. A task that comes with the package has none.
        """
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, Task)]
        modules = [
            Path(inspect.getfile(kind))
            for kind in kinds
            if kind.__module__.partition('.')[0] != _PACKAGE
        ]
        if not modules:
            return {}
        paths = [*modules, *listed.files(_problems_of(self), self._folder)]
        return listed.named_from(paths, self._folder)

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

    def demonstration(self, example: Example, rng: np.random.Generator, right_share: float) -> str:
        """Returns a completion to imitate: right with probability `right_share`, else a shortcut.

        This mixture defines the base policy that RL starts from: a model that knows how to answer
        but often does not. Both answers depend on the problem alone, so that a small model learns
        a choice between two ways of answering and not the noise of a demonstrator.
        """
        answer_of = self.right_answer if rng.random() < right_share else self.shortcut_answer
        return answer_of(example)

    def check_demonstrations(self, right_shares: Iterable[float]) -> None:
        """Fails early if the task cannot give demonstrations with these shares of right answers.

        Raises:
          ValueError: a part is missing; the message says which.
        """
        if self._has('demonstration'):
            return
        shares = list(right_shares)
        if any(share > 0 for share in shares) and not self._has('right_answer'):
            raise self._lacks_demonstrations('right_answer')
        if any(share < 1 for share in shares) and not self._has('shortcut_answer'):
            raise self._lacks_demonstrations('shortcut_answer')

    def right_answer(self, example: Example) -> str:
        """Returns the one canonical right answer, which is a whole completion in most own tasks."""
        raise self._lacks_demonstrations('right_answer')

    def shortcut_answer(self, example: Example) -> str:
        """Returns the answer of a model that avoids the work."""
        raise self._lacks_demonstrations('shortcut_answer')

    def correction(
        self, example: Example, rng: np.random.Generator, wrong_share: float
    ) -> tuple[str, str]:
        """Returns a completion to correct, and the right one.

        The first is the task's wrong answer with probability `wrong_share`, and else right as well,
        so that a model learns what to keep.
        """
        right = self.demonstration(example, rng, 1.0)
        if rng.random() >= wrong_share:
            return right, right
        return self.in_words(self.wrong_answer(example, rng)), right

    def check_corrections(self, wrong_share: float) -> None:
        """Fails early if the task has no wrong answers, and this share of them is asked for.

        Raises:
          ValueError: one line that says what to do.
        """
        self.check_demonstrations([1.0])
        if wrong_share and not self._has('wrong_answer'):
            raise ValueError(
                f'base.wrong_share is {wrong_share}, but task {self.name} has no wrong_answer; '
                'define it, or use 0, which leaves random tokens to correct'
            )

    def wrong_answer(self, example: Example, rng: np.random.Generator) -> str:
        """Returns an answer with a mistake, in as many words as the right one has.

        A policy that edits learns from it (`base.edit_weight`). A few kinds of mistakes, such as it
        makes itself, teach more than random ones.
        """
        raise ValueError(f'task {self.name} has no wrong_answer; define it')

    def in_words(self, answer: str) -> str:
        """Returns the completion that gives an answer; in most own tasks an answer is one."""
        return answer

    def read_published(self, path: str | Path) -> list[Example]:
        """Returns the problems of a test file, by default JSON lines like those of `problems`.

        Raises:
          ValueError: a line is wrong; the message names file and line, and quotes the line.
        """
        return listed.indexed(listed.read(path))

    def read_record(self, question: Any, ground_truth: Any) -> Example:
        """Returns the problem behind one line of published generations.

        Raises:
          ValueError: the values are wrong; the message says what was found and expected.
        """
        raise ValueError(
            f'task {self.name} has no read_record, which finds the problem of a question and a '
            'ground_truth; define it to score files'
        )

    def to_record(self, example: Example) -> tuple[Any, Any]:
        """Returns question and ground_truth of a problem, from which `read_record` finds it again.

        In a file of the user that defines neither, these are the prompt and the problem itself.
        """
        problem = {key: value for key, value in example.items() if key != 'index'}
        return self.prompt(example), problem

    @classmethod
    def missing_parts(cls) -> list[str]:
        """Returns the names of the needed parts that a class does not have."""
        missing = sorted(cls.__abstractmethods__)
        if cls.problems is None and not cls._has('source'):
            missing.append('problems')
        return missing

    @classmethod
    def _has(cls, part: str) -> bool:
        return getattr(cls, part) is not getattr(Task, part)

    def _lacks_demonstrations(self, part: str) -> ValueError:
        return ValueError(
            f'task {self.name} has no {part}, so that it cannot show answers to a base policy; '
            'define it, or set base.checkpoint'
        )


@functools.lru_cache(maxsize=8)  # A task is made several times in a run, and its problems once.
def _problems_of(task: Task) -> Any:
    return task.problems() if callable(task.problems) else task.problems
