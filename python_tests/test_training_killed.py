"""kill -9 at any moment: the resumed run ends with the numbers of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_killed
from training_killed import ROUNDS, STEPS, TRAPS

from fastforest import training

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("whole")
    training_killed.train(out)
    return out


def started(out, moment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    return subprocess.Popen([sys.executable, HERE / "training_killed.py", out, moment], env=environment)


def check_same(whole, out, parts=("weights", "ema", "rng")):
    for name in ("checkpoint.pt", "best.pt"):
        first, second = (training.load(folder / name) for folder in (whole, out))
        for part in parts:
            one, other = getattr(first, part), getattr(second, part)
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), (name, part)
        assert timeless(first.history) == timeless(second.history)
        states = [checkpoint.optimizer["state"] for checkpoint in (first, second)]
        assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])
    assert [line["round"] for line in lines(out / "metrics.jsonl")] == list(range(1, ROUNDS + 1))
    assert [line["step"] for line in lines(out / "steps.jsonl")] == list(range(1, ROUNDS * STEPS + 1))
    losses = [[line["loss"] for line in lines(folder / "steps.jsonl")] for folder in (whole, out)]
    assert losses[0] == losses[1]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


def timeless(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("moment", list(TRAPS))
def test_killed_run_goes_on_to_the_same_numbers(moment, whole, tmp_path):
    assert started(tmp_path, moment).wait(timeout=300) == -signal.SIGKILL
    assert training.load(tmp_path / "checkpoint.pt").round == (2 if moment == "after a checkpoint" else 1)
    if moment == "in a checkpoint":
        assert list(tmp_path.glob(".checkpoint.*.tmp.pt"))  # what it leaves is seen, and gone at the end
    training_killed.train(tmp_path, resume=True)
    check_same(whole, tmp_path)


def test_run_with_workers_killed_from_outside_goes_on_to_the_same_numbers(whole, tmp_path):
    process, end = started(tmp_path, "workers"), time.monotonic() + 300
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    training_killed.train(tmp_path, resume=True, workers=True)
    # Reading ahead changes no number; but a DataLoader draws a seed for its workers from PyTorch's own generator.
    check_same(whole, tmp_path, parts=("weights", "ema"))


def test_a_cut_line_of_the_steps_is_taken_out(whole, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\nnonsense\n{"step": 3}\n{"st')
    training.logs.StepLog(tmp_path, 2, False).close()
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    training.logs.StepLog(tmp_path, 0, False).close()
    assert (tmp_path / "steps.jsonl").read_text() == ""
