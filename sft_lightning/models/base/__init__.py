"""The base model: its weights, quantization, vocabulary and changes to its configuration."""
