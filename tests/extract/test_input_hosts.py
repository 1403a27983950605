"""Hosts of private networks: not reached by a list, a redirect, or a name that changes."""

import socket

import pytest
from loopback import redirect, serving
from pictures import png

from stellar_fast import ImageError
from stellar_fast.extract.input import discover, door, web
from stellar_fast.extract.input.addresses import Allowed
from stellar_fast.extract.records import Item

PRIVATE = (
    *("127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1"),
    *("::1", "::", "fe80::1", "fe80::1%lo", "fd00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1"),
    *("::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:db8::1", "2001:0:7f00:1::", "64:ff9b:1::1"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks_are_not_public(address):
    assert not web.is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_the_internet_is_public(address):
    assert web.is_public(address)


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "[::1]"],
)
def test_a_line_leads_to_no_private_host_however_it_is_spelled(host, tmp_path):
    with serving({"/a.png": png()}) as server:
        (tmp_path / "list.txt").write_text(f"http://{host}:{server.port}/a.png\n")
        (item,) = discover(tmp_path / "list.txt")
        with pytest.raises(
            ImageError, match=r"in a private network; --allow-host|has no address|refused"
        ):
            door.read_item(item)
        assert server.requests == []
        if "::" not in host:
            for text in (host, f"{host}:{server.port}"):
                assert door.read_item(item, Allowed.of("x", (), [text])) == png()
        for other in ("10.0.0.1", f"127.0.0.1:{server.port + 1}", "example.com"):
            with pytest.raises(ImageError, match="in a private network"):
                door.read_item(item, Allowed.of("x", (), [other]))


def test_the_hosts_name_is_looked_up_once_and_that_address_is_checked(monkeypatch):
    """A name that is public when it is asked for first, and private when it is connected to."""
    with serving({"/a.png": png()}) as server:
        asked = []

        def rebinding(host, port, **arguments):
            asked.append(host)
            address = "93.184.215.14" if len(asked) > 1 else "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        item = Item("a", f"http://public.example:{server.port}/a.png")
        with pytest.raises(ImageError, match=r"public\.example is at 127\.0\.0\.1"):
            door.read_item(item)
        assert asked == ["public.example"]
        assert server.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_leads_to_no_private_host(status):
    with serving({"/secret": png()}) as inner, serving({}) as outer:
        outer.answers["/a.png"] = redirect(inner.url("secret"))
        allowed = Allowed.of(outer.url())
        for address in (outer.url("a.png"), f"zip://x::{outer.url('a.png')}"):
            for span in ((), (0, 10)):
                with pytest.raises(ImageError, match="in a private network"):
                    door.read_item(Item("a", address, *span), allowed)
        assert inner.requests == []
        both = Allowed.of(outer.url(), (), [inner.host])
        assert door.read_item(Item("a", outer.url("a.png")), both) == png()


@pytest.mark.parametrize(
    "where",
    ["file:///etc/hostname", "ftp://h/x", "http://", "http://a:b:c/", "//", "gopher://x", "\x00"],
)
def test_a_redirect_leads_nowhere_else(where):
    with (
        serving({"/a.png": redirect(where)}) as server,
        pytest.raises(ImageError, match=r"redirects (to what is no address|more than 5 times)"),
    ):
        door.read_item(Item("a", server.url("a.png")), Allowed.of(server.url()))


def test_redirects_end(monkeypatch):
    with serving({"/a": redirect("/a")}) as server:
        with pytest.raises(ImageError, match="redirects more than 5 times"):
            door.read_item(Item("a", server.url("a")), Allowed.of(server.url()))
        assert len(server.requests) == 6
        server.answers |= {"/b": redirect("c?x=1"), "/c": png()}
        assert door.read_item(Item("a", server.url("b")), Allowed.of(server.url())) == png()
        assert server.paths[-1] == "/c?x=1"


@pytest.mark.parametrize("text", ["", "a b", "http://x", "x:y", "x:99999", "u@x", "x/y", ":80"])
def test_texts_that_are_no_hosts_are_refused(text):
    with pytest.raises(ValueError, match="a host is HOST or HOST:PORT"):
        Allowed.of("x", (), [text])


def test_hosts_are_taken_apart():
    hosts = ["NAS", "nas:80", "[::1]:80", "fd00::2"]
    assert Allowed.of("https://u:p@[::9]/x", (), hosts).hosts == {
        *(("nas", None), ("nas", 80), ("::1", 80), ("fd00::2", None), ("::9", 443))
    }
