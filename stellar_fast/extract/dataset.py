"""Extracted features as a torch Dataset."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset


class Rows(Protocol):
    """What a dataset needs of `Features`."""

    def __len__(self) -> int: ...

    def __getitem__(self, name: str, /) -> Any:
        """One feature, an array of (rows, ...)."""

    def ids_of(self, rows: Sequence[int], /) -> list[str]: ...


class FeatureDataset(Dataset[dict[str, Any]]):
    """Row by row, a dictionary of tensors; made by `Features.dataset`.

    A DataLoader asks for a batch's rows at once (`__getitems__`), and so a batch is read partition
    by partition. Tensors are copies.
    """

    def __init__(self, features: Rows, names: Collection[str], with_ids: bool) -> None:
        for name in names:
            features[name]  # KeyError, here and not in a worker
        self._features, self._names, self._with_ids = features, tuple(names), with_ids

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The items of some rows: each feature's tensor by name, and "id" if it was asked for."""
        columns: dict[str, Any] = {
            name: torch.from_numpy(self._features[name][list(rows)]) for name in self._names
        }
        if self._with_ids:
            columns["id"] = self._features.ids_of(list(rows))
        return [{name: column[at] for name, column in columns.items()} for at in range(len(rows))]
