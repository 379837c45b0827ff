"""Metrics: arrays in, numbers out; no module here knows a tokenizer."""
