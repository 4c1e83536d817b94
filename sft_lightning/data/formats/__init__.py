"""Record → list[Message]: one function per format, and the order in which messages may come."""
