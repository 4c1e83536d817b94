"""Write adapter and model folders, and verify them by loading them again."""
