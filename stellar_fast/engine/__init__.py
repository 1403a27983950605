"""The inference engine: forwards over injected ops, batches, CUDA graphs, devices."""
