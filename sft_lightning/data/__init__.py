"""From files to batches: sources → formats → templates → tokenization → store → blending → packing → plan → collate."""
