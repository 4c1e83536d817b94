"""Checks of a merge that read the base and the adapters by another way than the merge itself."""
