"""Things named by file and by path, rewards by name, and what is said when a name is wrong."""

import sys

import numpy as np
import pytest

from rayft import imports, reward
from rayft.domain import Plain

# objects by file and by path


def test_an_object_is_loaded_from_a_file_once(user_file):
    path = f"{user_file}:Net"
    assert imports.load(path) is imports.load(path)
    assert imports.load(imports.path_of(imports.load(path))) is imports.load(path)


def test_files_of_one_name_in_two_folders_stay_apart(tmp_path):
    for folder, number in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"NUMBER = {number}\n")
    assert [imports.load(f"{tmp_path / folder}/mine.py:NUMBER") for folder in "ab"] == [1, 2]


def test_a_relative_file_is_made_independent_of_the_working_directory(user_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert imports.absolute("./mine.py:Net") == f"{user_file.resolve()}:Net"
    monkeypatch.chdir("/")
    assert imports.absolute("mine.py:Net", tmp_path) == f"{user_file.resolve()}:Net"
    assert imports.absolute("rayft.domain:Plain", tmp_path) == "rayft.domain:Plain"
    assert imports.absolute("toy", tmp_path) == "toy"


def test_the_path_of_an_installed_object_is_its_module():
    assert imports.path_of(Plain) == "rayft.domain:Plain"
    assert imports.load(imports.path_of(Plain)) is Plain


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("Net", "'Net' is not an import path; write 'package.module:Name' or './file.py:Name'"),
        ("rayft.domain:", "is not an import path"),
        (":Plain", "is not an import path"),
        ("rayft.domain:Plane", "rayft.domain has no 'Plane' .did you mean 'Plain'"),
        ("rayft.domian:Plain", "no module 'rayft.domian'; is it installed, or is the path misspelt"),
        ("nowhere.at.all:Thing", "no module 'nowhere'"),
        ("/nowhere/mine.py:Net", "no file /nowhere/mine.py; an import path to a file looks like"),
    ],
)
def test_a_wrong_path_is_refused_in_a_sentence(path, sentence):
    with pytest.raises(ValueError, match=sentence):
        imports.load(path)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import nowhere_at_all\n", "broken.py could not be imported: ModuleNotFoundError: .*nowhere_at_all"),
        ("1 / 0\n", "broken.py could not be imported: ZeroDivisionError"),
        ("def f(:\n", "broken.py could not be imported: SyntaxError"),
    ],
)
def test_a_file_that_fails_says_why_and_may_be_mended(tmp_path, code, sentence):
    file = tmp_path / "broken.py"
    file.write_text(code)
    with pytest.raises(ValueError, match=sentence):
        imports.load(f"{file}:Net")
    file.write_text("Net = 3  # mended, and of another length\n")
    assert imports.load(f"{file}:Net") == 3


def test_a_module_whose_own_import_is_missing_is_not_called_misspelt(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="needy needs the module 'nowhere_at_all', which is not installed"):
        imports.load("needy:Net")
    assert "needy" not in sys.modules


# rewards by name


def test_a_reward_is_a_class_a_function_or_a_short_name(user_file):
    samples = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    short = {"bright": f"{user_file}:Bright"}
    for path, told, wanted in (
        ("bright", {"gain": 2.0}, [6.0, 14.0]),
        (f"{user_file}:Bright", {}, [3.0, 7.0]),
        (f"{user_file}:brightness", {}, [3.0, 7.0]),
        (lambda xs: [len(xs)] * len(xs), {}, [2, 2]),
    ):
        built = reward.build(path, told, short)
        assert isinstance(built, reward.Reward)
        assert list(built(samples)) == wanted
    assert reward.build("bright", {}, short).undecodable == -1.0
    assert reward.build(f"{user_file}:brightness", {}).undecodable == 0.0


@pytest.mark.parametrize(
    ("name", "told", "sentence"),
    [
        ("brigth", {}, "no reward 'brigth' .did you mean 'bright'.*this domain has bright, or write"),
        ("{file}:Mute", {}, "Mute is abstract: it lacks __call__"),
        ("{file}:NotCallable", {}, r"NotCallable is a class without __call__\(samples\)"),
        ("{file}:NUMBER", {}, "NUMBER is int, not a Reward"),
        ("{file}:brightness", {"gain": 1}, r"brightness is a function and takes no arguments \(gain\)"),
        ("bright", {"gian": 1}, "takes no 'gian' .did you mean 'gain'"),
    ],
)
def test_what_is_no_reward_is_refused_in_a_sentence(user_file, name, told, sentence):
    with pytest.raises(ValueError, match=sentence):
        reward.check(name.format(file=user_file), told, {"bright": f"{user_file}:Bright"})
