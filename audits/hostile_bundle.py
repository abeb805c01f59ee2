"""Bundles of the server's making: its own client must not be taken, no line of it may run, and none may cost much."""

from __future__ import annotations

import io
import time
import tomllib
import zipfile
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flwr.app import Context, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_files

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_site import tiny_site
from fedveil.client.policy import Policy
from fedveil.client.worker import reply_to
from fedveil.common import bundle as bundles
from fedveil.common.bundle import PROJECT, SETTINGS, bundle_digest, files_of
from fedveil.common.errors import FedVeilError, ProtocolError
from fedveil.common.findings import Finding
from fedveil.common.messages.wire import encode_task
from fedveil.server import runner

MARK = """
from pathlib import Path
from flwr.clientapp import ClientApp
Path({mark!r}).write_text("the bundle's code ran")
app = ClientApp()
"""


def any_bundle() -> AbstractContextManager[Any]:
    """A bundle's hash is nobody's business."""
    return patch.object(Policy, "check_bundle", lambda *_: None)


def settings_of_any_size() -> AbstractContextManager[Any]:
    """Whatever stands in ``pyproject.toml`` is parsed."""
    return patch.multiple(bundles, MOST_SETTINGS=1 << 30, MOST_DOTS=1 << 30)


def settings_of_all() -> AbstractContextManager[Any]:
    """The settings are parsed before the other files are looked at."""
    return patch.multiple(bundles, _code_digest=lambda _: "", _own_code_digest=lambda: "")


def any_app() -> AbstractContextManager[Any]:
    """The server's runner takes every bundle for its own."""
    return patch.object(runner, "bundle_digest", lambda *_, **__: bundles.own_digest())


BUNDLES = Fault("any bundle is taken", any_bundle)
DEAR = Fault("a bundle's settings are parsed whatever their size", settings_of_any_size)
EAGER = Fault("a stranger's settings are parsed", settings_of_all)
SUBMITTED = Fault("any app that is submitted is begun", any_app)
KEY_PARTS = 5000
"""Of one dotted key: the parser's time grows with their square, to half a second for so many."""
DEEP = b"[" + b"a." * 19 + b"a]\n"


def audit_bundle(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return whether a bundle whose client is the server's own is taken, and whether a line of it runs.

    Args:
        folder: empty; model, records and the mark go there.
        fault: SOUND or BUNDLES.
    """
    site, mark = tiny_site(folder), folder / "mark"
    own = {"client/app.py": MARK.format(mark=str(mark)).encode()}
    bundle = build_fab_from_files(files_of(PROJECT) | own)[0]
    metadata = Metadata(1, "", 1, 1, "", "1", time.time(), 600.0, "train")
    message = make_message(metadata, encode_task(site.task()))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=site.settings)
    with fault.plant():
        reply = reply_to(message, context, bundle, site.node)
    trained = bool(site.ledger.exists() and site.charges())
    figures: dict[str, int | float | str] = {
        "taken": str(trained),
        "its code ran": str(mark.exists()),
        "answered": str(reply.has_content()),
    }
    return judged("bundle of the server's own", fault.name, trained or mark.exists(), figures)


def dear_settings() -> dict[str, bytes]:
    """Return texts of ``pyproject.toml`` that cost a parser much, by what they are."""
    key = b"a" + b".a" * (KEY_PARTS - 1)
    return {
        "one dotted key": key + b" = 1",
        "a dotted key in an array": b"x = [\n{" + key + b" = 1}]",
        "a dotted table": b"[" + key + b"]",
        "many tables": b"".join(b"[%d]\n" % number for number in range(200_000)),
        "a huge text": b'x = "' + b"a" * 3_000_000 + b'"',
        "the most that is parsed": (DEEP + b"".join(b"%x.%s=1\n" % (i, b".a" * 18) for i in range(2000)))[: 32 << 10],
    }


def audit_dear_bundles(_: Path, fault: Fault = SOUND) -> Finding:
    """Return what of a server's settings is parsed for a site that joins the installed version's runs alone.

    Beside the installed version's files, only what is within bounds; beside others, nothing.

    Args:
        _: a folder, which this audit needs not.
        fault: SOUND, DEAR or EAGER.
    """
    own, parse = files_of(PROJECT), tomllib.loads
    parsed, wrong, dearest = list[str](), list[str](), 0.0

    def watched(text: str) -> dict[str, Any]:
        parsed.append(text)
        return parse(text)

    bundles.own_digest(), bundles._own_code_digest()
    with fault.plant(), patch.object(tomllib, "loads", watched):
        for name, settings in dear_settings().items():
            for whose, files in (("installed", own), ("strange", {"client/app.py": b""})):
                content, began = _zipped(files | {SETTINGS: settings}), time.process_time()
                with suppress(ProtocolError):
                    bundle_digest(content, own_alone=True)
                dearest = max(dearest, time.process_time() - began)
                bounded = len(settings) <= 32 << 10 and max(line.count(b".") for line in settings.split(b"\n")) <= 20
                if parsed and (whose == "strange" or not bounded):
                    wrong.append(f"{name}, {whose}")
                parsed.clear()
    figures: dict[str, int | float | str] = {
        "parsed": "; ".join(wrong) or "nothing that is strange or large",
        "dearest, seconds of a core": dearest,
    }
    return judged("bundles that cost much", fault.name, bool(wrong), figures)


def audit_submitted(_: Path, fault: Fault = SOUND) -> Finding:
    """Return which apps that are not its own a server's runner would begin, whoever submitted them.

    Args:
        _: a folder, which this audit needs not.
        fault: SOUND or SUBMITTED.
    """
    own, begun = files_of(PROJECT), list[str]()
    settings = own[SETTINGS].replace(b'serverapp = "fedveil.server.app:app"', b'serverapp = "fedveil.server.other:app"')
    submitted = {
        "another server app": _zipped(own | {"server/app.py": b""}),
        "another client app": _zipped(own | {"client/app.py": b""}),
        "one more file": _zipped(own | {"server/other.py": b""}),
        "another entry point": _zipped(own | {SETTINGS: settings}),
        "no zip": b"",
    }
    with fault.plant():
        for name, content in submitted.items():
            with suppress(FedVeilError):
                runner.check_bundle(content)
                begun.append(name)
    figures: dict[str, int | float | str] = {"submitted": len(submitted), "begun": "; ".join(begun) or "none"}
    return judged("apps submitted to a server", fault.name, bool(begun), figures)


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()
