"""Where `key=value` may stand on a command line."""

import pytest

from hope_pt.cli import parse


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "a.toml", "x=1", "y=2", "--dry-run"],
        ["train", "a.toml", "--dry-run", "x=1", "y=2"],
        ["train", "a.toml", "x=1", "--dry-run", "y=2"],
    ],
)
def test_overrides_count_before_and_after_options(argv):
    arguments = parse(argv)
    assert (arguments.config, arguments.overrides, arguments.dry_run) == ("a.toml", ["x=1", "y=2"], True)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "a.toml", "--dry-run", "x=1", "--worldsize=2"], "--worldsize=2"),
        (["train", "a.toml", "--dry-run", "word"], "word"),
        (["report", "runs/a", "--out", "b.html", "--x=1"], "--x=1"),
    ],
)
def test_what_is_no_argument_is_named_alone(argv, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    assert capsys.readouterr().err.strip().endswith(f"unrecognized arguments: {named}")
