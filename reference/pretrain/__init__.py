"""Training as published: the student and its teacher, views, heads, matching and losses."""

from .losses import training_loss

__all__ = ["training_loss"]
