"""The model: loading, quantization, adapters, packed attention, generation, export, merging."""
