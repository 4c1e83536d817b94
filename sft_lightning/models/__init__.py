"""The model: loading, quantization, adapters, packed attention, loss heads, generation, export."""
