"""A file, a folder or a Hub id becomes records; what was read is counted."""
