"""Training: schedules, checkpoints, atomic files, exact repetition and resumption. Tiny models, drawn faces."""

import dataclasses
import io
import json
import os
import time

import numpy as np
import pytest
import torch

from fastforest import draw, models, training
from fastforest.data import Cached, SyntheticFaces
from fastforest.training import TrainConfig, TrainingError, report
from fastforest.training.checkpoint import CheckpointError, write_atomically

SIZE = 32
TINY = {
    "forest": {"canvas": 8, "leaves": 16, "rank": 8, "width": 4, "code": 8},
    "dense": {"width": 4, "code": 8},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def faces():
    train, held_out = (Cached(SyntheticFaces(count, SIZE, seed), SIZE).load() for count, seed in ((12, 1), (5, 2)))
    return train, held_out


def tiny(name, faces, seed=0):
    shape = training.mean_shape(faces[0])
    torch.manual_seed(seed)
    given = {"landmarks": 68, "mean_shape": shape.tolist(), "image_size": SIZE}
    return models.build(name, given | TINY[name])


def settings(**changes):
    return TrainConfig(**({"rounds": 4, "steps": 3, "batch": 4, "warmup": 2, "rate": 3e-3, "leaf_faces": 8} | changes))


def same_state(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def timeless(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history.rounds]


class Interruption(Exception):
    pass


def stop_after(rounds):
    def on_round(record):
        if record["round"] == rounds:
            raise Interruption

    return on_round


# --- the loop ---------------------------------------------------------------------------------------------------------


FEATURES = {
    "forest": {"steepness": (1.0, 3.0), "ema": 0.9},
    "dense": {"schedule": "step", "clip": None},
}


@pytest.mark.parametrize("name", ["forest", "dense"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(name, faces, tmp_path):
    config = settings(**FEATURES[name])
    whole = tiny(name, faces)
    expected = training.fit(whole, *faces, config, tmp_path / "whole")
    with pytest.raises(Interruption):
        training.fit(tiny(name, faces), *faces, config, tmp_path / "parts", on_round=stop_after(2))
    torch.rand(7)  # the caller's generator does not matter
    other = tiny(name, faces, seed=5)  # nor do the weights that the resumed run starts from
    resumed = training.fit(other, *faces, config, tmp_path / "parts", resume=True)
    same_state(whole.state_dict(), other.state_dict())
    assert timeless(expected) == timeless(resumed)
    first, second = (training.load(tmp_path / part / "checkpoint.pt") for part in ("whole", "parts"))
    same_state(first.weights, second.weights)
    same_state(first.rng, second.rng)
    assert (first.step, first.round) == (second.step, second.round) == (12, 4)
    pictures = [sorted((tmp_path / part / "rounds").iterdir()) for part in ("whole", "parts")]
    expected_names = [f"{kind}_000{i}.png" for kind in ("inside", "round") for i in range(1, 5)]
    assert [p.name for p in pictures[0]] == [p.name for p in pictures[1]] == expected_names


def test_two_rounds_then_two_more_equal_four_with_a_constant_rate(faces, tmp_path):
    config = settings(schedule="constant")
    whole, parts = tiny("forest", faces), tiny("forest", faces)
    training.fit(whole, *faces, config, None)
    training.fit(parts, *faces, dataclasses.replace(config, rounds=2), tmp_path)
    training.fit(parts, *faces, config, tmp_path, resume=True)
    same_state(whole.state_dict(), parts.state_dict())


def test_two_runs_agree_bit_for_bit_and_leave_the_caller_s_generator_alone(faces):
    states = []
    for _ in range(2):
        model = tiny("forest", faces)
        before = torch.get_rng_state()
        training.fit(model, *faces, settings(rounds=2), None)
        assert torch.equal(before, torch.get_rng_state())
        states.append(model.state_dict())
    same_state(*states)
    different = tiny("forest", faces)
    training.fit(different, *faces, settings(rounds=2, seed=1), None)
    assert any(not torch.equal(tensor, different.state_dict()[name]) for name, tensor in states[0].items())


def test_training_reduces_the_error_and_writes_a_line_and_a_picture_a_round(faces, tmp_path):
    model = tiny("dense", faces)
    first = training.predict(model, faces[1])[0]
    history = training.fit(model, *faces, settings(rounds=3), tmp_path)
    assert not torch.equal(first, training.predict(model, faces[1])[0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"NME[inter_ocular]", "FR@0.08[inter_ocular]", "AUC@0.08[inter_ocular]", "seconds", "rate"} <= lines[
        0
    ].keys()
    assert history.picture == tmp_path / "rounds" / "round_0003.png" and history.picture.stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt",
        "checkpoint.pt",
        "metrics.jsonl",
        "rounds",
        "steps.jsonl",
    ]


def test_leaf_steps_change_the_pool_and_can_be_left_out(faces):
    def leaves(model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("pool")}

    model = tiny("forest", faces)
    before = leaves(model)
    assert before
    without = training.fit(model, *faces, settings(rounds=1, leaf_faces=0), None)
    same_state(before, leaves(model))
    assert without.last["dead_leaves"] is None
    history = training.fit(model, *faces, settings(rounds=1), None)
    assert history.last["dead_leaves"] >= 0
    assert all(not torch.equal(before[name], leaf) for name, leaf in leaves(model).items())


def test_steepness_is_annealed_over_the_run(faces):
    model = tiny("forest", faces)
    history = training.fit(model, *faces, settings(rounds=2, steepness=(1.0, 16.0)), None)
    # 3 steps a round; the last step of a round stands at 2/6 and 5/6
    assert [record["steepness"] for record in history.rounds] == pytest.approx([16 ** (2 / 6), 16 ** (5 / 6)])


def test_learning_rate_warms_up_over_steps(faces):
    history = training.fit(tiny("dense", faces), *faces, settings(steps=1, warmup=3, schedule="constant"), None)
    assert [record["rate"] for record in history.rounds] == pytest.approx([3e-3 * i / 4 for i in (1, 2, 3, 4)])


def test_minutes_end_a_run_and_scale_its_schedule(faces, monkeypatch):
    clock = iter(range(0, 10**6, 2))  # every look at the clock takes two seconds
    monkeypatch.setattr("fastforest.training.loop.time.monotonic", lambda: next(clock))
    history = training.fit(tiny("dense", faces), *faces, settings(rounds=None, minutes=1.5, warmup=0), None)
    assert 1 <= len(history.rounds) < 10
    assert history.last["seconds"] <= 90
    rates = [record["rate"] for record in history.rounds]
    assert rates == sorted(rates, reverse=True)


def test_mixed_precision_trains_to_finite_weights(faces):
    model = tiny("forest", faces)
    history = training.fit(model, *faces, settings(rounds=1, amp=True), None)
    assert np.isfinite(history.last["loss"])
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_average_is_what_is_evaluated_and_kept(faces, tmp_path):
    model = tiny("dense", faces)
    training.fit(model, *faces, settings(rounds=2, ema=0.5), tmp_path)
    saved = training.load(tmp_path / "checkpoint.pt")
    assert saved.ema.keys() == dict(model.named_parameters()).keys()
    same_state(saved.ema, {name: parameter.detach() for name, parameter in model.named_parameters()})
    assert any(not torch.equal(saved.ema[name], saved.weights[name]) for name in saved.ema)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(saved.build(tmp_path)(images), model(images))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_not_finite_stops_with_one_sentence_and_keeps_the_checkpoint(broken, faces, tmp_path):
    model = tiny("dense", faces)
    own, calls = model.loss, []

    def loss(images, points, weight=None):
        calls.append(1)
        value = own(images, points, weight)
        if len(calls) < 5:
            return value
        if broken == "loss":
            return value * float("nan")
        return value + 0 * (next(model.parameters()).sum() * 0).sqrt()  # d sqrt(0) = inf, times 0: NaN

    model.loss = loss
    with pytest.raises(TrainingError) as caught:
        training.fit(model, *faces, settings(), tmp_path)
    what = "the loss is nan" if broken == "loss" else "the gradient's norm is nan"
    kept = f"the checkpoint of round 1 is kept in {tmp_path / 'checkpoint.pt'}"
    assert str(caught.value) == f"training stopped: {what} in round 2, step 2; {kept}"
    assert training.load(tmp_path / "checkpoint.pt").round == 1


def test_resume_refuses_another_run(faces, tmp_path):
    config = settings(rounds=1)
    training.fit(tiny("dense", faces), *faces, config, tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: was written with rate = 0.003, got 0.1"):
        training.fit(tiny("dense", faces), *faces, dataclasses.replace(config, rate=0.1), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"was written with training faces = 12, got 5"):
        training.fit(tiny("dense", faces), faces[1], faces[1], config, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"was written with (model|config) = "):
        training.fit(tiny("forest", faces), *faces, config, tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs the folder"):
        training.fit(tiny("dense", faces), *faces, config, None, resume=True)
    with pytest.raises(CheckpointError, match="no such file"):
        training.fit(tiny("dense", faces), *faces, config, tmp_path / "none", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": None}, "rounds or minutes must be given, got neither"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"batch": 2.5}, "batch must be an integer of at least 1, got 2.5"),
        ({"leaf_faces": -1}, "leaf_faces must be an integer of at least 0, got -1"),
        ({"minutes": float("nan")}, "minutes must be a positive finite number, got nan"),
        ({"rate": 0.0}, "rate must be a positive finite number, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"warmup": 0.1}, "warmup must be an integer of at least 0, got 0.1"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"steepness": (0.0, 2.0)}, r"steepness must be two positive numbers, got \(0.0, 2.0\)"),
        ({"schedule": "poly"}, "schedule must be one of cosine, step, constant, multistep, plateau, got 'poly'"),
        ({"annealing": "cosine"}, "annealing must be one of linear, exponential, got 'cosine'"),
        ({"normalizer": "nose"}, "normalizer must be one of inter_ocular, inter_pupil, box, got 'nose'"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        settings(**changes)


def test_sets_that_do_not_fit(faces):
    with pytest.raises(ValueError, match="must be of one size, got 32 and 16"):
        training.fit(tiny("dense", faces), faces[0], Cached(SyntheticFaces(2, 16), 16), settings(), None)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_meet_their_ends_and_refuse_the_rest():
    factor = training.learning_rate_factor
    assert [factor("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.505, 0.01])
    assert [factor("step", p) for p in (0.0, 0.49, 0.5, 0.75, 0.9)] == pytest.approx([1, 1, 0.3, 0.09, 0.027])
    assert factor("constant", 0.7) == 1.0
    assert training.anneal("linear", 2.0, 4.0, 2.0) == 4.0 and training.anneal("exponential", 2.0, 8.0, 0.5) == 4.0
    for call, message in (
        (lambda: factor("x", 0.1), "kind must be one of cosine, step, constant, multistep, got 'x'"),
        (lambda: training.anneal("x", 1, 2, 0.5), "kind must be one of linear, exponential, got 'x'"),
        (lambda: training.anneal("exponential", 0, 2, 0.5), "exponential needs positive bounds, got 0 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    training.fit(tiny("forest", faces), *faces, settings(rounds=1), out)
    return out / "checkpoint.pt"


def test_checkpoint_is_plain_data_and_rebuilds_the_model(run, faces):
    content = torch.load(run, weights_only=True)
    assert (content["model"], content["landmarks"], content["size"]) == ("forest", 68, SIZE)
    assert torch.equal(content["mean_shape"], training.mean_shape(faces[0]))
    model = training.load(run).build(run)
    assert not model.training and model.config() == content["config"]


def test_a_crash_between_write_and_replace_leaves_the_old_file(run, monkeypatch, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(run.read_bytes())

    def crash(source, target):
        assert os.path.getsize(source) > 0  # the new file was complete
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        training.checkpoint.save(path, training.load(run))
    assert path.read_bytes() == run.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def half(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file.txt", half)
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_a_run_is_replaced_atomically(faces, tmp_path, monkeypatch):
    replaced, own = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(os.path.basename(b)), own(a, b)))
    training.fit(tiny("dense", faces), *faces, settings(rounds=1), tmp_path)
    assert replaced == ["steps.jsonl", "checkpoint.pt", "best.pt", "metrics.jsonl", "round_0001.png", "inside_0001.png"]


def _cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda content: b"", "empty file, not a checkpoint"),
        (lambda content: b"hello, world", "not a checkpoint of fastforest"),
        (_cut, "truncated or damaged checkpoint"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_files_that_are_no_checkpoint(make, reason, run, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(make(run.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        training.load(path)
    assert str(caught.value) == f"{path}: {reason}"


def test_torch_files_that_are_no_checkpoint(run, tmp_path):
    content = torch.load(run, weights_only=True)
    lacking = {key: value for key, value in content.items() if key != "weights"}
    cases = [
        ({"weights": torch.zeros(2)}, "not a checkpoint of fastforest"),
        (io.StringIO, "not a checkpoint of fastforest (holds more than tensors and numbers)"),
        (content | {"version": 99}, "checkpoint version 99, this library reads 1 and 2"),
        (lacking, "the checkpoint lacks 'weights'"),
    ]
    for value, reason in cases:
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(CheckpointError) as caught:
            training.load(tmp_path / "x.pt")
        assert str(caught.value) == f"{tmp_path / 'x.pt'}: {reason}"
    with pytest.raises(CheckpointError, match="is a folder"):
        training.load(tmp_path)


def test_checkpoint_of_another_shape(run):
    saved = training.load(run)
    wrong = dataclasses.replace(saved, config=saved.config | {"leaves": 32})
    with pytest.raises(CheckpointError, match="does not fit the model 'forest': size mismatch"):
        wrong.build(run)
    with pytest.raises(CheckpointError, match="does not fit the model 'oak'"):
        dataclasses.replace(saved, model="oak").build(run)


# --- reports and pictures ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_draws_on_terminals_only():
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        bar = report.Bar("round 1", 4, stream)
        for done in range(1, 5):
            time.sleep(0.11)  # it redraws at most ten times a second
            bar.show(done, "loss 1")
        bar.close()
        assert ("100 %" in stream.getvalue() and stream.getvalue().endswith("\r")) == drawn
        assert bool(stream.getvalue()) == drawn


def test_metrics_file_has_no_nan(tmp_path):
    report.write_metrics(tmp_path / "m.jsonl", [{"round": 1, "loss": float("nan")}])
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"round": 1, "loss": None}


def test_annotate_draws_on_the_points_and_nowhere_else():
    image = np.full((600, 640, 3), 90, np.uint8)
    points = np.array([[100.0, 50.0], [400.0, 300.0]])
    drawn = draw.annotate(image, points)
    assert drawn.shape == image.shape and (image == 90).all()
    changed = (drawn != image).any(axis=2)
    rows, columns = np.nonzero(changed)
    near = np.minimum(*(np.hypot(columns - x, rows - y) for x, y in points))
    assert near.max() < 6
    for x, y in points:
        close = np.hypot(columns - x, rows - y) < 6
        assert columns[close].mean() == pytest.approx(x, abs=0.3) and rows[close].mean() == pytest.approx(y, abs=0.3)


def test_ellipses_lie_along_the_covariance():
    image = np.zeros((600, 600, 3), np.uint8)
    covariance = 900 * np.array([[[1.0, 0.8], [0.8, 1.0]]])
    drawn = draw.annotate(image, np.array([[300.0, 300.0]]), covariance=covariance)
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert np.corrcoef(rows, columns)[0, 1] > 0.5
    # two standard deviations along x: 60 pixels
    assert columns.max() - 300 == pytest.approx(60, abs=3)


def test_small_images_are_enlarged_and_odd_numbers_of_points_drawn():
    assert draw.annotate(np.zeros((20, 30, 3), np.uint8), torch.full((5, 2), 8.0)).shape == (360, 540, 3)
    images = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    sheet = draw.contact_sheet(images, torch.rand(7, 68, 2) * 40 - 10, torch.rand(7, 68, 2) * 16, tile=64)
    assert sheet.shape == (4 + 2 * 68, 4 + 6 * 68, 3)


def test_figures_have_their_documented_shapes():
    rounds = [{"seconds": 60.0 * i, "loss": 2.0 / i, "NME[box]": 0.3 / i} for i in range(1, 4)]
    assert draw.curves_figure({"forest": rounds, "dense": rounds[:1]}, "box").shape == (440, 1000, 3)
    assert draw.ced_figure({"forest": torch.rand(9) / 9}, "box").shape == (480, 640, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw.annotate(np.zeros((4, 4), np.uint8), np.zeros((1, 2))), "annotate: image must be uint8"),
        (lambda: draw.annotate(np.zeros((4, 4, 3), np.uint8), np.zeros(2)), r"annotate: points must be \[P, 2\]"),
        (
            lambda: draw.annotate(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), covariance=np.zeros((1, 2, 2))),
            r"annotate: covariance must be \[2, 2, 2\], got \[1, 2, 2\]",
        ),
        (lambda: draw.contact_sheet(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2)), "contact_sheet: images must be"),
        (
            lambda: draw.contact_sheet(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 2, 2)),
            r"contact_sheet: points must be \[1, P, 2\]",
        ),
        (
            lambda: draw.contact_sheet(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 2), captions=[]),
            "captions must hold 1 words, got 0",
        ),
    ],
)
def test_drawing_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
