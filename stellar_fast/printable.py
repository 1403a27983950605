"""Names from elsewhere, made fit for a terminal, a log and UTF-8."""

from __future__ import annotations

import os
import unicodedata

# Control and format characters (terminal escapes, newlines, marks that turn the direction of text,
# characters without width), lone surrogates, line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Letters and marks that show nothing, of other categories.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def printable(text: str, *, keep: str = "") -> str:
    """`text` with every character that does not show as itself written as an escape, but for those
    in `keep`.

    Bytes that are no UTF-8, as file names have them, become `\\xe9`; others `\\x1b`, `\\n`,
    `\\u202e`. What shows stays as it is, so most names come back unchanged.
    """
    if text.isprintable() and _BLANK.isdisjoint(text):
        return text
    return "".join(one if one in keep else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if character not in _BLANK and unicodedata.category(character) not in _HIDDEN:
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that Python kept by surrogateescape
        return f"\\x{os.fsencode(character)[0]:02x}"
    return character.encode("unicode_escape").decode("ascii")
