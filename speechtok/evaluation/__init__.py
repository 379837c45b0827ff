"""Tokenizers measured on folders."""
