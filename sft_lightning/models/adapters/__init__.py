"""Adapters: what is asked for, what is wrapped, what trains, and continuing one."""
