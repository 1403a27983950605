"""Launch tables as files: every damage is one error that names the file."""

import json

import pytest
from tuning import WIDE, sound

from stellar_fast.kernels import tables

DAMAGE = {
    "arch": (lambda c: c.update(arch=100), "it was tuned on sm_100"),
    "missing": (lambda c: c.pop("date"), r"missing \['date'\]"),
    "unknown": (lambda c: c.update(more=1), r"unknown \['more'\]"),
    "no tiles": (lambda c: c["linear"][0].update(tiles=[]), "not ascending from 1"),
    "first": (lambda c: c["linear"][0]["tiles"][0].update(rows=2), "not ascending from 1"),
    "order": (
        lambda c: c["linear"][0]["tiles"].append(c["linear"][0]["tiles"][0]),
        "not ascending from 1",
    ),
    "family": (
        lambda c: c["linear"][0]["tiles"].append(
            {**c["linear"][0]["tiles"][0], "rows": 9, "num_warps": 16}
        ),
        "not of one family",
    ),
    "twice": (lambda c: c["linear"].append(c["linear"][0]), "is there twice"),
    "attention twice": (lambda c: c["attention"].append(c["attention"][0]), "is there twice"),
    "field": (lambda c: c["linear"][0]["tiles"][0].pop("block_n"), "a tile has the fields"),
    "extra": (lambda c: c["attention"][0]["tiles"][0].update(more=1), "a tile has the fields"),
    "size": (lambda c: c["attention"][0]["tiles"][0].update(block_k=48), "block_k is 48"),
    "zero": (lambda c: c["linear"][0]["tiles"][0].update(num_warps=0), "num_warps is 0"),
    "negative": (lambda c: c["attention"][0]["tiles"][0].update(num_stages=-1), "num_stages is -1"),
    "text": (lambda c: c["linear"][0]["tiles"][0].update(block_m="128"), "block_m is '128'"),
    "truth": (
        lambda c: c["attention"][0]["tiles"][0].update(num_stages=True),
        "num_stages is True",
    ),
    "shape": (lambda c: c["linear"][0].pop("depth"), "it lacks what a table has: .*depth"),
    "list": (lambda c: c.update(linear=7), "it lacks what a table has"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_one_error_that_names_it(tmp_path, name):
    content = json.loads(json.dumps(sound()))
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(content))
    assert tables.table(90, tmp_path).attention == {("bf16", 273, 80): ((1, WIDE),)}
    damage, message = DAMAGE[name]
    damage(content)
    path.write_text(json.dumps(content))
    tables.table.cache_clear()
    with pytest.raises(ValueError, match=f"launch table {path}: .*{message}.*; delete it"):
        tables.table(90, tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "null", '{"arch": 90'])
def test_a_file_that_is_no_table_is_one_error(tmp_path, text):
    (tmp_path / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match=r"launch table .*sm_90\.json: "):
        tables.table(90, tmp_path)


def test_a_tables_registers_are_read():
    content = sound()
    (entry,) = content["attention"][0]["tiles"]
    entry["registers"] = 128
    (((_, tile),),) = tables.parsed(content, 90).attention.values()
    assert tile.options["maxnreg"] == 128
    entry["registers"] = None
    assert tables.parsed(content, 90).attention == {("bf16", 273, 80): ((1, WIDE),)}
