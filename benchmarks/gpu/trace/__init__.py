"""Predict a training step on a GPU from a trace without one (`python -m benchmarks.gpu.trace`)."""
