r"""What the mended rules of all tasks share: which text is the answer, and how it may be spelt.

`task.rules='mended'` refuses what the released rules count as right although common sense does not,
and counts what they miss only for its spelling. Under it the reward of an answer and the verdict of
evaluation come from one reading of the completion, so that they never disagree.
"""

import re

from spg_jax.tasks import extraction
from spg_jax.tasks.arithmetic import MAX_CHARACTERS

SCORER = 'mended'  # the name that figures under these rules carry

# Words that make a number beside them another one. Quarters, tenths and the like may be things.
SCALES = frozenset(
    'hundred hundreds thousand thousands million millions billion billions trillion trillions mil '
    'mln bn lakh crore dozen dozens half halves quarter third k'.split()
)

_SYMBOLS = str.maketrans(
    dict.fromkeys('×·∙⋅∗', '*') | dict.fromkeys('÷∕⁄', '/') | dict.fromkeys('−–', '-')
)
_BRACKET_SIZE = re.compile(r'\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])')
_SPACE = re.compile(r'\\[,;:! ]|~|\\q?quad(?![A-Za-z])')
_WRAPPED = re.compile(r'\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}')
_MATH_MODE = re.compile(r'\$|\\[()\[\]]')
_COMMANDS = (
    (re.compile(r'\\(?:times|cdot|ast)(?![A-Za-z])'), '*'),
    (re.compile(r'\\div(?![A-Za-z])'), '/'),
    (re.compile(r'\\[dtc]frac(?![A-Za-z])'), r'\\frac'),
)
_FRACTION = re.compile(r'\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}')
# What stands between groups of three digits: in LaTeX, and a comma.
_THIN = r',\\! *|\{,\}|\\[,;:! ]|~'
_GROUPED = re.compile(
    rf'(?<![0-9.,])[0-9]{{1,3}}(?:(?:{_THIN}|,)[0-9]{{3}})+(?![0-9,])'
    # `\(` and `\[` begin mathematics, and no tuple.
    r'|(?P<opens>(?<!\\)[(\[]|\\\{)|(?P<closes>(?<!\\)[)\]]|\\\})'
)
_GROUPED_IN_LATEX = re.compile(rf'(?<![0-9.,])[0-9]{{1,3}}(?:(?:{_THIN})[0-9]{{3}})+(?![0-9])')
_NO_DIGIT = re.compile('[^0-9]')


def final_answer(completion: str) -> str | None:
    r"""Returns the text that a completion gives as its answer, or None.

    It is the content of the last answer tag or, without such a tag, of the last box of the
    completion. A box inside the tag is the answer. The released rules take the whole text where
    there is neither, and what stands before a box that is empty or never closes, so that an answer
    need not be given (open-compass/opencompass#2647; huggingface/Math-Verify#14). Here such a
    completion has no answer, and neither has a tag with boxes that differ.
    """
    answer = extraction.last_answer(completion)
    if answer is None:
        answer = extraction.last_box(completion) if extraction.BOX in completion else None
    elif extraction.BOX in answer:
        boxes = {_box(start) for start in answer.split(extraction.BOX)[1:]}
        answer = boxes.pop() if len(boxes) == 1 else None
    return (answer or '').strip() or None


def _box(start: str) -> str:
    """Returns the content of the box that starts before this text, or '' if it never closes.

    Each box is read by itself: `extraction.last_box` prefers one with a space wherever it stands,
    and takes what follows such a box for its content even if there are braces.
    """
    braced = start.lstrip()
    box = extraction.last_box(extraction.BOX + (braced if braced.startswith('{') else start))
    return (box or '').strip()


def plain_arithmetic(text: str) -> str:
    r"""Returns arithmetic with + - * / and round brackets for LaTeX and typeset signs.

    `5\times\frac{1}{2}` is `5*((1)/(2))`, and `[3−2]` is `(3-2)`. Unknown commands and single
    braces stay, so that an evaluator refuses them, and so does text too long to be an answer.
    """
    if len(text) > MAX_CHARACTERS:
        return text
    text = _BRACKET_SIZE.sub('', text.translate(_SYMBOLS))
    text = _WRAPPED.sub(r' \1 ', _SPACE.sub(' ', text))
    text = _MATH_MODE.sub('', text)
    for pattern, symbol in _COMMANDS:
        text = pattern.sub(symbol, text)
    text = text.replace('[', '(').replace(']', ')')
    while _FRACTION.search(text):  # Each round replaces the innermost fractions.
        text = _FRACTION.sub(r'((\1)/(\2))', text)
    return text


def without_thousands(text: str, in_brackets: bool = True) -> str:
    r"""Returns `10\,080`, `10{,}080` and `1,234,567` without what groups their digits.

    Text such as `1,2345`, whose groups are wrong, stays as it is.

    Args:
      text: with numbers.
      in_brackets: whether a comma within brackets can group digits. Where answers may be tuples, it
        stands between two numbers there.
    """

    depth = 0

    def ungrouped(match: re.Match[str]) -> str:
        nonlocal depth
        if match['opens'] or match['closes']:
            depth = max(0, depth + (1 if match['opens'] else -1))
            return match[0]
        return _NO_DIGIT.sub('', match[0]) if in_brackets or not depth else match[0]

    text = _GROUPED_IN_LATEX.sub(lambda match: _NO_DIGIT.sub('', match[0]), text)
    return _GROUPED.sub(ungrouped, text)
