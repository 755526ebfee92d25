"""The configuration of a run: data, model, augmentation, training, from a TOML file and `section.key=value` words.

    config = resolve(read_toml("run.toml"), parse_set("train.batch=64"))
    print(config.toml())

Every section is checked against what it configures: `TrainConfig`, `data.Augment`, the constructor of the model. TOML
has no null: "none" stands for None where None is allowed.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Union

from . import models
from .data import Augment
from .training.settings import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "ConfigError", "DataConfig", "ModelConfig", "merged", "parse_set", "read_toml", "resolve"]

GIVEN_BY_DATA = ("landmarks", "mean_shape", "image_size")
"""Arguments of the models that no configuration sets."""
GIVEN_BY_RUN = ("size", "flip")
"""Arguments of `data.Augment` that the model and the landmarks set."""

CONFIGS = Path(__file__).with_name("configs")

DEFAULT_MINUTES = {True: 1.5, False: 20.0}
DEFAULT_SIZE = {True: 64, False: 96}
"""By whether the faces are drawn: the demonstration takes about two minutes with the drawing."""


Tables = dict[str, dict[str, Any]]
"""By section and key: values, or their types."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message is one sentence that names the key or the file."""


@dataclass(frozen=True)
class DataConfig:
    """path, subset: as `data.open_dataset` takes them. faces, face_seed: how many drawn faces of which series. size: side
    of the model's images, pixels; None: 64 for drawn faces, else 96. crop, padding, fallback: as `data.RecordFaces`."""

    path: str = "synthetic"
    faces: int = 1000
    face_seed: int = 0
    size: int | None = None
    subset: str | None = None
    crop: str = "landmarks"
    padding: float = 0.25
    fallback: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("faces", 10), ("face_seed", 0), ("size", 16)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"DataConfig: {name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """name: of `models.MODELS`. options: keywords of its constructor but `GIVEN_BY_DATA`."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Config:
    """All that decides a run but the machine. augment: keywords of `data.Augment` but `GIVEN_BY_RUN`."""

    data: DataConfig
    model: ModelConfig
    augment: dict[str, Any]
    train: TrainConfig

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, which `resolve` takes back."""
        sections = {
            "data": asdict(self.data),
            "model": {"name": self.model.name} | self.model.options,
            "augment": self.augment,
            "train": asdict(self.train),
        }
        return {name: {key: _plain(value) for key, value in section.items()} for name, section in sections.items()}

    def toml(self) -> str:
        """A TOML file that resolves to this configuration."""
        sections = []
        for name, section in self.as_dict().items():
            sections.append("\n".join([f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]))
        return "\n\n".join(sections) + "\n"


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The configuration of sections of keys; later layers win, what no layer names is the default.

    Raises:
        ConfigError: an unknown section or key, with the nearest one; a value of the wrong type or out of range.

    >>> resolve({"train": {"batch": 8}}, {"train": {"rounds": 2}}).train.batch
    8
    >>> resolve({"train": {"bacth": 8}})
    Traceback (most recent call last):
    fastforest.config.ConfigError: train.bacth is no key: the nearest is train.batch, a whole number
    """
    given = merged(*layers)
    name = given.get("model", {}).get("name", "forest") if isinstance(given.get("model", {}), Mapping) else "forest"
    if name not in models.MODELS:
        raise ConfigError(f"model.name must be one of {', '.join(models.MODELS)}, got {name!r}")
    known = _known(name)
    checked: Tables = {section: {} for section in known}
    checked |= {section: _checked(section, values, known) for section, values in given.items()}
    data, train = checked["data"], checked["train"]
    able = "pretrain" in known["model"] and checked["model"].get("pretrain", True)
    if train.get("pretrain") and not able:
        got = f"got {train['pretrain']:g}"
        raise ConfigError(f"train.pretrain must be 0 for model '{name}' without pretrain, {got}")
    if train.get("pretrain"):
        checked["model"]["pretrain"] = True
    drawn = data.get("path", DataConfig.path) == "synthetic"
    data["size"] = DEFAULT_SIZE[drawn] if data.get("size") is None else data["size"]
    if train.get("rounds") is None and train.get("minutes") is None:
        train["minutes"] = DEFAULT_MINUTES[drawn]
    options = _defaults(models.MODELS[name], GIVEN_BY_DATA) | checked["model"]
    options.pop("name", None)
    augment = _defaults(Augment, GIVEN_BY_RUN) | checked["augment"]
    try:
        Augment(data["size"], **augment)
        return Config(DataConfig(**data), ModelConfig(name, options), augment, TrainConfig(**train))
    except ValueError as error:
        raise ConfigError(_of_key(str(error))) from None


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Tables within tables, later ones over earlier ones.

    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else merged(value) if isinstance(value, Mapping) else value
    return result


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, or of one in `configs` that is called by its name alone ("stacked").

    Raises:
        ConfigError: not TOML, or not UTF-8. OSError: it cannot be read.
    """
    own = CONFIGS / f"{path}.toml"
    if path.parent == Path() and not path.exists() and own.exists():
        path = own
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def parse_set(text: str) -> dict[str, Any]:
    """ "section.key=value" as tables; the value is TOML, or else a string as it stands.

    Raises:
        ConfigError: no "=", or no section.

    >>> parse_set("train.steepness=[1, 4]"), parse_set("model.backbone=hourglass")
    ({'train': {'steepness': [1, 4]}}, {'model': {'backbone': 'hourglass'}})
    """
    key, equals, word = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        near = _section_of(key.strip())
        raise ConfigError(f"--set must be section.key=value, got {text!r}{f': the nearest is {near}' if near else ''}")
    try:
        table = tomllib.loads(f"value = {word}")
        value = table["value"] if len(table) == 1 else word.strip()
    except tomllib.TOMLDecodeError:
        value = word.strip()
    tables: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        tables = {part: tables}
    return tables


def _known(model: str) -> Tables:
    return {
        "data": typing.get_type_hints(DataConfig),
        "model": {"name": str} | _hints(models.MODELS[model], GIVEN_BY_DATA),
        "augment": _hints(Augment, GIVEN_BY_RUN),
        "train": typing.get_type_hints(TrainConfig),
    }


def _hints(made: Any, without: Sequence[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(made.__init__)
    return {name: hints.get(name, Any) for name in inspect.signature(made).parameters if name not in without}


def _defaults(made: Any, without: Sequence[str]) -> dict[str, Any]:
    parameters = inspect.signature(made).parameters.items()
    return {
        name: _plain(parameter.default)
        for name, parameter in parameters
        if name not in without and parameter.default is not inspect.Parameter.empty
    }


def _checked(section: str, values: Any, known: Tables) -> dict[str, Any]:
    if section not in known:
        near = _section_of(section) or difflib.get_close_matches(section, known, 1, 0)[0]
        raise ConfigError(f"{section} is no section: the nearest is {near}")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section} must be a section of keys, got {values!r}")
    checked = {}
    for key, value in values.items():
        if key not in known[section]:
            near_section, near = _nearest(section, key, known)
            wanted = _described(known[near_section][near])
            raise ConfigError(f"{section}.{key} is no key: the nearest is {near_section}.{near}, {wanted}")
        hint = known[section][key]
        try:
            checked[key] = _converted(value, hint)
        except TypeError:
            raise ConfigError(f"{section}.{key} must be {_described(hint)}, got {value!r}") from None
    return checked


def _nearest(section: str, key: str, known: Tables) -> tuple[str, str]:
    """The same key of another section, or the key of this one that is spelt most like it."""
    elsewhere = next((other for other, keys in known.items() if key in keys), None)
    if elsewhere is not None:
        return elsewhere, key
    return section, difflib.get_close_matches(key, known[section], 1, 0)[0]


def _section_of(key: str) -> str | None:
    """section.key of a key that was given without its section."""
    return next((f"{section}.{key}" for section, keys in _known("forest").items() if key in keys), None)


def _of_key(message: str) -> str:
    """ "TrainConfig: batch must ..." -> "train.batch must ..." """
    sections = {"TrainConfig: ": "train.", "DataConfig: ": "data.", "Augment: ": "augment."}
    for name, section in sections.items():
        message = message.replace(name, section, 1)
    return message


def _converted(value: Any, hint: Any) -> Any:
    """The value as the type has it. Raises TypeError where it is of another type; a type not known here takes all."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "none"):
            return None
        return _converted_to_any(value, [argument for argument in arguments if argument is not type(None)])
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is not hint:
            raise TypeError
        return value
    if origin is tuple:
        _require(value, list | tuple)
        variadic = arguments[1:] == (...,)
        if not variadic and len(value) != len(arguments):
            raise TypeError
        each = [arguments[0]] * len(value) if variadic else arguments
        return tuple(_converted(item, of) for item, of in zip(value, each, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require(value, Mapping)
        return {key: _converted(item, arguments[1]) for key, item in value.items()}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        _require(value, list | tuple)
        return [_converted(item, arguments[0]) for item in value]
    if origin is None and isinstance(hint, type) and hint not in (Any, object, dict, list):
        raise TypeError  # such as a module, for which no word stands
    return value


def _converted_to_any(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _converted(value, hint)
        except TypeError:
            continue
    raise TypeError


def _require(value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError


OTHER = "a value"


def _described(hint: Any) -> str:
    """The type in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): '"none"'}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in words:
        return words[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(word for word in map(_described, arguments) if word != OTHER)
    if origin is tuple and arguments[1:] != (...,):
        return f"a list of {len(arguments)}: {', '.join(_described(argument) for argument in arguments)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {_described(arguments[0])}"
    return OTHER


def _plain(value: Any) -> Any:
    """Lists for tuples, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _toml(value: Any) -> str:
    """A value in TOML's notation, on one line."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
