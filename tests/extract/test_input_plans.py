"""What may be read, through a whole extraction and through plans that others made."""

import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace

import pytest
from extracting import index, load_small, touch
from loopback import serving
from pictures import png

from stellar_fast import StellarError
from stellar_fast.extract import make_job, run, run_devices
from stellar_fast.extract.job import decided, make_plan
from stellar_fast.extract.output.folder import Locks
from stellar_fast.extract.output.layout import PLAN, digest_of, read_items, read_plan, write_plan
from stellar_fast.extract.output.partition import Work
from stellar_fast.extract.records import Item
from stellar_fast.extract.work.decoding import Outcome


def test_what_is_allowed_travels_to_the_decoding_processes(tmp_path, engine):
    images = {f"/{n}.png": png(n) for n in range(3)}
    with serving(images) as inner, serving({}) as outer:
        lines = [outer.url("0.png"), inner.url("1.png"), "2.png"]
        outer.answers |= {"/list.txt": "\n".join(lines).encode(), **images}
        run(make_job(outer.url("list.txt"), tmp_path / "out"), engine)
        first, second, third = index(tmp_path / "out")["reason"]
        assert first is third is None
        assert "--allow-host 127.0.0.1" in second
        job = make_job(outer.url("list.txt"), tmp_path / "both", allow_host=[inner.host])
        assert pickle.loads(pickle.dumps(job)).allowed == job.allowed
        run_devices(job, load_small, ["cpu", "cpu"])
        assert index(tmp_path / "both")["reason"] == [None] * 3


def test_foreign_plans_open_nothing_that_is_not_allowed(tmp_path, engine):
    """The lines of an output folder from elsewhere, with all digests as they should be."""
    photos = tmp_path / "photos"
    for name in "ab":
        touch(photos, f"{name}.png")
        (photos / f"{name}.png").write_bytes(png(ord(name)))
    output = tmp_path / "out"
    job = make_job(photos, output)
    make_plan(job, decided(job, engine))
    plan = read_plan(output)
    items = read_items(output, plan.partitions[0], {})
    with serving({"/x.json": b"{}", "/x.png": png()}) as server:
        hostile = [
            Item(items[0].id, f"reference://x.png::{server.url('x.json')}"),
            Item(items[1].id, server.url("x.png")),
        ]
        other = tmp_path / "other"
        other.mkdir()
        changed = type(plan)(
            plan.configuration,
            (type(plan.partitions[0])(0, 2, digest_of(hostile)),),
            plan.facts,
        )
        write_plan(other, changed, hostile)
        run(make_job(photos, other, resume=True), engine)
        reasons = index(other)["reason"]
        assert "reference:// is not read" in reasons[0]
        assert "in a private network" in reasons[1]
        assert server.requests == []
        # The same lines under the digests of the plan: refused before anything is read.
        shutil.copy(other / "inputs.parquet", output / "inputs.parquet")
        with pytest.raises(StellarError, match="names other images than"):
            run(make_job(photos, output, resume=True), engine)


@pytest.mark.parametrize(
    "change",
    [{"file": "/etc/hostname"}, {"offset": 1}, {"size": 4}, {"id": "z.png"}],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_covers_all_that_is_read(change, tmp_path, engine):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(png())
        tar.addfile(member, io.BytesIO(png()))
    job = make_job(tmp_path / "a.tar", tmp_path / "out")
    plan = make_plan(job, decided(job, engine))
    write_plan(tmp_path / "out", plan, [replace(job.items[0], **change)])
    with pytest.raises(StellarError, match="names other images than"):
        read_items(tmp_path / "out", plan.partitions[0], {})


def test_plans_of_before_are_refused_with_what_to_do(tmp_path, engine):
    touch(tmp_path / "in", "a.png")
    output = tmp_path / "out"
    job = make_job(tmp_path / "in", output)
    make_plan(job, decided(job, engine))
    content = json.loads((output / PLAN).read_text())
    (output / PLAN).write_text(json.dumps(content | {"schema": 1}))
    with pytest.raises(StellarError, match=r"schema 1.*--overwrite"):
        make_job(tmp_path / "in", output)
    run(make_job(tmp_path / "in", output, overwrite=True), engine)


def test_reasons_of_any_text_are_written(tmp_path, engine):
    """Whoever gave them: a decoder, a store, a process that died."""
    touch(tmp_path / "in", "a.png")
    job = make_job(tmp_path / "in", tmp_path / "out")
    plan = make_plan(job, decided(job, engine))
    with Locks(tmp_path / "out") as locks:
        shapes = {"sparse": (8, 64), "cls": (1, 64)}
        work = Work(tmp_path / "out", plan, 0, list(job.items), shapes, locks)
        work.add(Outcome(0, 0, "cannot be \udce9\x1b[2J\n\u202e"))
        work.finish({})
    assert index(tmp_path / "out")["reason"] == ["cannot be \\xe9\\x1b[2J\\n\\u202e"]
