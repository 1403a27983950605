"""Folders with links: every folder once, and the same one of its paths each time."""

import itertools
import os

import pytest
from extracting import touch

from stellar_fast import ImageError
from stellar_fast.extract.input import discover, door
from stellar_fast.printable import printable


def ids(root) -> list[str]:
    return [item.id for item in discover(root)]


def test_folders_that_link_to_each_other_are_visited_once(tmp_path):
    """Eight of them: by every path, 109,600 images."""
    for one in "abcdefgh":
        touch(tmp_path, f"{one}/{one}.jpg")
    for one, other in itertools.permutations("abcdefgh", 2):
        (tmp_path / one / f"to-{other}").symlink_to(tmp_path / other)
    assert ids(tmp_path) == [f"{one}/{one}.jpg" for one in "abcdefgh"]


def test_the_own_path_wins_and_then_the_first_link(tmp_path):
    touch(tmp_path, "in/z/deep/a.jpg", "out/b.jpg", "out/inner/c.jpg")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "in" / "z")
    for name in ("y", "m", "z/deep/l"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "out")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "out" / "inner")
    assert ids(tmp_path / "in") == ["b/c.jpg", "m/b.jpg", "z/deep/a.jpg"]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_the_disk_does_not_matter(reverse, tmp_path, monkeypatch):
    touch(tmp_path, "in/k/a.jpg", "out/b.jpg")
    for name in "qwerty":
        (tmp_path / "in" / name).symlink_to(tmp_path / "out")
    scandir = os.scandir

    class Sorted:
        def __init__(self, path) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=reverse)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Sorted)
    assert ids(tmp_path / "in") == ["e/b.jpg", "k/a.jpg"]


def test_links_that_lead_nowhere_stop_nothing(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "none")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    found = discover(tmp_path)
    assert [item.id for item in found] == ["a.jpg", "gone.jpg", "self.jpg", "zero.jpg"]
    for item in found:
        with pytest.raises(ImageError):
            door.read_item(item)


# Names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo 1.jpg", "photo 1.jpg"),
        ("\u00e9\u4e2d\u3000\u00a0\U0001f600.jpg", "\u00e9\u4e2d\u3000\u00a0\U0001f600.jpg"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b2J", "\\x9b2J"),
        ("a\r\n\tb\0\x7f", "a\\r\\n\\tb\\x00\\x7f"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066a\u2069\u200f\u061c", "\\u2066a\\u2069\\u200f\\u061c"),
        (
            "a\u200b\u200d\u2060\ufeff\u00ad\u3164\u034fb",
            "a\\u200b\\u200d\\u2060\\ufeff\\xad\\u3164\\u034fb",
        ),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\U000e0041", "\\U000e0041"),
        ("\udce9\udcff", "\\xe9\\xff"),
        ("\ud800x\udfff", "\\ud800x\\udfff"),
    ],
)
def test_what_does_not_show_is_escaped(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_every_character_is_shown_or_escaped():
    for number in range(0x110000):
        text = printable(chr(number))
        assert text == chr(number) or text.isascii()
        text.encode()
        assert text.isprintable() or text == chr(number)
    assert not any(printable(chr(n)) == chr(n) for n in (*range(32), *range(127, 160)))


def test_ids_and_messages_of_folders_are_printable(tmp_path):
    touch(tmp_path, "a\x1b[2J\n\u202e.jpg", "b\u200b/c.jpg")
    assert ids(tmp_path) == ["a\\x1b[2J\\n\\u202e.jpg", "b\\u200b/c.jpg"]
    for name in ("gone\x1b[2J", "gone\x1b.tar", "gone\x1b.txt", "gone\x1b{", "{1..0}\x1b", "\x1b*"):
        with pytest.raises((ValueError, OSError)) as caught:
            discover(tmp_path / name)
        assert str(caught.value).isprintable()
