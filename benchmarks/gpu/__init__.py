"""Speed and memory of the training step on one GPU, cell by cell (`python -m benchmarks.gpu`)."""
