"""Encoders: wave -> frames."""

from speechtok.encoders.base import Encoder, Frames
from speechtok.encoders.pretrained import from_pretrained

__all__ = ["Encoder", "Frames", "from_pretrained"]
