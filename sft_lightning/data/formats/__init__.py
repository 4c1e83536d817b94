"""Record → list[Message]: one function a format, and the order that turns may come in."""
