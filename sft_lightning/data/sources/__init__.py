"""A file, a folder or a Hub data set → records, and the counts of the data report."""
