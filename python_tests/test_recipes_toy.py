"""The toy recipe: each failure happens without what the library does about it, and does not with it."""

import json

import pytest
import torch
from PIL import Image

from fastforest.recipes import toy


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_em_climbs_and_finds_the_clouds():
    labels = toy.clouds(300, seed=1)
    assert torch.equal(labels, toy.clouds(300, seed=1))
    frames = toy.converge(labels, (0, 2, 20), seed=0)
    likelihood = [frame["log_likelihood"] for frame in frames]
    assert likelihood[0] < likelihood[1] < likelihood[2]
    assert [frame["iterations"] for frame in frames] == [0, 2, 20]
    assert not torch.equal(frames[0]["mean"], frames[2]["mean"])
    centres = torch.stack([labels[k::6].mean(0) for k in range(6)])
    assert torch.cdist(centres, frames[2]["mean"]).amin(1).max() < 0.5


def test_a_covariance_collapses_without_a_floor_only():
    found = toy.collapse(seed=0, iterations=30)
    assert found["without"]["iterations"] < 30 and found["least_deviation"]["without"] < 1e-3
    assert found["with"]["iterations"] == 30 and found["finite"] and found["least_deviation"]["with"] > 1e-2


def test_calibrated_units_tell_inputs_apart():
    found = toy.same_outputs(toy.clouds(120, seed=0), seed=0, steps=40)
    assert found["weak"]["spread"] < 0.05 and found["weak"]["leaves_reached"] > 15.9
    assert found["saturated"]["leaves_reached"] < 2
    for name in ("weak, calibrated", "saturated, calibrated"):
        assert found[name]["spread"] > 0.2 and 8 < found[name]["leaves_reached"] < 14
        assert found[name]["error"] < 0.9 * found["weak"]["error"]


def test_weights_that_sum_to_less_drag_to_the_origin():
    pull = toy.drag(toy.clouds(300, seed=0), seed=0)["pull"]
    assert pull["unnormalised"] > 0.5 and pull["normalised"] < 0.1 and pull["library"] < 0.1


def test_a_run_writes_what_it_promises(tmp_path, capsys):
    assert toy.main(["--out", str(tmp_path / "out"), "--samples", "60"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["failures.png", "results.json", "toy.png"]
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(summary) == {"samples", "seed", "convergence", "collapse", "same_outputs", "drag"}
    for name in ("toy.png", "failures.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50
    printed = capsys.readouterr().out
    assert printed.startswith("EM") and "collapse" in printed and "drag" in printed


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert toy.main(["--out", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert "is not a folder" in captured.err and captured.err.count("\n") == 1
    with pytest.raises(ValueError, match="at least 6"):
        toy.clouds(5, 0)
