from __future__ import annotations

from sft_lightning.printable import printable


def test_control_characters_become_visible_and_text_stays() -> None:
    assert printable("a\x1b[2J\x07\x9b\x7f\nb\tc 世界") == "a␛[2J␇\ufffd␡\nb\tc 世界"
