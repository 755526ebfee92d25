"""Training: schedules, checkpoints, atomic files, exact repetition and resumption. Tiny models, drawn faces."""

import dataclasses
import io
import json
import os
import sys
import time

import numpy as np
import pytest
import torch

from fastforest import models, training
from fastforest.data import Cached, SyntheticFaces
from fastforest.training import TrainConfig, TrainingError, pictures, report, schedules
from fastforest.training.checkpoint import CheckpointError, write_atomically

SIZE = 32
TINY = {
    "forest": {"canvas": 8, "leaves": 16, "rank": 8, "backbone_options": {"width": 4, "code": 8}},
    "dense": {"backbone_options": {"width": 4, "code": 8}},
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


# the loop


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


def test_best_checkpoint_is_of_the_round_with_the_lowest_watched_error(faces, tmp_path):
    rates = settings(rounds=4, rate=0.05, schedule="constant")  # too high: not every round is better
    for name, watch in (("held_out", "NME[inter_ocular]"), ("loss", "loss")):
        out = tmp_path / name
        training.fit(tiny("dense", faces), *faces, dataclasses.replace(rates, watch=name), out)
        errors = [record[watch] for record in training.load(out / "checkpoint.pt").history]
        assert training.load(out / "best.pt").round == 1 + errors.index(min(errors))


def test_steps_have_lines_of_their_own(faces, tmp_path):
    history = training.fit(tiny("dense", faces), *faces, settings(rounds=2, log_every=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() == {"step", "loss", "rate", "gradient_norm", "images_per_second"} for line in lines)
    assert lines[-1]["rate"] == history.last["rate"] and lines[-1]["images_per_second"] > 0


def test_tensorboard_gets_the_numbers_of_steps_and_rounds(faces, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings(rounds=2, log_every=1, tensorboard=True)
    history = training.fit(tiny("dense", faces), *faces, config, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("steps/loss")] == list(range(1, 7))
    assert events.Scalars("rounds/loss")[-1].value == pytest.approx(history.last["loss"])


def test_tensorboard_that_is_not_installed_is_told_before_training(faces, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"needs the package tensorboard: pip install 'fastforest\[tensorboard\]'"):
        training.fit(tiny("dense", faces), *faces, settings(tensorboard=True), tmp_path)


def test_patience_ends_a_run_that_no_longer_improves(faces):
    config = settings(rounds=9, patience=2, min_delta=10.0)  # an improvement that no round can make but the first
    history = training.fit(tiny("dense", faces), *faces, config, None)
    assert len(history.rounds) == 3


def test_plateau_drops_the_rate_when_the_error_is_stuck(faces):
    config = settings(rounds=4, schedule="plateau", plateau=1, min_delta=10.0, drop=0.5, warmup=0)
    history = training.fit(tiny("dense", faces), *faces, config, None)
    assert [record["rate"] for record in history.rounds] == pytest.approx([3e-3, 3e-3, 1.5e-3, 0.75e-3])


def test_landmarks_that_are_not_known_train_nothing(faces):
    class Masked:
        size = SIZE

        def __len__(self):
            return len(faces[0])

        def batch(self, rows):
            images, points = faces[0].batch(rows)
            points = points.clone()
            points[torch.as_tensor(rows) > 0, :30] = torch.nan  # known in the first face alone
            return images, points

    model, weights, known = tiny("forest", faces), [], []
    own = model.loss

    def loss(images, points, weight):
        weights.append(weight)
        known.append(points.isfinite().all(-1).float())
        return own(images, points, weight)

    model.loss = loss
    history = training.fit(model, Masked(), faces[1], settings(rounds=1), None, augment=unchanged)
    assert all(torch.equal(weight, one) for weight, one in zip(weights, known, strict=True))
    assert all(weight[:, 30:].all() and not weight[:, :30].all() for weight in weights)
    assert np.isfinite(history.last["loss"]) and history.last["dead_leaves"] is not None
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    weights.clear()
    training.fit(model, *faces, settings(rounds=1), None)
    assert weights == [None] * 3


def unchanged(images, points, generator):
    return images.float() / 255, points


def test_model_starts_once_from_a_bounded_sample_of_faces_as_training_sees_them(faces, tmp_path):
    started, config = [], settings(rounds=1, leaf_faces=8)

    def startable(seed=0):
        model = tiny("forest", faces, seed)
        model.start = lambda images, points: started.append((images, points))
        return model

    training.fit(startable(), *faces, config, tmp_path, augment=unchanged)
    training.fit(startable(1), *faces, dataclasses.replace(config, rounds=2), tmp_path, resume=True, augment=unchanged)
    ((images, points),) = started
    assert images.shape == (8, 3, SIZE, SIZE) and points.shape == (8, 68, 2)
    whole = faces[0].batch(range(len(faces[0])))[0].float() / 255
    assert all(any(torch.equal(image, other) for other in whole) for image in images)


def test_an_evaluation_halves_its_batches_where_memory_ends(faces):
    model = tiny("forest", faces)
    whole, sizes, own = training.predict(model, faces[1])[0], [], model.forward

    def scarce(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return own(images)

    model.forward = scarce
    found = training.predict(model, faces[1])[0]
    torch.testing.assert_close(found, whole)
    assert max(sizes) == len(faces[1]) and sum(size for size in sizes if size <= 3) == len(faces[1])
    model.forward = lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        training.predict(model, faces[1])


def test_first_share_of_a_run_may_train_the_backbone_alone(faces):
    model, calls = tiny("forest", faces), []
    own = model.loss
    model.pretrain_loss = lambda *batch: calls.append("pretrain") or own(*batch)
    model.loss = lambda *batch: calls.append("loss") or own(*batch)
    history = training.fit(model, *faces, settings(rounds=3, pretrain=0.5), None)
    assert calls == ["pretrain"] * 5 + ["loss"] * 4
    assert [record["dead_leaves"] is None for record in history.rounds] == [True, False, False]
    with pytest.raises(ValueError, match="pretrain_loss needs a model made with pretrain=True"):
        training.fit(tiny("dense", faces), *faces, settings(pretrain=0.5), None)
    other = torch.nn.Linear(1, 1)
    other.name = "line"
    with pytest.raises(TrainingError, match=r"train.pretrain must be 0 for the model 'line', .* got 0.5"):
        training.fit(other, *faces, settings(pretrain=0.5), None)


def test_leaves_are_updated_as_often_as_asked(faces):
    model, own, calls = tiny("forest", faces), [], []
    own = model.update
    model.update = lambda: calls.append(1) or own()
    training.fit(model, *faces, settings(rounds=2, leaf_updates=3), None)
    assert len(calls) == 6


def test_sixteen_bit_floats_scale_the_loss_and_resume(faces, tmp_path):
    config = settings(rounds=3, amp="fp16")
    whole, parts = tiny("dense", faces), tiny("dense", faces)
    training.fit(whole, *faces, config, tmp_path / "whole")
    with pytest.raises(Interruption):
        training.fit(parts, *faces, config, tmp_path / "parts", on_round=stop_after(2))
    training.fit(parts, *faces, config, tmp_path / "parts", resume=True)
    same_state(whole.state_dict(), parts.state_dict())
    scaler = training.load(tmp_path / "whole" / "checkpoint.pt").scaler
    assert scaler == training.load(tmp_path / "parts" / "checkpoint.pt").scaler and scaler["scale"] > 1
    assert all(bool(tensor.isfinite().all()) for tensor in whole.state_dict().values())


def test_scaled_loss_that_overflows_skips_the_step(faces):
    model = tiny("dense", faces)
    own, calls, states = model.loss, [], []

    def loss(*batch):
        calls.append(1)
        states.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        # the gradient of sqrt at 0 is infinite: 0 times it is NaN
        poison = 0 * (next(model.parameters()).sum() * 0).sqrt() if len(calls) == 2 else 0
        return own(*batch) + poison

    model.loss = loss
    training.fit(model, *faces, settings(rounds=1, amp="fp16"), None)
    same_state(states[1], states[2])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_scaled_loss_that_never_fits_ends_the_run(faces):
    model = tiny("dense", faces)
    own = model.loss
    model.loss = lambda *batch: own(*batch) + 0 * (next(model.parameters()).sum() * 0).sqrt()
    with pytest.raises(TrainingError, match=r"the gradient's norm is nan in round 1, step 17"):  # 65536 / 2^17 < 1
        training.fit(model, *faces, settings(rounds=1, steps=20, amp="fp16"), None)


# memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000 bytes."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def greedy(faces, most, error):
    """A model that runs out of memory for more than `most` faces."""
    model = tiny("dense", faces)
    own = model.loss

    def loss(images, points, weight=None):
        if len(images) > most:
            raise error
        return own(images, points, weight)

    model.loss = loss
    return model


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "python", "linux", "windows", "driver", "cublas"])
def test_memory_that_runs_out_halves_the_batch_for_the_rest_of_the_run(error, faces, tmp_path, caplog):
    config = settings(rounds=2, log_every=1)
    history = training.fit(greedy(faces, 2, error), *faces, config, tmp_path)
    assert [record["batch"] for record in history.rounds] == [2, 2] and history.last["step"] == 6
    assert [record.message for record in caplog.records] == ["out of memory at 4 faces a step: going on with 2"]
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "event": "out of memory", "batch": 2} and len(lines) == 7
    resumed = training.fit(greedy(faces, 2, error), *faces, settings(rounds=3, log_every=1), tmp_path, resume=True)
    assert resumed.last["batch"] == 2 and len(caplog.records) == 1  # it is known by then


def test_memory_that_no_batch_has_is_one_sentence(faces, tmp_path):
    with pytest.raises(TrainingError) as caught:
        training.fit(greedy(faces, 0, OUT_OF_MEMORY[0]), *faces, settings(), tmp_path)
    assert str(caught.value) == (
        "training stopped: out of memory at 1 faces a step, and there is no smaller batch in round 1, step 1; "
        "no checkpoint was written yet"
    )


def test_ranks_that_share_batch_norm_cannot_halve(faces, monkeypatch):
    monkeypatch.setattr(training.ranks, "count", lambda: 2)
    with pytest.raises(TrainingError, match="out of memory at 4 faces a step, which ranks that share BatchNorm cannot"):
        training.fit(greedy(faces, 0, OUT_OF_MEMORY[0]), *faces, settings(), None)


def test_model_that_no_checkpoint_can_name_is_told_before_it_trains(faces, tmp_path):
    given = {"landmarks": 68, "mean_shape": training.mean_shape(faces[0]).tolist(), "image_size": faces[0].size}
    backbone = torch.nn.Conv2d(3, 8, 3, stride=4, padding=1)
    model = models.build("coordinates", given | {"backbone": backbone})
    sentence = "out must be None for this model: CoordinateRegression: the backbone was given as a Conv2d, which a conf"
    with pytest.raises(TrainingError, match=sentence):
        training.fit(model, *faces, settings(rounds=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert training.fit(model, *faces, settings(rounds=1), None).last["round"] == 1


def test_batch_of_fewer_faces_than_ranks_and_a_normalizer_without_eyes_are_told(faces, monkeypatch):
    with pytest.raises(TrainingError, match=r"train.normalizer does not suit the landmarks: .* got 5"):
        training.fit(tiny("dense", faces), *map(Few, faces), settings(normalizer="inter_pupil"), None)
    monkeypatch.setattr(training.ranks, "count", lambda: 5)
    with pytest.raises(TrainingError, match=r"train.batch must be at least the number of ranks, 5, got 4"):
        training.fit(tiny("dense", faces), *faces, settings(), None)


class Few:
    """Faces of five landmarks."""

    def __init__(self, faces):
        self.faces, self.size = faces, faces.size

    def __len__(self):
        return len(self.faces)

    def batch(self, rows):
        images, points = self.faces.batch(rows)
        return images, points[:, :5]


def test_other_errors_are_not_taken_for_memory(faces):
    with pytest.raises(RuntimeError, match="shapes"):
        training.fit(greedy(faces, 0, RuntimeError("shapes differ")), *faces, settings(), None)


# configuration


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
        ({"pretrain": 1.0}, r"pretrain must be in \[0, 1\), got 1.0"),
        ({"min_delta": -0.1}, "min_delta must not be negative, got -0.1"),
        ({"drop": 1.0}, r"drop must be in \(0, 1\), got 1.0"),
        ({"milestones": (0.5, 0.5)}, r"milestones must be increasing shares of the run in \(0, 1\), got \(0.5, 0.5\)"),
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"amp": "fp8"}, "amp must be one of off, bf16, fp16, got 'fp8'"),
        ({"watch": "moon"}, "watch must be one of held_out, loss, got 'moon'"),
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


# schedules


def test_schedules_meet_their_ends_and_refuse_the_rest():
    factor = training.learning_rate_factor
    assert [factor("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.505, 0.01])
    assert [factor("step", p) for p in (0.0, 0.49, 0.5, 0.75, 0.9)] == pytest.approx([1, 1, 0.3, 0.09, 0.027])
    assert factor("constant", 0.7) == 1.0
    steps = [factor("multistep", p, milestones=(0.2, 0.6), drop=0.5) for p in (0.0, 0.19, 0.2, 0.59, 0.6, 1.0)]
    assert steps == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    assert factor("multistep", 1.0, milestones=(0.1, 0.2, 0.3)) == pytest.approx(0.001)  # no floor
    stuck = [0.5, 0.4, 0.41, 0.4, 0.3, float("nan"), 0.3, 0.3, 0.3]
    factors = [schedules.plateau_factor(stuck[:n], 2, drop=0.5) for n in range(len(stuck) + 1)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125])
    assert schedules.plateau_factor([0.5, 0.4, 0.3], 1, min_delta=0.15) == pytest.approx(0.1)
    assert [schedules.stale_rounds(stuck[:n]) for n in range(len(stuck) + 1)] == [0, 0, 0, 1, 2, 0, 1, 2, 3, 4]
    assert training.anneal("linear", 2.0, 4.0, 2.0) == 4.0 and training.anneal("exponential", 2.0, 8.0, 0.5) == 4.0
    for call, message in (
        (lambda: factor("x", 0.1), "kind must be one of cosine, step, constant, multistep, got 'x'"),
        (lambda: training.anneal("x", 1, 2, 0.5), "kind must be one of linear, exponential, got 'x'"),
        (lambda: training.anneal("exponential", 0, 2, 0.5), "exponential needs positive bounds, got 0 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# files


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


@pytest.mark.parametrize("name", ["forest", "dense"])
def test_checkpoint_of_version_1_is_read_and_goes_on(name, faces, tmp_path):
    config, path = settings(rounds=2, amp=True, ema=0.5), tmp_path / "checkpoint.pt"
    whole, parts = tiny(name, faces), tiny(name, faces)
    training.fit(whole, *faces, config, None)
    with pytest.raises(Interruption):
        training.fit(parts, *faces, config, tmp_path, on_round=stop_after(1))
    content = torch.load(path, weights_only=True)
    torch.save(as_version_1(content), path)
    old = training.load(path)
    assert (old.batch, old.scaler, old.settings) == (4, {}, {})
    same_state(old.build(path).state_dict(), content["weights"] | content["ema"])
    other = old.build(path)
    training.fit(other, *faces, config, tmp_path, resume=True)
    same_state(whole.state_dict(), other.state_dict())


def as_version_1(content):
    """What version 1 would have written."""
    old = {key: value for key, value in content.items() if key not in ("scaler", "batch", "settings")}
    later = ("backbone", "backbone_options", "pretrain", "decode")
    old["config"] = {key: value for key, value in content["config"].items() if key not in later}
    old["config"] |= content["config"]["backbone_options"] | {"blocks": [1, 1, 1, 1]}
    old["train"] = {name: content["train"][name] for name in VERSION_1_TRAIN} | {"amp": True}
    if content["model"] == "dense":
        for part in ("weights", "ema"):
            names = {key: key.replace("heads.0.", "head.").replace("maps.0.", "maps.") for key in content[part]}
            old[part] = {names[key]: tensor for key, tensor in content[part].items()}
    return old | {"version": 1}


VERSION_1_TRAIN = (
    *("rounds", "minutes", "steps", "batch", "rate", "weight_decay", "schedule", "warmup", "steepness"),
    *("annealing", "leaf_faces", "clip", "ema", "amp", "seed", "normalizer", "threshold"),
)


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


# reports and pictures


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


def test_leaves_lie_side_by_side():
    leaves = np.arange(12.0).reshape(3, 2, 2)
    mosaic = pictures.leaf_mosaic(leaves, columns=2)
    assert mosaic.shape == (5, 5) and np.isnan(mosaic[2]).all() and np.isnan(mosaic[:, 2]).all()
    np.testing.assert_allclose(mosaic[:2, 3:], leaves[1] / 7)
    np.testing.assert_allclose(mosaic[3:, :2], leaves[2] / 11)
    assert np.isnan(mosaic[3:, 3:]).all()


def test_inside_are_the_leaves_that_a_landmark_selects(faces):
    assert pictures.look_inside(tiny("dense", faces), faces[1]) is None
    model = tiny("forest", faces).eval()
    inside = pictures.look_inside(model, faces[1])
    assert [stage.name for stage in inside.stages] == ["coarse", "fine"] and inside.landmark == 34
    for stage in inside.stages:
        assert stage.leaves.shape == (16, 8, 8) and stage.prob.sum() == pytest.approx(1)
    images, points = faces[1].batch([0])
    np.testing.assert_array_equal(inside.image, images[0].permute(1, 2, 0))
    np.testing.assert_allclose(inside.truth, points[0, 34])
    # a model may name its own leaves
    model.selections = lambda images: [("own", torch.ones(2, 3, 4) / 12, torch.full((1, 68, 2), 0.5))]
    own = pictures.look_inside(model, faces[1])
    assert [(stage.name, stage.leaves.shape, list(stage.prob)) for stage in own.stages] == [
        ("own", (2, 3, 4), [0.5] * 2)
    ]
    rounds = [{"step": 10 * i, "loss": 100.0 / 10**i, "NME[box]": 0.1 / i} for i in (1, 2, 3)]
    heights = [pictures.inside_figure(what, rounds, "box").shape for what in (None, own, inside)]
    assert heights == [(340, 1200, 3), (680, 1200, 3), (1020, 1200, 3)]


def test_metrics_file_has_no_nan(tmp_path):
    report.write_metrics(tmp_path / "m.jsonl", [{"round": 1, "loss": float("nan")}])
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"round": 1, "loss": None}
