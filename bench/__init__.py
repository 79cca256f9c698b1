"""Benchmarks, one command each; `speed bench` runs those that users need."""
