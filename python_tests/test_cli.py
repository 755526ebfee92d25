"""The command line: what it writes, what it prints, and one sentence for every bad input. Drawn faces only."""

import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastforest import aligner, config, data, models, training
from fastforest.aligner import Aligner
from fastforest.cli import main
from fastforest.cli.sets import open_evaluated, open_sets
from fastforest.config import DataConfig

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


# train


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


@pytest.fixture
def photographs(tmp_path):
    """Ten drawn faces in larger pictures, as an XML file of dlib, in boxes of which some cut the chin."""
    rows = []
    for index in range(10):
        image, points = data.draw_face(0, index, 48)
        canvas = np.full((80, 90, 3), 128, np.uint8)
        canvas[10:58, 20:68] = image
        Image.fromarray(canvas).save(tmp_path / f"{index}.png")
        parts = "".join(f"<part name='{i:02}' x='{x + 20:.3f}' y='{y + 10:.3f}'/>" for i, (x, y) in enumerate(points))
        rows.append(
            f"<image file='{index}.png'><box top='14' left='24' width='36' height='{34 + 2 * index}'>{parts}</box></image>"
        )
    (tmp_path / "faces.xml").write_text(f"<dataset><images>{''.join(rows)}</images></dataset>")
    return tmp_path / "faces.xml"


def test_faces_in_memory_in_a_file_or_nowhere_train_alike(photographs, tmp_path, capsys):
    weights = []
    for cache, more in (("memory", []), ("off", ["--set", "train.workers=1"]), (str(tmp_path / "cache"), [])):
        out = tmp_path / f"run{len(weights)}"
        words = ["--set", f"train.cache={cache}", "--set", "data.crop=box", "--set", "data.padding=0", *more]
        assert (
            main(["train", "--data", str(photographs), *TINY[4:], "--out", str(out), "--model", "dense", *words]) == 0
        )
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"{photographs}: ") and said[0].endswith(
            "landmarks lie outside their crops and are masked"
        )
        assert "9 faces of 32 x 32 pixels" in said[1]
        weights.append(training.load(out / "checkpoint.pt").weights)
    assert len(list((tmp_path / "cache").glob("*.faces"))) == 1
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())


def test_faces_that_do_not_fit_in_memory_are_told(photographs, capsys, monkeypatch):
    monkeypatch.setattr(training.sets, "Cached", functools.partial(data.Cached, max_bytes=4 * 3 * 32 * 32))
    train, _ = open_sets(config.resolve({"data": {"path": str(photographs), "size": 32}}))
    assert capsys.readouterr().out == (
        f"{photographs}: 4 of 9 faces are kept in memory, the others are decoded in every round: train.cache = FOLDER "
        "keeps all in a file\n"
    )
    assert len(train.batch(range(9))[0]) == 9


def test_faces_whose_boxes_hide_all_their_landmarks_are_left_out_of_training(photographs, capsys):
    text, boxes, beside = photographs.read_text(), "<box [^>]*>", "<box top='1' left='1' width='8' height='8'>"
    end = text.index("</image>") + len("</image>")
    lost = re.sub(boxes, beside, text[text.index("<image ") : end])
    photographs.write_text(text[:end] + lost + text[end:])
    chosen = config.resolve({"data": {"path": str(photographs), "size": 32, "crop": "box", "padding": 0.0}})
    train, held_out = open_sets(chosen)
    said = capsys.readouterr().out.splitlines()
    assert (len(train), len(held_out)) == (9, 1)
    assert said[0] == f"{photographs}: 1 faces whose crops hold none of their landmarks are left out"
    assert "landmarks lie outside" in said[1]
    evaluated = open_evaluated(chosen.data)
    assert len(evaluated) == 11 and held_out[0].name == data.split(evaluated)[1][0].name  # the same face held out
    photographs.write_text(re.sub(boxes, beside, text))
    with pytest.raises(data.DataError, match=r"of 10 faces, 0 are left to train and 0 held out"):
        open_sets(chosen)


def test_faces_that_a_reader_leaves_out_are_counted(photographs, capsys):
    bare = "<box top='14' left='24' width='36' height='34'/>"
    photographs.write_text(photographs.read_text().replace("<box", f"{bare}<box", 3))
    train, held_out = open_sets(config.resolve({"data": {"path": str(photographs), "size": 32}}))
    assert (len(train), len(held_out)) == (9, 1)
    assert capsys.readouterr().out == f"{photographs}: 3 faces without a landmark are left out\n"


def test_what_was_trained_on_boxes_knows_it_wherever_it_goes(tmp_path, photographs):
    out, exported = tmp_path / "run", tmp_path / "model.pt2"
    words = [*TINY[4:], "--set", "data.crop=box", "--set", "data.padding=0.3"]
    assert main(["train", "--data", str(photographs), "--out", str(out), *words]) == 0
    assert main(["export", "--checkpoint", str(out / "checkpoint.pt"), "--out", str(exported)]) == 0
    shape = training.load(out / "checkpoint.pt").mean_shape.numpy()
    for found in (Aligner.from_checkpoint(out / "checkpoint.pt"), Aligner.from_exported(exported)):
        assert found.padding == 0.3 and np.array_equal(found.shape, shape)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.cache=folder", "train.cache must be memory or off for synthetic, got 'folder'"),
        ("data.crop=box", "data.crop is for sets of annotated photographs, which synthetic is not"),
    ],
)
def test_what_drawn_faces_do_not_have(word, sentence, capsys, tmp_path):
    error = complaint(capsys, "train", *TINY, "--out", tmp_path / "x", "--set", word)
    assert error == f"fastforest: {sentence}" and files(tmp_path) == []


def test_crop_that_does_not_exist(photographs, capsys, tmp_path):
    error = complaint(capsys, "train", "--data", photographs, "--out", tmp_path / "x", "--set", "data.crop=circle")
    assert error == f"fastforest: {photographs}: RecordFaces: crop must be one of landmarks, box, got 'circle'"


def test_evaluation_counts_landmarks_that_lie_outside_their_crops(photographs):
    chosen = DataConfig(str(photographs), size=32, crop="box", padding=0.0)
    truth, points = open_evaluated(chosen), data.RecordFaces(data.read_dlib(photographs), 32, crop="box", padding=0.0)
    assert points.masked > 0
    assert all(face.points.isfinite().all() for face in truth)
    assert truth[0].points[8, 1] > 31.5  # the chin, below the face


def test_evaluation_and_prediction_crop_as_training_did(tmp_path, photographs, capsys):
    out = tmp_path / "run"
    words = [*TINY[4:], "--set", "data.padding=0.6"]
    assert main(["train", "--data", str(photographs), "--out", str(out), *words]) == 0
    trained = next(line for line in reversed(capsys.readouterr().out.splitlines()) if line.startswith("NME["))
    path = out / "checkpoint.pt"
    assert main(["evaluate", "--data", str(photographs), "--checkpoint", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == trained
    aligner_, saved = Aligner.from_checkpoint(path), training.load(path)
    assert aligner_.padding == saved.padding == 0.6
    exported = tmp_path / "model.pt2"
    assert main(["export", "--checkpoint", str(path), "--out", str(exported)]) == 0
    assert Aligner.from_exported(exported).padding == 0.6
    assert aligner_.shape is None and Aligner.from_exported(exported).shape is None
    saved.settings["data"]["padding"] = 0.25
    training.checkpoint.save(tmp_path / "other.pt", saved)
    assert main(["evaluate", "--data", str(photographs), "--checkpoint", str(tmp_path / "other.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] != trained
    assert (
        main(["evaluate", "--data", "synthetic", "--faces", "20", "--checkpoint", str(path), "--subset", "full"]) == 2
    )
    assert "subset" in capsys.readouterr().err


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


# evaluate


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


def test_evaluate_prints_and_writes_tables_and_pictures(run, tmp_path, capsys):
    out = tmp_path / "new" / "results"
    arguments = ["--checkpoint", str(run / "checkpoint.pt"), *TINY[:4], "--all", "--out", str(out)]
    assert main(["evaluate", *arguments]) == 0
    printed = capsys.readouterr().out
    pictures = ["ced.png", "regions.png", "risk_coverage.png", "worst.png"]
    assert files(out) == sorted([*pictures, "faces.jsonl", "results.json", "results.md"])
    table = (out / "results.md").read_text()
    assert table.startswith("# synthetic: all 20 faces\n")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 9 and all(row in printed for row in rows)
    lines = [json.loads(line) for line in (out / "faces.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and lines[7]["name"] == data.SyntheticFaces(20)[7].name
    results = json.loads((out / "results.json").read_text())[run.name]
    assert results["NME[inter_ocular]"] == pytest.approx(np.mean([line["nme"] for line in lines]))
    assert list(results["regions"]) == ["jaw", "brows", "nose", "eyes", "mouth"]
    assert printed.endswith(f"written to {out}\n")


def test_evaluate_compares_checkpoints(run, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    second, third = tmp_path / "a" / "checkpoint.pt", tmp_path / "a" / "older.pt"
    for path in (second, third):
        path.write_bytes((run / "checkpoint.pt").read_bytes())
    out = tmp_path / "out"
    arguments = [*TINY[:4], "--out", str(out), "--checkpoint"]
    assert main(["evaluate", *arguments, str(run / "checkpoint.pt"), str(second)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{run.name}: NME[") and printed[1].startswith("a: NME[")
    assert printed[0].split(":")[1] == printed[1].split(":")[1]
    assert {"worst_a.png", f"worst_{run.name}.png", "ced.png"} < set(files(out))
    assert main(["evaluate", *TINY[:4], "--checkpoint", str(second), str(third)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["checkpoint", "older"]
    error = complaint(capsys, "evaluate", *arguments, second, second)
    assert error == f"fastforest: {second}: is given twice"


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


# predict


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
    assert len(files(out)) == 4 and capsys.readouterr().err == ""
    # a model of two steps drifts from crop to crop, but not off the face
    points = data.read_pts(out / "photo_landmarks.pts")
    assert np.abs(points.mean(axis=0) - truth.mean(axis=0)).max() < 50
    mirrored = data.read_pts(out / "second_landmarks.pts")
    assert abs(mirrored[:, 0].mean() - (399 - truth[:, 0].mean())) < 50


def test_predict_writes_one_file_for_all_images(run, photo, tmp_path, capsys):
    path, truth = photo
    box, out = _box(truth), tmp_path / "out"
    arguments = ["--checkpoint", str(run / "checkpoint.pt"), "--box", *box, "--out", str(out), "--format", "json"]
    assert main(["predict", str(path), *arguments]) == 0
    assert files(out) == ["predictions.json"]
    assert capsys.readouterr().out == f"{out / 'predictions.json'}: 1 of 1 images\n"
    content = json.loads((out / "predictions.json").read_text())
    assert content["failed"] == [] and len(content["faces"]) == 1
    face = content["faces"][0]
    expected = Aligner.from_checkpoint(run / "checkpoint.pt")(path, tuple(map(float, box)))
    assert face["image"] == str(path) and face["box"] == pytest.approx(list(map(float, box)), abs=1e-3)
    for key in ("points", "spread", "covariance"):
        assert np.array(face[key]) == pytest.approx(getattr(expected, key), abs=6e-4)


def _gallery(folder, photo):
    """Frames of one face, one of them broken, in and below a folder; other files beside them."""
    picture = Image.open(photo[0])
    (folder / "below").mkdir(parents=True)
    for name in ("frame_10.png", "frame_2.JPG", "below/frame_3.png", ".hidden.png", "old_landmarks.png"):
        picture.convert("RGB").save(folder / name, format="PNG")
    (folder / "frame_9.png").write_bytes(photo[0].read_bytes()[:400])
    (folder / "notes.txt").write_text("not a picture")


def test_predict_takes_folders_in_natural_order_and_goes_on_after_a_broken_image(run, photo, tmp_path, capsys):
    _gallery(tmp_path / "gallery", photo)
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run / "checkpoint.pt"), "--box", *_box(photo[1]), "--out", str(out)]
    assert main(["predict", str(tmp_path / "gallery"), *arguments, "--format", "json,pts"]) == 2
    captured = capsys.readouterr()
    names = ["below/frame_3", "frame_10", "frame_2"]
    assert files(out) == sorted([*(f"{name}_landmarks.pts" for name in names), "predictions.json"])
    content = json.loads((out / "predictions.json").read_text())
    read = [Path(face["image"]).name for face in content["faces"]]
    assert read == ["frame_3.png", "frame_2.JPG", "frame_10.png"]
    broken = f"{tmp_path / 'gallery' / 'frame_9.png'}: cannot decode the image"
    assert len(content["failed"]) == 1 and content["failed"][0].startswith(broken)
    first, last = captured.err.splitlines()
    assert first.startswith(f"fastforest: {broken}") and last == "fastforest: 1 of 4 images without landmarks"


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_predict_takes_boxes_by_name(suffix, run, photo, tmp_path, capsys):
    _gallery(tmp_path / "gallery", photo)
    (tmp_path / "gallery" / "frame_9.png").unlink()
    low, high = photo[1].min(axis=0), photo[1].max(axis=0)
    box = [float(round(value)) for value in (*low, *(high - low))]
    wider = [box[0] - 5, box[1] - 6, box[2] + 9, box[3] + 8]
    boxes = {"below/frame_3.png": box, "frame_2.JPG": wider, str(tmp_path / "gallery" / "frame_10.png"): box}
    text = "name,x,y,w,h\n" + "".join(f"{name},{','.join(map(str, box))}\n" for name, box in boxes.items())
    path = tmp_path / f"boxes.{suffix}"
    path.write_text(json.dumps(boxes) if suffix == "json" else text)
    arguments = ["--checkpoint", str(run / "checkpoint.pt"), "--out", str(tmp_path), "--format", "json"]
    assert main(["predict", str(tmp_path / "gallery"), *arguments, "--boxes", str(path)]) == 0
    faces = json.loads((tmp_path / "predictions.json").read_text())["faces"]
    assert [face["box"] for face in faces] == [box, wider, box]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("b.json", "[1, 2", "not JSON: Expecting ',' delimiter"),
        ("b.json", "[1, 2]", 'expected {"name": [x, y, width, height], ...}, got a list'),
        ("b.json", '{"a.png": [1, 2, 3]}', "'a.png': expected x, y, width, height, got [1, 2, 3]"),
        ("b.json", '{"a.png": 7}', "'a.png': expected x, y, width, height, got 7"),
        ("b.json", '{"a.png": [1, 2, 3, 4], "a.png": [1, 2, 3, 4]}', "'a.png': has a second box for 'a.png'"),
        ("b.csv", "a.png,1,2,3,4\nb.png,1,2,x,4\n", "line 2: expected x, y, width, height, got ['1', '2', 'x', '4']"),
        ("b.csv", "a.png,1,2,3,4\na.png,1,2,3,4\n", "line 2: has a second box for 'a.png'"),
        ("b.csv", "a.png\n", "line 1: expected x, y, width, height, got []"),
        ("c.csv", None, "no such file"),
    ],
)
def test_boxes_that_cannot_be_read(name, text, reason, run, photo, tmp_path, capsys):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    arguments = ["--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "out", "--boxes", path]
    error = complaint(capsys, "predict", photo[0], *arguments)
    assert error.startswith(f"fastforest: {path}: {reason}")
    assert not (tmp_path / "out").exists()


def test_predict_follows_a_face_through_a_video(run, photo, tmp_path, capsys, monkeypatch):
    picture = np.asarray(Image.open(photo[0]))
    folder, searched = tmp_path / "video", []
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.roll(picture, 4 * number, axis=1)).save(folder / f"{number}.png")
    (folder / "1a.png").write_text("broken")
    find = aligner.find_faces
    monkeypatch.setattr(aligner, "find_faces", lambda image: searched.append(1) or find(image))
    monkeypatch.setattr(aligner, "LOST", 0.5)  # a model of two steps drifts
    arguments = ["--checkpoint", str(run / "checkpoint.pt"), "--out", str(tmp_path / "out"), "--format", "json"]
    assert main(["predict", str(folder), *arguments, "--track"]) == 2
    assert capsys.readouterr().err.endswith("fastforest: 1 of 4 images without landmarks\n")
    faces = json.loads((tmp_path / "out" / "predictions.json").read_text())["faces"]
    assert [Path(face["image"]).name for face in faces] == ["0.png", "1.png", "2.png"]
    assert len(searched) == 1
    assert main(["predict", str(folder), *arguments, "--track", "--box", *_box(photo[1])]) == 2
    assert len(searched) == 1 and "3 of 4 images" in capsys.readouterr().out
    error = complaint(capsys, "predict", folder, *arguments, "--track", "--boxes", "b.csv")
    assert error == "fastforest: --track and --boxes exclude each other: --box gives the place in the first frame"


def test_predict_complains_in_one_sentence_and_writes_nothing(run, photo, tmp_path, capsys):
    path, _ = photo
    empty = tmp_path / "sky.png"
    Image.fromarray(np.full((200, 200, 3), 200, np.uint8)).save(empty)
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:400])
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    (tmp_path / "other").mkdir()
    (tmp_path / "nothing").mkdir()
    twin = tmp_path / "other" / "photo.png"
    twin.write_bytes(path.read_bytes())
    cases = [
        ([empty], f"{empty}: no face found, give its place with --box X Y W H"),
        ([tmp_path / "none.png"], f"{tmp_path / 'none.png'}: no such file"),
        ([cut], f"{cut}: cannot decode the image"),
        ([text], f"{text}: not an image in a known format"),
        ([tmp_path / "nothing"], f"{tmp_path / 'nothing'}: holds no image (.jpg "),
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
    error = complaint(capsys, "predict", path, "--checkpoint", "x", "--format", "png,gif", parsing=True)
    assert "argument --format: must be some of png,pts,json, got 'gif'" in error


def test_predict_names_a_checkpoint_that_predicts_nan(run, photo, tmp_path, capsys):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    broken = tmp_path / "broken.pt"
    weights = {
        key: value * float("nan") if value.is_floating_point() else value for key, value in content["weights"].items()
    }
    torch.save(content | {"weights": weights, "ema": None}, broken)
    error = complaint(capsys, "predict", photo[0], "--box", *_box(photo[1]), "--checkpoint", broken, "--out", tmp_path)
    assert error == f"fastforest: {broken}: the model predicts points that are not finite"


# export


def test_export_writes_a_file_for_torch_export(run, tmp_path, capsys):
    out = tmp_path / "new" / "model.pt2"
    assert main(["export", "--checkpoint", str(run / "checkpoint.pt"), "--out", str(out)]) == 0
    sizes = "images uint8 [B, 3, 32, 32] -> points [B, 68, 2], spread [B, 68]"
    assert capsys.readouterr().out == f"{out}: {sizes}\n"
    loaded = aligner.load_exported(out)
    saved = training.load(run / "checkpoint.pt")
    assert loaded.size == 32 and torch.equal(loaded.mean_shape, saved.mean_shape)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(loaded.predict(images)[0], saved.build(run)(images.float() / 255))


def test_export_complains(run, tmp_path, capsys):
    error = complaint(capsys, "export", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "model.onnx")
    assert error == f"fastforest: --out must end in .pt2, got {tmp_path / 'model.onnx'}"
    error = complaint(capsys, "export", "--checkpoint", tmp_path / "no.pt", "--out", tmp_path / "model.pt2")
    assert error == f"fastforest: {tmp_path / 'no.pt'}: no such file"
    assert files(tmp_path) == []


# info, recipe


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
