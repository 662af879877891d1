"""An object store that is too small for an iteration's chains: Ray writes them to disk, and the run does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

PROGRAM = """
import json, sys
import ray
from ray._private.internal_api import memory_summary
from rayft import loop, spec

ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=int(sys.argv[2]), log_to_driver=False)

class Watch:
    def row(self, row, total): ...
    def event(self, text): ...

told = ["iterations=2", "domain.num_steps=500", "domain.weights=null", "training.chains=4096", "training.num_epochs=1",
        "training.minibatch_size=16384", "training.row_share=0.05", "training.target_kl=null", "evaluate.every=0",
        "evaluate.chains=64", "evaluate.pretrained_chains=64", "resources.num_env_runners=2",
        "resources.num_learners=1",
        "resources.num_cpus_per_env_runner=0.5", "evaluate.max_kl=null", f"output={sys.argv[1]}"]
asked = spec.read("toy_ppo", told)
run = loop.Run(asked, loop.create_folder(asked), Watch())
run.execute(resume=False)
weights = run.folder / "checkpoints/iteration_000002/weights.safetensors"
spilled = "Spilled" in memory_summary(stats_only=True)
print("SEEN" + json.dumps({"weights": weights.read_bytes().hex()[-4000:], "spilled": spilled}), flush=True)
ray.shutdown()
"""


def seen(folder, store):
    with tempfile.TemporaryDirectory(prefix="ray") as apart:
        told = {"capture_output": True, "text": True, "env": os.environ | {"RAY_TMPDIR": apart, "OMP_NUM_THREADS": "1"}}
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), str(store)], **told, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("SEEN")[2].splitlines()[0])


@pytest.mark.slow
def test_chains_that_do_not_fit_into_the_object_store_are_spilled_and_learned_from_all_the_same(tmp_path):
    small, large = seen(tmp_path / "small", 80 * 10**6), seen(tmp_path / "large", 2 * 10**9)
    assert (small["spilled"], large["spilled"]) == (True, False)
    assert small["weights"] == large["weights"]
