"""Whether two answers to a problem of MATH are the same, by the published rules.

Both answers go through one list of replacements, in the published order, and are then compared as
text; no mathematics is done. Every step is a plain search, so that hostile text of any shape takes
time in proportion to its length.
"""

from collections.abc import Callable

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
