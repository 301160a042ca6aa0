"""From a TOML file and `section.key=value` overrides to a `RunConfig`, and back to TOML.

In: a file, at most one file it is based on (`base = "other.toml"`, relative to it), and overrides in TOML value syntax, where a bare
word is a string. Out: a validated, frozen `RunConfig`. Every mistake is a one-line `ConfigError` with the key, its value and where it
was set; an unknown key names the nearest one. `to_toml` writes the resolved form that checkpoints and golden files hold.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hope_pt.config.schema import RunConfig
from hope_pt.errors import ConfigError

COMMAND_LINE = "the command line"
EXPECTED = {
    "int_type": "expected an integer",
    "int_from_float": "expected an integer, without a point or exponent",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected a string",
    "tuple_type": "expected a list",
    "model_type": "expected a table of keys",
    "model_attributes_type": "expected a table of keys",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge, override and validate a run configuration; raises `ConfigError`."""
    path = Path(path)
    tree = _read_toml(path)
    origins = dict.fromkeys(_leaves(tree), str(path))
    base = tree.pop("base", None)
    if base is not None:
        tree, origins = _with_base(tree, origins, base=base, path=path)
    for override in overrides:
        _apply_override(tree, override)
        origins[override.partition("=")[0].strip()] = COMMAND_LINE
    return _validate(tree, origins=origins, default_origin=str(path))


def loads(text: str, *, source: str) -> RunConfig:
    """Validate resolved TOML such as `to_toml` writes; `source` names it in errors."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    return _validate(tree, origins={}, default_origin=source)


def to_toml(config: BaseModel) -> str:
    """Every field of `config` as TOML, in the order of the schema; `loads` gives the same object back."""
    lines: list[str] = []
    _write_table(config.model_dump(), prefix="", lines=lines)
    return "\n".join(lines).strip() + "\n"


def diff(a: BaseModel, b: BaseModel) -> list[str]:
    """Lines "key: a -> b", in schema order, for every field whose value differs."""
    left, right = flatten(a), flatten(b)
    keys = [*left, *(key for key in right if key not in left)]
    return [f"{key}: {_shown(left, key)} -> {_shown(right, key)}" for key in keys if _shown(left, key) != _shown(right, key)]


def config_hash(config: BaseModel) -> str:
    """64 hex digits that depend on every value and on nothing else."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted key -> value of every field that is not a section."""
    return _leaves(config.model_dump())


def _leaves(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.update(_leaves(value, prefix=f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    return _toml_value(values[key]) if key in values else "(absent)"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _with_base(tree: dict[str, Any], origins: dict[str, str], *, base: Any, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay `tree` over the file it is based on."""
    if not isinstance(base, str):
        raise ConfigError(f"base = {_toml_value(base)} ({path}): expected the name of a TOML file, relative to this one")
    base_path = path.parent / base
    if not base_path.is_file():
        raise ConfigError(f'base = "{base}" ({path}): there is no file {base_path}')
    base_tree = _read_toml(base_path)
    if "base" in base_tree:
        raise ConfigError(f'base = "{base}" ({path}): {base_path} has a base itself; only one level is followed, so name the last one')
    return _merged(base_tree, tree), {**dict.fromkeys(_leaves(base_tree), str(base_path)), **origins}


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in `tree`."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f'override "{override}": expected section.key=value, for example optim.lr=1e-3')
    table = tree
    for depth, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f'override "{override}": {".".join(parts[: depth + 1])} is a value, not a table of keys')
    table[parts[-1]] = _override_value(text.strip(), override=override)


def _override_value(text: str, *, override: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        # A word is a string without quotes; what starts like a quoted string, a list or a table was meant as TOML and is malformed.
        if text and text[0] not in "\"'[{" and "\n" not in text:
            return text
        raise ConfigError(f'override "{override}": the value is not valid TOML: {error}') from None


def _validate(tree: Mapping[str, Any], *, origins: Mapping[str, str], default_origin: str) -> RunConfig:
    # A missing data section is validated as an empty one, so that the error names its keys.
    tree = {**tree, "data": tree.get("data", {})}
    try:
        return RunConfig.model_validate(_with_tuples(tree))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # An unknown key often causes a "missing" one, so it is told first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    loc = problems[0]["loc"]
    key = ".".join(str(part) for part in loc)
    origin = _origin(key, origins=origins, default=default_origin)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(_message(problems[0], key=key, origin=origin) + more)


def _message(problem: Mapping[str, Any], *, key: str, origin: str) -> str:
    """One line for one pydantic problem at `key`."""
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{key} ({origin}): unknown key{_did_you_mean(key, known=_known_keys(RunConfig))}"
    if kind == "missing":
        return f"{key} is missing; set it in {origin}"
    if kind == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        return f"{key} ({origin}): {text}" if key else f"{origin}: {text}"
    expected = EXPECTED.get(kind, problem["msg"].replace("Input should", "it should"))
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        hint = difflib.get_close_matches(str(value), choices, n=1)
        expected = f"expected {', '.join(choices)}" + (f'; did you mean "{hint[0]}"?' if hint else "")
    return f"{key} = {_toml_value(value)} ({origin}): {expected}"


def _origin(key: str, *, origins: Mapping[str, str], default: str) -> str:
    """Where `key`, a key below it or a list that holds it was set; the command line wins."""
    touching = [where for set_key, where in origins.items() if f"{set_key}.".startswith(f"{key}.") or key.startswith(f"{set_key}.")]
    return COMMAND_LINE if COMMAND_LINE in touching else (touching[0] if touching else default)


def _did_you_mean(key: str, *, known: Sequence[str]) -> str:
    """The key whose last name is nearest, with an advantage for the same section; empty when nothing is near."""
    section, _, name = key.rpartition(".")

    def nearness(candidate: str) -> float:
        candidate_section, _, candidate_name = candidate.rpartition(".")
        return difflib.SequenceMatcher(None, name, candidate_name).ratio() + 0.2 * (candidate_section == section)

    nearest = max(known, key=nearness)
    return f"; did you mean {nearest}?" if nearness(nearest) > 0.65 else ""


def _known_keys(model: type[BaseModel], *, prefix: str = "") -> list[str]:
    """Dotted names of all fields and sections of `model`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, prefix=f"{prefix}{name}.")
    return keys


def _with_tuples(value: Any) -> Any:
    """TOML lists as tuples: the schema is strict and frozen."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _write_table(table: Mapping[str, Any], *, prefix: str, lines: list[str]) -> None:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if prefix:
        lines += ["", f"[{prefix}]"]
    lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, prefix=f"{prefix}.{key}" if prefix else key, lines=lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, float) else str(value)
