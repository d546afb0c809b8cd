"""Tasks whose prompt is a template in one of several formats, among them the published ones."""

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from spg_jax.errors import check_one_of
from spg_jax.tasks import mended
from spg_jax.tasks.reading import Columns, with_own_keys
from spg_jax.tasks.source import Example, Source
from spg_jax.tasks.task import RULES, Task

EXAMPLES = 'examples'  # the placeholder that worked examples replace, if a prompt has it
# Only {name} is a placeholder: braces around anything else, as in \boxed{}, are text.
_PLACEHOLDER = re.compile(r'\{([A-Za-z_]+)\}')


@dataclass(frozen=True)
class Format:
    """How problem and answer are written, and which scorer judges the answer."""

    template: str  # the prompt, with the task's placeholders
    completion: str  # a demonstration, with {answer} and other names of `answer_fields`
    separator: str  # the text between the numbers or cells of a prompt
    scorer: str  # 'compact' | 'published'; the name that figures carry
    prefill: str = ''  # the start of every completion; it follows the chat template, if any
    examples: tuple[str, ...] = ()  # worked examples, of which the prompt shows the first `shots`


class FormattedTask(Task):
    """A task with templates, rules of two kinds, demonstrations, and problems made by TFDS.

    The tasks that come with the package are of this kind, and all parts are needed.
    """

    formats: ClassVar[Mapping[str, Format]]
    placeholders: ClassVar[tuple[str, ...]]
    usual_columns: ClassVar[Columns]  # the keys of a problem in given files
    # What making the problems means; a line on the screen says so on the first run.
    preparation: ClassVar[str] = 'making them'

    @classmethod
    def with_settings(
        cls,
        format: str,
        prompt_template: str = '',
        shots: int = 0,
        rules: str = 'released',
        fields: str = '',
    ) -> Self:
        check_one_of(f'format of task {cls.name}', format, cls.formats)
        check_one_of(f'task.rules of {cls.name}', rules, RULES)
        examples = cls.formats[format].examples
        if shots not in range(len(examples) + 1):
            limit = f'has examples for 0 to {len(examples)}'
            if not examples:
                limit = 'has no worked examples'
            raise ValueError(f'task.shots is {shots}; format {format} of task {cls.name} {limit}')
        if prompt_template:
            # With shots, the file must say where in the prompt the worked examples stand.
            required = (*cls.placeholders, EXAMPLES) if shots else cls.placeholders
            optional = (EXAMPLES,) if examples else ()
            template = read_template(prompt_template, required, optional)
        else:
            template = cls.formats[format].template
        with_own_keys(cls.usual_columns, fields)  # Fail early: files are read much later.
        return cls(format, fill(template, {EXAMPLES: ''.join(examples[:shots])}), rules, fields)

    @property
    def scorer(self) -> str:
        """'compact', 'published' or 'mended': the name that stands beside every figure."""
        if self.rules == 'mended':
            return mended.SCORER
        return self.formats[self.format].scorer

    @property
    def prefill(self) -> str:
        return self.formats[self.format].prefill

    @property
    def columns(self) -> Columns:
        """The keys under which given files have the values of a problem.

        Raises:
          ValueError: the setting task.fields is not a list of pairs with known names.
        """
        return with_own_keys(self.usual_columns, self.own_keys)

    def prompt(self, example: Example) -> str:
        return fill(self.template, self.fields(example))

    def demonstration(self, example: Example, rng: np.random.Generator, right_share: float) -> str:
        """Returns a completion to imitate in the format's words, chosen as every task does."""
        return self.in_words(super().demonstration(example, rng, right_share))

    def in_words(self, answer: str) -> str:
        return fill(self.formats[self.format].completion, self.answer_fields(answer))

    def source(self, split: str, data_dir: str | Path) -> Sequence[Example]:
        """Returns the examples of a split (`source.SPLITS`), made under `data_dir` on first use.

        Raises:
          ValueError: the split is unknown, or the data cannot be read; the message says what to do.
        """
        folder = Path(data_dir)
        return Source(self.builder(), split, folder, self.preparation, self.given_files)

    def answer_fields(self, answer: str) -> dict[str, str]:
        """Returns the text for each placeholder of a demonstration with this answer."""
        return {'answer': answer}

    @abc.abstractmethod
    def fields(self, example: Example) -> dict[str, str]:
        """Returns the text for each placeholder."""

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

    @abc.abstractmethod
    def to_record(self, example: Example) -> tuple[Any, Any]:
        """Returns question and ground_truth as published, which `read_record` takes."""


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
