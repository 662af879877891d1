"""Rewards that are a program behind a pipe: what is asked, what counts as an answer, and how it ends."""

from __future__ import annotations

import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pools import lives, until

from rayft.pipe import CHATTER, WireError
from rayft.reward import arity, build, check, identity
from rayft.wire import Command, Http

LOOP = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    number, samples = question["id"], question["samples"]
    answer = {"id": number, "scores": [len(s) for s in samples]}
    BODY
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Command]:
    """A Python program that scores a text by its length, with some lines of its own before it answers."""

    def made(body: str = "pass", **arguments: Any) -> Command:
        path = tmp_path / "score.py"
        path.write_text(LOOP.replace("BODY", body.replace("\n", "\n    ")))
        return Command([sys.executable, str(path)], **arguments)

    return made


# -- what is asked and answered


def test_a_program_is_told_samples_and_conditions_and_answers_scores_and_numbers_to_log(program):
    body = """answer["scores"] = [c.get("by", 1) * len(s) for s, c in zip(samples, question["conditions"])]
answer["info"] = {"vowels": [sum(map(s.count, "aeiou")) for s in samples]}"""
    score = program(body)
    assert score(["ab", "aei"], [{"by": 2}, {"by": np.float32(0.5)}]) == ([4, 1.5], {"vowels": [1, 3]})
    assert score(["ab"]) == ([2], {"vowels": [1]})
    assert score([]) == ([], {"vowels": []})


def test_one_program_answers_every_call(program):
    score = program("answer['scores'] = [os.getpid() for s in samples]")
    assert score(["a"])[0] == score(["b", "c"])[0][:1] == [score.program.process.pid]


def test_null_stays_a_failure_and_is_never_zero(program):
    score = program("answer['scores'] = [None if s == '' else float('nan') for s in samples]")
    failed, not_a_number = score(["", "a"])[0]
    assert failed is None
    assert math.isnan(not_a_number)


def test_arrays_travel_as_lists(program):
    score = program("answer['scores'] = [sum(map(sum, s)) for s in samples]")
    assert score([np.array([[1.0, 2.0], [3.0, 4.5]]), np.eye(2, dtype=np.int8)])[0] == [10.5, 2]


def test_a_sample_that_is_not_plain_data_needs_a_canonical_form(program):
    with pytest.raises(TypeError, match=r"type PosixPath has no canonical form.*`canonical: package\.module:function`"):
        program()([Path("abcd")])
    assert program(canonical="os:fspath")([Path("abcd")])[0] == [4]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_json_cannot_carry_is_an_error_and_the_program_runs_on(program, bad):
    score = program()
    pid = score.program.process.pid
    with pytest.raises(ValueError, match="not finite, which JSON cannot carry"):
        score([[1.0, bad]])
    assert score([[1.0, 2.0]])[0] == [2]
    assert score.program.process.pid == pid


def test_text_of_any_kind_stays_on_its_line(program):
    score = program("answer['scores'] = [[ord(c) for c in s][0] for s in samples]")
    assert score(["\n", "\u2028", "\x00", "é", "𝄞"])[0] == [10, 0x2028, 0, 233, 0x1D11E]


def test_a_question_and_an_answer_larger_than_any_pipe_pass(program):
    score = program(
        "print('x' * 300_000)\nanswer['scores'] = [len(s) for s in samples] * 1\nanswer['info'] = {'n': 'y' * 300_000}"
    )
    assert score(["ab" * 500_000, "c"])[0] == [1_000_000, 1]


def test_a_chatty_program_is_understood(program):
    body = """print('loading'); print('[1, 2]'); print(); print('0.5'); print(json.dumps({'level': 'info'}))
os.write(1, b'no utf-8: \\xe9\\n')"""
    assert program(body)(["abc"])[0] == [3]


def test_a_program_that_writes_a_megabyte_to_stderr_is_not_blocked(program):
    score = program("sys.stderr.write('e' * 2**20)")
    assert [score(["abc"])[0] for _ in range(3)] == [[3]] * 3


def test_only_so_much_chatter_is_skipped(program):
    score = program(f"if samples: print('tick\\n' * {CHATTER + 1})")
    with pytest.raises(WireError, match=f"printed {CHATTER} lines that are no answer, the first: 'tick'"):
        score(["a"])


# -- what is no answer


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit(3)", "ended with exit code 3; nothing on its stderr"),
        ("raise KeyError('no atom')", "ended with exit code 1; its stderr: .*KeyError: 'no atom'"),
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ('os.write(1, b\'{"id": 1, "sco\'); os._exit(0)', 'ended with exit code 0.*printed: \'{"id": 1, "sco\''),
        ("os.close(1); time.sleep(30)", "closed its pipe and ran on"),
        ("print('{\"id\": 1,, }')", "is not JSON: '{\"id\": 1,, }'"),
        ("print(answer)", "is not JSON: \"{'id': 2, 'scores'"),
        ("answer['id'] = 7", r"answered id 7 when asked 2: '\{\"id\": 7, \"scores\": \[1\]\}'"),
        ("del answer['id']", "answered id None when asked 2"),
        ("answer['scores'].append(1)", r"answered 2 scores for 1 samples: '.*\[1, 1\]"),
        ("answer['scores'] = 0.5", "answered without a list of scores: '.*0.5"),
        ("answer['scores'] = None", "answered without a list of scores"),
        ("answer['info'] = [1]", "an info that is no object"),
    ],
)
def test_what_is_no_answer_is_quoted_and_the_next_question_is_answered(program, body, said):
    score = program(f"if samples == ['a']:\n    {body}")
    with pytest.raises(WireError, match=said):
        score(["a"])
    assert score(["abc", "de"])[0] == [3, 2]


def test_an_answer_that_comes_twice_never_counts_for_the_next_question(program):
    score = program("if samples == ['a']: print(json.dumps(answer))")
    assert score(["a"])[0] == [1]
    with pytest.raises(WireError, match="answered id 2 when asked 3"):
        score(["abc"])
    assert score(["abc"])[0] == [3]


def test_the_sample_that_killed_the_program_pays_for_its_new_start(program):
    score = program("if not samples: time.sleep(0.5)\nif samples == ['a']: os._exit(1)")
    start = time.monotonic()
    with pytest.raises(WireError, match="exit code 1"):
        score(["a"])
    assert time.monotonic() - start >= 0.5
    start = time.monotonic()
    assert score(["abc"])[0] == [3]
    assert time.monotonic() - start < 0.4


def test_a_program_that_cannot_start_again_says_so_and_is_tried_once_more_later(program, tmp_path):
    score = program(f"if os.path.exists({str(tmp_path / 'off')!r}): os._exit(9)")
    (tmp_path / "off").touch()
    with pytest.raises(WireError, match=r"exit code 9.*and then it did not start again: .*asked about no samples"):
        score(["a"])
    with pytest.raises(WireError, match="asked about no samples"):
        score(["a"])
    (tmp_path / "off").unlink()
    assert score(["abc"])[0] == [3]


def test_an_interrupted_question_leaves_no_answer_for_the_next(program):
    score = program("if samples == ['a']: time.sleep(0.6)")
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        score(["a"])
    assert score(["abc"])[0] == [3]


# -- how it begins and ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"run": "no-such-program --x"}, "run: the program 'no-such-program' is not there"),
        ({"run": ["./gone.sh"]}, r"run: the program '\./gone\.sh' is not there"),
        ({"run": ["FILE"]}, r"is not executable: chmod \+x it"),
        ({"run": []}, r"run is \[\]; it should be a program"),
        ({"run": 3}, "run is 3; it should be a program"),
        ({"run": "sh", "cwd": "/no/such"}, "cwd is '/no/such', which is no folder"),
        ({"run": "sh", "batch_size": 0}, "batch_size is 0; it should be a whole number, 1 or more"),
        ({"run": "sh", "batch_size": 1.5}, "batch_size is 1.5; it should be a whole number"),
        ({"run": "sh", "start_timeout": True}, "start_timeout is True; it should be a number"),
        ({"run": "sh", "undecodable": math.nan}, "undecodable is nan; it should be a number"),
        ({"run": "sh", "canonical": "math:pi"}, "canonical: math:pi is float, not a function"),
        ({"run": "sh -c 'echo hm >&2; exit 4'"}, r"exit code 4; its stderr: hm.* asked about no samples.*no scores"),
        ({"run": "sh -c 'echo 0.5; exec sleep 9'", "start_timeout": 0.3}, "within 0.3 s; does it flush.*: '0.5'"),
        ({"run": ["sh", "-c", 'read x; echo \'{"id": 1, "scores": [1]}\'']}, "answered 1 scores for 0 samples"),
    ],
)
def test_what_cannot_start_is_refused_when_the_reward_is_made(arguments, said, tmp_path):
    (tmp_path / "file").write_text("")
    if arguments["run"] == ["FILE"]:
        arguments = {"run": [str(tmp_path / "file")]}
    with pytest.raises(ValueError, match=said):
        Command(**arguments)


def test_a_script_without_an_interpreter_line_is_refused_when_the_reward_is_made(tmp_path):
    (tmp_path / "score").write_text("print(1)")
    (tmp_path / "score").chmod(0o755)
    with pytest.raises(ValueError, match=r"cannot be started.*Exec format error"):
        Command([str(tmp_path / "score")])


def test_the_program_gets_its_folder_its_environment_and_spaces_in_its_path(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    text = LOOP.replace("BODY", "answer['info'] = {'at': os.getcwd(), 'is': os.environ['IS']}")
    (folder / "score.py").write_text(f"#!{sys.executable}\n{text}")
    (folder / "score.py").chmod(0o755)
    for run in (str(folder / "score.py"), "./score.py", [str(folder / "score.py")], ["python", "score.py"]):
        score = Command(run, cwd=str(folder), env={"IS": 1})
        assert score(["ab"]) == ([2], {"at": str(folder), "is": "1"})


def test_a_dropped_reward_ends_its_program_and_what_that_started(program):
    body = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nanswer['scores'] = [child.pid for s in samples]"
    )
    score = program(body)
    children, pid = [score.program.process.pid, *score(["a"])[0]], score.program.process.pid
    assert all(map(lives, children))
    del score
    gc.collect()
    assert not lives(pid)
    assert until(lambda: not any(map(lives, children)))


def test_a_program_in_an_endless_loop_does_not_outlive_a_killed_process(program, tmp_path):
    path = program("while samples: pass").argv[1]
    code = f"from rayft.wire import Command; c = Command({[sys.executable, path]!r})\n"
    code += "print(c.program.process.pid, flush=True); c(['a'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert lives(pid)
        owner.kill()
    assert until(lambda: not lives(pid))


def test_an_ordinary_end_of_the_process_ends_the_program(program):
    path = program().argv[1]
    code = f"from rayft.wire import Command; c = Command({[sys.executable, path]!r}); print(c.program.process.pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert not lives(pid)


def test_a_fork_of_the_process_leaves_the_program_alone(program):
    score = program()
    if (child := os.fork()) == 0:
        score.program.end()
        os._exit(0)
    os.waitpid(child, 0)
    assert score(["abc"])[0] == [3]


def test_a_pickled_reward_starts_a_program_of_its_own(program):
    score = program()
    again = pickle.loads(pickle.dumps(score))
    assert again(["abc"])[0] == score(["abc"])[0] == [3]
    assert again.program.process.pid != score.program.process.pid


def test_it_is_a_reward_of_two_arguments_with_the_version_in_its_cache_key(program):
    score = program(batch_size=8, undecodable=-1, version="2", groupwise=True)
    assert (score.batch_size, score.undecodable, score.version, score.groupwise) == (8, -1.0, "2", True)
    assert arity(score) == arity(Http("http://localhost")) == 2
    check("command", {"run": "x"})
    check("http", {"url": "x"})
    keys = {identity("command", {"run": "x", **more}) for more in ({}, {"version": "1"}, {"version": "2"})}
    assert len(keys) == 3
    with pytest.raises(ValueError, match=r"takes no 'ulr' \(did you mean 'url'\?\)"):
        build("http", {"ulr": "x"})
