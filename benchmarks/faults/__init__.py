"""Plant one fault at a time in a copy of the packages, and see whether a user's run notices it: `make faults`."""
