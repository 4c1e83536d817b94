"""FSDP2 for adapters and quantized bases, on CPU and GPU."""
