"""A site's worker: one long-lived process of the installed package that answers a SuperNode's tasks.

It hashes the bundle that came with a task in memory, asks the policy, and runs the installed ``client.app``; the bundle
is written nowhere and nothing of it is executed. The run's settings come in the context. Policy, ledger and records
are those of the site's folder. The supervisor (``deploy.pair``) starts it anew whenever it ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

from flwr.app import Context, Message

from client import app as installed
from client.ledger.file import withdrawn_in
from client.outgoing import UNTOLD
from client.runtime import ANEW, NODE_TOO, LostMessage, Node, NotOurNode, TaskLost, failed
from client.site import ledger_of, policy_of
from common.bundle import bundle_digest, own_digest
from common.config.sections import Scalar
from common.errors import ConfigError, LedgerError
from common.log import about, place_of, set_up
from common.messages.wire import encode_reply, round_of
from common.paths import run_name
from strategies.job import configure

log = logging.getLogger("fedveil.site")
POLL_SECONDS = 0.2
"""Between two questions for a task. One takes 2.7 ms of a core, both processes together; with the work of an idle round
it stays within the half second after which the SuperNode looks for the reply."""
LOOK_SECONDS = 2.0
"""Between two looks, before a task is taken, at whether the site's records have changed or were withdrawn."""
IDLE_SECONDS = 3600.0
"""From the last round that was paid for until all that is held of records is dropped. By default a server waits for a
round so long (``round-timeout``): a run that goes on has hardly anything computed twice, and what one leaves stays an
hour."""


def reply_to(message: Message, context: Context, bundle: bytes, node: Mapping[str, Scalar]) -> Message:
    """Return the site's answer: of the installed client, or the policy's refusal of the bundle.

    Args:
        message: what the server sent.
        context: the run's settings, and what the site kept; ``node`` takes the place of the node's settings in it.
        bundle: the bundle as received.
        node: the site's own settings, from its folder: nobody else says which policy, ledger and records.
    """
    context.node_config, run = dict(node), str(context.run_id)
    try:
        try:
            policy_of(node).check_bundle(bundle_digest(bundle), own_digest())
        except Exception as error:
            with suppress(ConfigError):  # what a resumed run is called stands in its settings
                run = run_name(configure(context.run_config).config, run)
            reply = installed.refused(error, node, run, round_of(message.content))
            return Message(encode_reply(reply), reply_to=message)
        return installed.app(message, context)
    except Exception as error:  # Flower would send its words
        log.error("failed: %s", place_of(error), extra=about(run, None, installed.name_of(node)))
        return failed(message, UNTOLD)


def work(node: Node, settings: Mapping[str, Scalar]) -> int:
    """Answer tasks until the process must be started anew; return the exit code that says how.

    However it ends, this process then holds nothing of the site's records.
    """
    try:
        return _work(node, settings)
    finally:
        installed.forget()


def _work(node: Node, settings: Mapping[str, Scalar]) -> int:
    records, looked, worked = stamp(settings), time.monotonic(), math.inf
    while True:
        try:
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if stamp(settings) != records:
                    log.info("the site's records have changed, or were withdrawn: the worker starts anew")
                    return ANEW
            if time.monotonic() - worked > IDLE_SECONDS:
                worked = math.inf
                log.info("no round for %g seconds: what was made of the site's records is dropped", IDLE_SECONDS)
                installed.forget()
            token, rounds = node.acquire(), installed.rounds_trained()
            if not token:
                time.sleep(POLL_SECONDS)
                continue
            with node.task(token) as task:
                message, context, bundle = task.pull()
                task.push(reply_to(message, context, bundle, settings), context)
        except TaskLost:
            log.error("the node has given a task up")
        except LostMessage:
            log.error("a task has no message: node and worker start anew")
            return NODE_TOO
        except NotOurNode as error:
            log.error("the worker leaves: %s", error)
            return NODE_TOO
        except Exception as error:  # of Flower's own, or the node is gone; it answers for the task within a minute
            log.error("the worker starts anew: %s", place_of(error))
            return ANEW
        if installed.rounds_trained() != rounds or math.isinf(worked):  # a task that is refused renews nothing
            worked = time.monotonic()
        if not installed.is_clean():
            log.warning("a task has changed the model for good: the worker starts anew")
            return ANEW


def stamp(settings: Mapping[str, Scalar]) -> tuple[int, tuple[tuple[str, int, int], ...]]:
    """Return how many data sets are withdrawn, and name, time and size of the files that hold the site's records.

    Of whatever data set of the ledger: which others share a record with this one is not asked.
    """
    withdrawn = _withdrawn(settings)
    if "data" not in settings:
        return withdrawn, ()
    source = Path(str(settings["data"])).expanduser()
    found = sorted(source.rglob("*")) if source.is_dir() else [source]
    states = [(str(path), path.stat()) for path in found if path.is_file()]
    return withdrawn, tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


def _withdrawn(settings: Mapping[str, Scalar]) -> int:
    """Return how many data sets the site's ledger has withdrawn; -1: it cannot be read, which every round refuses."""
    try:
        ledger = ledger_of(settings)
        return len(withdrawn_in(ledger))
    except (LedgerError, OSError):
        return -1


def main() -> int:
    """Run from the supervisor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="the SuperNode's Runtime API on 127.0.0.1")
    parser.add_argument("--secret", type=Path, required=True, help="file with the secret that it was started with")
    parser.add_argument("--node", required=True, help="the node's settings as JSON")
    words = parser.parse_args()
    set_up()
    logging.getLogger("fedveil").propagate = False  # libraries put handlers of their own on the root
    settings: dict[str, Scalar] = json.loads(words.node)
    where = about("", None, installed.name_of(settings))
    try:
        allowed = ", ".join(digits[:12] for digits in policy_of(settings).allowed_bundles(own_digest()))
    except ConfigError as error:
        log.error("%s", error, extra=where)
        return 1
    log.info("the worker is ready; it joins runs of the bundle %s, by the installed code", allowed, extra=where)
    with closing(Node(words.port, words.secret.read_bytes())) as node:
        return work(node, settings)


if __name__ == "__main__":
    sys.exit(main())
