"""The configuration: defaults, files, words, what is refused and in which words."""

from pathlib import Path

import pytest
import torch

from fastforest import config, data, models
from fastforest.config import ConfigError, parse_set, read_toml, resolve
from fastforest.training import TrainConfig


def test_defaults_are_those_of_what_is_configured():
    plain = resolve()
    assert plain.data.size == 64 and plain.train == TrainConfig(minutes=1.5)
    assert plain.model.name == "forest" and plain.model.options["leaves"] == 256
    assert data.Augment(64, **plain.augment) == data.Augment(64)
    folder = resolve({"data": {"path": "faces"}})
    assert folder.data.size == 96 and folder.train.minutes == 20
    assert resolve({"train": {"rounds": 3}}).train == TrainConfig(rounds=3)


def test_options_build_the_model():
    words = ["model.name=dense", "model.backbone_options.width=4", "model.backbone_options.code=8"]
    chosen = resolve(*map(parse_set, words))
    given = {"landmarks": 3, "mean_shape": [[8.0, 8.0]] * 3, "image_size": 32}
    model = models.build(chosen.model.name, chosen.model.options | given)
    assert model.config()["backbone_options"] == {"width": 4, "code": 8} and model.name == "dense"


def test_a_share_of_pretraining_makes_a_model_that_can():
    assert resolve({"train": {"pretrain": 0.25}}).model.options["pretrain"] is True
    for model in ({"name": "dense"}, {"pretrain": False}):
        with pytest.raises(ConfigError, match=r"train.pretrain must be 0 for model '\w+' without pretrain, got 0.25"):
            resolve({"train": {"pretrain": 0.25}, "model": model})


@pytest.mark.parametrize("path", sorted(config.CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_that_come_along_build_a_model_that_predicts(path):
    chosen = resolve(read_toml(Path(path.stem)))
    assert chosen == resolve(read_toml(path)) and chosen.data.size is not None
    given = {"landmarks": 5, "mean_shape": [[chosen.data.size / 2] * 2] * 5, "image_size": chosen.data.size}
    model = models.build(chosen.model.name, chosen.model.options | given).eval()
    with torch.no_grad():
        found = model(torch.rand(1, 3, chosen.data.size, chosen.data.size))
    assert found.shape == (1, 5, 2) and bool(found.isfinite().all())


@pytest.mark.parametrize("name", list(models.MODELS))
def test_printed_configuration_resolves_to_itself(name, tmp_path):
    words = ["train.steepness=[1, 4]", "train.clip=none", "train.milestones=[0.25]", "augment.blur=0", "train.amp=true"]
    words += ['data.path=a "folder"\\ of\tfaces é', "train.rate=1e-3", "train.minutes=5"]
    chosen = resolve({"model": {"name": name}}, *map(parse_set, words))
    path = tmp_path / "run.toml"
    path.write_text(chosen.toml(), encoding="utf-8")
    assert resolve(read_toml(path)) == chosen
    assert resolve(chosen.as_dict()) == chosen
    assert chosen.train.clip is None and chosen.train.amp == "bf16" and chosen.train.steepness == (1.0, 4.0)
    assert chosen.data.path == 'a "folder"\\ of\tfaces é' and chosen.train.rate == 1e-3


def test_later_layers_win():
    layers = [{"train": {"batch": 8, "rate": 0.1}}, parse_set("train.batch=16"), {"train": {"rounds": 1}}]
    assert resolve(*layers).train == TrainConfig(rounds=1, batch=16, rate=0.1)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("3", 3),
        ("3.5", 3.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("hourglass", "hourglass"),
        (" none ", "none"),
        ("{width = 4}", {"width": 4}),
        ("a=b", "a=b"),
        ("1\nx = 2", "1\nx = 2"),
    ],
)
def test_words_are_toml_or_else_strings(word, value):
    assert parse_set(f"model.options.x = {word}") == {"model": {"options": {"x": value}}}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.bacth=3", "train.bacth is no key: the nearest is train.batch, a whole number"),
        ("train.leaf_face=3", "train.leaf_face is no key: the nearest is train.leaf_faces, a whole number"),
        ("model.leafs=3", "model.leafs is no key: the nearest is model.leaves, a whole number"),
        ("model.batch=3", "model.batch is no key: the nearest is train.batch, a whole number"),
        ("augment.rotations=3", "augment.rotations is no key: the nearest is augment.rotation, a number"),
        ("trian.batch=3", "trian is no section: the nearest is train"),
        ("train.batch=many", "train.batch must be a whole number, got 'many'"),
        ("train.batch=3.0", "train.batch must be a whole number, got 3.0"),
        ("train.batch=true", "train.batch must be a whole number, got True"),
        ("train.rate=fast", "train.rate must be a number, got 'fast'"),
        ("train.ema=x", "train.ema must be a number or \"none\", got 'x'"),
        ("train.pin=1", "train.pin must be true or false, got 1"),
        ("train.schedule=3", "train.schedule must be a string, got 3"),
        ("train.steepness=[1]", 'train.steepness must be a list of 2: a number, a number or "none", got [1]'),
        ("train.milestones=0.5", "train.milestones must be a list, each a number, got 0.5"),
        ("model.backbone=3", "model.backbone must be a string, got 3"),
        ("model.backbone_options=3", 'model.backbone_options must be a table or "none", got 3'),
        ("model.leaf_rate=[1]", "model.leaf_rate must be a number, got [1]"),
        ("train.rate=-1", "train.rate must be a positive finite number, got -1.0"),
        ("train.schedule=poly", "train.schedule must be one of cosine, step, constant, multistep, plateau, got 'poly'"),
        ("augment.blur=2", "augment.blur must be a probability in [0, 1], got 2.0"),
        ("data.faces=9", "data.faces must be at least 10, got 9"),
        ("model.name=oak", f"model.name must be one of {', '.join(models.MODELS)}, got 'oak'"),
        ("train.batch", "--set must be section.key=value, got 'train.batch'"),
        ("batch=4", "--set must be section.key=value, got 'batch=4': the nearest is train.batch"),
    ],
)
def test_what_is_refused(word, sentence):
    with pytest.raises(ConfigError) as caught:
        resolve(parse_set(word))
    assert str(caught.value) == sentence


def test_sections_that_are_none():
    for layer, sentence in (
        ({"batch": 3}, "batch is no section: the nearest is train.batch"),
        ({"train": 3}, "train must be a section of keys, got 3"),
        ({"model": 3}, "model must be a section of keys, got 3"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(layer)
        assert str(caught.value) == sentence


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train\nbatch = 3")
    with pytest.raises(ConfigError, match=r"run.toml: is not TOML: .*line 1"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"run.toml: is not UTF-8 text"):
        read_toml(path)
    with pytest.raises(FileNotFoundError):
        read_toml(tmp_path / "none.toml")


def test_types_in_words():
    for hint, words in (
        (dict[str, int], "a table"),
        (list[str], "a list, each a string"),
        (int | str | None, 'a whole number or a string or "none"'),
        (object, "a value"),
    ):
        assert config._described(hint) == words
