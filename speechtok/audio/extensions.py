"""How names of sound files end. Apart from `decode`, so that the search of a folder loads no decoder."""

__all__ = ["AUDIO_EXTENSIONS"]

AUDIO_EXTENSIONS = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".w64", ".caf", ".rf64", ".sph")
)
