"""The answer in a completion: answer tags and boxes, read by the published rules.

Completions are hostile input: a hundred thousand unclosed tags must take no longer than as many
letters. Plain searches therefore replace every regular expression whose lazy pattern would need
quadratic time.
"""

import re
from collections.abc import Sequence

OPEN, CLOSE = '<answer>', '</answer>'
BOX, FRAME = '\\boxed', '\\fbox'


def _span(text: str, start: int) -> tuple[int, int] | None:
    """Returns the (begin, end) of the first answer tag's content at or after `start`, or None."""
    begin = text.find(OPEN, start)
    if begin < 0:
        return None
    begin += len(OPEN)
    end = text.find(CLOSE, begin)
    return None if end < 0 else (begin, end)


def first_answer(text: str) -> str | None:
    """Returns the stripped content of the first `<answer>…</answer>`, across lines, or None."""
    span = _span(text, 0)
    return None if span is None else text[slice(*span)].strip()


def last_answer(text: str) -> str | None:
    """Returns the stripped content of the last `<answer>…</answer>`, across lines, or None.

    Tags pair from the left: an opening tag inside an answer is part of that answer's text.
    """
    last_span, start = None, 0
    while (span := _span(text, start)) is not None:
        last_span, start = span, span[1] + len(CLOSE)
    return None if last_span is None else text[slice(*last_span)].strip()


def after_last_tag(text: str) -> str:
    """Returns the stripped text between the last `<answer>` and the next `</answer>`.

    Without an opening tag, the text up to the first closing tag is returned, or all of the text.
    """
    return text.rpartition(OPEN)[2].partition(CLOSE)[0].strip()


def until(text: str, ends: Sequence[str]) -> str | None:
    r"""Returns `text` up to the earliest of `ends`, or None where none of them occurs."""
    cuts = [cut for cut in map(text.find, ends) if cut >= 0]
    return text[: min(cuts)] if cuts else None


def last_box(text: str) -> str | None:
    r"""Returns the last boxed content of `text`, by the rules of MATH500 scoring.

    If the text has a `\boxed x` (with a space), the text after it up to the next `$` is returned.
    Otherwise the result is the content of the last `\boxed{…}` with its braces matched, or else the
    last `\fbox{…}` including its wrapper, or else the whole text. It is None if the box never
    closes.
    """
    spaced = text.rfind(BOX + ' ')
    if spaced >= 0:
        return text[spaced + len(BOX) + 1 :].split('$', 1)[0]
    start = text.rfind(BOX)
    if start < 0:
        start = text.rfind(FRAME)
    if start < 0:
        return text
    depth = 0
    for brace in re.finditer('[{}]', text[start:]):
        depth += 1 if brace.group() == '{' else -1
        if brace.group() == '}' and depth == 0:
            box = text[start : start + brace.end()]
            opening = BOX + '{'
            return box[len(opening) : -1] if box.startswith(opening) else box
    return None
