from __future__ import annotations

import pytest

from sft_lightning.compat.transformers import compile_chat_template
from sft_lightning.data.templates import bounded
from sft_lightning.data.templates.bounded import BoundedTemplate, LimitError

LOOPS = """\
{%- for m in messages if m.role != 'system' -%}
{{ loop.index }}/{{ loop.length }} {{ m.role }}: {{ m.content * 2 }}{{ '.' if loop.last else ', ' }}
{%- endfor -%}
{%- for key, value in messages[0].items() -%}{{ key }}={{ value }};{%- endfor -%}
{%- for part in 'a b'.split() | map('upper') -%}{{ part }}{%- else -%}none{%- endfor -%}
{%- for x in [] -%}x{%- else -%}empty{%- endfor -%}{{ 2 ** 10 }}"""


def test_a_template_renders_as_in_serving() -> None:
    values = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    text = BoundedTemplate(LOOPS).render(**values)
    assert text == compile_chat_template(LOOPS).render(**values)
    assert text == "1/2 user: HiHi, 2/2 assistant: HoHo.role=user;content=Hi;ABempty1024"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}", "more than 1,000,000 steps"),
        (
            '{% for i in range(2000) %}{% for c in text | map("upper") %}{% endfor %}{% endfor %}',
            "1,000,000 steps",
        ),
        ("{{ 'ab' * (10 ** 8) }}", "writes more than 100,000,000 characters"),
        ("{{ 7 ** (10 ** 9) }}", "is too large"),
    ],
)
def test_a_template_that_would_run_or_write_without_end_is_stopped(source: str, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        BoundedTemplate(source).render(text="x" * 1000)


def test_the_limits_are_of_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MAX_STEPS", 10)
    template = BoundedTemplate("{% for i in range(n) %}{{ i }}{% endfor %}")
    assert [template.render(n=8) for _ in range(3)] == ["01234567"] * 3
    with pytest.raises(LimitError, match="more than 10 steps"):
        template.render(n=11)


def test_text_is_counted_over_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MAX_CHARACTERS", 10)
    template = BoundedTemplate("{% for i in range(n) %}{{ text }}{% endfor %}")
    assert template.render(n=2, text="abcd") == "abcdabcd"
    with pytest.raises(LimitError, match="more than 10 characters"):
        template.render(n=3, text="abcd")
