"""One file a command: its docstring's first line is its help, and `main(args)` runs it."""
