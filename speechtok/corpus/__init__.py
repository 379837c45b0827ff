"""Corpus engine: scan -> plan -> run -> write -> resume."""
