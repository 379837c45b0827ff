"""Benchmarks: one script per question, results as JSON."""
