"""What a checkpoint contains, how its file is written and read, and the folder of the run that writes it."""
