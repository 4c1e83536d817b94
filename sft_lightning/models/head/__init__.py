"""The output head, applied to supervised positions only, and the load-balancing loss of routers."""
