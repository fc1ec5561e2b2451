"""The Slurm script of docs/multi_node.md: its syntax, and itself, on two processes of this machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.kills import write_data
from tests.end_to_end.workshop import ROOT
from tinymim.engine import pretrain

STUDENT = "student_args.depth=2 student_args.embed_dim=24 student_args.num_heads=2 target_block=2"


def script() -> str:
    """The one block of the page that is a script."""
    (block,) = re.findall(r"```sbatch\n(.*?)```", (ROOT / "docs/multi_node.md").read_text("utf-8"), re.DOTALL)
    return block


def test_syntax():
    subprocess.run(["bash", "-n"], input=script(), text=True, check=True)
    options = re.findall(r"^#SBATCH (--[\w-]+)=?(.*)$", script(), re.MULTILINE)
    assert ("--nodes", "4") in options
    assert ("--ntasks-per-node", "1") in options


@pytest.mark.slow
def test_the_script_runs_and_goes_on_when_it_is_requeued(tmp_path):
    write_data(tmp_path / "data")
    photos = tmp_path / "data/photos/train"
    teacher = pretrain(
        "mae_tiny",
        data=photos,
        out=tmp_path / "teacher",
        img_size=32,
        batch_size=8,
        max_steps=1,
        workers=0,
        device="cpu",
        cfg_options={
            "student_args": dict(depth=2, embed_dim=48, num_heads=4),
            "decoder": dict(dim=16, depth=1, heads=2),
        },
    ).student
    tiny = f"--teacher {teacher} --img-size 32 --batch-size 8 --max-steps 2 --device cpu"
    text = script().replace("imagenet/train", str(photos)).replace("--workers 10", f"--workers 0 {tiny}")
    text = text.replace("nproc_per_node=8", "nproc_per_node=2").replace(
        "$RESUME\n", f"$RESUME --cfg-options {STUDENT}\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        text = text.replace("29500", str(free.getsockname()[1]))
    for name, body in (("srun", 'exec "$@"'), ("scontrol", "echo localhost; echo another")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(text)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = dict(SLURM_JOB_NODELIST="a,b", SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="7", PATH=path, OMP_NUM_THREADS="1")
    for said in ("2 steps", "resuming at step 2"):
        done = subprocess.run(
            ["bash", "job.sbatch"], cwd=tmp_path, env=os.environ | slurm, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert said in done.stdout, done.stdout + done.stderr[-3000:]
    assert (tmp_path / "runs/base/student.pth").is_file()
