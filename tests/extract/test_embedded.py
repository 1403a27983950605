"""Images in the cells of Parquet files: which column and rows, read once, in bounded memory."""

import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from extracting import feature, index
from hub_datasets import TOKEN, serving_dataset
from loopback import serving
from parquets import cells, counting_work, jpeg, write
from pictures import photograph, png, saved
from pyarrow import parquet

from stellar_fast import ImageError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import cells as reading
from stellar_fast.extract.input import discover, embedded
from stellar_fast.extract.input.addresses import Allowed
from stellar_fast.extract.input.cells import read_item
from stellar_fast.extract.output.layout import read_items, read_plan
from stellar_fast.extract.work.sandbox import Limits
from stellar_fast.extract.work.workers import Workers

BINARY = pyarrow.binary()
TWELVE = [jpeg(seed) for seed in range(12)]


def refused(source, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        discover(source, **options)
    assert "\n" not in str(caught.value)


# Which column


@pytest.mark.parametrize("name", ["image", "img", "picture", "jpg", "jpeg", "png"])
@pytest.mark.parametrize(
    "kind", [BINARY, pyarrow.large_binary(), pyarrow.binary_view(), "struct", "dictionary"]
)
def test_a_usual_column_of_images_is_found(tmp_path, name, kind):
    if kind == "struct":
        column = cells(TWELVE)
    elif kind == "dictionary":
        column = pyarrow.array(TWELVE).dictionary_encode()
    else:
        column = pyarrow.array(TWELVE, kind)
    path = write(tmp_path / "a.parquet", label=range(12), url=["x"] * 12, **{name: column})
    items = discover(path)
    assert [item.id for item in items] == [f"a.parquet::{row}" for row in range(12)]
    assert [(item.group, item.row) for item in items] == [divmod(row, 5) for row in range(12)]
    assert [read_item(item) for item in items] == TWELVE


def test_others_are_named_and_ambiguity_is_one_error(tmp_path):
    path = write(tmp_path / "a.parquet", jpg=TWELVE, png=TWELVE, scan=TWELVE, n=range(12))
    refused(path, r"a\.parquet: which column has the images\? It has jpg, png; name one by --col")
    assert read_item(discover(path, "scan")[7]) == TWELVE[7]
    refused(path, "no column 'none'", column="none")
    refused(path, "'n' holds int64, not paths", column="n")
    # The only struct needs no name, unless there are paths; nor does the only column.
    assert len(discover(write(tmp_path / "b.parquet", n=range(12), scan=cells(TWELVE)))) == 12
    sound = cells([b"RIFF....WAVEfmt "] * 12)
    items = discover(write(tmp_path / "b.parquet", audio=sound, n=range(12), scan=cells(TWELVE)))
    assert items[0].column == "scan"
    path = write(tmp_path / "b.parquet", audio=sound, n=range(12))
    refused(path, r"which column has the paths\? It has audio, n")
    both = write(tmp_path / "c.parquet", url=["a.jpg"] * 12, scan=cells(TWELVE))
    refused(both, "are the images in scan, or their paths in url")
    assert len(discover(both, "scan")) == 12
    assert len(discover(write(tmp_path / "d.parquet", scan=TWELVE))) == 12


def test_columns_with_dots_are_not_taken_for_each_other(tmp_path):
    columns = {"image.path": ["no"] * 12, "image.bytes": [b"no"] * 12, "image": TWELVE}
    items = discover(write(tmp_path / "a.parquet", **columns))
    assert [read_item(item) for item in items] == TWELVE
    path = write(tmp_path / "b.parquet", **{"path.x": ["no"] * 2, "path": ["a.jpg", "b.jpg"]})
    assert [item.id for item in discover(path, "path")] == ["a.jpg", "b.jpg"]


def test_binary_cells_are_told_by_their_bytes(tmp_path):
    paths = [b"BMW/1.jpg", b"P6 photos/2.ppm", b"GIF/3.gif", b"RIFF/4.webp", b"\xe9.jpg"]
    items = discover(write(tmp_path / "a.parquet", image=paths))
    assert [os.fsencode(Path(item.file).name) for item in items] == [
        *(b"1.jpg", b"2.ppm", b"3.gif", b"4.webp", b"\xe9.jpg")
    ]
    assert all(item.column is None for item in items)
    for cell, holds in (
        (b"\x80\x04pickle\0", r"neither images nor paths: a cell of 9 bytes begins with b'\\x80"),
        (b"", "neither images nor paths: a cell of 0 bytes"),
        (b"some\ntext", "neither images nor paths"),
        (b"b.jpg", "both images and paths"),
    ):
        mixed = [None, TWELVE[0], cell, TWELVE[1]]
        refused(write(tmp_path / "b.parquet", image=mixed), holds)
    # Behind the first ones, such a cell is a line with a reason.
    late = [None, *TWELVE[:8], b"b.jpg", b"", TWELVE[8]]
    items = discover(write(tmp_path / "c.parquet", image=late))
    assert [read_item(item) for item in items[1:10]] == [*TWELVE[:8], b"b.jpg"]
    for row, reason in ((0, "no image, a null cell"), (10, "empty cell")):
        with pytest.raises(ImageError, match=reason):
            read_item(items[row])
    refused(write(tmp_path / "d.parquet", image=pyarrow.nulls(3, BINARY)), "line 1 has no path")


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "MPO"]
)
def test_every_format_that_is_read_is_told_by_its_first_bytes(format):
    content = saved(photograph(), format)
    assert embedded.is_image(content)
    assert not embedded._is_path(content)


def test_strings_in_a_usual_column_are_paths(tmp_path):
    path = write(tmp_path / "a.parquet", image=["x.jpg", "y.jpg"], label=[1, 2])
    assert [item.id for item in discover(path)] == ["x.jpg", "y.jpg"]


# Which files, and their ids


def test_several_files_in_order_and_one_kind(tmp_path):
    for split, first in (("train", 0), ("test", 6)):
        (tmp_path / split).mkdir()
        for shard in range(2):
            rows = TWELVE[first + 3 * shard :][:3]
            write(tmp_path / split / f"{shard:05d}.parquet", image=cells(rows))
    items = discover(f"{tmp_path}/{{train,test}}/*.parquet")
    assert [read_item(item) for item in items] == TWELVE
    assert [items[0].id, items[-1].id] == ["train/00000.parquet::0", "test/00001.parquet::2"]
    assert len(discover(f"{tmp_path}/**/*.parquet")) == 12
    refused(tmp_path, r"no images in this folder; .*4 \.parquet files; to read those, name them: ")
    refused(f"{tmp_path}/{{train,train}}/00000.parquet", "names .* twice")
    write(tmp_path / "train" / "00002.parquet", image=["a.jpg"])
    refused(f"{tmp_path}/train/*.parquet", "00002.parquet: holds paths in place of what .*00000")
    write(tmp_path / "train" / "00002.parquet", picture=cells(TWELVE))
    refused(f"{tmp_path}/train/*.parquet", "00002.parquet: no column 'image'")
    refused(tmp_path / "none.parquet", "no such list")
    refused(write(tmp_path / "e.parquet", image=cells([])), "has no rows")


def test_an_id_column(tmp_path):
    keys = [f"id {row}\n" for row in range(12)]
    path = write(tmp_path / "a.parquet", image=TWELVE, key=keys, n=range(12), x=[0.5] * 12)
    assert [item.id for item in discover(path, id_column="key")][3] == "id 3\\n"
    assert [item.id for item in discover(path, id_column="n")] == [str(row) for row in range(12)]
    refused(path, "'x' holds double, and ids are text or integers", id_column="x")
    refused(path, "no column 'y'", id_column="y")
    twice = write(tmp_path / "b.parquet", image=TWELVE[:3], key=["a", "b", "a"])
    refused(twice, "two images have the name a", id_column="key")
    none = write(tmp_path / "c.parquet", image=TWELVE[:3], key=["a", None, "b"])
    refused(none, "row 1 has no id in the column 'key'", id_column="key")
    write(tmp_path / "d.parquet", path=["a.jpg"], key=["a"])
    refused(tmp_path / "d.parquet", "an id column is of Parquet files with images", id_column="key")


def test_a_null_cell_with_a_path_is_that_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(png(1))
    (tmp_path / "y.png").write_bytes(png(2))
    paths = ["x.png", str(tmp_path / "y.png"), "none.png", None]
    items = discover(write(tmp_path / "in" / "a.parquet", image=cells([None] * 4, paths)))
    assert [read_item(item) for item in items[:2]] == [png(1), png(2)]
    for row, reason in ((2, "no such file"), (3, "no image, a null cell")):
        with pytest.raises(ImageError, match=rf"a\.parquet::{row}: {reason}"):
            read_item(items[row])


def test_a_file_from_elsewhere_names_no_local_files(tmp_path):
    (tmp_path / "x.png").write_bytes(png(1))
    paths = [str(tmp_path / "x.png"), f"file://{tmp_path}/x.png", "b.png"]
    path = write(tmp_path / "a.parquet", image=cells([TWELVE[0], None, None], [None, *paths[1:]]))
    answers = {"/x/a.parquet": path.read_bytes(), "/x/b.png": png(3)}
    with serving(answers) as server:
        allowed = Allowed.of(server.url())
        items = discover(server.url("x/a.parquet"))
        assert [item.id for item in items] == [f"a.parquet::{row}" for row in range(3)]
        assert read_item(items[0], allowed) == TWELVE[0]
        with pytest.raises(ImageError, match="named by a list that is not local itself"):
            read_item(items[1], allowed)
        assert read_item(items[2], allowed) == png(3)


def test_a_store(tmp_path):
    import fsspec

    path = write(tmp_path / "a.parquet", image=cells(TWELVE))
    memory = fsspec.filesystem("memory")
    for shard in range(2):
        memory.pipe(f"/set/data/{shard}.parquet", path.read_bytes())
    allowed = Allowed.of("memory://", ["memory"])
    items = discover("memory://set/data/*.parquet", allowed=allowed)
    assert [item.id for item in items] == [
        f"{n}.parquet::{row}" for n in (0, 1) for row in range(12)
    ]
    assert [read_item(item, allowed) for item in items] == TWELVE * 2


@pytest.mark.parametrize("name", ["a.parquet", "*.parquet"])
def test_the_hub_offline_is_one_line(name, tmp_path):
    code = "import sys; from stellar_fast.cli import main; sys.argv[0] = 'stellar-fast'; main()"
    command = [sys.executable, "-P", "-c", code, "extract", f"hf://datasets/some/one/{name}"]
    command += [str(tmp_path / "out"), "--weights", "synthetic"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: hf://datasets/some/one/")
    assert "offline" in done.stderr.lower()
    assert done.stderr.count("\n") == 1


HUB = """
import hashlib, sys
from stellar_fast.extract.input import discover
from stellar_fast.extract.input.cells import read_item
for name in ("a.parquet", "*.parquet"):
    items = discover(f"hf://datasets/some/one/data/{name}")
    digest = hashlib.sha256(b"".join(map(read_item, items))).hexdigest()
    print(items[0].id, len(items), digest)
"""


def test_the_hub_is_read_with_the_users_token(tmp_path):
    path = write(tmp_path / "a.parquet", image=cells(TWELVE))
    digest = hashlib.sha256(b"".join(TWELVE)).hexdigest()
    command = [sys.executable, "-P", "-c", HUB]
    with serving_dataset(path.read_bytes()) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        for token, expected in ((TOKEN, f"a.parquet::0 12 {digest}\n" * 2), ("other", "")):
            told = {**environment, "HF_TOKEN": token}
            done = subprocess.run(command, env=told, capture_output=True, text=True)
            assert done.stdout == expected, done.stderr
            assert token not in done.stderr
    assert done.returncode == 1 and "hf://datasets/some/one/data/a.parquet" in done.stderr


# What is read of a file


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.taken = 0

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.taken += count
        return count

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        self.taken += len(content)
        return content


def test_rows_in_order_read_the_column_once_and_no_other(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = [TWELVE[row % 12] + rng.bytes(20_000) for row in range(400)]
    other = [rng.bytes(50_000) for _ in range(400)]
    path = write(tmp_path / "a.parquet", 100, image=cells(images), other=other)
    items = discover(path)
    files = []

    def opened(place, allowed):
        files.append(Counted(place))
        return files[-1]

    monkeypatch.setattr(reading, "open_file", opened)
    assert [read_item(item) for item in items] == images
    (file,) = files
    packed = sum(map(len, images))
    assert packed < file.taken < packed + 4 * reading.BUFFER
    # Rows that are left out are read through; those behind the place are read again.
    assert read_item(items[350]) == images[350]
    assert read_item(items[301]) == images[301]


def test_a_group_of_any_size_is_read_in_bounded_memory(tmp_path):
    noise = os.urandom(1 << 20)
    rows = [TWELVE[0] + noise[row : 400_000 + row] for row in range(250)]
    path = write(tmp_path / "a.parquet", 1000, image=cells(rows))
    assert path.stat().st_size > 90 << 20
    code = (
        "import sys, resource, hashlib, pyarrow\n"
        "from stellar_fast.extract.input import discover\n"
        "from stellar_fast.extract.input.cells import read_item\n"
        "items = discover(sys.argv[1])\n"
        "read_item(items[0])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for item in items: read_item(item)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert int(done.stdout) << 10 < 16 << 20, done.stderr


def reads_of_groups(monkeypatch, path, workers: int) -> dict[int, int]:
    """How often each row group of one file was begun, by decoding processes in tests alone."""
    monkeypatch.setattr("stellar_fast.extract.work.workers.work", counting_work)
    pool = Workers(workers, "card", 16)
    items = discover(path)
    try:
        outcomes = list(pool.decode(items, lambda: False))
    finally:
        pool.close()
    assert [outcome.reason for outcome in outcomes] == [None] * len(items)
    found: dict[int, int] = {}
    for line in Path(f"{path}.begun").read_text().split():
        found[int(line)] = found.get(int(line), 0) + 1
    return found


@pytest.mark.parametrize(("group", "most"), [(100, 1), (250, 2)])
def test_a_group_that_fits_is_read_by_one_process(tmp_path, monkeypatch, group, most):
    path = write(tmp_path / "a.parquet", group, image=cells((TWELVE * 42)[:500]))
    found = reads_of_groups(monkeypatch, path, 3)
    assert sorted(found) == list(range(500 // group))
    assert max(found.values()) <= most


# An extraction


def test_an_extraction_is_that_of_the_files(tmp_path, engine):
    (tmp_path / "in").mkdir()
    for row, content in enumerate(TWELVE):
        (tmp_path / "in" / f"{row:02d}.jpg").write_bytes(content)
    images = [*TWELVE[:4], None, b"\xff\xd8\xffbroken", *TWELVE[4:]]
    path = write(tmp_path / "a.parquet", image=cells(images), key=[f"k{row}" for row in range(14)])
    options = {"partition_size": 6, "batch_size": 4, "workers": 2}
    job = make_job(path, tmp_path / "out", id_column="key", **options)
    summary = run(job, engine)
    assert (summary.images, summary.failed) == (14, 2)
    run(make_job(tmp_path / "in", tmp_path / "plain", **options), engine)
    found, expected = (feature(tmp_path / name, "sparse") for name in ("out", "plain"))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    lines = index(tmp_path / "out")
    assert lines["id"] == [f"k{row}" for row in range(14)]
    assert [id for id, row in zip(lines["id"], lines["row"], strict=True) if row is None] == [
        "k4",
        "k5",
    ]
    plan = read_plan(tmp_path / "out")
    assert [
        item for part in plan.partitions for item in read_items(tmp_path / "out", part, {})
    ] == (job.items)
    # The plan holds which column, and a run that goes on lists nothing.
    with pytest.raises(ValueError, match="id_column"):
        make_job(path, tmp_path / "out", **options)
    write(path, image=cells(images[:-1]), key=[f"k{row}" for row in range(13)])
    with pytest.raises(ValueError, match="the input has changed"):
        make_job(path, tmp_path / "out", id_column="key", **options)


# Hostile files


def test_damaged_files_are_errors_or_lines(tmp_path):
    whole = write(tmp_path / "a.parquet", image=cells(TWELVE)).read_bytes()
    rng = random.Random(0)
    outcomes = {"refused": 0, "failed": 0, "read": 0}
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            content[rng.randrange(len(content) - 8)] = rng.randrange(256)
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content))]
        (tmp_path / "b.parquet").write_bytes(content)
        try:
            items = discover(tmp_path / "b.parquet")
        except (ValueError, OSError):
            outcomes["refused"] += 1
            continue
        for item in items:
            try:
                read_item(item)
            except ImageError:
                outcomes["failed"] += 1
            else:
                outcomes["read"] += 1
    assert min(outcomes.values()) > 10


def test_rows_that_are_not_there_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", image=cells(TWELVE))
    items = discover(path)
    monkeypatch.setattr(embedded, "FREE_ROWS", 10)
    assert len(discover(path)) == 12
    with path.open("rb") as file:
        length = len(file.read())
    groups = embedded.read_footer(path.open("rb"))
    with pytest.raises(ValueError, match="it says that 12 rows are in its 11 bytes"):
        embedded.check_footer(groups, 11)
    with pytest.raises(ValueError, match="a column is beyond its"):
        embedded.check_footer(groups, length // 2)
    # A file that was changed since it was listed.
    write(path, image=cells(TWELVE[:7]))
    reading._KEPT.cells = None
    assert read_item(items[6]) == TWELVE[6]
    for row in (7, 11):
        with pytest.raises(ImageError, match="has changed since it was listed"):
            read_item(items[row])


def test_two_files_in_one_are_refused(tmp_path):
    first = write(tmp_path / "a.parquet", image=cells(TWELVE)).read_bytes()
    second = write(tmp_path / "b.parquet", image=cells(TWELVE[::-1])).read_bytes()
    (tmp_path / "c.parquet").write_bytes(first + second)
    refused(tmp_path / "c.parquet", "several such files follow each other")
    # Indexes and filters are behind the pages of an honest file.
    table = pyarrow.table({"image": TWELVE, "n": range(12)})
    parquet.write_table(
        table, tmp_path / "d.parquet", write_page_index=True, row_group_size=3, compression="zstd"
    )
    with (tmp_path / "d.parquet").open("rb") as file:
        assert embedded.unaccounted(file, embedded.read_footer(file)) == 0
    assert len(discover(tmp_path / "d.parquet")) == 12


def test_a_page_that_unpacks_to_more_than_there_may_be_is_a_line_with_a_reason(tmp_path):
    images = [TWELVE[0], b"\xff\xd8\xff" + bytes(150 << 20), TWELVE[1]]
    path = write(tmp_path / "a.parquet", 1, image=images)
    assert path.stat().st_size < 10 << 20
    pool = Workers(1, "card", 4, limits=Limits(memory=128))
    try:
        reasons = [outcome.reason for outcome in pool.decode(discover(path), lambda: False)]
    finally:
        pool.close()
    assert reasons == [None, "needs more than 128 MiB of memory (--worker-memory)", None]
