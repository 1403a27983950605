"""Extraction of features from many images: readers, writers, the loop between them."""
