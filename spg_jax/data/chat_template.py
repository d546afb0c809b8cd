"""Chat templates: programs in the language of jinja2 that come with a tokenizer.

They are written by strangers and may loop or fill the memory. jinja2's sandbox keeps them from the
machine's files and no more, so a template is first rendered in a process of its own, with limits.
That process runs this file as a program, which is why it imports so little.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

MOST_SECONDS = 3  # of a processor; a real template needs a thousandth
MOST_BYTES = 2**30  # of memory, the interpreter included
MOST_CHARACTERS = 100_000  # more than any context has room for
# What the user says when a template is tried. The last text is as long as long prompts, so that a
# turn which grows faster than its prompt shows.
PROBES = ('', 'Use 3, 44 and 7.\nReach 26.', 'Use 3, 44 and 7.\nReach 26. ' * 200)


class ChatTemplate:
    """A chat template that asks for the answer to one user turn.

    It renders what `transformers` renders, with one exception: `strftime_now` is not defined,
    because a prompt that changes with the date would not come back when a run goes on. Templates
    that ask whether it is defined write their fixed date, and the others are refused.
    """

    def __init__(self, text: str, specials: Mapping[str, Any]):
        """Compiles the template.

        Args:
          text: the template; a byte order mark at its start is left out.
          specials: the texts of the special tokens, by names such as 'bos_token'.

        Raises:
          jinja2.TemplateError: if it is no template.
        """
        self.text, self.specials = text.removeprefix('\ufeff'), dict(specials)
        self._template = _environment().from_string(self.text)

    def render(self, content: str) -> str:
        """The text of one user turn and the opening of the answer; a template may raise anything.

        Args:
          content: what the user says.
        """
        return self._template.render(
            messages=[{'role': 'user', 'content': content}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self.specials,
        )


@functools.cache
def _environment() -> Any:
    """The environment in which `transformers` 5.24 renders templates, without `strftime_now`."""
    import jinja2  # It comes with the extra 'hf'.
    from jinja2.ext import Extension, loopcontrols
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant says and writes nothing."""

        tags = {'generation'}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        """Names with underscores are refused, as they could lead to what Python keeps inside."""

        def __init__(*args: Any, **kwargs: Any):
            self, *rest = args  # so that an attribute may have the name 'self'
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                check_name(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    class Dict:
        """The type `dict` without access to the type itself."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict:
            return dict.fromkeys(*args)

    def check_name(name: str) -> None:
        if name.startswith('_'):
            raise jinja2.exceptions.SecurityError(f'a namespace cannot have the name {name!r}')

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = _bounded_sandbox()(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters['tojson'] = tojson
    environment.globals |= {
        'raise_exception': raise_exception,
        'namespace': PublicNamespace,
        'dict': Dict(),
    }
    return environment


def _bounded_sandbox() -> type:
    """jinja2's sandbox, which refuses sums, products and powers that could fill the memory.

    They may be small for PROBES and large for another prompt.
    """
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class BoundedSandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(('+', '*', '**'))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _most_size(operator, left, right) > MOST_CHARACTERS:
                raise SecurityError(
                    f'a {operator} needs the memory of more than {MOST_CHARACTERS} characters'
                )
            return super().call_binop(context, operator, left, right)

    return BoundedSandbox


def _most_size(operator: str, left: Any, right: Any) -> int:
    """The characters, elements or bits of a sum, product or power, or more."""
    if operator == '**':
        integers = isinstance(left, int) and isinstance(right, int)
        return left.bit_length() * right if integers else 1
    if operator == '*':
        for text, times in ((left, right), (right, left)):
            if hasattr(text, '__len__') and isinstance(times, int):
                return len(text) * times
    return sum(
        value.bit_length() if isinstance(value, int) else len(value)
        for value in (left, right)
        if isinstance(value, int) or hasattr(value, '__len__')
    )


def try_out(text: str, specials: Mapping[str, Any]) -> list[str]:
    """The turns that a template writes for `PROBES`, rendered in a process with limits.

    Arguments are those of `ChatTemplate`.

    Raises:
      ValueError: if the template fails, takes too much time or memory, or writes too much; the
        message says which.
    """
    return list(_try_out(json.dumps([text, dict(specials)])))


@functools.lru_cache
def _try_out(task: str) -> Sequence[str]:
    child = subprocess.run(
        # With -P the files of this folder do not hide installed packages of the same names.
        [sys.executable, '-P', __file__],
        input=task,
        capture_output=True,
        text=True,
        timeout=60 * MOST_SECONDS,
    )
    if child.returncode < 0:
        raise ValueError(
            f'it needs more than {MOST_SECONDS} s of a processor or '
            f'{MOST_BYTES >> 20} MiB of memory'
        )
    if child.returncode:
        raise ValueError(f'trying it out ended with {child.stderr.strip()[-200:]!r}')
    outcome = json.loads(child.stdout)
    if 'error' in outcome:
        raise ValueError(outcome['error'])
    return outcome['turns']


def _child() -> None:
    """Reads a template and its special tokens from standard input, and writes what it renders."""
    import resource

    task = sys.stdin.read()
    for limit, value in (
        (resource.RLIMIT_CPU, MOST_SECONDS),
        (resource.RLIMIT_AS, MOST_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(limit, (value, value))
        except ValueError:  # macOS cannot limit the memory.
            pass
    try:
        template = ChatTemplate(*json.loads(task))
        turns = [template.render(content) for content in PROBES]
        longest = max(map(len, turns))
        if longest > MOST_CHARACTERS:
            raise ValueError(f'it writes {longest} characters for one turn')
        outcome = {'turns': turns}
    except MemoryError:
        outcome = {'error': f'it needs more than {MOST_BYTES >> 20} MiB of memory'}
    except Exception as error:  # A template is a program, which can raise any exception.
        outcome = {'error': f'{type(error).__name__}: {error}'[:1000]}
    print(json.dumps(outcome))


if __name__ == '__main__':
    _child()
