"""Chromium without a window, as Debian has it, and what a page asked of the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Chromium asks its makers for things of its own otherwise.
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip


@contextmanager
def chromium(profile: Path, width: int, height: int) -> Iterator[Any]:
    """A selenium driver; skips the test where there is no browser.

    Args:
        profile: a new folder of its own.
        width, height: of the page in CSS pixels, as a phone has them if it is narrow.
    """
    pytest.importorskip("selenium", reason="the package selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no browser: neither chromium nor chromedriver may be missing")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = browser
    for argument in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    try:
        found.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        found.get("about:blank")  # away from the page for new tabs
        yield found
    finally:
        found.quit()


def requested(browser: Any) -> list[str]:
    """What was asked for since this was called last, but for what is in the page or browser."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [address for address in addresses if not address.startswith(("data:", "chrome:"))]


def complaints(browser: Any) -> list[str]:
    """The console's lines since this was called last."""
    return [entry["message"] for entry in browser.get_log("browser")]
