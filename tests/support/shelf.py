"""A store for tests: `shelf:///PATH` is a folder that has whole puts and no locks, as stores do.

Importing this registers it with fsspec.
"""

import os
import shutil
import tempfile
from typing import ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Shelf(LocalFileSystem):
    """
    Attributes:
        puts: what was put, in order.
        before: is called with the name of each file before it is put; may raise.
    """

    protocol = "shelf"
    puts: ClassVar[list[str]] = []
    before = staticmethod(lambda name: None)

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return os.fspath(path).removeprefix("shelf://").rstrip("/") or "/"

    def unstrip_protocol(self, name):
        return f"shelf://{self._strip_protocol(name)}"

    def put_file(self, lpath, rpath, callback=None, **kwargs):
        Shelf.before(rpath)
        with tempfile.TemporaryDirectory() as elsewhere:  # a put that was cut off is not there
            shutil.copyfile(lpath, f"{elsewhere}/whole")
            shutil.move(f"{elsewhere}/whole", rpath)
        Shelf.puts.append(rpath)


fsspec.register_implementation("shelf", Shelf, clobber=True)
