from __future__ import annotations

import re

from sft_lightning.comparison.page import render_page
from sft_lightning.comparison.results import Comparison


def test_the_page_is_self_contained_and_escapes_what_models_say(comparison: Comparison) -> None:
    page = render_page(comparison)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("same as the baseline") == 1
    assert "default-src 'none'" in page
