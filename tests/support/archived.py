"""Tars and zips in memory, for tests."""

import io
import tarfile
import zipfile


def write_tar(count: int, size: int) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes([number]) * size))
    return file.getvalue()


def zipped(**members) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()
