"""A bundle whose client is the server's own: it must not be taken, and no line of it may run."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
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
from client.policy import Policy
from client.worker import reply_to
from common.bundle import PROJECT, files_of
from common.messages.wire import encode_task
from common.run_lines import Finding

MARK = """
from pathlib import Path
from flwr.clientapp import ClientApp
Path({mark!r}).write_text("the bundle's code ran")
app = ClientApp()
"""


def any_bundle() -> AbstractContextManager[Any]:
    """A bundle's hash is nobody's business."""
    return patch.object(Policy, "check_bundle", lambda *_: None)


BUNDLES = Fault("any bundle is taken", any_bundle)


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
