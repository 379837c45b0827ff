"""A three-hour file in bounded memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

HOURS = 3


@pytest.mark.slow
def test_three_hours(tmp_path, clip_wave):
    folder = tmp_path / "in"
    folder.mkdir()
    with soundfile.SoundFile(folder / "long.flac", "w", 16000, 1, subtype="PCM_16") as file:
        for _ in range(HOURS * 3600 * 16000 // len(clip_wave) + 1):
            file.write(clip_wave)
    parts = []
    for seconds in ("10", "300"):
        out, facts = tmp_path / f"out{seconds}", tmp_path / f"{seconds}.json"
        command = [
            sys.executable,
            "-c",
            "from speechtok.cli import main; main()",
            "tokenize",
            str(folder),
            "-o",
            str(out),
        ]
        subprocess.run([*command, "--batch-seconds", seconds, "--json", str(facts)], check=True, capture_output=True)
        assert json.loads(facts.read_text())["peak_megabytes"] < 1500
        parts.append((out / "part-00000.parquet").read_bytes())
    assert parts[0] == parts[1]
    assert np.isclose(json.loads(facts.read_text())["audio_seconds"], HOURS * 3600, rtol=0.01)
