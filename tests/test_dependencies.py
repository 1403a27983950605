"""What is installed: every dependency is in the lock, by its hash, at no less than its floor."""

import itertools
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = (".ci/lock.txt", ".ci/lock-test.txt")
# No command of the README installs these from the lock: they are to compare with, and torchvision
# is as torch is.
UNLOCKED = {"peers", "metrics"}
ALONE = "torch"  # in no lock, see .ci/lock.py
# Earlier ones run code from a list (fsspec), take gigabytes for small pictures (Pillow), let anyone
# in (Ray), read freed memory (Arrow's IPC files), evaluate an argument (tqdm), or write outside of
# what they unpack (setuptools, wheel).
SAFE = {
    "fsspec": "2026.6",
    "pillow": "13",
    "pyarrow": "23.0.1",
    "ray": "2.59",
    "setuptools": "78.1.1",
    "tqdm": "4.66.3",
    "wheel": "0.46.2",
}


def entries() -> list[tuple[Requirement, list[str]]]:
    """Of the lock: (requirement, its hashes)."""
    lines = [line for name in LOCKS for line in (ROOT / name).read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        found.append((Requirement(requirement), [hash.strip() for hash in hashes]))
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def wanted() -> list[Requirement]:
    """What is built with, what is needed, and every extra that the lock has."""
    found = project()
    extras = found["project"]["optional-dependencies"]
    assert set(extras) >= UNLOCKED
    lines = [*found["build-system"]["requires"], *found["project"]["dependencies"]]
    for name in set(extras) - UNLOCKED:
        lines += extras[name]
    return [Requirement(line) for line in lines]


def test_every_dependency_is_locked_within_its_range():
    locked = entries()
    for requirement in wanted():
        name = canonicalize_name(requirement.name)
        if name == ALONE:
            continue
        pins = [pin for pin, _ in locked if canonicalize_name(pin.name) == name]
        assert pins, f"{name} is not in the lock"
        for pin in pins:
            (version,) = (part.version for part in pin.specifier)
            assert requirement.specifier.contains(version), f"{pin} is not {requirement}"


def test_every_entry_is_one_version_with_hashes():
    locked = entries()
    assert len(locked) > 60, "what the dependencies need is missing"
    for pin, hashes in locked:
        assert [part.operator for part in pin.specifier] == ["=="], pin
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash) for hash in hashes), pin


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_no_python_has_two_versions_of_one_dependency(version):
    environment = {
        **default_environment(),
        "python_version": version,
        "python_full_version": f"{version}.1",
    }
    names = [
        canonicalize_name(pin.name)
        for pin, _ in entries()
        if pin.marker is None or pin.marker.evaluate(environment)
    ]
    assert len(names) == len(set(names))


def test_floors_leave_out_releases_with_known_holes():
    found = project()["project"]
    extras = found["optional-dependencies"].values()
    lines = [*found["dependencies"], *itertools.chain.from_iterable(extras)]
    lines += project()["build-system"]["requires"]
    seen = set()
    for requirement in map(Requirement, lines):
        if requirement.name in SAFE:
            seen.add(requirement.name)
            (floor,) = requirement.specifier
            assert (floor.operator, floor.version) == (">=", SAFE[requirement.name])
    assert seen == set(SAFE)


def test_constraints_have_the_versions_of_the_lock():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {str(Requirement(line)) for line in lines if not line.startswith("#")}
    assert {str(pin) for pin, _ in entries()} <= pins


def test_the_readmes_commands_install_from_the_lock():
    """All but torch, of which every machine has its own build, and this package."""
    commands = re.findall(
        r"<!-- command: \w+ -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text()
    )
    assert len(commands) >= 2
    pins = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(r"^torch==(\S+)$", pins, re.MULTILINE)
    for command in commands:
        locked, torch, ours = re.findall(r"pip install ([^&]*)", command)
        files = locked.removeprefix("-q --require-hashes --no-deps").split()
        assert files in (["-r", LOCKS[0]], ["-r", LOCKS[0], "-r", LOCKS[1]])
        assert torch == f"-q torch=={version} "
        assert re.fullmatch(r"-q --no-build-isolation (-e )?'\.\[[\w,]+\]' ", ours)


def test_nothing_of_the_lock_needs_what_is_not_in_it():
    """It is installed without looking at dependencies."""
    locked = {canonicalize_name(pin.name) for pin, _ in entries()}
    for name in locked:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in locked | {ALONE}, f"{name} needs {need}"
