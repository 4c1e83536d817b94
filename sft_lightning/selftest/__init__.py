"""Check the trainer's promises on the user's own model and data."""
