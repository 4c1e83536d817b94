"""The memory of a training step, simulated on a model without weights; `fit` and `plan` both use it."""
