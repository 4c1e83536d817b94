"""Adapter and model folders: written, opened again, and compared."""
