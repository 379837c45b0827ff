"""Codecs: quantized frames -> sound, and published codecs as a whole."""
