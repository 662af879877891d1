"""The meter counts exactly, is bounded whatever it counts, survives a resume, and speaks when something is new."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from rayft.rewards import meter
from rayft.rewards.meter import Counts, Meter, Seconds
from rayft.rewards.worker import Inline
from rayft.score import Part, Task, Told, Work

NAN = float("nan")


def filled():
    """A meter that has seen something of everything."""
    found = Meter()
    found.add("train", "docking", calls=3, hits=2, duplicates=1, seconds=np.array([0.1, NAN, 0.3, 0.2]))
    errors = {1: "raised: ValueError: bad ring", 5: "timed out: no answer for 1 s"}
    found.add("train", "docking", calls=6, seconds=np.full(6, 0.5), errors=errors, labels={1: "C1CC", 2: "CCO"})
    found.add("evaluate", "docking", calls=4, errors={0: "raised: ValueError: bad ring"}, labels={0: "C2CC"})
    found.add("watch", "size", hits=7)
    found.undecodable("train", 5)
    found.undecodable("score", 1)
    return found


def test_every_count_is_exact():
    found = filled()
    assert found.total_calls == 13
    assert found.mark() == {
        ("train", "docking"): Counts(9, 2, 1, 2, pytest.approx(3.6)),
        ("evaluate", "docking"): Counts(4, 0, 0, 1, 0.0),
        ("watch", "size"): Counts(0, 7, 0, 0, 0.0),
    }
    told = found.summary()
    assert told["total_calls"] == 13
    assert {name: purpose["undecodable"] for name, purpose in told["purposes"].items()} == {
        "train": 5,
        "evaluate": 0,
        "watch": 0,
        "score": 1,
    }
    docking = told["purposes"]["train"]["parts"]["docking"]
    assert (docking["calls"], docking["hits"], docking["duplicates"], docking["failed"]) == (9, 2, 1, 2)
    assert docking["failures"] == {"raised": 1, "timed out": 1}
    assert docking["reasons"][0] == {"reason": "raised: ValueError: bad ring", "count": 1, "label": "C1CC"}
    assert docking["last_failed"][1] == {"reason": "timed out: no answer for 1 s", "label": ""}
    assert docking["slowest"][:3] == [
        {"seconds": 0.5, "label": ""},
        {"seconds": 0.5, "label": "C1CC"},
        {"seconds": 0.5, "label": "CCO"},
    ]
    assert [one["seconds"] for one in docking["slowest"][6:]] == [0.3, 0.2, 0.1]
    assert told["purposes"]["watch"]["parts"]["size"]["seconds"] == {
        "total": 0.0,
        "p50": None,
        "p95": None,
        "p99": None,
    }


@pytest.mark.parametrize("size", [1, 2, 7, 100, 20_000])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 3e4])
def test_percentiles_are_within_two_and_a_half_percent(size, scale):
    durations = scale * np.random.default_rng(size).lognormal(0, 1, size)
    found = Seconds()
    for some in np.array_split(durations, 3):
        found.add(some)
    assert found.total == pytest.approx(durations.sum())
    for percent in (50, 95, 99):
        exact = np.percentile(durations, percent, method="inverted_cdf")
        assert found.percentile(percent) == pytest.approx(exact, rel=0.025)


def test_durations_beyond_every_bin_count_too():
    found = Seconds()
    found.add(np.array([0.0, -1e-9, 1e-30, 1e9]))
    assert sum(found.bins().values()) == 4
    assert found.percentile(50) < 1.1e-7
    assert found.percentile(99) > 4e5


def test_the_slowest_and_the_last_failed_samples_are_known_by_their_labels():
    found = Meter()
    durations = np.random.default_rng(0).permutation(1000) / 1000
    for start in range(0, 1000, 100):
        rows = range(100)
        found.add(
            "train",
            "slow",
            calls=100,
            seconds=durations[start : start + 100],
            errors={7: f"raised: {start}"},
            labels={row: f"sample {start + row}" for row in rows},
        )
    told = found.summary()["purposes"]["train"]["parts"]["slow"]
    expected = [f"sample {row}" for row in np.argsort(-durations)[: meter.SAMPLES]]
    assert [one["label"] for one in told["slowest"]] == expected
    assert told["last_failed"][-1] == {"reason": "raised: 900", "label": "sample 907"}


def test_memory_is_bounded_when_every_reason_is_another():
    found = Meter()
    for start in range(0, 5000, 500):
        found.add("train", "chatty", errors={row: f"raised: line {start + row}" for row in range(500)})
    told = found.summary()["purposes"]["train"]["parts"]["chatty"]
    assert told["failed"] == told["failures"]["raised"] == 5000
    assert len(told["reasons"]) == meter.REASONS + 1
    assert told["reasons"][0] | {"label": ""} == {"reason": "raised: other reasons", "count": 4900, "label": ""}
    assert len(told["last_failed"]) == meter.SAMPLES
    assert len(json.dumps(found.state())) < 20_000


def test_a_resumed_meter_goes_on_from_its_state_without_counting_twice():
    found = filled()
    found.sentences()
    state = json.loads(json.dumps(found.state()))
    found.add("train", "docking", calls=100, errors={0: "crashed: signal 11"})  # after the checkpoint: happens again
    for resumed in (found, Meter()):
        resumed.load_state(state)
        assert json.loads(json.dumps(resumed.state())) == state
        assert resumed.summary() == filled().summary()
        assert resumed.sentences() == []
        resumed.add("train", "docking", calls=1)
        assert resumed.total_calls == 14


def test_what_was_paid_since_a_mark_is_the_difference():
    found = filled()
    mark = found.mark()
    assert found.since(mark) == {}
    found.add("train", "docking", calls=2, seconds=np.array([0.25, 0.25]), errors={0: "raised: x"})
    found.add("payoff", "docking", hits=3)
    assert found.since(mark) == {
        ("train", "docking"): Counts(2, 0, 0, 1, pytest.approx(0.5)),
        ("payoff", "docking"): Counts(0, 3, 0, 0, 0.0),
    }
    assert found.since({})[("train", "docking")].calls == 11


def test_numbers_of_a_summary_and_a_state_are_plain():
    found = Meter()
    found.add("train", "r", calls=np.int64(3), hits=np.int32(1), seconds=np.ones(3, np.float32), labels={0: "a"})
    found.undecodable("train", np.int64(2))
    text = json.dumps([found.summary(), found.state()], allow_nan=False)
    assert "NaN" not in text


def test_a_failure_is_spoken_of_when_it_is_new_or_has_doubled():
    found = Meter()
    ring, late = "raised: ValueError: bad ring", "timed out: no answer for 1 s"

    def after(num_ring, num_late, calls=512):
        reasons = [ring] * num_ring + [late] * num_late
        found.add("train", "reward", calls=calls, errors=dict(enumerate(reasons)))
        return found.sentences()

    assert after(0, 0) == []
    assert after(9, 3, 0) == [f"reward failed on 12 of 512 samples: {ring} (9), {late} (3)"]
    assert after(3, 2) == []
    assert after(0, 0) == []
    assert after(6, 0) == [f"reward failed on 23 of 2,048 samples so far: {ring} (18), {late} (5)"]
    assert after(1, 0) == after(1, 4) == []
    assert after(0, 1)[0].startswith("reward failed on 30 of ")
    found.add("evaluate", "reward", calls=1, errors={0: "crashed: signal 11\nin a thread"})
    assert found.sentences()[0].endswith("crashed: signal 11 in a thread (1)")
    assert found.sentences() == []


def test_a_long_run_with_a_steady_share_of_failures_is_spoken_of_a_few_times():
    found, said = Meter(), []
    for _ in range(1000):
        found.add("train", "reward", calls=100, errors=dict.fromkeys(range(5), "raised: no"))
        said += found.sentences()
    assert len(said) == 10


def test_parts_are_spoken_of_each_by_its_name_over_all_purposes():
    said = filled().sentences()
    assert said == [
        "docking failed on 3 of 16 samples: raised: ValueError: bad ring (2), timed out: no answer for 1 s (1)"
    ]


class Picky:
    """Refuses some samples, answers others with None."""

    def __call__(self, samples):
        if any(sample > 7 for sample in samples):
            raise ValueError("too large")
        return [None if sample == 3 else float(sample) for sample in samples]


def test_what_a_worker_did_is_metered_as_it_is():
    rows = np.arange(10)
    told = Told((Part("picky", Picky(), identity="picky"),), None, "rayft.reward:itself")
    outcome = Inline(told).work(Work(0, rows, list(range(10)), {}, (Task(0, rows),), keys=True))
    found = Meter()
    errors = {row: reason for (part, row), reason in outcome.errors.items() if part == 0}
    found.add(
        "train", "picky", calls=outcome.calls[0], seconds=outcome.seconds[0], errors=errors, labels=outcome.labels
    )
    counts = found.mark()[("train", "picky")]
    assert (counts.calls, counts.failed) == (10, 3)
    assert counts.seconds == pytest.approx(np.nansum(outcome.seconds[0]))
    part = found.summary()["purposes"]["train"]["parts"]["picky"]
    assert part["failures"] == {"raised": 2, "returned": 1}
    assert {one["label"] for one in part["last_failed"]} == {"3", "8", "9"}


# -- Prometheus


def test_without_ray_nothing_is_exported_and_nothing_raised():
    code = "from rayft.rewards.meter import Meter; m = Meter(); m.add('train', 'r', calls=3); print(m.exporter.made)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "None\n"


def test_with_ray_the_metrics_are_made_and_none_is_refused(ray_session):
    found = Meter()
    for _ in range(3):
        found.add("train", "reward", calls=20_000, hits=1, seconds=np.full(20_000, 1e-3), errors={0: "raised: x"})
    assert found.exporter.made is not None
    assert not found.exporter.failed


def test_an_exporter_that_fails_is_silent_from_then_on(ray_session):
    found = Meter()
    found.add("train", None, calls=1)  # a tag that is no text, which Ray refuses
    assert found.exporter.failed
    found.add("train", "reward", calls=1)
    assert found.total_calls == 2


SERVED = """
import sys, time, urllib.request
import numpy as np, ray
from rayft.rewards.meter import Meter
ray.init(num_cpus=1, include_dashboard=False, _metrics_export_port=int(sys.argv[1]), logging_level="ERROR")
meter = Meter()
errors = {0: "raised: x", 1: "raised: y", 2: "timed out: z"}
for _ in range(2):
    meter.add("train", "reward", calls=50, hits=7, seconds=np.full(50, 0.02), errors=errors)
deadline, served = time.monotonic() + 60, ""
while "rayft_reward_failures_total{" not in served and time.monotonic() < deadline:
    time.sleep(0.5)
    try:
        served = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics", timeout=5).read().decode()
    except OSError:
        pass
print("\\n".join(line for line in served.splitlines() if line.startswith("ray_rayft")))
"""


@pytest.mark.slow
def test_prometheus_finds_the_numbers_at_the_metrics_port():
    for package in ("aiohttp", "opencensus", "prometheus_client"):  # ray[default]: without it Ray serves no metrics
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [sys.executable, "-c", SERVED, str(port)]
    done = subprocess.run(told, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr

    def value(name, **tags):
        wanted = [f'{key}="{text}"' for key, text in {"purpose": "train", "part": "reward", **tags}.items()]
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"ray_{name}{{")]
        (line,) = [line for line in lines if all(tag in line for tag in wanted)]
        return float(line.rpartition(" ")[2])

    assert value("rayft_reward_calls_total") == 100
    assert value("rayft_reward_cache_hits_total") == 14
    assert value("rayft_reward_failures_total", kind="raised") == 4
    assert value("rayft_reward_failures_total", kind="timed out") == 2
    assert value("rayft_reward_seconds_count") == 100
    assert value("rayft_reward_seconds_sum") == pytest.approx(2.0)
