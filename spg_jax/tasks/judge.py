"""MATH500 and GSM8K judged by math-verify, which knows some mathematics.

Published figures never use it. The judge runs in a process of its own: text that a model wrote must
never hang a scorer or fill its memory, and no alarm can interrupt Python while it computes a power
of powers. math-verify has slips of its own, and `_settled` and `_numerically_equal` keep it from
those that were reported (huggingface/Math-Verify#14, #21; open-compass/opencompass#2647).
"""

import contextlib
import functools
import importlib.util
import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, mended
from spg_jax.tasks.equivalence import equivalent
from spg_jax.tasks.gsm8k import GSM8K
from spg_jax.tasks.math500 import Math500
from spg_jax.tasks.source import Example
from spg_jax.tasks.task import Score, Task

NAME = 'math-verify'
TIMEOUT = 4.0  # seconds for one verdict, so that with all around it 5 are never needed
START_TIMEOUT = 120.0  # seconds until the process has imported the package on a busy machine
LONGEST = 20_000  # characters read from the end of a completion, where its answer stands
LONGEST_BOX = 2_000  # characters of an answer; a longer one is wrong
MOST_BYTES = 2**30  # of memory that the answers may need, beside that of the package

_CLOSE = 1e-5  # the relative difference up to which a rounded decimal is the number
_EXACT = 1e-12  # the same for two numbers of which neither is a decimal
_BASED = re.compile(r'\(?([0-9A-Z]+)\)?_\{?(?:\\text\{)?([0-9]+|[a-z]+)\}{0,2}')
_DOTS = re.compile(r'\\[lcvd]?dots[bcmi]?(?![A-Za-z])|\.\.\.|…')


class _Judged(Task):
    """A task with math-verify's verdicts as scores."""

    @property
    def scorer(self) -> str:
        return NAME

    def score(self, completion: str, example: Example) -> Score:
        right = agrees(example['answer'], completion)
        return Score(right=int(right), total=1, solved=right)


class JudgedMath500(_Judged, Math500):
    """MATH500 with math-verify's verdicts as scores."""


class JudgedGSM8K(_Judged, GSM8K):
    """GSM8K with math-verify's verdicts as scores."""


def judged(task: Task) -> Task:
    """Returns the task with math-verify as its judge.

    Raises:
      ValueError: the task is neither MATH500 nor GSM8K, or the package is missing.
    """
    kinds = {kind.name: kind for kind in (JudgedMath500, JudgedGSM8K)}
    if task.name not in kinds:
        raise ValueError(
            f'--judge={NAME} is for --task={" and ".join(kinds)}, not {task.name}; leave it out'
        )
    if importlib.util.find_spec('math_verify') is None:
        raise ValueError(f"--judge={NAME} needs the package {NAME}; pip install -e '.[math]'")
    return kinds[task.name](task.format, task.template, task.rules, task.own_keys)


def agrees(reference: str, completion: str) -> bool:
    """Whether math-verify, kept from its slips, finds the reference in the completion."""
    tail = completion[-LONGEST:]
    answer = extraction.last_box(tail) if extraction.BOX in tail else extraction.last_answer(tail)
    # math-verify would search the text before a last box that is empty or never closes.
    if (extraction.BOX in tail and not (answer or '').strip()) or not reference.strip():
        return False
    reference = mended.without_thousands(reference.strip())
    if answer is None:
        return _judge().agrees(f'${reference}$', tail)
    answer = mended.without_thousands(answer.strip().strip('$'))
    if len(answer) > LONGEST_BOX or not answer:
        return False
    verdict = _settled(reference, answer)
    return _judge().agrees(f'${reference}$', f'\\boxed{{{answer}}}') if verdict is None else verdict


def _settled(reference: str, answer: str) -> bool | None:
    r"""Returns the verdict on answers that math-verify is known to misread, or None.

    - It ignores number bases. `52_9` is never `52_8`; without a base the digits have to be those
      of the reference, whose question names the base.
    - It reads a list with dots as its numbers or as nothing. Such a list is compared as text.
    """
    gold, guess = (_BASED.fullmatch(text.replace(' ', '')) for text in (reference, answer))
    if gold or guess:
        if gold and guess:
            return gold.groups() == guess.groups()
        digits = answer.replace(' ', '') if gold else reference.replace(' ', '')
        based = gold or guess
        return digits == based[1] and (based is gold or based[2] == '10')
    if _DOTS.search(reference) or _DOTS.search(answer):
        return equivalent(answer, reference)
    return None


class _Judge:
    """The judging process. If it takes too long, it is ended and the completion counts as wrong.

    The process is a copy of one that has imported the package, which takes seconds: a completion
    that makes it hang must not let the next one wait for that as well.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, worker_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(worker_end,), daemon=True)
        self._process.start()
        worker_end.close()
        self._copy = 0  # the process identifier of the copy, 0 before it is known

    def agrees(self, reference: str, completion: str) -> bool:
        """Whether math-verify finds the reference in the completion, within the time allowed.

        Raises:
          ValueError: the package cannot be imported, or somebody has ended its process.
        """
        self._wait_until_ready()
        try:
            self._pipe.send((reference, completion))
            answer = self._pipe.recv() if self._pipe.poll(TIMEOUT) else None
        except (EOFError, OSError):  # Not the copy but the process that makes copies has ended.
            raise ValueError(f'the process of {NAME} has been ended; run again') from None
        if isinstance(answer, bool):
            return answer
        if answer is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._copy, signal.SIGKILL)
        # The identifier of a new copy in place of a verdict says that the text made the last one
        # die.
        self._copy = answer or 0
        return False

    def _wait_until_ready(self) -> None:
        """Waits for a copy; a slow import must not count as a slow verdict."""
        while not self._copy:
            try:
                answer = self._pipe.recv() if self._pipe.poll(START_TIMEOUT) else None
            except (EOFError, OSError):
                answer = None
            if answer is None:
                raise ValueError(f'{NAME} does not start; try `python -c "import math_verify"`')
            # A verdict that came too late may stand before the identifier.
            self._copy = 0 if isinstance(answer, bool) else answer


@functools.cache
def _judge() -> _Judge:
    return _Judge()


def _serve(pipe: Connection) -> None:
    """Keeps one copy of this process that judges, until the other end of the pipe is closed."""
    import math_verify

    logging.disable()  # math-verify would log each text that it cannot read.
    # The first call imports the rest of the package.
    math_verify.parse('$1$', parsing_timeout=None)
    while True:
        copy = os.fork()
        if not copy:
            status = 1
            try:
                _limit_memory()
                pipe.send(os.getpid())
                _judge_all(pipe)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(copy, 0)[1] == 0:
            return


def _limit_memory() -> None:
    """Lets this process use MOST_BYTES more than it has now, where that is known, as on Linux."""
    with contextlib.suppress(OSError, ValueError):  # a lower limit may hold already
        pages = int(Path('/proc/self/statm').read_text().split()[0])
        limit = pages * resource.getpagesize() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _judge_all(pipe: Connection) -> None:
    """Answers (reference, completion) pairs until the other end of the pipe is closed."""
    import math_verify

    while True:
        try:
            reference, completion = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            # math-verify's own limit of 5 seconds is off: a busy machine needs longer even for 1/2.
            gold, answer = (
                math_verify.parse(text, parsing_timeout=None) for text in (reference, completion)
            )
            verdict = bool(math_verify.verify(gold, answer, timeout_seconds=None))
            verdict = bool(verdict and _numerically_equal(gold, answer))
        except Exception:  # Hostile text makes it raise errors of many classes.
            verdict = False
        pipe.send(verdict)


def _numerically_equal(gold: Any, answer: Any) -> bool:
    """Whether the numbers of two parsed answers, if they are numbers, differ by rounding at most.

    math-verify rounds to six decimals and drops small differences, so that 1/2^99 is 1/2^98 and
    0.0000001 is 0.0000002 there.
    """
    if isinstance(gold, str) or not isinstance(gold, list) or not gold or not answer:
        return True
    pair = [list(_numbers(values[0])) for values in (gold, answer)]
    if len(pair[0]) != len(pair[1]):
        return True
    return all(map(_close, *(sorted(numbers, key=lambda n: n.evalf(15)) for numbers in pair)))


def _numbers(value: Any) -> Iterator[Any]:
    """Yields the real numbers of a parsed answer: itself, or the members of a set or tuple."""
    import sympy

    if isinstance(value, sympy.FiniteSet | sympy.Tuple):
        for member in value.args:
            yield from _numbers(member)
    elif getattr(value, 'is_number', False) and value.doit().is_real:
        yield value.doit()


def _close(gold: Any, answer: Any) -> bool:
    import sympy

    rounded = gold.atoms(sympy.Float) or answer.atoms(sympy.Float)
    limit = (_CLOSE if rounded else _EXACT) * abs(gold.evalf(30))
    # math-verify takes 50 % for 50 and for 0.5.
    return any(
        bool(abs((gold * scale - answer).evalf(30)) <= limit * scale)
        for scale in (sympy.Integer(1), sympy.Integer(100), sympy.Rational(1, 100))
    )
