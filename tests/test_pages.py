"""Pages are filled completely, allow nothing but what they have, and their plots have round tick marks."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from jinja2 import UndefinedError

from tests.conftest import REPOSITORY
from video_swinv2.pages import _environment, render, tick_marks

TEMPLATES = {
    "data_prep": ["status.html.j2"],
    "video_swinv2.inference": ["serve.html.j2"],
    "video_swinv2.report": [
        "report.html.j2",
        "compare.html.j2",
        "segmentation_report.html.j2",
        "detection_report.html.j2",
    ],
}


def test_a_value_the_template_needs_and_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("video_swinv2.report", "compare.html.j2", {})


def digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def test_the_policy_allows_the_style_and_the_script_of_the_page_and_no_others() -> None:
    for script, allowed in ((None, None), ("alert(1 < 2)", digest("alert(1 < 2)"))):
        page = render_child(script)
        policy = dict(
            part.strip().split(" ", 1) for part in re.findall('Policy" content="([^"]*)"', page)[0].split(";")
        )
        (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
        assert policy["style-src-elem"] == digest(style)
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy.get("script-src") == allowed
        assert re.findall(r"<script>(.*?)</script>", page, re.DOTALL) == ([script] if script else [])
        assert set(policy) - {"script-src"} == {
            *("default-src", "base-uri", "form-action", "style-src", "style-src-elem", "style-src-attr")
        }


def render_child(script: str | None) -> str:
    """A page without content whose script is `script`."""
    block = "" if script is None else "{% block script %}" + script + "{% endblock %}"
    return _environment("video_swinv2").from_string('{% extends "page.html.j2" %}' + block).render()


def test_every_page_is_known_here_and_has_its_scripts_in_the_block_for_them() -> None:
    found = {
        path for path in REPOSITORY.glob("*/**/*.html.j2") if "page" in path.read_text().partition("extends")[2][:30]
    }
    named = {REPOSITORY / package.replace(".", "/") / name for package, names in TEMPLATES.items() for name in names}
    assert found == named
    for path in found:
        assert set(re.findall(r"<script[^>]*>", path.read_text())) <= {
            *('<script type="application/json" id="settings">', '<script type="application/json" id="matrix-data">')
        }
        block = re.search(r"\{% block script %\}(.*?)\{% endblock %\}", path.read_text(), re.DOTALL)
        assert block is None or "{{" not in block[1], "values belong into elements that are not run"


def test_tick_marks_are_round_and_inside_the_axis() -> None:
    assert [mark.text for mark in tick_marks(0, 100, " %")] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    assert [mark.text for mark in tick_marks(0.7, 2.07)] == ["1", "1.5", "2"]
    assert [mark.text for mark in tick_marks(0.0003, 0.00151)] == ["0.0005", "0.001", "0.0015"]
    assert tick_marks(0, 100)[1].position == pytest.approx(0.2)
    assert [mark.text for mark in tick_marks(3, 3)] == ["3"]
    assert all(0 <= mark.position <= 1 for low in (-7.3, 0, 12.1) for mark in tick_marks(low, low + 31.7))


@pytest.mark.parametrize("high", [0.003, 1, 7, 10, 246_534])
def test_tick_marks_are_round_and_few(high: float) -> None:
    marks = tick_marks(0, high)
    assert 2 <= len(marks) <= 6
    assert marks[0].position == 0
    assert marks[-1].position <= 1
    assert all(re.fullmatch(r"0|0?\.?0*[1-9]\d?0*|\d*\.\d", mark.text) for mark in marks), marks
