"""What augmentations draw from besides numbers: noises and rooms."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from speechtok.audio.clips import ClipSource, FileClips, clips_below, clips_of_split
from speechtok.audio.rooms import SimulatedRooms
from speechtok.errors import InputError

__all__ = ["AugmentResources"]


@dataclass(frozen=True)
class AugmentResources:
    """What the families draw from besides numbers.

    Parameters
    ----------
    noises, rooms : ClipSource, optional
        Noises to add; room responses to convolve with.
    legacy_half_snr : bool
        Halve every signal-to-noise ratio, as NAST does (see `speechtok.audio.mixing.mix_at_snr`).
    """

    noises: ClipSource | None = None
    rooms: ClipSource | None = None
    legacy_half_snr: bool = False

    @property
    def identity(self) -> dict[str, str | bool | None]:
        """What decides the draws besides family, key and seed."""
        noises, rooms = (None if clips is None else clips.identity for clips in (self.noises, self.rooms))
        return {"noises": noises, "rooms": rooms, "legacy_half_snr": self.legacy_half_snr}

    @classmethod
    def default(cls, legacy_half_snr: bool = False) -> "AugmentResources":
        """The shipped noises (``assets/noise``) and simulated rooms: needs no data folder."""
        return cls(_shipped_noises(), SimulatedRooms(), legacy_half_snr)

    @classmethod
    def from_folders(
        cls,
        noise: str | os.PathLike[str] | None = None,
        rooms: str | os.PathLike[str] | None = None,
        split: str = "test",
        legacy_half_snr: bool = False,
    ) -> "AugmentResources":
        """Take noises, room responses or both from folders, and the default for what is not given.

        Parameters
        ----------
        noise, rooms : path, optional
            A folder with a ``metadata.jsonl`` (fields `path`, `split`, for responses also `room`), or any folder of
            sound files.
        split : {"train", "valid", "test"}
            Of folders with a listing.
        legacy_half_snr : bool
            See the class.

        Raises
        ------
        InputError
            If a folder is missing, holds nothing usable, or its listing is damaged.
        """
        return cls(
            _shipped_noises() if noise is None else clips_below(noise, split),
            SimulatedRooms() if rooms is None else clips_below(rooms, split, group_by="room"),
            legacy_half_snr,
        )

    @classmethod
    def from_folder(
        cls, data_root: str | os.PathLike[str], split: str, legacy_half_snr: bool = False
    ) -> "AugmentResources":
        """Take noises and measured room responses from a data folder.

        Parameters
        ----------
        data_root : path
            Holds ``noise/metadata.jsonl`` and ``rir/metadata.jsonl``.
        split : {"train", "valid", "test"}
            A kind of which this split has no files is left out, and refused when it is asked for.
        legacy_half_snr : bool
            See the class.

        Raises
        ------
        InputError
            If a listing is missing or damaged, or neither has files of that split.
        """
        noises = clips_of_split(Path(data_root) / "noise", split)
        rooms = clips_of_split(Path(data_root) / "rir", split, group_by="room")
        if noises is None and rooms is None:
            raise InputError(f"{data_root}: neither noise nor room responses of split {split!r}")
        return cls(noises, rooms, legacy_half_snr)


@cache
def _shipped_noises() -> FileClips:
    """One object for all who ask, so that clips are decoded once."""
    return clips_below(Path(str(files("speechtok.assets"))) / "noise", "train")
