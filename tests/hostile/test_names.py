"""What a name can do: nothing to the terminal, to a spreadsheet, or to a page of Markdown."""

from __future__ import annotations

import pytest

from video_swinv2.escaping import for_csv, for_markdown, for_terminal

RETITLE = "\x1b]0;owned\x07"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (RETITLE, r"\x1b]0;owned\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m\x7f\x85", r"\x9b31m\x7f\x85"),
        ("gpj\u202efdp.exe\u2066", r"gpj\u202efdp.exe\u2066"),
        ("a\u2028b", r"a\u2028b"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\udce9"),
        ("Größe 山 👩‍🚀 שלום", "Größe 山 👩‍🚀 שלום"),
        (r"C:\new", r"C:\new"),
        (3, "3"),
    ],
)
def test_for_terminal(name, shown):
    assert for_terminal(name) == shown
    assert for_terminal(shown) == shown, "escaping twice changes nothing more"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+cmd", "'+1+cmd"),
        ("-x.mp4", "'-x.mp4"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\uff1d1", "'\uff1d1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        (RETITLE, r"\x1b]0;owned\x07"),
        ("a=b", "a=b"),
        ("-", "-"),
        ("", ""),
    ],
)
def test_for_csv(name, cell):
    assert for_csv(name) == cell


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a | b", r"a \| b"),
        ("<script>", r"\<script\>"),
        ("`x` *y* _z_ $w$", r"\`x\` \*y\* \_z\_ \$w\$"),
        ("[a](b)", r"\[a\](b)"),
        ("a\n\n# b", r"a \# b"),
        ("see http://a.b and www.c.d or e@f.g", r"see http\://a.b and www\.c.d or e\@f.g"),
        (RETITLE, r"\\x1b\]0;owned\\x07"),
        ("10:30, videoswin-4x3", "10:30, videoswin-4x3"),
    ],
)
def test_for_markdown(name, text):
    assert for_markdown(name) == text
