"""Strict loading of `RunConfig`: defaults <- preset <- YAML files <- `--set a.b=c`.

Later sources override single keys of earlier ones; a preset may start from another one (`extends: NAME`).
An unknown key or a value of the wrong type is a `ConfigError` that names the source, the key and the nearest
valid name.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from mt_deepspeed.config.run import RunConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration key or value that cannot be used."""


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    folder = resources.files("mt_deepspeed.config") / "presets"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    preset: str | None = None, files: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> RunConfig:
    """Builds the run configuration.

    Args:
        preset: Name of a shipped preset.
        files: YAML files, later ones win.
        overrides: `a.b=value` strings; the value is read as YAML.

    Raises:
        ConfigError: Unknown preset or key, unreadable file, or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in preset_names():
            raise ConfigError(
                f"--preset {preset}: no such preset{_nearest(preset, preset_names())}; "
                f"there are: {', '.join(preset_names())}"
            )
        _merge(tree, _read_preset(preset))
    for file in files:
        try:
            text = Path(file).read_text("utf-8")
        except OSError as error:
            raise ConfigError(f"--config {file}: cannot be read ({error.strerror})") from error
        _merge(tree, _parse_yaml(text, str(file)))
    for override in overrides:
        _merge(tree, _parse_override(override))
    return from_dict(RunConfig, tree)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds dataclass `cls` from nested mappings, checking every key and type.

    Args:
        cls: A dataclass.
        values: Its fields, nested dataclasses as mappings; missing fields keep their default.
        where: Dotted path of `values`, for error messages.

    Raises:
        ConfigError: See the module docstring.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise ConfigError(
                f"{path}: unknown key{_nearest(str(key), names)}; valid here: {', '.join(names)}"
            )
        arguments[key] = _convert(hints[key], value, path)
    try:
        return cls(**arguments)
    except TypeError as error:  # a field without default is missing
        raise ConfigError(f"{where or 'configuration'}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: plain dicts, lists and scalars, fit for YAML and JSON."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """`config` as YAML text that `load_config` reads back to an equal value."""
    # Escaped: PyYAML loses some line-break characters that it writes as they are.
    return str(yaml.safe_dump(to_dict(config), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read_preset(name: str) -> dict[str, Any]:
    text = (resources.files("mt_deepspeed.config") / "presets" / f"{name}.yaml").read_text("utf-8")
    tree = _parse_yaml(text, f"preset {name}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    whole = _read_preset(base)
    _merge(whole, tree)
    return whole


def _nearest(name: str, valid: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean `{match[0]}`?)" if match else ""


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as train.max_steps=1000")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as type `hint`; numbers written as text (`1e-5` in YAML 1.1) are accepted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(item for item in arguments if item is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path}: found {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: found {value!r}, expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ConfigError(f"{path}: found {len(value)} items, expected {len(arguments)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _convert(kind, item, f"{path}[{i}]")
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: found {value!r}, expected a mapping of keys")
        return from_dict(typing.cast("type[Any]", hint), value, path)
    return _scalar(hint, value, path)


def _scalar(kind: type, value: Any, path: str) -> Any:
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            if float(value) == int(float(value)):
                return int(float(value)) if not isinstance(value, int) else value
        elif kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            return float(value)
        elif kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    except ValueError:
        pass  # falls through to the error below: the text is not a number
    raise ConfigError(f"{path}: found {value!r} ({type(value).__name__}), expected {kind.__name__}")
