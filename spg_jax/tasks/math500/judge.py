"""MATH500 judged by math-verify, which knows some mathematics. Published figures never use it.

The judge runs in a process of its own. Text that a model wrote must never hang a scorer, and no
alarm can interrupt Python while it computes a power of powers.
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
LONGEST = 20_000  # characters read from the end of a completion, where its answer stands


class JudgedByMathVerify(Math500):
    """MATH500 with math-verify's verdicts as scores."""

    @property
    def scorer(self) -> str:
        return NAME

    def score(self, completion: str, example: Example) -> Score:
        right = _worker().agrees(example['answer'], completion[-LONGEST:])
        return Score(right=int(right), total=1, solved=right)


def judged(task: Math500) -> JudgedByMathVerify:
    """Returns the task with math-verify as its judge.

    Raises:
      ValueError: the task is not MATH500, or the package is missing.
    """
    if not isinstance(task, Math500):
        raise ValueError(f'--judge={NAME} is for --task=math500, not {task.name}; leave it out')
    if importlib.util.find_spec('math_verify') is None:
        raise ValueError(f"--judge={NAME} needs the package {NAME}; pip install -e '.[math]'")
    return JudgedByMathVerify(task.format, task.template, task.rules)


class _Worker:
    """The judging process. If it takes too long, it is ended and the completion counts as wrong."""

    def __init__(self) -> None:
        self._start()

    def agrees(self, reference: str, completion: str) -> bool:
        """Whether math-verify finds the reference in the completion, within the time allowed."""
        try:
            self._pipe.send((reference, completion))
            if self._pipe.poll(TIMEOUT):
                return self._pipe.recv()
        except (EOFError, OSError):  # The text made the process die.
            pass
        self._process.kill()
        self._process.join()
        self._start()
        return False

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, worker_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(worker_end,), daemon=True)
        self._process.start()
        worker_end.close()
        # Wait until the process is ready: a slow import must not count as a slow verdict.
        self._pipe.recv()


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def _serve(pipe: Connection) -> None:
    """Answers (reference, completion) pairs until the other end of the pipe is closed."""
    import math_verify

    logging.disable()  # math-verify would log each text that it cannot read.
    # The first call imports the rest of the package.
    math_verify.parse('$1$', parsing_timeout=None)
    pipe.send(True)
    while True:
        try:
            reference, completion = pipe.recv()
        except EOFError:
            return
        try:
            # math-verify's own limit of 5 seconds is off: a busy machine needs longer even for 1/2.
            gold, answer = (
                math_verify.parse(text, parsing_timeout=None)
                for text in (f'${reference}$', completion)
            )
            verdict = bool(math_verify.verify(gold, answer, timeout_seconds=None))
        except Exception:  # Hostile text makes it raise errors of many classes.
            verdict = False
        pipe.send(verdict)
