"""The commands: each module is one, named like its file; `run` has the four that run a trainer."""
