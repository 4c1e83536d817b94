"""The command line: LightningCLI, its defaults, its errors, and one file per command."""
