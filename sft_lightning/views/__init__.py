"""What people look at: tables, highlighted tokens, the preview page."""
