"""The LightningModule and the arithmetic that it wires: loss, metrics, optimizer, checkpoints."""
