"""Whether two answers to a problem of MATH are the same, by the published rules.

Text is compared with text after both went through one list of replacements, in the published order;
no mathematics is done. Every step is a plain search, so that hostile text of any shape takes time
in proportion to its length.
"""

from collections.abc import Callable

_TEXT_UNIT = r'\text{ '  # with the space, which in the published references means a unit

# (what, by what), in this order: a line break may hide a command, `\\` turns into `\` before
# commands are looked for.
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
    """An answer that normalising fails on, as released."""


def equivalent(found: str, reference: str) -> bool:
    """Whether two answers are equal once both are normalised; as they stand, if one cannot be."""
    try:
        return normal_form(found) == normal_form(reference)
    except NotNormal:
        return found == reference


def normal_form(answer: str) -> str:
    r"""Returns an answer with the published rules applied: `\dfrac12` is `\frac{1}{2}`.

    Raises:
      NotNormal: two units or more, a root or fraction of nothing, or one `/` between anything but
        integers. (The last looks like a slip of the released code; then spaces, for one, count.)
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
    """Drops `x =` and the like: up to two characters before the only equals sign."""
    left, _, right = answer.partition('=')
    return right if answer.count('=') == 1 and len(left) <= 2 else answer


def _each_argument(answer: str, command: str, braced: Callable[[str], str | None]) -> str:
    """Rewrites what follows each `command`; leaves all as it is if `braced` finds too little."""
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
    r"""`12x` is `{1}{2}x` and `1{72}` is `{1}{72}`; None if there is no denominator."""
    if len(piece) < 2:
        return None
    top, bottom, rest = piece[0], piece[1], piece[2:]
    return f'{{{top}}}{bottom}{rest}' if bottom == '{' else f'{{{top}}}{{{bottom}}}{rest}'


def _as_fraction(answer: str) -> str:
    r"""The whole of 0.5, or of two integers with a slash, as `\frac`."""
    if answer == '0.5':
        return r'\frac{1}{2}'
    if answer.count('/') != 1:
        return answer
    try:
        top, bottom = map(int, answer.split('/'))
    except ValueError:  # more digits than Python reads, too
        raise NotNormal from None
    written = f'{top}/{bottom}' == answer  # 01/2 is not how 1/2 is written
    return rf'\frac{{{top}}}{{{bottom}}}' if written else answer
