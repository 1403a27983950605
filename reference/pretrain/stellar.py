"""The published STELLAR model: everything of the student, and the forward pass of training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .losses import image_reconstruction, training_predictions
from .student import Student
from .teacher import sync_teacher


class STELLARModel(Student):
    """STELLAR in plain PyTorch: the arguments are those of `Student`."""

    def forward(
        self, inputs: Mapping[str, Tensor], mode: str = "train"
    ) -> dict[str, dict[str, Tensor]]:
        """The published forward pass.

        Args:
            inputs: "image" (B, 3, H, W); for the losses also what those asked for need: "labels"
                (B,), "global_views" (B, G, 3, 224, 224), "local_views" (B, L, 3, 96, 96), all RGB
                in [0, 1].
            mode: "train" or "valid", which compute the losses; in "train", and in training mode, a
                teacher is updated too. "eval" gives the features alone.

        Returns:
            {"predictions": ...}: the features, and unless the mode is "eval" "gold_labels" and the
            losses.

        Raises:
            ValueError: another mode, or an input that does not fit.
        """
        if mode == "eval":
            return {"predictions": self.encode(inputs)}
        if mode not in ("train", "valid"):
            raise ValueError(f'mode must be "train", "valid" or "eval", got {mode!r}')
        return {
            "predictions": training_predictions(
                self, inputs, moves_teacher=self.training and mode == "train"
            )
        }

    def image_reconstruction(self, decoder_output: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The reconstruction loss of `forward_decoder`'s output (B, P, 512) against an image.

        Returns:
            VQ-CE or MSE, x_hat and x_original, as the training forward gives them.
        """
        return image_reconstruction(self, decoder_output, image)

    def sync_teacher_across_processes(self) -> None:
        """Gives all processes the teacher of the first; nothing without a teacher."""
        if self.momentum_teacher:
            sync_teacher(self)
