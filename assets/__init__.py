"""Shipped tokenizers and short licensed clips."""
