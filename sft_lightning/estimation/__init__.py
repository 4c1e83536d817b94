"""What a run will take, before it is started: optimizer steps, memory by part, time."""
