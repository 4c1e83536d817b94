"""Command lines and argument files of other fine-tuning systems → our YAML."""
