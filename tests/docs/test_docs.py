"""What README and docs say is true: commands exist, settings are accepted, tables are the code's, examples run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from safetensors import safe_open
from typer.testing import CliRunner

from audits.tiny_models import TARGETS, write_questions
from docs.make import pages as reference
from docs.make import results
from docs.make.__main__ import made
from docs.make.page import MADE
from docs.make.tables import DEFAULT_RANK, DEFAULT_SHAPES, pair_table
from fedveil.cli.main import app
from fedveil.client.node import NODE_KEYS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.targets import AUTO
from fedveil.common.config.text import parse_settings, to_toml
from fedveil.common.errors import ConfigError
from fedveil.demo.models import MINILM
from fedveil.demo.packaged import packaged_folder
from fedveil.experiments.api import front
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.sweep import conduct
from fedveil.experiments.sweep.rows import read_rows, results_file, write_rows
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import configure

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.toml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "(?:sh|bash|console)"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.strip().removeprefix("$ ")) for line in lines if line.strip()]
    return found


def check_settings(words: list[str]) -> None:
    texts = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-c"]
    texts = [str(ROOT / text) if text.endswith(".toml") else text for text in texts]
    configure(parse_settings(texts))


def check_install(words: list[str]) -> None:
    """Hold what a page installs, with its extras and files, against ``pyproject.toml`` and ``requirements/``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "install" in words[1:3]
    for word in words[words.index("install") + 1 :]:
        if word.startswith("requirements/"):
            assert (ROOT / word).is_file()
        elif not word.startswith("-"):
            name, _, extras = Path(word).name.rstrip("]").partition("[")
            assert name in ("", f"fedveil-{project['version']}-py3-none-any.whl")
            assert set(extras.split(",")) <= set(project["optional-dependencies"])


def made_here() -> list[str]:
    """Return what keys, models and pictures the pages' commands write into the folder in which they are given."""
    named = set()
    for _, line in commands():
        words = shlex.split(line, comments=True)
        for word, place in (("keygen", 1), ("merge", 2), ("--gguf", 1), ("--output", 1)):
            if word in words and not (path := words[words.index(word) + place]).startswith("/") and not path.isupper():
                named |= {path, path.replace(".pem", ".pub.pem")}
    return sorted(named)


def test_git_leaves_out_what_the_guides_make(tmp_path: Path) -> None:
    found = made_here()
    assert {"mine.pem", "mine.pub.pem", "model"} <= {*found}
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    for name in found:
        path = tmp_path / name
        path.touch() if path.suffix else path.mkdir()
        path.is_dir() and (path / "config.json").touch()
    told = subprocess.run(["git", "-C", tmp_path, "status", "--short"], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["??", ".gitignore"]


def test_no_build_of_the_image_is_sent_what_the_guides_make() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert not {f"!{name}" for name in made_here()} & {*rules}


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_every_command_in_the_docs_exists(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    for word in list(words):
        if "=" in word and word.split("=")[0].isupper():
            words.remove(word)
    if not words or words[0] in ("git", "cd", "export", "source", "."):
        return
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) <= set(targets), f"{page}: make has no target {words[1:]}"
    elif program == "fedveil":
        names = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
        group = ["ledger", "show"] if words[1] == "ledger" else names[:1]
        assert CliRunner().invoke(app, [*group, "--help"]).exit_code == 0, f"{page}: {line}"
        check_settings(words)
    elif program == "flwr":
        check_settings(words)
    elif program == "flower-supernode":
        node = parse_settings([words[words.index("--node-config") + 1]])
        assert set(node) <= set(NODE_KEYS), f"{page}: a site knows no {set(node) - set(NODE_KEYS)}"
    elif program in ("pip", "uv"):
        check_install(words)
    elif words[1:3] == ["-m", "venv"]:
        assert (place := words[3]) != "fedveil", f"{page}: {place} would be imported instead of the package"
    elif program in ("python", "python3"):
        script = next(word for word in words[1:] if not word.startswith("-"))
        module = script.removeprefix("fedveil.").replace(".", "/") if words[1] == "-m" else script
        assert any((ROOT / name).is_file() for name in (module, f"{module}.py", f"{module}/__main__.py")), (
            f"{page}: {script} is not there"
        )
    else:
        raise AssertionError(f"{page}: nobody knows how to check {line!r}")


def test_every_argument_and_option_says_what_it_is() -> None:
    """Click 8.5 drops the help of Typer's arguments, so the range in pyproject.toml leaves it out."""
    leaves = reference._leaves(typer.main.get_command(app), ("fedveil",))
    silent = [
        f"{' '.join(words)} {parameter.name}"
        for words, command in leaves
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert len(leaves) > 20
    assert not silent


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_accepted_and_starts_with_its_command(path: Path) -> None:
    configure(parse_settings([str(path)]))
    first = path.read_text().splitlines()[0]
    assert first.startswith("#")
    assert f"fedveil run -c experiments/configs/{path.name}" in first


def test_made_files_are_what_the_code_and_the_rows_say() -> None:
    stale = [path.name for path, text in made().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run make docs"


def test_the_readmes_table_is_made_from_the_rows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (figure,) = re.findall(r"^\| default \| ([\d.]+) ", readme, flags=re.M)
    assert results.with_results(readme.replace(figure, "99.9")) == readme
    assert len(results.readme_table().splitlines()) == 2 + 6


def test_the_readmes_plot_is_of_the_rows_and_has_five_series(tmp_path: Path) -> None:
    picture = results.PLOT.read_bytes()
    assert results.is_current(picture), "run make docs"
    assert len({row.variant for row in results.plotted()}) == 5
    rows = [replace(row, accuracy=1.0) for row in results.rows_of(results.MOVIES)]
    write_rows(results_file(tmp_path, results.MOVIES), rows)
    assert not results.is_current(picture, tmp_path)


def test_no_line_outside_tables_and_code_is_long() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if MADE in text:
            continue
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        long = [line for line in prose.splitlines() if len(line) > 130 and not line.lstrip().startswith(("|", "!["))]
        assert not long, f"{page.name}: {long[0]}"


def test_every_pair_of_strategy_and_adapter_is_in_its_table_as_the_code_takes_it() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in pair_table().splitlines()[2:]]
    told = {(strategy.strip("`"), adapter.split("`")[1]) for strategy, adapter in rows}
    for strategy in STRATEGIES:
        for adapter in ADAPTERS:
            try:
                # A start that gives what the adapter begins with; the default gives A and B.
                start = "public-metric" if "V" in ADAPTERS[adapter].directions else "orthonormal"
                library = {
                    "adapter.start": "library",
                    "start.library": "library",
                    "start.adapters": "letters=1,notes=2",
                }
                begun = library if "stack" in ADAPTERS[adapter].directions else {"adapter.start": start}
                configure({"strategy": strategy, "adapter.name": adapter, **begun})
                taken = True
            except ConfigError:
                taken = False
            assert ((strategy, adapter) in told) == taken, f"{strategy} with {adapter}"
    assert [adapter for strategy, adapter in rows if strategy == "`fed-sb`"] == ["`lora-sb` (its own)"]


def test_every_page_is_in_the_index_once() -> None:
    docs = ROOT / "docs"
    linked = re.findall(r"\]\(((?:\w+/)?[\w-]+\.md)\)", (docs / "README.md").read_text(encoding="utf-8"))
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    assert sorted(linked) == sorted({*pages} - {"README.md"})


def test_the_tables_bytes_are_of_the_plain_jobs_own_layers() -> None:
    config = configure({"recipe": "plain"}).config
    assert config.model.name == "all-MiniLM-L6-v2", "the default model is another: read that one's layers here"
    assert config.adapter.target_modules == (AUTO,)
    targets = KNOWN["bert"]
    with packaged_folder(MINILM) as folder, safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        weights = [key for key in file.keys() if key.removesuffix(".weight").rsplit(".", 1)[-1] in targets]  # noqa: SIM118
        shapes = sorted(tuple(file.get_slice(key).get_shape()) for key in weights)
    assert shapes == sorted(DEFAULT_SHAPES), f"the plain job adapts {len(shapes)} layers, of {set(shapes)}"
    assert config.adapter.rank == DEFAULT_RANK, "the table counts bytes at another rank than the plain job's"


def anchors(page: Path) -> set[str]:
    """Return what a git host calls the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_somewhere() -> None:
    others = (ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))
    for page in [*PAGES, *others, *sorted((ROOT / "experiments" / "log").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)]+?)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            if "://" in target:
                continue
            there = page.parent / file if file else page
            assert there.exists(), f"{page.name} links to {file}, which is not there"
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}: no such heading"


def defined(path: Path) -> set[str]:
    """Return the functions, methods and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def test_the_page_on_one_round_names_code_that_is_there_and_the_picture_has_its_steps() -> None:
    text = (ROOT / "docs" / "concepts" / "round.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 12
    for path, name in named:
        assert name in defined(ROOT / path), f"docs/concepts/round.md names {path}::{name}, which is not there"
    steps = re.findall(r"^\| (\d+) \|", text, flags=re.M)
    picture = (ROOT / "docs" / "concepts" / "round.svg").read_text(encoding="utf-8")
    assert steps == sorted(re.findall(r'class="digit"[^>]*>(\d+)<', picture))


def test_tests_named_in_a_page_exist() -> None:
    files = {path.name: path for folder in ("tests", "contrib/tests") for path in (ROOT / folder).rglob("test_*.py")}
    for page in PAGES:
        named = re.findall(r"`([\w/]*/)?(test_\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
        assert named or page.stem not in ("threat-model", "site", "evidence")
        for folder, file, test in named:
            path = files[file]
            assert path.match(f"{folder}{file}"), f"{page} names {folder}{file}, which is at {path}"
            assert not test or f"def {test}(" in path.read_text(), f"{page} names {file}::{test}, which is not there"


def test_every_pitfall_that_is_of_code_has_a_test_and_every_edge_a_severity() -> None:
    text = (ROOT / "docs" / "concepts" / "evidence.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", text, flags=re.M)
    assert {int(number) for number, _, _ in rows} == set(range(1, 22))
    untested = [pitfall for _, pitfall, tests in rows if "::test_" not in tests and "not of code" not in tests]
    assert not untested, f"no test would find: {untested}"
    promised = (ROOT / "docs" / "concepts" / "threat-model.md").read_text(encoding="utf-8")
    edges = promised.split("## Sharp edges")[1].split("\n## ")[0]
    severities = [line.split("|")[1].strip() for line in edges.splitlines() if line.startswith("|")][2:]
    assert set(severities) == {"high", "medium", "low"}
    assert severities == sorted(severities, key=["high", "medium", "low"].index)


@pytest.fixture
def researcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that make any job of the guide a second's; reviews.csv, which it names, is where it runs."""
    header, *rows = Path(toy_settings["data.name"]).read_text(encoding="utf-8").splitlines()
    assert header == "text,label,author"
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars,author", *rows]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    small = (
        "model.name",
        "model.max-length",
        "adapter.rank",
        "adapter.targets",
        "head.start",
        "precision",
        "device",
        "output",
    )
    return {**{key: toy_settings[key] for key in small}, "rounds": 1, "training.local-steps": 1, "privacy.delta": 1e-3}


OWN_RECORDS = {"data.name": "reviews.csv", "data.text": "review", "data.label": "stars", "data.test-size": 40}


@pytest.mark.usefixtures("rough_prices", "own_rows")
def test_the_researchers_guide_ends_in_a_result(
    researcher: dict[str, Any],
    model_folder: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every command and block of the page, in order; the runs are in process, on a tiny model and its own records."""
    page, folder, done = ROOT / "docs" / "guides" / "researcher.md", Path(), []
    asked_of = write_questions(Path("notes.csv"), 120).read_text(encoding="utf-8")
    Path("notes.csv").write_text(asked_of.replace("prompt,completion", "question,answer", 1), encoding="utf-8")
    Path("job.toml").write_text(to_toml({k: v for k, v in {**researcher, **OWN_RECORDS}.items() if k != "output"}))
    monkeypatch.setattr(conduct, "each_in_a_process", lambda run, works, *_: ((work, run(work)) for work in works))
    for start in ("public_metric", "class_means"):  # a map of 16 features needs no more made-up texts
        monkeypatch.setattr(f"fedveil.common.starts.{start}.MADE", 48)
    for language, block in re.findall(r"```(sh|python|toml)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        block = block.replace("RUN_FOLDER", str(folder))
        if language == "toml":
            fewer = block.replace("seeds = [1, 2, 3]", "seeds = [1]").replace("sites = 4", "sites = 2")
            Path("sweep.toml").write_text(fewer, encoding="utf-8")
            continue
        if language == "python":
            if "MINILM" not in block:  # the plain job's own adapter; tests/demo/test_packaged.py loads that model
                namespace: dict[str, Any] = {}
                usual = front.given_settings
                monkeypatch.setattr(front, "given_settings", lambda *own, usual=usual: {**researcher, **usual(*own)})
                exec(block, namespace)
                folder = namespace.get("folder", folder)
                done.append("python")
            continue
        for line in block.splitlines():
            words = [
                str(ROOT / word) if word.endswith(".toml") and not Path(word).exists() else word
                for word in shlex.split(line)
            ]
            name = words[1]
            if words[0] == "make":
                continue
            if name == "run":
                texts = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-c"]
                if "asdiv" in line:
                    continue
                if "causal-lm" in line:
                    own = researcher | {"model.name": model_folder("llama"), "adapter.targets": TARGETS["llama"]}
                    kept = {key: value for key, value in own.items() if key != "head.start"}
                    run_in_process({**parse_settings(texts), **kept, "data.test-size": 20}, 2, run="words")
                    continue
                asked = {k: v for k, v in parse_settings(texts).items() if k not in researcher}
                folder = run_in_process({**researcher, **OWN_RECORDS, **asked}, 2, run=str(len(done)))
            else:
                answer = CliRunner().invoke(app, words[1:])
                assert answer.exit_code == 0, f"{line}\n{answer.output}"
            done.append(name)
    assert {"plan", "settings", "run", "evaluate", "report", "ledger", "python", "sweep", "pictures"} <= set(done)
    rows = read_rows(Path("runs/sweeps/sweep/sweep.jsonl"))
    assert {(row.variant, row.arm) for row in rows} == {
        *(("rank-2", arm) for arm in ("federated", "local-only", "pooled")),
        ("rank-8", "federated"),
    }
    assert sorted(path.suffix for path in Path("pictures").iterdir()) == [".html", ".png", ".png"]
    assert re.search(r"accuracy +loss", capsys.readouterr().out), "no frame of rounds was printed"


@pytest.mark.parametrize("page", ["README.md", "docs/guides/operate.md"])
def test_no_command_of_flowers_reports_to_anyone(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```(?:sh|text)\n(.*?)```", text, flags=re.DOTALL):
        if re.search(r"^(\w+=\S* )*(flower-\w+|flwr) ", block, flags=re.MULTILINE):
            assert "FLWR_TELEMETRY_ENABLED=0" in block, f"{page} starts Flower's programs as they come:\n{block}"
