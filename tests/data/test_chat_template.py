"""Chat templates that would fill the memory for a prompt that nobody has tried."""

import pytest
from jinja2.exceptions import SecurityError

from spg_jax.data.chat_template import ChatTemplate

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    'expression',
    [
        'text * 10**6',
        '10**6 * text',
        '[text] * 10**6',
        '(text | length) ** 1000000',
        '[[text, text]] | sum(start=[]) * 10**6',
    ],
)
def test_a_template_that_grows_for_another_prompt_is_refused_when_it_does(expression):
    template = ChatTemplate(
        '{% set text = messages[0].content %}'
        f'{{% if text == "Sudoku" %}}{{{{ {expression} }}}}{{% endif %}}{{{{ text + text * 2 }}}}',
        {},
    )
    assert template.render('a') == 'aaa'
    with pytest.raises(SecurityError, match='needs the memory of more than 100000 characters'):
        template.render('Sudoku')


def test_a_template_that_doubles_its_text_is_refused():
    template = ChatTemplate(
        '{% set n = namespace(text=messages[0].content) %}{% for _ in range(16) %}'
        '{% set n.text = n.text + n.text %}{% endfor %}{{ n.text | length }}',
        {},
    )
    assert template.render('a') == '65536'
    with pytest.raises(SecurityError, match=r'a \+ needs the memory'):
        template.render('ab')
