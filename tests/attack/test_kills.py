"""Kills at renames and syncs: a resumed run leaves what an undisturbed one leaves. ``TINYMIM_KILLS=all`` tries all."""

import os
import re
import subprocess
import sys

import pytest

# kills of each command in the sample, the first four around its last save; a demo takes a minute
SAMPLE = {
    "pretrain": 5,
    "distill": 8,
    "finetune": 8,
    "segment": 8,
    "chain": 4,
    "study": 8,
    "tune": 3,
    "pack": 8,
    "label": 6,
    "demo": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", SAMPLE)
def test_kills_are_survived(verb, tmp_path):
    much = ["--all"] if os.environ.get("TINYMIM_KILLS") == "all" else ["--tries", str(SAMPLE[verb])]
    words = [sys.executable, "-m", "tests.attack.kills", str(tmp_path), "--verbs", verb, *much]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(done.stdout)
    survived, tried = map(int, re.search(r"(\d+) of (\d+) kills survived\n$", done.stdout).groups())
    assert survived == tried >= SAMPLE[verb], done.stdout[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
