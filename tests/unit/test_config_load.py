"""Configuration loading: merging, overrides, one-line errors, the round trip, and the golden resolved files."""

from pathlib import Path

import pytest

from hope_pt.config import config_hash, diff, load, loads, to_toml
from hope_pt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
MINIMAL = """
name = "r"
[model]
vocab_size = 64
num_layers = 1
width = 32
num_heads = 2
[data]
path = "somewhere"
[train]
steps = 10
"""


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_fill_in(minimal):
    config = load(minimal)
    assert config.train.steps == 10
    assert config.model.titans.chunk_mem == 64
    assert config.model.head_width == 16


def test_overrides_take_toml_values_and_bare_words(minimal):
    config = load(minimal, ["optim.lr=1e-2", "data.path=data/x", "model.cms.periods=[1, 8]", "model.titans.momentum=titans", 'name="q"'])
    assert config.optim.lr == 0.01
    assert config.data.path == "data/x"
    assert config.model.cms.periods == (1, 8)
    assert config.model.titans.momentum == "titans"
    assert config.name == "q"


def test_override_of_a_number_stays_exact(minimal):
    assert load(minimal, ["data.path=007", "train.steps=1_000"]).train.steps == 1000
    assert load(minimal, ["data.path=007"]).data.path == "007"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=0.1", ["optim.lrr", "unknown key", "did you mean optim.lr?", "command line"]),
        ("optim.warm_up=3", ["did you mean optim.warmup_steps?"]),
        ("steps=3", ["did you mean train.steps?"]),
        ("titan.chunk_mem=3", ["titan ", "unknown key", "model.titans"]),
        ("train.steps=ten", ['train.steps = "ten"', "expected an integer"]),
        ("train.steps=1e3", ["train.steps = 1000.0", "expected an integer"]),
        ("train.steps=-1", ["train.steps = -1", "greater than 0"]),
        ("model.titans.retention=True", ['model.titans.retention = "True"', "expected true or false"]),
        ("model.mixer=titan", ['model.mixer = "titan"', "expected titans, attention", 'did you mean "titans"?']),
        ("model.cms=3", ["model.cms = 3", "expected a table"]),
        ("model.cms.periods=[1, 0]", ["model.cms.periods.1 = 0", "greater than 0", "command line"]),
        ("model.num_heads=3", ["model", "num_heads = 3 does not divide width = 32"]),
        ("model.titans.chunk_mem=48", ["model.titans", "chunk_proj = 256 is not a multiple of chunk_mem = 48"]),
        ("train.steps.x=1", ["train.steps is a value, not a table"]),
        ("train.steps", ["expected section.key=value"]),
        ("data.path=[1", ["not valid TOML"]),
        ("train.global_batch_size=33", ["global_batch_size = 33 is not a multiple"]),
        ("name=../x", ['name = "../x"']),
        ("optim.matrix_lr=0.01", ["optim.matrix_lr = 0.01", "all have it", "set optim.lr"]),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(minimal, override, parts):
    message = error_of(minimal, [override])
    for part in parts:
        assert part in message


def test_errors_name_the_file_that_set_the_key(minimal, tmp_path):
    child = tmp_path / "child.toml"
    child.write_text('base = "minimal.toml"\n[optim]\nlrr = 1.0\n')
    assert str(child) in error_of(child)
    minimal.write_text(MINIMAL.replace("steps = 10", 'steps = "10"'))
    child.write_text('base = "minimal.toml"\n')
    assert str(minimal) in error_of(child)


def test_missing_keys_and_sections(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('name = "r"\n[train]\nsteps = 1\n[data]\npath = "x"\n')
    assert "model is missing" in error_of(path)
    path.write_text(MINIMAL.replace('[data]\npath = "somewhere"\n', ""))
    message = error_of(path)
    assert message.startswith("data ") and "path is empty" in message


def test_unreadable_files(tmp_path):
    assert "no such configuration file" in error_of(tmp_path / "absent.toml")
    assert "cannot be read" in error_of(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("name = \n")
    assert "not valid TOML" in error_of(bad)
    bad.write_bytes(b"name = '\xff'")
    assert "cannot be read" in error_of(bad)


def test_base_is_merged_one_level_only(minimal, tmp_path):
    child = tmp_path / "child.toml"
    child.write_text('base = "minimal.toml"\nname = "child"\n[model.cms]\nperiods = [1]\n')
    config = load(child)
    assert (config.name, config.model.width, config.model.cms.periods) == ("child", 32, (1,))
    grandchild = tmp_path / "grandchild.toml"
    grandchild.write_text('base = "child.toml"\n')
    assert "only one level" in error_of(grandchild)
    grandchild.write_text('base = "nowhere.toml"\n')
    assert "nowhere.toml" in error_of(grandchild)
    grandchild.write_text("base = 3\n")
    assert "base = 3" in error_of(grandchild)


def test_diff_and_hash_see_every_change(minimal):
    a = load(minimal)
    b = load(minimal, ["optim.lr=0.5", "model.cms.periods=[1]"])
    assert diff(a, b) == ["model.cms.periods: [1, 4, 16] -> [1]", "optim.lr: 0.001 -> 0.5"]
    assert diff(a, load(minimal)) == []
    assert config_hash(a) == config_hash(load(minimal)) != config_hash(b)


def test_strings_survive_the_round_trip(minimal):
    config = load(minimal)
    awkward = config.model_copy(update={"out": 'a"b\\c\n\x7fé\u2028'})
    assert loads(to_toml(awkward), source="text") == awkward


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_round_trips_and_matches_its_golden_form(path):
    config = load(path)
    assert config.name == path.stem
    text = to_toml(config)
    assert loads(text, source="text") == config
    golden = ROOT / "tests" / "golden" / "configs" / path.name
    assert golden.is_file(), "run `make golden`"
    assert text == golden.read_text(), "the resolved configuration changed; if that was meant, run `make golden`"


def test_no_golden_file_without_a_config():
    assert CONFIGS
    assert {path.name for path in (ROOT / "tests" / "golden" / "configs").glob("*.toml")} == {path.name for path in CONFIGS}
