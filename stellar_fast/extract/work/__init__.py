"""One engine at work: decoding processes before it, a writing thread behind it."""
