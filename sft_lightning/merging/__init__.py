"""Adapters merged into their base, shard by shard, and what proves it."""
