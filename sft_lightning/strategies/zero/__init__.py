"""DeepSpeed ZeRO for adapters and quantized bases, on CPU and GPU."""
