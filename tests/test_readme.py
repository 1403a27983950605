"""The README's Python runs as it stands, with synthetic weights."""

import re
from pathlib import Path

import pytest
from outputs import made_up, write_output

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 2
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_output(tmp_path / "features", made_up(20))
    names: dict = {}
    exec("import stellar_fast\n" + BLOCKS[block], names)
    if "out" in names:
        assert list(names["out"]) == ["sparse", "spatial", "dense", "lowrank", "cls"]
    else:
        assert len(names["features"].ids) == 20
