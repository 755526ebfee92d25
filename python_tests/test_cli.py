"""The command line: what it writes, what it prints, and one sentence for every bad input. Drawn faces only."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastforest import config, data, models, training
from fastforest.cli import main
from fastforest.training import photos

SIZE = 32
TINY = ["--data", "synthetic", "--faces", "20", "--size", str(SIZE), "--rounds", "1", "--batch", "4", "--steps", "2"]

FILES = [
    "best.pt",
    "checkpoint.pt",
    "metrics.jsonl",
    "rounds/inside_0001.png",
    "rounds/round_0001.png",
    "steps.jsonl",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def small_models():
    """The command line builds models of their default widths: here a sixteenth of that."""
    own = models.build
    backbone = {"backbone_options": {"width": 4, "code": 8}}
    shrunk = {"forest": backbone | {"leaves": 16, "canvas": 8}, "dense": backbone}

    def build(name, config, points=None):
        small = {}
        for key, value in shrunk.get(name, {}).items():
            default = inspect.signature(models.MODELS[name]).parameters[key].default
            small |= {key: value} if config.get(key, default) == default else {}
        return own(name, config | small, points)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", build)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread, small_models):
    """A trained run."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A drawn face in a larger picture; its path and true landmarks."""
    image, points = data.draw_face(3, 7, 160)
    canvas = np.full((300, 400, 3), 128, np.uint8)
    canvas[100:260, 180:340] = image
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(canvas).save(path)
    return path, points + np.array([180, 100], np.float32)


@pytest.fixture
def pts_folder(tmp_path):
    """Ten faces as .pts files."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(10):
        image, points = data.draw_face(0, index, 48)
        Image.fromarray(image).save(folder / f"{index}.png")
        data.write_pts(folder / f"{index}.pts", points)
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def complaint(capsys, *arguments, parsing=False):
    """Runs a command that must fail: code 2, nothing on standard output, one line on standard error, which it gives."""
    if parsing:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        code = stopped.value.code
    else:
        code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err.strip()


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_prints_rounds_metrics_and_the_picture(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *TINY, "--out", str(out), "--model", "dense", "--ema", "0.5", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dense: ") and "18 faces of 32 x 32 pixels, 2 held out, at most 1 rounds" in lines[0]
    assert lines[1].startswith("round   1") and "NME[inter_ocular]" in lines[1]
    assert (
        lines[2].startswith("NME[inter_ocular]") and "AUC@0.08[inter_ocular]" in lines[2] and "(2 images)" in lines[2]
    )
    assert lines[3] == f"checkpoint {out / 'checkpoint.pt'}"
    assert lines[4] == f"picture    {out / 'rounds' / 'round_0001.png'}"
    assert files(out) == FILES


def test_resume_goes_on_with_the_settings_of_the_checkpoint(tmp_path, capsys):
    base = [*TINY, "--steepness", "1", "2"]
    rounds = base.index("--rounds") + 1
    assert main(["train", *base[:rounds], "2", *base[rounds + 1 :], "--out", str(tmp_path / "run")]) == 0
    saved = training.load(tmp_path / "run" / "checkpoint.pt")
    again = ["train", *TINY, "--out", str(tmp_path / "run"), "--resume", "--rounds", "3"]
    assert main(again) == 0
    resumed = training.load(tmp_path / "run" / "checkpoint.pt")
    assert (saved.round, resumed.round) == (2, 3) and resumed.history[:2] == saved.history
    assert resumed.train["steepness"] == (1.0, 2.0) and resumed.train["steps"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    assert main(["train", *TINY[:4], "--out", str(tmp_path / "run"), "--resume"]) == 0  # nothing is left to do
    assert capsys.readouterr().out.endswith(f"picture    {tmp_path / 'run' / 'rounds' / 'round_0003.png'}\n")
    path = tmp_path / "run" / "checkpoint.pt"
    more = ["--data", "synthetic", "--faces", "30"]
    assert main(["train", *more, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert capsys.readouterr().err == f"fastforest: {path}: was written with training faces = 18, got 27\n"


def test_configuration_from_a_file_words_and_options_is_kept_and_used(tmp_path, capsys):
    out, path = tmp_path / "run", tmp_path / "run.toml"
    path.write_text('[data]\npath = "synthetic"\nfaces = 20\nsize = 32\n[train]\nsteps = 2\nbatch = 8\nrounds = 9\n')
    arguments = ["train", "--config", str(path), "--set", "train.batch=6", "--set", "augment.blur=0", "--rounds", "1"]
    assert main([*arguments, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, "--out", str(out)]) == 0
    assert "18 faces of 32 x 32 pixels" in capsys.readouterr().out
    saved = training.load(out / "checkpoint.pt")
    chosen = config.resolve(saved.settings)
    assert chosen.toml() == printed and (tmp_path / "run.toml").exists()
    assert (chosen.train.batch, chosen.train.steps, chosen.train.rounds, chosen.augment["blur"]) == (6, 2, 1, 0.0)
    # a resumed run needs nothing but its folder, and may be given what is so already
    assert main(["train", "--out", str(out), "--resume", "--rounds", "2", "--set", "train.batch=6"]) == 0
    assert training.load(out / "checkpoint.pt").round == 2
    capsys.readouterr()
    for word, was in (
        ("train.rate=0.5", "train.rate = 0.002, got 0.5"),
        ("model.canvas=9", "model.canvas = 32, got 9"),
    ):
        error = complaint(capsys, "train", "--out", out, "--resume", "--set", word)
        assert error == f"fastforest: {out / 'checkpoint.pt'}: was written with {was}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "train.bacth=3"], "train.bacth is no key: the nearest is train.batch, a whole number"),
        (["--set", "train.batch=many"], "train.batch must be a whole number, got 'many'"),
        (["--set", "batch=3"], "--set must be section.key=value, got 'batch=3': the nearest is train.batch"),
        (
            ["--set", "train.normalizer=inter_pupil", "--set", "train.batch=0"],
            "train.batch must be an integer of at least 1",
        ),
        (["--config", "none.toml"], "none.toml: No such file or directory"),
        ([], "--data is needed: synthetic, or a folder (or data.path in --config)"),
    ],
)
def test_configuration_that_is_refused(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if not arguments else ["--data", "synthetic"]
    assert complaint(capsys, "train", *given, *arguments).startswith(f"fastforest: {sentence}")
    assert files(tmp_path) == []


def test_groups_are_made_from_the_landmarks(tmp_path, capsys):
    small = ["groups=3", "trees=1", "depth=2", "units=8", "canvas=8", "backbone_options={width = 4, code = 8}"]
    words = [part for word in small for part in ("--set", f"model.{word}")]
    assert main(["train", *TINY, "--out", str(tmp_path), "--model", "heatmap_forest", *words]) == 0
    assert len(set(training.load(tmp_path / "checkpoint.pt").config["groups"])) == 3
    assert main(["train", "--out", str(tmp_path), "--resume", "--rounds", "2"]) == 0


def test_train_keeps_an_earlier_run_unless_told(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    error = complaint(capsys, "train", *TINY, "--out", run)
    assert error == (
        f"fastforest: {run / 'checkpoint.pt'}: exists already, continue it with --resume or replace it with --overwrite"
    )
    assert (run / "checkpoint.pt").read_bytes() == before
    assert "exclude each other" in complaint(capsys, "train", *TINY, "--out", run, "--resume", "--overwrite")


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path, capsys):
    (tmp_path / "rounds").mkdir()
    for name in ("checkpoint.pt", "rounds/round_0009.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    assert main(["train", *TINY, "--out", str(tmp_path), "--overwrite"]) == 0
    assert files(tmp_path) == sorted([*FILES, "notes.txt"])


def test_default_out_is_a_new_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", *TINY]) == 0
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["synthetic-forest", "synthetic-forest-2"]


def test_train_reads_a_folder_of_pts_files(pts_folder, tmp_path, capsys):
    arguments = ["--size", "32", "--rounds", "1", "--batch", "4", "--steps", "1"]
    assert main(["train", "--data", str(pts_folder), "--out", str(tmp_path / "run"), *arguments]) == 0
    assert "9 faces of 32 x 32 pixels, 1 held out" in capsys.readouterr().out


def _broken_sets(folder):
    """(what is done to the folder, what the sentence says)"""
    first, image = folder / "0.pts", folder / "3.png"

    def truncated_image():
        image.write_bytes(image.read_bytes()[:300])

    def nan_point():
        first.write_text(first.read_text().replace(first.read_text().splitlines()[5], "nan 3.0"))

    def wrong_number():
        data.write_pts(first, np.ones((5, 2)))

    def truncated_points():
        first.write_text("\n".join(first.read_text().splitlines()[:20]))

    def no_image():
        image.unlink()

    def too_few():
        (folder / "0.pts").unlink()

    def empty():
        for path in folder.iterdir():
            path.unlink()

    return {
        "truncated image": (truncated_image, f"{image}: cannot decode the image"),
        "NaN point": (nan_point, f"{first}: point 2 is not finite"),
        "number of points": (wrong_number, f"{first}: expected 68 points, got 5"),
        "truncated points": (truncated_points, f"{first}: truncated"),
        "no image": (no_image, f"{folder / '3.pts'}: no image of the same name"),
        "too few": (too_few, f"{folder}: needs at least 10 faces to hold every tenth out, got 9"),
        "empty folder": (empty, f"{folder}: holds neither landmarks.npz nor .pts files"),
    }


@pytest.mark.parametrize("case", list(_broken_sets(Path())))
def test_broken_sets(case, pts_folder, tmp_path, capsys, run):
    breaking, sentence = _broken_sets(pts_folder)[case]
    breaking()
    out = tmp_path / "run"
    error = complaint(capsys, "train", "--data", pts_folder, "--out", out, "--size", 32, "--rounds", 1)
    assert error.startswith(f"fastforest: {sentence}")
    assert not out.exists()
    if case != "too few":
        error = complaint(capsys, "evaluate", "--data", pts_folder, "--checkpoint", run / "checkpoint.pt", "--all")
        assert error.startswith(f"fastforest: {sentence}")


def test_missing_folder(tmp_path, capsys):
    error = complaint(capsys, "train", "--data", tmp_path / "none", "--out", tmp_path / "run")
    assert error == f"fastforest: {tmp_path / 'none'}: no such folder"
    assert files(tmp_path) == []


def test_output_that_cannot_be_written(tmp_path, capsys, run, photo):
    (tmp_path / "file").write_text("x")
    error = complaint(capsys, "train", *TINY, "--out", tmp_path / "file" / "run")
    assert error == f"fastforest: {tmp_path / 'file' / 'run'}: cannot be made, {tmp_path / 'file'} is not a folder"
    error = complaint(
        capsys, "predict", photo[0], "--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "file" / "x"
    )
    assert "is not a folder" in error
    assert files(tmp_path) == ["file"]


def test_output_without_permission(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastforest.cli.common.os.access", lambda path, mode: False)  # the superuser may write anywhere
    error = complaint(capsys, "train", *TINY, "--out", tmp_path / "run")
    assert error == f"fastforest: {tmp_path / 'run'}: cannot be written, no permission for {tmp_path}"


def test_full_disk_is_one_sentence(tmp_path, capsys, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", full)
    assert main(["train", *TINY, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"fastforest: {tmp_path / 'steps.jsonl'}: No space left on device\n"
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--minutes", "nan"], "argument --minutes: must be a finite number above 0, got 'nan'"),
        (["--minutes", "-1"], "argument --minutes: must be a finite number above 0, got '-1'"),
        (["--minutes", "inf"], "argument --minutes: must be a finite number above 0, got 'inf'"),
        (["--rounds", "0"], "argument --rounds: must be a whole number of at least 1, got '0'"),
        (["--batch", "many"], "argument --batch: must be a whole number of at least 2, got 'many'"),
        (["--ema", "1"], "argument --ema: must be a finite number between 0 and 1, got '1'"),
        (["--faces", "9"], "argument --faces: must be a whole number of at least 10, got '9'"),
        (["--model", "oak"], "argument --model: invalid choice: 'oak' (choose from "),
        (["--leaves"], "unrecognized arguments: --leaves"),
    ],
)
def test_nonsense_numbers(arguments, reason, capsys, tmp_path):
    error = complaint(capsys, "train", "--data", "synthetic", "--out", tmp_path / "x", *arguments, parsing=True)
    assert reason in error
    assert files(tmp_path) == []


def test_size_that_the_model_refuses(capsys, tmp_path):
    error = complaint(capsys, "train", "--data", "synthetic", "--faces", 10, "--size", 40, "--out", tmp_path / "x")
    assert error == "fastforest: model 'forest': Backbone: image_size must be a positive multiple of 32, got 40"
    assert files(tmp_path) == []


def test_interruption_keeps_the_last_round(tmp_path, capsys, monkeypatch):
    own = training.fit

    def fit(*arguments, on_round, **keywords):
        def interrupted(record):
            raise KeyboardInterrupt

        return own(*arguments, on_round=interrupted, **keywords)

    monkeypatch.setattr(training, "fit", fit)
    assert main(["train", *TINY, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "fastforest: interrupted\n"
    assert training.load(tmp_path / "checkpoint.pt").round == 1


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_numbers_of_training(run, capsys):
    assert main(["evaluate", "--checkpoint", str(run / "checkpoint.pt"), *TINY[:4]]) == 0
    printed = capsys.readouterr().out
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert printed.startswith(f"NME[inter_ocular] {100 * last['NME[inter_ocular]']:.2f} %")
    assert "(2 images)" in printed
    arguments = ["--all", "--normalizer", "box", "--threshold", "0.1"]
    assert main(["evaluate", "--checkpoint", str(run / "checkpoint.pt"), *TINY[:4], *arguments]) == 0
    printed = capsys.readouterr().out
    assert "NME[box]" in printed and "FR@0.1[box]" in printed and "(20 images)" in printed


def test_evaluate_refuses_another_number_of_points(run, tmp_path, capsys):
    for index in range(10):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{index}.png")
    landmarks = np.random.default_rng(0).uniform(5, 35, (10, 5, 2)).astype(np.float32)
    np.savez(tmp_path / "landmarks.npz", image=np.array([f"{i}.png" for i in range(10)]), landmarks=landmarks)
    error = complaint(capsys, "evaluate", "--data", tmp_path, "--checkpoint", run / "checkpoint.pt")
    assert error == f"fastforest: {tmp_path}: has 5 points, but {run / 'checkpoint.pt'} predicts 68"
    error = complaint(capsys, "train", "--data", tmp_path, "--out", run, "--resume")
    assert error == f"fastforest: {tmp_path}: has 5 points, but {run / 'checkpoint.pt'} was trained with 68"
    # and such a set trains a model of its own, measured by its box
    assert main(["train", "--data", str(tmp_path), *TINY[4:], "--out", str(tmp_path / "run")]) == 0
    assert "NME[box]" in capsys.readouterr().out


def test_evaluate_needs_held_out_faces_or_all(run, pts_folder, capsys):
    (pts_folder / "0.pts").unlink()
    error = complaint(capsys, "evaluate", "--data", pts_folder, "--checkpoint", run / "checkpoint.pt")
    assert error == f"fastforest: {pts_folder}: has only 9 faces, of which none is held out: add --all"
    assert main(["evaluate", "--data", str(pts_folder), "--checkpoint", str(run / "checkpoint.pt"), "--all"]) == 0
    assert "(9 images)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "predict", "resume"])
def test_checkpoints_that_cannot_be_used(command, run, photo, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    out = tmp_path / "out"

    def error():
        if command == "evaluate":
            return complaint(capsys, "evaluate", *TINY[:4], "--checkpoint", path)
        if command == "predict":
            return complaint(capsys, "predict", photo[0], "--checkpoint", path, "--out", out)
        return complaint(capsys, "train", *TINY, "--resume", "--out", tmp_path)

    assert error() == f"fastforest: {path}: no such file"
    path.write_bytes((run / "checkpoint.pt").read_bytes()[:5000])
    assert error() == f"fastforest: {path}: truncated or damaged checkpoint"
    path.write_text("hello")
    assert error() == f"fastforest: {path}: not a checkpoint of fastforest"
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"leaves": 32}}, path)
    assert error().startswith(f"fastforest: {path}: does not fit the model 'forest': size mismatch for ")
    assert files(tmp_path) == ["checkpoint.pt"]


# --- predict ----------------------------------------------------------------------------------------------------------


def _box(points):
    low, high = points.min(axis=0), points.max(axis=0)
    return [f"{value:g}" for value in (*low, *(high - low))]


def test_predict_writes_the_picture_and_the_points(run, photo, tmp_path, capsys):
    path, truth = photo
    arguments = ["--checkpoint", str(run / "checkpoint.pt"), "--out", str(tmp_path / "new" / "out")]
    assert main(["predict", str(path), *arguments, "--box", *_box(truth), "--ellipses"]) == 0
    written = tmp_path / "new" / "out"
    assert files(written) == ["photo_landmarks.png", "photo_landmarks.pts"]
    assert capsys.readouterr().out == f"{path}: {written / 'photo_landmarks.png'}\n"
    points = data.read_pts(written / "photo_landmarks.pts", expected=68)
    # two steps of training: hardly more than the mean shape, but at the right place and size
    assert np.abs(points.mean(axis=0) - truth.mean(axis=0)).max() < 12
    assert np.ptp(points, axis=0) == pytest.approx(np.ptp(truth, axis=0), rel=0.3)
    picture, image = data.read_image(written / "photo_landmarks.png"), data.read_image(path)
    assert picture.shape == (2 * 300, 2 * 400, 3)  # enlarged to a longer side of at least 512
    changed = (picture != np.asarray(Image.fromarray(image).resize((800, 600), Image.Resampling.BICUBIC))).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert 0.001 < changed.mean() < 0.2 and columns.min() > 2 * 150 and rows.min() > 2 * 70


def test_predict_finds_the_face_in_several_images(run, photo, tmp_path, capsys):
    path, truth = photo
    second = tmp_path / "second.jpg"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(second, quality=95)
    out = tmp_path / "out"
    assert main(["predict", str(path), str(second), "--checkpoint", str(run / "checkpoint.pt"), "--out", str(out)]) == 0
    assert len(files(out)) == 4
    # a model of two steps drifts from crop to crop, but not off the face
    points = data.read_pts(out / "photo_landmarks.pts")
    assert np.abs(points.mean(axis=0) - truth.mean(axis=0)).max() < 50
    mirrored = data.read_pts(out / "second_landmarks.pts")
    assert abs(mirrored[:, 0].mean() - (399 - truth[:, 0].mean())) < 50


def test_one_of_the_faces_found_is_the_face(photo):
    path, truth = photo
    low, high = truth.min(axis=0), truth.max(axis=0)
    side = (high - low).max()
    boxes = photos.find_faces(data.read_image(path))
    assert 1 <= len(boxes) <= photos.CANDIDATES
    assert [box[2] for box in boxes] == sorted((box[2] for box in boxes), reverse=True)
    shifts = [np.abs(np.array(box[:2]) + box[2] / 2 - (low + high) / 2).max() / side for box in boxes]
    nearest = int(np.argmin(shifts))
    assert shifts[nearest] < 0.15 and 0.75 < boxes[nearest][2] / side < 1.35


@pytest.mark.parametrize("shape", [(10, 10), (25, 400), (26, 26), (300, 200)])
def test_pictures_without_a_face(shape):
    assert photos.find_faces(np.full((*shape, 3), 90, np.uint8)) == []
    assert photos.locate(Centroid(), 64, np.full((*shape, 3), 90, np.uint8)) is None


def test_predict_complains_in_one_sentence_and_writes_nothing(run, photo, tmp_path, capsys):
    path, _ = photo
    empty = tmp_path / "sky.png"
    Image.fromarray(np.full((200, 200, 3), 200, np.uint8)).save(empty)
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:400])
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "photo.png"
    twin.write_bytes(path.read_bytes())
    cases = [
        ([empty], f"{empty}: no face found, give its place with --box X Y W H"),
        ([path, empty], f"{empty}: no face found"),
        ([tmp_path / "none.png"], f"{tmp_path / 'none.png'}: no such file"),
        ([cut], f"{cut}: cannot decode the image"),
        ([text], f"{text}: not an image in a known format"),
        ([tmp_path], f"{tmp_path}: is a folder, not an image"),
        ([path, twin], f"{twin}: would write the same files as {path}"),
        ([path, "--box", "10", "10", "0", "5"], f"{path}: the box must be finite with positive width and height"),
        ([path, "--box", "nan", "10", "5", "5"], f"{path}: the box must be finite with positive width and height"),
        ([path, "--box", "900", "10", "5", "5"], f"{path}: the box 900 10 5 5 does not lie in the image of 400 x 300"),
        ([path, "--box", "0", "0", "1e9", "5"], f"{path}: the box 0 0 1e+09 5 does not lie in the image"),
    ]
    out = tmp_path / "out"
    for arguments, sentence in cases:
        error = complaint(capsys, "predict", *arguments, "--checkpoint", run / "checkpoint.pt", "--out", out)
        assert error.startswith(f"fastforest: {sentence}")
    assert not out.exists()
    error = complaint(capsys, "predict", path, "--checkpoint", "x", "--box", "1", "2", "a", "3", parsing=True)
    assert "argument --box: invalid float value: 'a'" in error


class Centroid(torch.nn.Module):
    """Finds the bright spot of its crop: what the crop shows where is seen in what it says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        light = images.mean(dim=1)
        light = light / light.sum(dim=(1, 2), keepdim=True)
        grid = torch.arange(images.shape[-1], dtype=torch.float32)
        return torch.stack([(light.sum(dim=1) * grid).sum(dim=1), (light.sum(dim=2) * grid).sum(dim=1)], dim=-1)[
            :, None
        ]


class Spread(Centroid):
    """Four landmarks at two standard deviations of the light: they settle on a spot, and grow where there is none."""

    def forward(self, images):
        light = images.mean(dim=1).double() + 1e-4
        light = light / light.sum(dim=(1, 2), keepdim=True)
        grid = torch.arange(images.shape[-1], dtype=torch.float64)
        ends = []
        for axis in (1, 2):
            marginal = light.sum(dim=axis)
            mean = (marginal * grid).sum(dim=1, keepdim=True)
            reach = 2 * (marginal * (grid - mean) ** 2).sum(dim=1, keepdim=True).sqrt()
            ends.append(torch.cat([mean - reach, mean + reach], dim=1))
        return torch.stack([ends[0], ends[1]], dim=-1)


def test_a_false_find_is_told_from_a_face_by_landmarks_that_do_not_settle(monkeypatch):
    rows, columns = np.mgrid[:300, :300]
    spot = 255 * np.exp(-((columns - 200.0) ** 2 + (rows - 210.0) ** 2) / (2 * 10.0**2))
    image = np.repeat(np.rint(spot).astype(np.uint8)[..., None], 3, axis=2)
    monkeypatch.setattr(photos, "find_faces", lambda image: [(20, 20, 60, 60), (175, 190, 42, 42)])
    found = photos.locate(Spread(), 64, image)
    assert found.points.mean(axis=0) == pytest.approx([200, 210], abs=1)


@pytest.mark.parametrize("box", [(60, 50, 64, 40), (100, 80, 30, 30), (-20, -30, 150, 160), (90, 90, 120, 100)])
def test_points_are_mapped_back_to_the_photograph(box):
    x, y = 112.3, 93.8
    rows, columns = np.mgrid[:150, :180]
    spot = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 3.0**2))
    image = np.repeat(np.rint(spot).astype(np.uint8)[..., None], 3, axis=2)
    found = photos.locate(Centroid(), 64, image, box)
    assert found.covariance is None
    assert found.points[0] == pytest.approx([x, y], abs=0.05)


def test_a_model_that_predicts_nan_is_refused(photo):
    class Broken(Centroid):
        def forward(self, images):
            return super().forward(images) * float("nan")

    with pytest.raises(ValueError, match="the model predicts points that are not finite"):
        photos.locate(Broken(), 64, data.read_image(photo[0]), (10, 10, 50, 50))


# --- info, recipe -----------------------------------------------------------------------------------------------------


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"PyTorch {torch.__version__}" in printed and "kernels for baseline" in printed and "devices    cpu" in printed
    )


def test_the_program_from_outside(tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "fastforest", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)

    done = call("predict", "none.jpg", "--checkpoint", str(tmp_path / "none.pt"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fastforest: {tmp_path / 'none.pt'}: no such file\n"
