"""What is used of Lightning beyond its documented interface."""
