"""Output for people: tables of the data report, highlighted tokens, the preview page."""
