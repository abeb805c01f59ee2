"""The command line: a wrong command is named once, and what can be known at once is said at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from report_forms import fedveil


@pytest.mark.parametrize(
    ("words", "meant"), [(("rnu",), "run"), (("ledger", "shwo"), "show"), (("site", "strat"), "start")]
)
def test_a_mistyped_command_is_told_the_nearest_one_once(words: tuple[str, ...], meant: str) -> None:
    code, said = fedveil(*words)
    assert code == 2
    assert said.lower().count("did you mean") == 1, said
    assert f"did you mean '{meant}'" in said


def test_a_command_that_is_like_no_other_is_told_of_none() -> None:
    code, said = fedveil("xyzzyx")
    assert (code, "did you mean" in said.lower()) == (2, False)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("ask", "absent", "a text"), "names no run in"),
        (("evaluate", "."), "holds no adapter"),
        (("merge", "latest", "new"), "names no run in"),
        (("merge", "run", "full"), "exists already"),
        (("export", "absent", "--gguf", "new.gguf"), "names no run in"),
    ],
)
def test_a_folder_is_looked_at_before_what_takes_seconds_is_imported(
    words: tuple[str, ...], wanted: str, tmp_path: Path
) -> None:
    for name in ("full/mine.txt", "run/adapter/fedveil.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    program = (
        "import sys; from fedveil.cli.main import app\n"
        "try: app(sys.argv[1:], standalone_mode=False)\n"
        "finally: print('imported:', *{'torch', 'transformers'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wanted in done.stderr, done.stderr
    assert done.stdout.split() == ["imported:"]


def test_the_help_begins_with_run_has_examples_and_imports_nothing_that_takes_time() -> None:
    program = (
        "import sys; from fedveil.cli.main import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print('imported:', *{'torch', 'numpy', 'dp_accounting', 'fedveil.privacy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "imported:"
    panels = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("╭─")]
    assert panels == ["Options", "Train", "Look", "Use", "Real", "Research", "Between"]
    assert done.stdout.split("╭─ Train")[1].splitlines()[1].split()[1] == "run"
    examples = done.stdout.split("Examples:")[1].splitlines()
    assert len([line for line in examples if line.strip().startswith("fedveil ")]) == 5


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("question,kind\na,b\n", "has no column 'text'"),
        ("text,label\na,b\nc\n", "line 3 has 1 fields"),
        ("text,label\n" + "".join(f"a {i},{i % 5}\n" for i in range(2)), "too few for 3 sites"),
    ],
    ids=["column", "row", "few"],
)
def test_what_is_wrong_with_a_table_is_the_only_line(command: str, content: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(content, encoding="utf-8")
    code, said = fedveil(command, "--sites", "3", "-c", f'data.name="{path}" output="{tmp_path}"')
    assert (code, said.count("\n")) == (1, 1), said
    assert wanted in said
