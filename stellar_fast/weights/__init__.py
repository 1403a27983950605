"""From a name to packed weights: where files are, what they must hold, how they are folded."""
