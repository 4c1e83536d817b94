"""Merge adapters into their base, shard by shard, and verify the result against plain PEFT."""
