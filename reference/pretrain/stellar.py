"""The published STELLAR model: everything of the student, and the forward pass of training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .losses import training_predictions
from .student import Student


class STELLARModel(Student):
    """STELLAR in plain PyTorch: the arguments are those of `Student`."""

    def forward(
        self, inputs: Mapping[str, Tensor], mode: str = "train"
    ) -> dict[str, dict[str, Tensor]]:
        """The published forward pass.

        Args:
            inputs: "image" (B, 3, H, W); in training also what the losses asked for need: "labels"
                (B,), "global_views" (B, G, 3, 224, 224), "local_views" (B, L, 3, 96, 96), all RGB
                in [0, 1].
            mode: "eval" or "train".

        Returns:
            {"predictions": ...}: in eval mode `evaluation_predictions`, in training those,
            "gold_labels" and the losses.

        Raises:
            ValueError: another mode, or an input that does not fit.
        """
        if mode == "eval":
            return {"predictions": self.evaluation_predictions(inputs["image"])}
        if mode != "train":
            raise ValueError(f'mode must be "train" or "eval", got {mode!r}')
        return {"predictions": training_predictions(self, inputs)}
