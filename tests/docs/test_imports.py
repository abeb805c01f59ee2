"""Imports point one way, and the big libraries come in through named doors only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fedveil.common.tasks import TASKS
from fedveil.privacy import MECHANISMS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    *("common", "privacy", "demo", "strategies", "client", "reports", "server", "deploy", "experiments", "cli"),
    *("audits", "faults"),
)
"""From the lowest floor to the highest: a room imports itself and what is below it, except as said in NEVER."""
OWN = "fedveil."
"""How a room is imported, everywhere: under another name its modules would be loaded twice."""
BESIDE = "contrib"
"""The room of rows that no run needs: it imports the others, and none of the product imports it (``common.rows``)."""
EVIDENCE, NOT_BESIDE = {"audits", "faults"}, {"audits", "faults"}
"""What may import it, and what it may not import."""
ROOMS_OF_THE_WHEEL = {BESIDE, *ROOMS} - EVIDENCE
NEVER = {
    *{("reports", "client"), ("server", "client"), ("audits", "cli"), ("faults", "cli")},
    # What a run needs of the demonstrations it asks the tables of ``common`` for, by name.
    *((room, "demo") for room in ("strategies", "client", "reports", "server", "deploy")),
}
WINGS = ("tasks", "privacy", "config", "data", "secure_sum", "messages", "adapters", "model", "starts")
"""The folders of ``common`` and the privacy room in their order, lowest first: one imports itself, the files beside
them, and the wings below it."""
LOOSE = {"privacy.accountant", "privacy.entropy", "privacy.grid", "privacy.randomness"}
"""Files of the privacy room that every wing may import: they import none."""
NAMED = {"tasks": set[str](), "privacy": {"dpsgd.py"}}
"""Wings whose rows settings name. Settings are checked by their tables, so they are the lowest, and import what is
above only in the methods that load it; the files here are loaded by such methods alone."""
DOORS = {
    "flwr": {
        "audits/hostile_bundle.py",
        "audits/simulated_site.py",
        "client/app.py",
        "client/runtime.py",
        "client/worker.py",
        "server/app.py",
        "server/pulls.py",
        "server/runner.py",
        "server/signing.py",
        "server/submission.py",
        "common/messages/blocks.py",
        "common/messages/header.py",
        "common/messages/named.py",
        "common/messages/signed.py",
        "common/messages/sum_messages.py",
        "common/messages/wire.py",
        "common/runtime.py",
        "deploy/control.py",
        "deploy/fleet.py",
        "deploy/superlink.py",
        "audits/front_door.py",
        "faults/checks.py",
        "faults/faulty_server.py",
        "faults/faulty_site.py",
        "faults/impostor.py",
        "faults/impostor_scenarios.py",
        "faults/stuttering_node.py",
    },
    "opacus": {"privacy/dpsgd.py", "privacy/linear_samples.py"},
    "dp_accounting": {"privacy/accounting.py", "privacy/events.py", "privacy/meaning.py"},
    "sqlite3": {"client/ledger/file.py", "client/ledger/schema.py"},
    "flwr_datasets": set(),
    "cryptography": {
        "audits/summed.py",
        "common/messages/signed.py",
        "privacy/secure_sum/attempt.py",
        "privacy/secure_sum/identity.py",
        "privacy/secure_sum/masks.py",
        "privacy/secure_sum/recovery.py",
        "privacy/secure_sum/survivors.py",
        "reports/signature.py",
        "deploy/certificates.py",
        "deploy/fleet.py",
        "deploy/fleet_answers.py",
        "deploy/fleet_grpc.py",
        "deploy/fleet_http.py",
        "deploy/node_keys.py",
        "deploy/shared_checks.py",
        "faults/impostor.py",
    },
    "jinja2": {"reports/page.py"},
    "PIL": {"common/tasks/images.py"},
    "matplotlib": {"experiments/sweep/pictures.py"},
    "mlflow": {"contrib/trackers/mlflow.py"},
    "trackio": {"contrib/trackers/trackio.py"},
    "wandb": {"contrib/trackers/wandb.py"},
    "onnx": {"contrib/experiments/transfer_l3.py", "demo/dinov2.py"},
    "gguf": {"experiments/serving/gguf.py"},
    "bitsandbytes": {"common/adapters/low_bits.py"},
    "ray": set(),
}


LATER = {"np": "numpy", "torch": "torch", "nn": "torch", "F": "torch"}
"""The library of each name of ``common.later``: what imports the name counts as importing the library."""


@cache
def imports(path: Path) -> frozenset[str]:
    """Return every module that a file imports, wherever in the file it does; each file is read once."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found |= {library for name, library in LATER.items() if f"{OWN}common.later.{name}" in found}
    return frozenset(map(in_its_room, found))


def in_its_room(name: str) -> str:
    """Return a module's name from its room on; a room that is imported by its bare name has a mark before it."""
    if name.startswith(OWN):
        return name.removeprefix(OWN)
    return f"bare {name}" if name.split(".", maxsplit=1)[0] in ROOMS_OF_THE_WHEEL else name


def at_import(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports as soon as it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (in_its_room(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield in_its_room(node.module)


def run_imports(tree: ast.Module, modules: Collection[str]) -> Iterator[str]:
    """Yield which of ``modules`` a file imports when it is run, in its functions as well: not what types alone need."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (name for alias in node.names if (name := in_its_room(alias.name)) in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            module = in_its_room(node.module)
            for alias in node.names:
                part = f"{module}.{alias.name}"
                yield from [part] if part in modules else [module] * (module in modules)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            left += node.orelse
        else:
            left += ast.iter_child_nodes(node)


def circle(files: Mapping[str, str]) -> list[str]:
    """Return modules that import one another in a circle, by their sources; empty: there is none."""
    arrows = {name: set(run_imports(ast.parse(source), files)) - {name} for name, source in files.items()}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def libraries(path: Path) -> set[str]:
    """Return the first part of everything that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def sources() -> list[Path]:
    """Return the files of all rooms, those beside the core included, and no tests."""
    found = [path for room in (*ROOMS, BESIDE) for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if "tests" not in path.relative_to(ROOT).parts]


def allowed_of(room: str) -> set[str]:
    """Return the rooms that one may import."""
    if room == BESIDE:
        return {BESIDE, *ROOMS} - NOT_BESIDE
    below = {other for other in ROOMS[: ROOMS.index(room) + 1] if (room, other) not in NEVER}
    # Messages, settings and starts are made of what the privacy room says; file by file there is no circle.
    return below | ({BESIDE} if room in EVIDENCE else set()) | ({"privacy"} if room == "common" else set())


def wrong_rooms(room: str, names: Collection[str]) -> set[str]:
    """Return the rooms among imported names that a room may not import; nobody imports the writers of documents."""
    return ({name.split(".")[0] for name in names} & {*ROOMS, BESIDE, "docs"}) - allowed_of(room)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    wrong = wrong_rooms(room, imports(path))
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; {room} may import {allowed_of(room)}"


@pytest.mark.parametrize(
    ("room", "fault"),
    [
        ("strategies", "import fedveil.contrib"),
        ("common", "from fedveil.contrib import ROWS"),
        ("cli", "def f():\n    import fedveil.contrib.starts.eva"),
        ("contrib", "from faults.bundle import make_bundle"),
        ("server", "import docs.make"),
    ],
)
def test_a_room_that_imports_what_it_may_not_is_found(room: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(fault, encoding="utf-8")
    assert wrong_rooms(room, imports(tmp_path / "planted.py"))


def test_no_file_imports_a_room_by_its_bare_name() -> None:
    """It would be loaded twice, with two of each class, and from an installed wheel not at all."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "build")]
    assert len(files) > 600
    assert [str(path.relative_to(ROOT)) for path in files if any(name[:5] == "bare " for name in imports(path))] == []


@pytest.mark.parametrize(
    "fault", ["import common", "from client.app import app", "def f():\n    import server.app as s"]
)
def test_a_room_imported_by_its_bare_name_is_found(fault: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(fault, encoding="utf-8")
    assert any(name.startswith("bare ") for name in imports(tmp_path / "planted.py"))


def test_names_of_rows_are_listed_without_loading_a_row() -> None:
    """But for kinds of task: which columns and options there are to pin, they say."""
    code = """
import sys
def loaded():
    names = (name for name in sys.modules if name.startswith("fedveil.contrib"))
    print(sorted(name for name in names if ".tasks" not in name and not name.endswith(".rewards")))
from fedveil.cli.settings_reference import select
from fedveil.client.policy import Policy
from fedveil.strategies.options import known_settings, tables
from fedveil.strategies.job import configure
assert {"eva", "orthonormal"} <= set(tables()["adapter.start"].choices)
known_settings(), select([]), configure({}), Policy()
loaded()
configure({"adapter.start": "eva", "strategy": "ffa-lora"})
loaded()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "['fedveil.contrib']",
        "['fedveil.contrib', 'fedveil.contrib.starts', 'fedveil.contrib.starts.eva']",
    ]


def sums_of_flower(modules: Collection[str]) -> set[str]:
    """Return which modules are those of Flower's own secure sums, whose masks follow from 32 bits."""
    return {name for name in modules if name.startswith("flwr") and re.search(r"secagg|secure_aggregation", name)}


def test_nothing_imports_flowers_secure_sums() -> None:
    assert {str(path.relative_to(ROOT)) for path in sources() if sums_of_flower(imports(path))} == set()
    for name in ("flwr.clientapp.mod.secaggplus_mod", "flwr.common.secure_aggregation.crypto"):
        assert sums_of_flower({"flwr.app", name}) == {name}, "the check is blind"


def wing_of(module: str) -> str:
    """Return the wing that a module is in; empty: in none."""
    parts = module.split(".")
    if parts[0] == "privacy":
        return "secure_sum" if parts[1:2] == ["secure_sum"] else "" if ".".join(parts[:2]) in LOOSE else "privacy"
    return parts[1] if parts[0] == "common" and parts[1:2] and parts[1] in WINGS else ""


def files_of_wing(wing: str) -> Iterator[Path]:
    for path in sorted([*(ROOT / "common").rglob("*.py"), *(ROOT / "privacy").rglob("*.py")]):
        if wing_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) == wing:
            yield path


@pytest.mark.parametrize("wing", WINGS)
def test_the_wings_of_common_and_the_privacy_room_point_one_way(wing: str) -> None:
    higher = set(WINGS[WINGS.index(wing) + 1 :])
    room = "privacy" if wing == "privacy" else f"common.{wing}"
    loaded = {f"{room}.{name.removesuffix('.py')}" for name in NAMED.get(wing, ())}
    found = list(files_of_wing(wing))
    assert found
    for path in found:
        if path.name in NAMED.get(wing, ()):
            continue
        names = set(at_import(path) if wing in NAMED else imports(path))
        assert not names & loaded, f"{path.relative_to(ROOT)} imports {names & loaded} before anybody needs it"
        wrong = {name for name in names if wing_of(name) in higher}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which are above it"


@pytest.mark.parametrize("name", sorted(LOOSE))
def test_what_every_wing_may_import_imports_no_wing(name: str) -> None:
    found = imports(ROOT / f"{name.replace('.', '/')}.py")
    assert not {module for module in found if wing_of(module)}


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Also where a method imports: the order in which files can be understood is the order in which they run."""
    files = {}
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        files[name] = path.read_text(encoding="utf-8")
    assert circle(files) == []


@pytest.mark.parametrize(
    ("back", "found"),
    [
        ("import room.first", True),
        ("from room import first", True),
        ("from room.first import name", True),
        ("def later():\n    from room.first import name", True),
        ("if TYPE_CHECKING:\n    from room.first import name", False),
        ("from room import other", False),
    ],
)
def test_a_circle_is_found_wherever_it_is_closed(back: str, found: bool) -> None:
    files = {"room": "", "room.first": "from room.second import name", "room.second": back}
    assert bool(circle(files)) is found


def test_every_folder_of_common_is_a_wing() -> None:
    assert {path.name for path in (ROOT / "common").iterdir() if path.is_dir() and path.name[0] != "_"} <= set(WINGS)


@pytest.mark.parametrize("library", sorted(DOORS))
def test_big_libraries_come_in_through_their_doors(library: str) -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if library in libraries(path)}
    assert found <= DOORS[library], f"{library} is imported in {found - DOORS[library]}"


def test_peft_comes_in_through_the_adapters_and_the_way_out() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if "peft" in libraries(path)}
    ways_out = {"experiments/evaluate.py", "experiments/serving/gguf.py"}
    assert all(name.startswith(("common/adapters/", "contrib/adapters/")) or name in ways_out for name in found), found


KINDS = {"Classification", "CausalLM", "TextTask", "TextExample", "has_head", "input_ids"}
"""Names that only code for one kind of task has a use for."""


def kinds_named(tree: ast.AST) -> Iterator[str]:
    """Yield what in a file's code knows a kind of task: its names, and comparisons with a task's name."""
    for node in ast.walk(tree):
        for name in (getattr(node, field, None) for field in ("id", "attr", "name", "value")):
            if isinstance(name, str) and name in KINDS:
                yield name
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if any(side.endswith("model.task") or side.strip("'") in TASKS for side in sides):
                yield ast.unparse(node)


def test_only_tasks_know_kinds_of_records() -> None:
    """An image task is one file and one row only as long as nobody else asks which task a run has."""
    for path in sources():
        name = path.relative_to(ROOT)
        # The audits attack a model of text with texts of their own.
        allowed = {"TextExample", "TextTask", "CausalLM"} if name.parts[0] == "audits" else set()
        found = set(kinds_named(ast.parse(path.read_text(encoding="utf-8")))) - allowed
        own = name.is_relative_to("common/tasks") or name.is_relative_to("contrib/tasks")
        assert own or not found, f"{name} knows a kind of task: {found}"


@pytest.mark.parametrize(
    "fault",
    [
        "if config.model.task == other: ...",
        "if 'causal-lm' != kind: ...",
        "len(record['input_ids'])",
        "model.task.has_head",
        "from fedveil.common.tasks import CausalLM",
    ],
)
def test_code_that_knows_a_kind_of_task_is_found(fault: str) -> None:
    assert list(kinds_named(ast.parse(fault)))


OTHERWISE_PRIVATE = {
    *("demo/packaged.py", "demo/unpacked.py"),  # folders of the user alone
    *("client/pins.py", "client/policy.py", "client/site.py", "deploy/container.py"),  # records that are anybody's
    *(
        f"deploy/{name}.py"
        for name in ("doctor", "files", "node_keys", "peers", "server_folder", "site_folder", "start")
    ),  # keys
}
"""Files in which "private" is said of something else than a run."""


def privacy_asked(tree: ast.AST) -> Iterator[str]:
    """Yield what in a file's code asks whether a run is private: by its mode, a flag of that name, or a plan's absence.

    What somebody needs to know beyond that is a property of the mechanism, named for what it means.
    """
    for node in ast.walk(tree):
        name = next((getattr(node, field) for field in ("id", "attr", "arg") if hasattr(node, field)), None)
        if name == "private" or (name == "on" and ast.unparse(node).endswith("privacy.on")):
            yield ast.unparse(node)
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            named = any(re.search(r"\bmode\b", side) for side in sides)
            by_mode = named and any(side.strip("'") in MECHANISMS for side in sides)
            if by_mode or ("None" in sides and any(side.split(".")[-1] in ("plan", "plans") for side in sides)):
                yield ast.unparse(node)
        test = getattr(node, "test", None)
        for part in test.values if isinstance(test, ast.BoolOp) else [test]:
            asked = part.operand if isinstance(part, ast.UnaryOp) else part
            if isinstance(asked, ast.Name | ast.Attribute) and ast.unparse(asked).split(".")[-1] in ("plan", "plans"):
                yield ast.unparse(part)


def test_nobody_but_the_mechanism_asks_whether_a_run_is_private() -> None:
    """Another mechanism is one file and one row only as long as nobody else decides by the ones there are."""
    for path in sources():
        name = str(path.relative_to(ROOT))
        found = set(privacy_asked(ast.parse(path.read_text(encoding="utf-8"))))
        if name in OTHERWISE_PRIVATE:
            found = {what for what in found if "mode" in what or "privacy" in what or "plan" in what}
        assert name.startswith("privacy/") or not found, f"{name} asks whether a run is private: {found}"


@pytest.mark.parametrize(
    "fault",
    [
        "if job.config.privacy.on: ...",
        "fill(training, private=True)",
        "def check(self, *, private): ...",
        "if config.privacy.mode != 'none': ...",
        "x = 1 if mode == 'dp-sgd' else 2",
        "if plan is None: ...",
        "x = plans[0] if plans else None",
        "if task and not self.plan: ...",
    ],
)
def test_code_that_asks_whether_a_run_is_private_is_found(fault: str) -> None:
    assert list(privacy_asked(ast.parse(fault)))


PRICES = {"epsilon_with_method", "divergence_at", "least_noise", "epsilon_of_several", "meaning_of", "composable"}
"""Prices of releases that were all fixed beforehand. A history that a server chose as it went has the filter's."""
KEPT_TO = "promised"
"""The filter's own price of a plan that is kept to, which a ledger's history need not do."""
PRICED_AS_FIXED = {
    "client/ledger/receipts.py": {KEPT_TO},  # of one run by itself; what the data set has spent stands beside it
    "experiments/planner/find.py": {KEPT_TO},  # before anything is released
    "experiments/planner/forecast.py": {KEPT_TO},  # the same
    "experiments/planner/price.py": {KEPT_TO},  # the same
    "reports/meaning.py": {"meaning_of"},  # of a run that keeps to its plan: a departure is told beside it
    "server/last_rounds.py": {KEPT_TO},  # of a site's own lines, to end a run early: no charge follows from it
    # What a run's own lines cost, which is compared with its ledger's price; the larger one is told.
    "reports/course.py": {KEPT_TO},
    "reports/sites.py": {KEPT_TO},
}
"""Who asks for one of them outside the mechanisms, and why."""


def prices_asked(tree: ast.AST) -> set[str]:
    """Return what of ``PRICES`` a file's code imports, ``accounting.epsilon`` under any name, and ``KEPT_TO``."""
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            of_accounting = {"epsilon"} if node.module == "fedveil.privacy.accounting" else set()
            named |= names & (PRICES | {KEPT_TO} | of_accounting)
            if node.module == "fedveil.privacy":
                named |= names & {"accounting"}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names if alias.name == "fedveil.privacy.accounting"}
        elif isinstance(node, ast.Attribute) and node.attr == KEPT_TO:
            named.add(KEPT_TO)
    return named


def test_no_history_is_priced_past_the_filter() -> None:
    """A server that chooses the next release by the last answer gets more than composition of fixed ones says."""
    for path in sources():
        name = path.relative_to(ROOT)
        found = prices_asked(ast.parse(path.read_text(encoding="utf-8")))
        found -= PRICED_AS_FIXED.get(str(name), set())
        free = name.is_relative_to("privacy") or name.parts[0] == "audits"
        assert free or not found, f"{name} prices releases past privacy.privacy_filter: {sorted(found)}"


@pytest.mark.parametrize(
    "fault",
    [
        "from fedveil.privacy.accounting import epsilon as cost",
        "from fedveil.privacy.accounting import Release, epsilon_with_method",
        "from fedveil.privacy import accounting",
        "import fedveil.privacy.accounting as prices",
        "from fedveil.privacy.privacy_filter import planned_delta, promised as cost",
        "spent = privacy_filter.promised(before, delta)",
    ],
)
def test_code_that_prices_past_the_filter_is_found(fault: str) -> None:
    assert prices_asked(ast.parse(fault))


@pytest.mark.parametrize("name", ["client/ledger/ledger.py", "client/ledger/rows.py", "server/ledger.py"])
def test_no_ledger_is_free_to_price_past_the_filter(name: str) -> None:
    assert ROOT / name in list(sources())
    assert name not in PRICED_AS_FIXED


def test_accounting_knows_no_training_code() -> None:
    assert "torch" not in libraries(ROOT / "privacy/accounting.py")


def test_settings_are_checked_without_torch() -> None:
    """A command that only reads settings answers at once; torch and transformers take seconds to import."""
    modules = "fedveil.common.config.sections, fedveil.common.tasks, fedveil.cli.main, fedveil.deploy.policy_file"
    heavy = "torch", "transformers", "peft", "opacus"
    code = f"import sys, {modules}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", f"importing {modules} imports {found.stdout}"
