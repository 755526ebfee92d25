"""Training on two ranks: one process's numbers, one writer, one decision about time and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_ranks import work

from fastforest import training
from fastforest.training import ranks

HERE = Path(__file__).parent


def launch(arguments, folder, count=2):
    """Ranks of one machine as torchrun starts them, without its agent, which takes seconds; their outputs."""
    environment = os.environ | {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    processes = []
    for rank in range(count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=own, cwd=folder, stdout=pipe, stderr=pipe, text=True))
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs
    return outputs


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_two_ranks(run, folder):
    launch([HERE / "training_ranks.py", run, folder / "out"], folder)
    return [torch.load(folder / f"out.{rank}") for rank in (0, 1)]


def same(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("model", ["forest", "heatmap_forest"])
def test_two_ranks_end_with_the_model_of_one_process(model, tmp_path):
    alone, (first, second) = work(model), on_two_ranks(model, tmp_path)
    same(first["state"], second["state"], 0.0)
    same(alone["state"], first["state"], 1e-4)
    for one, two, other in zip(alone["rounds"], first["rounds"], second["rounds"], strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, nan_ok=True), key
            assert other[key] == pytest.approx(two[key], rel=0, abs=0, nan_ok=True), key


def test_batch_norm_is_over_all_ranks(tmp_path):
    """Gradients, not weights: in its first steps AdamW makes as much of a rounding error as of a gradient."""
    alone, (first, second) = work("batch_norm"), on_two_ranks("batch_norm", tmp_path)
    same(first["state"], second["state"], 0.0)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    running = [name for name in alone["state"] if "running" in name]
    assert running
    same({n: alone["state"][n] for n in running}, {n: first["state"][n] for n in running}, 1e-4)


def test_ranks_stop_together_when_the_first_one_s_minutes_end(tmp_path):
    first, second = on_two_ranks("minutes", tmp_path)
    assert [record["step"] for record in first["rounds"]] == [record["step"] for record in second["rounds"]]
    same(first["state"], second["state"], 0.0)


def test_memory_that_runs_out_on_one_rank_halves_the_batch_of_all(tmp_path):
    first, second = on_two_ranks("memory", tmp_path)
    assert [record["batch"] for record in first["rounds"]] == [record["batch"] for record in second["rounds"]] == [3, 3]
    same(first["state"], second["state"], 0.0)


def test_loss_that_is_lost_on_one_rank_ends_the_run_of_both(tmp_path):
    """The other one waits for its gradients' batch statistics."""
    said = {outcome["error"] for outcome in on_two_ranks("lost", tmp_path)}
    assert said == {"training stopped: the loss is nan in round 1, step 1; no checkpoint was written yet"}


def test_command_line_on_two_ranks_has_one_voice_and_resumes(tmp_path):
    small = ["--set=model.backbone_options={width = 8, code = 8}", "--set=model.leaves=16", "--set=model.canvas=8"]
    base = ["-m", "fastforest", "train", "--data", "synthetic", "--faces", "20", "--size", "32", "--out", "run"]
    (out, _), (silent, _) = launch([*base, "--rounds", "1", "--steps", "2", "--batch", "5", *small], tmp_path)
    assert out.splitlines()[0].endswith("at most 1 rounds, 2 ranks") and silent == ""
    assert training.load(tmp_path / "run" / "checkpoint.pt").round == 1
    (out, _), (silent, _) = launch([*base, "--rounds", "2", "--resume"], tmp_path)
    assert out.splitlines()[1].startswith("round   2") and silent == ""
    assert training.load(tmp_path / "run" / "checkpoint.pt").round == 2


def test_one_process_talks_to_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = torch.device("cpu")
    with ranks.joined(device) as here:
        assert here == device and not torch.distributed.is_initialized()
    assert (ranks.rank(), ranks.count(), ranks.mine(7)) == (0, 1, slice(0, 7))
    assert ranks.first_says(0.5, device) == 0.5 and ranks.sums([1.0, 2.0], device) == [1.0, 2.0]


def test_gradients_are_cut_into_buckets_of_one_type(monkeypatch):
    monkeypatch.setattr(ranks, "BUCKET", 5)
    grads = [torch.zeros(n, dtype=t) for n, t in ((2, torch.float32), (3, torch.float32), (9, torch.float32))]
    grads += [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float32)]
    assert [[grad.numel() for grad in bucket] for bucket in ranks._buckets(grads)] == [[2, 3], [9], [1], [1]]
