"""Vocoders: units of a tokenizer back to waves. Networks and their losses; nothing here knows a corpus."""
