"""The page of hits: harmless whatever images are called, and used in a browser as people do."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from browsing import chromium, complaints, requested
from pictures import photograph

from stellar_fast.viz.hits import Section, Tile, veil
from stellar_fast.viz.page import page

HOSTILE = (
    "<script>window.taken=1</script>.jpg",
    "\"><img src=x onerror='window.taken=1'>.jpg",
    "{{script}}</title></style></script><b>.jpg",
    "a'b&amp;c<!--.jpg",
    "\u202egpj.exe\x1b[31m\ud800.jpg",
    "javascript:window.taken=1",
)
PLAIN = HOSTILE[4].encode("unicode_escape").decode()  # as `printable` writes it


def jpeg(width: int, height: int) -> bytes:
    file = BytesIO()
    photograph(width, height).save(file, "JPEG")
    return file.getvalue()


def sections() -> list[Section]:
    """Two queries: six hits with maps, one of which has no picture; and no hit."""
    rng = np.random.default_rng(0)
    near = [(HOSTILE[0], 0, 0.91), ("elsewhere.jpg", 77, 0.5)]
    hits = [
        Tile(
            id,
            None if place == 3 else jpeg(400, 300 if place % 2 else 500),
            (400, 300 if place % 2 else 500),
            reason="no such <b>file</b>" if place == 3 else "",
            score=0.9 - place / 10,
            row=place,
            token=place,
            weights=rng.random((14, 14)),
            near=near if place else (),
        )
        for place, id in enumerate(HOSTILE)
    ]
    query = Tile(HOSTILE[1], jpeg(300, 300), (300, 300), row=9, token=2, weights=np.ones((14, 14)))
    return [Section(query, hits), Section(Tile("nothing like it"), [])]


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data):
        self.text.setdefault(self._open, []).append(data)


def test_ids_are_text_and_nothing_else():
    plain = [*sections()]
    harmless = [
        Section(
            Tile(**{**vars(one.query), "id": "a.jpg"}),
            [Tile(**{**vars(hit), "id": "a.jpg", "reason": "", "near": ()}) for hit in one.hits],
        )
        for one in plain
    ]
    title = "</title><script>1</script>"
    hostile, tame = Reader(page(title, "<i>", plain)), Reader(page("title", "facts", harmless))
    counted = [tag for tag, _ in hostile.elements if tag not in ("li", "span", "button")]
    assert counted == [tag for tag, _ in tame.elements if tag not in ("li", "span", "button")]
    named = [attributes["data-id"] for _, attributes in hostile.elements if "data-id" in attributes]
    assert named == [*HOSTILE[:4], PLAIN, HOSTILE[5]]
    allowed = {"src", "href", "id", "class", "alt", "title", "width", "height", "type", "hidden"}
    for tag, attributes in hostile.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name, value in attributes.items():
            if name in ("src", "href"):
                assert value.startswith("data:"), (tag, name)
            assert name in allowed or name.startswith(("data-", "aria-")) or tag in ("meta", "html",
                "link", "p"), (tag, name)  # fmt: skip


def test_the_page_is_text_of_its_own():
    text = page("title", "facts", sections())
    text.encode()
    assert "://" not in text
    assert "default-src 'none'" in text
    assert text == page("title", "facts", sections())


def test_a_map_glows_where_its_token_is():
    weights = np.zeros((2, 3))
    weights[0, 1] = 0.5
    over = veil(weights).astype(int)
    assert over.shape == (2, 3, 4)
    assert over[1, 1].tolist() == [0, 0, 0, round(255 * 0.72)]
    assert over[0, 1].tolist() == [255, 150, 30, round(255 * 0.38)]
    assert len({tuple(pixel) for pixel in veil(np.full((2, 2), 1e-9)).reshape(-1, 4)}) == 1


# In a browser


@pytest.fixture(scope="module", params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def browser(request, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), *request.param) as found:
        yield found


@pytest.fixture
def opened(browser, tmp_path):
    """The page, just opened. After the test: it asked for nothing and complained of nothing."""
    path = tmp_path / "hits.html"
    path.write_text(page("Nearest images", "facts", sections(), "a warning"), encoding="utf-8")
    requested(browser), complaints(browser)
    browser.get(path.as_uri())
    yield browser
    assert requested(browser) == [path.as_uri()]
    assert complaints(browser) == []
    assert browser.execute_script("return window.taken") is None


def one(browser, selector: str):
    return browser.find_element("css selector", selector)


def every(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def is_open(browser) -> bool:
    return browser.execute_script("return document.querySelector('dialog').open")


def press(browser, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(getattr(Keys, key, key)).perform()


def test_clicking_through(opened):
    hits = every(opened, "button.hit")
    assert len(hits) == 6
    assert [hit.find_element("css selector", ".score").text for hit in hits][:2] == [
        "0.900",
        "0.800",
    ]
    assert not is_open(opened)
    small = hits[1].find_element("css selector", "img.picture").size["width"]
    hits[1].click()
    assert is_open(opened)
    assert one(opened, "dialog h2").text == HOSTILE[1]
    about = one(opened, "dialog .about").text
    assert about.startswith("cosine 0.8000 · row 1 · token 1 · ")
    large, over = one(opened, "dialog img.picture"), one(opened, "dialog img.map")
    assert large.size["width"] > 1.2 * small
    assert large.get_property("naturalWidth") == 400
    assert over.rect == large.rect
    assert over.get_property("naturalWidth") == 14
    near = [line.text.split("\n") for line in every(opened, "dialog .near li")]
    assert [" ".join(line) for line in near] == [f"0.910 {HOSTILE[0]}", "0.500 elsewhere.jpg"]

    one(opened, "dialog .next").click()
    assert one(opened, "dialog h2").text == HOSTILE[2]
    assert one(opened, "dialog .place").text == "3 of 6"
    one(opened, "dialog .next").click()
    assert one(opened, "dialog .gone").text == "no picture: no such <b>file</b>"
    assert not one(opened, "dialog nav .maps").is_displayed()
    one(opened, "dialog .previous").click()
    one(opened, "dialog .near button").click()  # the first hit, which is on the page
    assert one(opened, "dialog h2").text == HOSTILE[0]
    assert not one(opened, "dialog .previous").is_enabled()
    assert not one(opened, "dialog .around").is_displayed()
    one(opened, "dialog .close").click()
    assert not is_open(opened)
    assert opened.switch_to.active_element.get_attribute("data-id") == HOSTILE[0]


def test_by_the_keyboard_alone(opened):
    opened.execute_script("document.querySelectorAll('button.hit')[3].focus()")
    press(opened, "TAB")
    press(opened, "ENTER")
    assert one(opened, "dialog h2").text == PLAIN
    press(opened, "ARROW_RIGHT")
    press(opened, "ARROW_RIGHT")  # the last has none behind it
    assert one(opened, "dialog .place").text == "6 of 6"
    press(opened, "ARROW_LEFT")
    assert one(opened, "dialog h2").text == PLAIN
    assert one(opened, "dialog img.map").is_displayed()
    press(opened, "m")
    assert not one(opened, "dialog img.map").is_displayed()
    assert one(opened, "header .maps").get_attribute("aria-pressed") == "false"
    press(opened, "ESCAPE")
    assert not is_open(opened)
    assert opened.switch_to.active_element.get_attribute("data-id") == PLAIN
    assert not any(over.is_displayed() for over in every(opened, "img.map"))
    one(opened, "header .maps").click()
    assert all(over.is_displayed() for over in every(opened, ".hit img.map"))


def test_it_fits(opened):
    """Nothing sticks out sideways, which a phone would make room for by showing all smaller; and
    fingers can hit the buttons."""
    width, height, needed = opened.execute_script(
        "const root = document.documentElement;"
        "return [root.clientWidth, root.clientHeight, root.scrollWidth]"
    )
    assert needed <= width
    every(opened, "button.hit")[0].click()
    for button in every(opened, "dialog nav button"):
        place = opened.execute_script(
            "return arguments[0].getBoundingClientRect().toJSON()", button
        )
        assert place["height"] >= 44
        assert place["left"] >= 0
        assert place["right"] <= width
        assert place["bottom"] <= height
    picture = one(opened, "dialog img.picture").rect
    assert picture["width"] / picture["height"] == pytest.approx(400 / 500, rel=0.02)
    press(opened, "ESCAPE")


@contextmanager
def listening() -> Iterator[tuple[str, list[bytes]]]:
    """An address, and the beginning of all that is asked there; nobody gets an answer. A browser
    may connect in advance and ask for nothing."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection, suppress(TimeoutError, ConnectionError):
                    connection.settimeout(1)
                    if said := connection.recv(4):
                        asked.append(said)
                    if said == b"stop":
                        return

        served = pool.submit(serve)
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png", asked
        finally:
            with socket.create_connection(server.getsockname()) as last:
                last.sendall(b"stop")
            served.result()


@pytest.mark.parametrize("policy", [True, False])
def test_what_slips_through_does_not_run(browser, tmp_path, policy):
    """The policy by itself: an id that is put in as it is, with all that it holds. Without the
    policy it would do harm, or this would show nothing."""
    path = tmp_path / "broken.html"
    with listening() as (address, asked):
        broken = (
            f"<script>window.taken=1</script><img src='{address}'><iframe src='{address}'></iframe>"
            "<style>h1{display:none}</style>"
        )
        text = page("title", "facts", sections()).replace("<main>", f"<main>{broken}")
        path.write_text(
            text if policy else text.replace("Content-Security-Policy", "none"), encoding="utf-8"
        )
        browser.get(path.as_uri())  # returns when all that is asked for is there, or is not
        assert one(browser, "h1").is_displayed() == policy
        assert browser.execute_script("return window.taken") == (None if policy else 1)
    assert asked[:-1] == [] if policy else asked[0] == b"GET "
    assert asked[-1] == b"stop"
    complaints(browser)
