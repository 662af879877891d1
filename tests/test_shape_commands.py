"""From a folder of meshes to a fine-tuned model, its pictures and files, by the commands that ``make shapes`` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.shapes.formats import read

FEW = ["domain.num_points=32", "pretrain.steps=3", "pretrain.batch_size=8", "pretrain.compile=false"]
SMALL = ["domain.num_points=32", "iterations=1", "training.chains=64", "training.bank_pairs=64"]
SMALL += ["training.minibatch_size=32", "evaluate.chains=16", "evaluate.pretrained_chains=16", "chain.num_steps=10"]


def run(*command: str, cwd: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAYFT_DATA": str(cwd / "cache")}
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_meshes_become_a_model_a_fine_tuned_one_pictures_and_files(tmp_path):
    meshes, weights = "domain.data=runs/meshes", "domain.weights=runs/model/weights.safetensors"
    run("envs.shapes.generated", "runs/meshes", "--num", "80", cwd=tmp_path)
    run("rayft.cli", "pretrain", "shapes_pretrain", meshes, "name=model", *FEW, "--quiet", cwd=tmp_path)
    run("rayft.cli", "run", "shapes_helicopter_rgdm", meshes, weights, "name=tuned", *SMALL, "--quiet", cwd=tmp_path)
    page = (tmp_path / "runs/tuned/report.html").read_text()
    assert "data:image/png" in page
    assert "Shapes in three dimensions" in page
    run("rayft.cli", "sample", "runs/tuned", "--num", "6", "--score", "--out", "out.ply", cwd=tmp_path)
    header = (tmp_path / "out.ply").read_bytes().partition(b"end_header")[0].decode()
    assert "element vertex 192" in header
    run("rayft.cli", "sample", "runs/tuned", "--num", "6", "--out", "out.npz", cwd=tmp_path)
    with np.load(tmp_path / "out.npz") as found:
        assert found["x_0"].shape == (6, 8 + 32, 3)
        np.testing.assert_array_equal(found["points"], found["x_0"][:, 8:])
    assert len(read(tmp_path / "out.npz", 32)) == 6
