"""An output folder: what it holds, how it is written, and how a foreign one is read."""
