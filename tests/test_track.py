"""Trackers for real: event files are read back by TensorBoard, W&B writes offline, a dead server costs one warning."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec

import pytest

from rayft import settings
from rayft.track import TrackSettings, open_trackers

CONFIG = {"algorithm": "ppo", "training": {"lr": 1e-3, "alpha": None}}
NOWHERE = "http://127.0.0.1:9"


def log(run, steps, told=None, value=float):
    """Opens, logs a row per step and closes, as one process would."""
    for tracker in open_trackers(told or TrackSettings(), run, CONFIG):
        for step in steps:
            tracker.log(step, {"reward_mean": value(step), "evaluate/attained": math.nan})
        tracker.close()


def events(run):
    """(step, value) of every scalar, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_every_row_and_nothing_that_is_not_finite(tmp_path):
    log(tmp_path, range(1, 6))
    assert events(tmp_path) == {"reward_mean": [(step, float(step)) for step in range(1, 6)]}


def test_tensorboard_shows_each_iteration_once_after_a_resume(tmp_path):
    log(tmp_path, range(1, 8))
    log(tmp_path, range(5, 10), value=lambda step: step + 0.5)  # within the same second: a file of its own all the same
    log(tmp_path, range(9, 12), value=lambda step: step + 0.25)
    values = {**{s: s for s in range(1, 5)}, **{s: s + 0.5 for s in range(5, 9)}, **{s: s + 0.25 for s in range(9, 12)}}
    assert events(tmp_path)["reward_mean"] == list(values.items())


def test_a_killed_process_leaves_rows_that_its_resume_completes(tmp_path):
    (tracker,) = open_trackers(TrackSettings(), tmp_path, CONFIG)
    for step in range(1, 4):
        tracker.log(step, {"reward_mean": step})
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()  # not closed: what kill -9 would leave
    tracker.close()
    file.write_bytes(written[:-3])
    log(tmp_path, range(3, 6))
    assert [step for step, _ in events(tmp_path)["reward_mean"]] == [1, 2, 3, 4, 5]


def test_a_run_that_goes_back_without_ending_shows_each_iteration_once(tmp_path):
    log(tmp_path, [1, 2, 3, 4, 3, 4, 5])
    assert [step for step, _ in events(tmp_path)["reward_mean"]] == [1, 2, 3, 4, 5]


def test_nothing_is_opened_before_the_first_row(tmp_path):
    log(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_warns_once_and_is_left_alone(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match=r"tensorboard is told nothing more, metrics.csv is: .*Error") as warned:
        log(tmp_path, range(1, 5))
    assert len(warned) == 1


def test_no_tracker_is_a_choice(tmp_path):
    assert open_trackers(TrackSettings(tensorboard=False), tmp_path, CONFIG) == []


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_one_sentence_that_names_the_extra(package, tmp_path, monkeypatch):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    told = TrackSettings(**{package: "project"})
    with pytest.raises(ValueError, match=rf"^track.{package} needs .* pip install rayft\[{package}\]$"):
        open_trackers(told, tmp_path, CONFIG)
    (tmp_path / package).mkdir()  # W&B leaves such a folder where it ran, and Python would import it
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="pip install"):
        open_trackers(told, tmp_path, CONFIG)


@pytest.fixture
def wandb():
    """W&B remembers the environment it first met; each test starts it anew."""
    found = pytest.importorskip("wandb")
    found.teardown()
    yield found
    found.teardown()


@pytest.mark.usefixtures("wandb")
def test_wandb_writes_offline_and_keeps_its_name_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told, run = TrackSettings(tensorboard=False, wandb="rayft-test"), tmp_path / "a run"
    run.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        log(run, range(1, 4), told)
        log(run, range(3, 6), told)
    parts = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    name = (run / ".wandb_id").read_text()
    assert [part.name for part in parts] == [f"run-{name}.wandb"] * 2
    text = parts[0].read_bytes()
    assert b"reward_mean" in text
    assert b"evaluate/attained" not in text
    assert b"rayft-test" in text


@pytest.mark.usefixtures("wandb")
def test_wandb_without_network_costs_one_warning(tmp_path, monkeypatch):
    told = {"WANDB_MODE": "online", "WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": NOWHERE, "WANDB_INIT_TIMEOUT": "1"}
    for name, value in {**told, "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(RuntimeWarning, match="wandb is told nothing more") as warned:
        log(tmp_path, range(1, 4), TrackSettings(tensorboard=False, wandb="rayft-test"))
    assert len(warned) == 1


def test_mlflow_holds_each_iteration_once_after_a_resume(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    told = TrackSettings(tensorboard=False, mlflow=f"sqlite:///{tmp_path}/runs.db")
    log(tmp_path, range(1, 5), told)
    log(tmp_path, [3, 4, 5, 5, 6], told)
    client, ident = mlflow.MlflowClient(told.mlflow), (tmp_path / ".mlflow_id").read_text()
    assert [(m.step, m.value) for m in client.get_metric_history(ident, "reward_mean")] == [(s, s) for s in range(1, 7)]
    assert client.get_metric_history(ident, "evaluate/attained") == []
    found = client.get_run(ident)
    assert found.data.params == {"algorithm": "ppo", "training.lr": "0.001", "training.alpha": "None"}
    assert found.info.status == "FINISHED"


def test_mlflow_without_network_costs_one_warning(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(RuntimeWarning, match="mlflow is told nothing more") as warned:
        log(tmp_path, range(1, 4), TrackSettings(tensorboard=False, mlflow=NOWHERE))
    assert len(warned) == 1


def test_every_setting_has_its_sentence_and_its_check():
    assert settings.explain(TrackSettings).keys() == settings.defaults(TrackSettings).keys()
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        settings.check("track", TrackSettings, {"tensorbord": True})
    with pytest.raises(ValueError, match=r"track.wandb is True; it should be a valid string"):
        settings.check("track", TrackSettings, {"wandb": True})
