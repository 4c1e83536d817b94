"""The checks that are too slow for every run, one file each."""
