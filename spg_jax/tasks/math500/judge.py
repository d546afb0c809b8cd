"""MATH500 judged by math-verify, which knows some mathematics; never what published figures use.

It runs in a process of its own: no alarm can interrupt Python in the middle of a power of powers,
and what a model wrote must never hang a scorer.
"""

import functools
import importlib.util
import logging
import multiprocessing
from multiprocessing.connection import Connection

from spg_jax.tasks.math500.task import Math500
from spg_jax.tasks.task import Example, Score

NAME = 'math-verify'
TIMEOUT = 30.0  # seconds for one verdict
LONGEST = 20_000  # characters of a completion that are read, from its end: answers stand there


class JudgedByMathVerify(Math500):
    """MATH500 with math-verify's verdicts as scores."""

    @property
    def scorer(self) -> str:
        return NAME

    def score(self, completion: str, example: Example) -> Score:
        right = _worker().agrees(example['answer'], completion[-LONGEST:])
        return Score(right=int(right), total=1, solved=right)


def judged(task: Math500) -> JudgedByMathVerify:
    """Returns a task with math-verify for its judge.

    Raises:
      ValueError: it is not MATH500, or the package is missing.
    """
    if not isinstance(task, Math500):
        raise ValueError(f'--judge={NAME} is for --task=math500, not {task.name}; leave it out')
    if importlib.util.find_spec('math_verify') is None:
        raise ValueError(f"--judge={NAME} needs the package {NAME}; pip install -e '.[math]'")
    return JudgedByMathVerify(task.format, task.template, task.rules)


class _Worker:
    """The process that judges; one that takes too long is ended and its verdict is wrong."""

    def __init__(self) -> None:
        self._start()

    def agrees(self, reference: str, completion: str) -> bool:
        """Whether math-verify finds the reference in the completion, within the time allowed."""
        try:
            self._pipe.send((reference, completion))
            if self._pipe.poll(TIMEOUT):
                return self._pipe.recv()
        except (EOFError, OSError):  # it died of what it read
            pass
        self._process.kill()
        self._process.join()
        self._start()
        return False

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is ready: a slow import must not count as a slow verdict


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def _serve(pipe: Connection) -> None:
    """Answers (reference, completion) pairs for ever, until the other end is closed."""
    import math_verify

    logging.disable()  # it tells of each text it cannot read, in full
    math_verify.parse('$1$', parsing_timeout=None)  # which imports the rest of it
    pipe.send(True)
    while True:
        try:
            reference, completion = pipe.recv()
        except EOFError:
            return
        try:
            # Without its own time limit of 5 seconds, which a busy machine exceeds on 1/2.
            gold, found = (
                math_verify.parse(text, parsing_timeout=None)
                for text in (f'${reference}$', completion)
            )
            verdict = bool(math_verify.verify(gold, found, timeout_seconds=None))
        except Exception:  # of many kinds, all because of the text
            verdict = False
        pipe.send(verdict)
