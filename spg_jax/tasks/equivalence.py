"""Whether two answers to a problem of MATH are the same, by the published rules.

Both answers go through one list of replacements, in the published order, and are then compared as
text; no mathematics is done. Every step is a plain search, so that hostile text of any shape takes
time in proportion to its length.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from math import gcd

from spg_jax.tasks import mended
from spg_jax.tasks.arithmetic import MAX_CHARACTERS

# In the published references this command means a unit if a space follows its brace.
_TEXT_UNIT = r'\text{ '

# Pairs of (old, new) text. Their order matters: a line break may hide a command, and `\\` has to
# become `\` before commands are replaced.
_BEFORE_UNITS = (
    ('\n', ''),
    (r'\!', ''),
    ('\\\\', '\\'),
    ('tfrac', 'frac'),
    ('dfrac', 'frac'),
    (r'\left', ''),
    (r'\right', ''),
    (r'^{\circ}', ''),
    (r'^\circ', ''),
    (r'\$', ''),
)
_AFTER_UNITS = ((r'\%', ''), (' .', ' 0.'), ('{.', '{0.'))


class NotNormal(ValueError):
    """An answer on which the released normalisation fails."""


def equivalent(answer: str, reference: str) -> bool:
    """Whether the normal forms of two answers are equal, or the answers if one has no such form."""
    try:
        return normal_form(answer) == normal_form(reference)
    except NotNormal:
        return answer == reference


def normal_form(answer: str) -> str:
    r"""Returns an answer with the published rules applied: `\dfrac12` is `\frac{1}{2}`.

    Raises:
      NotNormal: the answer has two units or more, a root or fraction of nothing, or exactly one `/`
        that does not stand between integers. (The last case looks like a mistake of the released
        code: such answers are then compared with their spaces.)
    """
    for old, new in _BEFORE_UNITS:
        answer = answer.replace(old, new)
    answer = _without_unit(answer)
    for old, new in _AFTER_UNITS:
        answer = answer.replace(old, new)
    if answer.startswith('.'):
        answer = f'0{answer}'
    answer = _without_left_side(answer)
    answer = _each_argument(answer, r'\sqrt', _braced_root)
    answer = answer.replace(' ', '')
    answer = _each_argument(answer, r'\frac', _braced_fraction)
    return _as_fraction(answer)


def _without_unit(answer: str) -> str:
    if answer.count(_TEXT_UNIT) > 1:
        raise NotNormal
    return answer.partition(_TEXT_UNIT)[0]


def _without_left_side(answer: str) -> str:
    """Drops a left side such as `x =`: up to two characters before the only equals sign."""
    left, _, right = answer.partition('=')
    return right if answer.count('=') == 1 and len(left) <= 2 else answer


def _each_argument(answer: str, command: str, braced: Callable[[str], str | None]) -> str:
    """Puts braces around the argument of each `command`; changes nothing if one has none."""
    before, *rest = answer.split(command)
    pieces = [before]
    for piece in rest:
        if not piece:
            raise NotNormal
        if piece[0] != '{':
            piece = braced(piece)
        if piece is None:
            return answer
        pieces.append(piece)
    return command.join(pieces)


def _braced_root(piece: str) -> str:
    r"""`3x` is `{3}x`: the root of one character."""
    return f'{{{piece[0]}}}{piece[1:]}'


def _braced_fraction(piece: str) -> str | None:
    r"""`12x` is `{1}{2}x` and `1{72}` is `{1}{72}`; the result is None without a denominator."""
    if len(piece) < 2:
        return None
    top, bottom, rest = piece[0], piece[1], piece[2:]
    return f'{{{top}}}{bottom}{rest}' if bottom == '{' else f'{{{top}}}{{{bottom}}}{rest}'


def _as_fraction(answer: str) -> str:
    r"""Writes 0.5, or two integers with a slash, as a `\frac`; leaves other answers unchanged."""
    if answer == '0.5':
        return r'\frac{1}{2}'
    if answer.count('/') != 1:
        return answer
    try:
        top, bottom = map(int, answer.split('/'))
    except ValueError:  # Python also raises it for an integer with too many digits.
        raise NotNormal from None
    is_canonical = f'{top}/{bottom}' == answer  # The form 01/2 of 1/2 is not canonical.
    return rf'\frac{{{top}}}{{{bottom}}}' if is_canonical else answer


# Text at the end of an answer that may be a unit: words, with powers such as `\text{ cm}^2`.
_UNIT = re.compile(
    r'(?:\s*\\(?:text|mbox|mathrm|textrm)\s*\{\s*([A-Za-z][A-Za-z ./]*)\}(?:\^\{?([23])\}?)?\s*)'
)
_WORDS = re.compile(r'\\(?:text|mbox|mathrm|textrm|textbf)\s*\{([^{}]*)\}')
_TEXT = re.compile(r'\\(?:text|mbox|mathrm|textrm)\s*\{')
_NO_UNIT = mended.SCALES.union('or nor and not no to than either neither but except if'.split())
# Signs as people and editors typeset them.
_SIGNS = str.maketrans(
    {'−': '-', '–': '-', '×': r'\times ', '÷': r'\div ', '·': r'\cdot ', '⋅': r'\cdot '}
)
_SYMBOL_UNITS = ((re.compile(r'\^\{?\\circ\}?|°'), 'degree'), (re.compile(r'\\?%'), 'percent'))
_DOLLAR = re.compile(r'\\\$')
# A variable, with an index or an argument, that an answer may define: `x`, `x_1`, `f(x)`.
_DEFINED = re.compile(r'\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]\}?|\([A-Za-z]\))?')
_DECIMAL = re.compile(r'-?[0-9]*\.?[0-9]+')
_RATIO = re.compile(r'(-?)(?:\\frac\{(-?[0-9]+)\}\{([0-9]+)\}|\(?(-?[0-9]+)\)?/\(?([0-9]+)\)?)')
_LAYOUT = re.compile(
    r'\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|\\q?quad(?![A-Za-z])|[\s~$]'
)


def equivalent_by_mended_rules(answer: str, reference: str) -> bool:
    r"""Whether an answer is the same as the reference, by rules that common sense shares.

    Each rule stands against what the released rules do:

    - An empty answer is never right. There, `\boxed{}` equals `\text{ odd}`.
    - Text is a unit only if words that can be one follow a value. There, everything from `\text{ `
      on is dropped: `5\text{ or 6}` is 5, and `\text{ even}` is `\text{ odd}`.
    - Two units have to be the same, but one side may leave its unit out. There, 5 cm is 5 miles,
      and 60 % is 60 dollars.
    - A left side such as `x =` is dropped if it names a variable. There, `6=5` is 5.
    - Numbers are compared exactly: 1.5 is `\frac{3}{2}` in lowest terms, and 10,080 is 10080
      (open-compass/opencompass#2647), while (10,080) is two numbers. There, they are compared as
      text.
    - Layout never counts: spaces, `\left`, `\dfrac`, `\sqrt 2`.
    """
    if not answer.strip() or max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    return any(_are_same(one, other) for one in _readings(answer) for other in _readings(reference))


def _readings(answer: str) -> tuple[str, str]:
    """Returns an answer with its commas, and without those that may group digits."""
    # Two backslashes end a row of a matrix; elsewhere they are one that was escaped.
    row_end = '@' if r'\begin{' in answer else '\\'
    answer = answer.strip().strip('$').replace('\\\\', row_end).translate(_SIGNS)
    return answer, mended.without_thousands(answer, in_brackets=False)


def _are_same(answer: str, reference: str) -> bool:
    """Whether readings of two answers are the same."""
    (value, unit), (right_value, right_unit) = _value_and_unit(answer), _value_and_unit(reference)
    if unit and right_unit and unit != right_unit:
        return False
    if right_value == '' or value == '':
        return False
    left, right_left = _left_side(value), _left_side(right_value)
    if left and right_left and left != right_left:
        return False
    value, right_value = value.removeprefix(left), right_value.removeprefix(right_left)
    number, right_number = _rational(value), _rational(right_value)
    if number is not None and right_number is not None:
        return number == right_number
    if any(_WORDS.fullmatch(text.strip()) for text in (answer, reference)):
        return value.lower() == right_value.lower()  # Monday is monday, but x is not X.
    return value == right_value


def _value_and_unit(answer: str) -> tuple[str, str]:
    """Returns (the value in one spelling, the name of its unit or '')."""
    answer, dollars = _DOLLAR.subn('', answer)
    unit = 'dollar' if dollars else ''
    for pattern, name in _SYMBOL_UNITS:
        answer, count = pattern.subn('', answer)
        unit = name if count else unit
    text = _TEXT.search(answer)
    if text and answer[: text.start()].strip():
        match = _UNIT.fullmatch(answer[text.start() :])
        words = match[1].lower().split() if match else []
        if words and not set(words) & _NO_UNIT:
            unit = ' '.join(word.removesuffix('s') for word in words) + (match[2] or '')
            answer = answer[: text.start()]
    only_words = _WORDS.fullmatch(answer.strip())
    return _one_spelling(only_words[1] if only_words else answer), unit


def _one_spelling(answer: str) -> str:
    """Returns an answer without layout, its roots and fractions with braces."""
    answer = re.sub(r'\\[dt]frac(?![A-Za-z])', r'\\frac', answer)
    answer = re.sub(r'(\\(?:sqrt|frac)) +', r'\1', answer)
    answer = _LAYOUT.sub('', answer.replace('\n', ' '))
    answer = re.sub(r'\\text\{([A-Za-z])\}|\\mathrm\{([A-Za-z])\}', r'\1\2', answer)
    try:
        answer = _each_argument(answer, r'\sqrt', _braced_root)
        answer = _each_argument(answer, r'\frac', _braced_fraction)
    except NotNormal:
        pass
    answer = re.sub(r'(\\frac\{[^{}]*\})([0-9A-Za-z])', r'\1{\2}', answer)
    answer = re.sub(r'\^\{([0-9A-Za-z])\}', r'^\1', answer)
    return re.sub(r'(?<![0-9])\.(?=[0-9])', '0.', answer).removesuffix('.')


def _left_side(value: str) -> str:
    """Returns `x=` where a value defines a variable, with its equals sign, or ''."""
    left, equals, right = value.partition('=')
    defines = equals and right and '=' not in right and _DEFINED.fullmatch(left)
    return f'{left}=' if defines else ''


def _rational(value: str) -> Fraction | None:
    """Returns the exact value of an integer, a decimal or a fraction in lowest terms, or None."""
    if _DECIMAL.fullmatch(value):
        return Fraction(value)
    ratio = _RATIO.fullmatch(value)
    if ratio is None:
        return None
    top, bottom = (int(part) for part in ratio.groups()[1:] if part)
    if bottom < 2 or gcd(top, bottom) != 1:
        return None
    return Fraction(-top if ratio[1] else top, bottom)
