"""The output head, applied to supervised positions alone; the loss of routers."""
