"""What extracted features are used for: search, probes and segments, each a short module to copy
from. They need the extra `recipes`."""
