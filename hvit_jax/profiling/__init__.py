"""Measure GFLOPs, latency, throughput and memory; `profile.py` and `hvit profile`."""
