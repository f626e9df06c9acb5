"""Trying settings of all methods on one's own pictures and device."""
