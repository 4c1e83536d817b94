"""Checks on what trains: on the batches, the model and the optimizer of the run itself."""
