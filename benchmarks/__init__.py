"""Measurements that anybody can repeat; each module prints its own numbers."""
