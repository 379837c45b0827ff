"""Toy data folders as training and measuring read them: speech, music, notes and noise with their listings."""

import json
import shutil
from pathlib import Path

import numpy as np
import soundfile

CLIPS = Path(__file__).resolve().parents[1] / "assets" / "clips"
RATE = 24000
SPLITS = {"train": "train", "valid": "dev", "test": "eval"}
# Instrument, maker, family: two of every family, and a reed that is alone.
INSTRUMENTS = [
    ("acoustic_grand_piano", "Anna", "keyboard"), ("upright_piano", "Ben", "keyboard"), ("bass", "Cleo", "bass"),
    ("electric_bass_finger", "Dora", "bass"), ("pizzicato_strings", "Emil", "string"),
    ("tremolo_strings", "Fred", "string"), ("shanai", "Gina", "reed"),
]  # fmt: skip
PITCHES = {"train": (60, 64), "valid": (72,), "test": (48,)}
DRUMS = [(f"{piece}_{number}", f"{piece} maker {number}") for piece in ("kick", "snare") for number in range(3)]


def save(folder: Path, lines: list[dict], sounds: list[np.ndarray]) -> None:
    """Write sounds and a ``metadata.jsonl``."""
    for line, wave in zip(lines, sounds, strict=True):
        path = folder / line["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, RATE)
        line["duration_s"] = len(wave) / RATE
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tone(midi: int, seconds: float, overtones: int, rng: np.random.Generator) -> np.ndarray:
    """A note that fades, of so many partials."""
    time = np.arange(round(seconds * RATE)) / RATE
    partials = [np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * n * time) / n for n in range(1, overtones + 1)]
    return 0.2 * np.sum(partials, 0) * np.exp(-3 * time) + rng.normal(0, 1e-3, len(time))


def music(data: Path, rng: np.random.Generator) -> None:
    """Tracks and notes of all splits."""
    lines, waves = [], []
    for split, folder in SPLITS.items():
        for number, licence in enumerate(("CC BY-SA 4.0", "CC0 1.0")):
            lines.append({
                "path": f"{folder}/piece-{number}.flac", "title": f"{split} piece {number}", "artist": f"{split} band",
                "licence": licence, "source_repo": "someone/music", "split": split,
            })  # fmt: skip
            waves.append(sum(tone(midi, 1.5 + number, 4, rng) for midi in rng.choice(np.arange(48, 72), 3)))
    save(data / "music" / "tracks", lines, waves)
    lines, waves = [], []
    for index, (instrument, maker, _) in enumerate(INSTRUMENTS):
        for split, pitches in PITCHES.items():
            for midi in pitches:
                lines.append({
                    "path": f"pitched/{instrument}-{midi}.flac", "label": instrument, "instrument": instrument,
                    "pitch_midi": midi, "artist": maker, "licence": "CC0 1.0", "source_repo": "someone/notes",
                    "split": split,
                })  # fmt: skip
                waves.append(tone(midi, 0.4, 1 + index // 2, rng))
    for index, (instrument, maker) in enumerate(DRUMS):
        lines.append({
            "path": f"drums/{instrument}.flac", "label": "drum", "instrument": instrument, "artist": maker,
            "licence": "CC BY-SA 3.0", "source_repo": "someone/drums", "split": list(SPLITS)[index % 3],
        })  # fmt: skip
        waves.append(rng.normal(0, 0.1, RATE // 5) * np.exp(-np.arange(RATE // 5) / (300 if index < 3 else 3000)))
    save(data / "music" / "notes", lines, waves)


def noise(data: Path, rng: np.random.Generator) -> None:
    """A noise of every split."""
    facts = {"licence": "CC0", "source_repo": "some/one"}
    lines = [{"path": f"{split}.flac", "split": split, "author": f"{split} maker", **facts} for split in SPLITS]
    save(data / "noise", lines, [rng.normal(0, 0.1, RATE) for _ in lines])


def speech(data: Path) -> None:
    """Real clips: two of each split."""
    names = sorted(path.name for path in CLIPS.glob("librispeech-*"))
    for number, folder in enumerate(SPLITS.values()):
        place = data / "speech" / folder
        (place / "librispeech").mkdir(parents=True)
        lines = []
        for name in (names[number % len(names)], names[(number + 1) % len(names)]):
            path = place / "librispeech" / name
            shutil.copy(CLIPS / name, path)
            lines.append({
                "path": f"librispeech/{name}", "speaker": name, "duration_s": soundfile.info(path).duration,
                "licence": "CC-BY-4.0", "source_repo": "someone/something",
            })  # fmt: skip
        (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
