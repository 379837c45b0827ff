"""Quantizers: frames -> ids."""
