"""Footers of Parquet files: the same facts as Arrow's, and no byte of them ends the process."""

import os
import subprocess
import sys

import pyarrow
import pytest
from extracting import SUPPORT
from forged import original
from pyarrow import parquet

from stellar_fast.extract.footer import read_footer

CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "BROTLI": 4, "ZSTD": 6, "LZ4": 7}


@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_the_facts_are_those_that_arrow_sees(version, tmp_path):
    """With more groups and columns than the short form of a list holds, and nested columns."""
    columns = {f"column{at}": [at * 1.5] * 40 for at in range(20)}
    table = pyarrow.table({**columns, "text": ["x" * 300] * 40, "nested": [[{"a": True}]] * 40})
    codecs = ["none", "snappy", "gzip", "brotli", "zstd"]
    names = [*columns, "text", "nested.list.element.a"]
    chosen = {name: codecs[at % 5] for at, name in enumerate(names)}
    path = tmp_path / "file.parquet"
    parquet.write_table(
        table,
        path,
        row_group_size=2,
        compression=chosen,
        version=version,
        write_page_index=True,
        sorting_columns=[parquet.SortingColumn(0)],
    )
    seen = parquet.ParquetFile(path).metadata
    with path.open("rb") as file:
        groups = read_footer(file)
    assert [group.rows for group in groups] == [2] * 20
    for at, group in enumerate(groups):
        found = [seen.row_group(at).column(column).compression for column in range(22)]
        assert [CODECS[name] for name in found] == list(group.codecs)


def footer(content: bytes) -> bytes:
    return b"PAR1" + content + len(content).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1PAR1", "no Parquet file"),
        (footer(b"\x00")[:-1] + b"2", "no Parquet file"),
        (b"PAR1" + (1 << 31).to_bytes(4, "little") + b"PAR1", "its footer has 2147483648 bytes"),
        (footer(b"\x00"), "damaged"),
        (footer(b"\x1c" * 100_000), "nested too deeply"),
        (footer(b"\x19" + b"\x19" * 100_000), "nested too deeply"),
        (footer(b"\x19\xfc\xff\xff\xff\xff\x07\x00"), "damaged"),  # a list of 2 billion
        (footer(b"\x18\xff\xff\xff\xff\x07\x00"), "damaged"),  # text of 2 GB
        (footer(b"\x16" + b"\xff" * 1000 + b"\x00"), "damaged"),  # an integer without end
        (footer(b"\x36\x02\x06\x06\x02\x00"), "a field twice"),
        (footer(b"\x36\x02\x19\x0c\x00"), "have not the 1 rows"),
        (footer(b"\x36\x02"), "damaged"),
    ],
)
def test_damaged_footers(content, words, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file, pytest.raises(ValueError, match=words):
        read_footer(file)


EVERY_BYTE = """
import json, sys
from pathlib import Path
from extracting import SUPPORT
from forged import PART
from stellar_fast.errors import StellarError
from stellar_fast.extract.output.formats import FORMATS
from stellar_fast.extract.output.index import read_index
folder = Path(sys.argv[1]) / PART
path = folder / sys.argv[2]
manifest = json.loads((folder / "manifest.json").read_text())
content = path.read_bytes()
refused = 0
for at in range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content)):
    for value in {0xFF, content[at] ^ 1, content[at] ^ 4}:
        path.write_bytes(content[:at] + bytes([value]) + content[at + 1:])
        try:
            if sys.argv[2] == "index.parquet":
                read_index(folder, manifest)
            else:
                FORMATS["parquet"].open(folder, manifest, "cls")[0:4]
        except StellarError:
            refused += 1
print(refused)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.parquet", "features.parquet"])
def test_no_byte_of_a_footer_ends_the_process(name, tmp_path):
    """Arrow's `metadata.row_group(0).column(0).compression` calls `std::terminate` on some."""
    folder = original(tmp_path / "out", "parquet")
    done = subprocess.run(
        [sys.executable, "-c", EVERY_BYTE, str(folder), name],
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300
