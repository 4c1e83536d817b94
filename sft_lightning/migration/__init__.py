"""Translate command lines and argument files of other fine-tuning systems into this trainer's YAML."""
