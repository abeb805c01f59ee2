"""A site's worker: one long-lived process of the installed package that answers a SuperNode's tasks.

It lets through what the server has signed for this site alone (``common.messages.signed``), hashes the bundle that came
with it in memory, asks the policy, runs the installed ``client.app``, and signs the answer. The bundle is written
nowhere and nothing of it is executed. The run's settings come in the context. Policy, ledger and records are those of
the site's folder. The supervisor (``deploy.pair``) restarts it whenever it ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from flwr.app import Context, Message

from fedveil.client import app as installed
from fedveil.client.dumps import write_no_dumps
from fedveil.client.lookout import Lookout
from fedveil.client.node import ledger_of, name_of, policy_of
from fedveil.client.outgoing import UNTOLD, refused
from fedveil.client.runtime import LostMessage, Node, failed
from fedveil.client.turns import task_turn
from fedveil.common.bundle import bundle_digest, own_digest
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, DataError, LedgerError
from fedveil.common.log import about, place_of, set_up
from fedveil.common.messages.signed import Asked, SiteKeys, check_task, digest, sign_answer
from fedveil.common.messages.wire import encode_reply, round_of
from fedveil.common.paths import run_name
from fedveil.common.registered import require_installed_rows
from fedveil.common.runtime import ANEW, NODE_TOO, NotOurNode, TaskLost
from fedveil.privacy.entropy import require_system_entropy
from fedveil.strategies.job import configure

log = logging.getLogger("fedveil.site")
POLL_SECONDS = 0.2
"""Between two questions for a task. One takes 2.7 ms of a core, both processes together; with the work of an idle round
it stays within the half second after which the SuperNode looks for the reply."""
IDLE_SECONDS = 3600.0
"""From the last round that was paid for until all that is held of records is dropped. By default a server waits for a
round so long (``round-timeout``): a run that goes on has hardly anything computed twice, and what one leaves stays an
hour."""


def reply_to(
    message: Message, context: Context, bundle: bytes, node: Mapping[str, Scalar], keys: SiteKeys | None = None
) -> Message:
    """Return the site's answer, signed: of the installed client, or the refusal of a task or bundle.

    Both are looked at before anything that a task names. What that and the signature take follows from the lengths of
    what is received and sent, and from no record.

    Args:
        message: what the server sent.
        context: the run's settings, and what the site kept; ``node`` takes the place of the node's settings in it.
        bundle: the bundle as received.
        node: the site's own settings, from its folder: no other source says which policy, ledger and records.
        keys: of the site; None: of a test's own server, which signs no task.
    """
    context.node_config, run, task = dict(node), str(context.run_id), b""
    try:
        try:
            if keys:
                signed = Asked(run, context.run_config, context.node_id).task(message.content)
                task = digest(signed)
                check_task(message.content, signed, keys.authority)
            policy = policy_of(node)
            own = own_digest()
            policy.check_bundle(bundle_digest(bundle, own_alone=policy.allowed_bundles(own) == (own,)), own)
        except Exception as error:
            with suppress(ConfigError):  # what a resumed run is called stands in its settings
                run = run_name(configure(context.run_config).config, run)
            refusal = refused(error, node, run, round_of(message.content))
            reply = Message(encode_reply(refusal), reply_to=message)
        else:
            reply = installed.app(message, context)
        if keys:
            sign_answer(reply.content, task, keys)
        return reply
    except Exception as error:  # Flower would send its words
        log.error("failed: %s", place_of(error), extra=about(run, None, name_of(node)))
        return failed(message, UNTOLD)


def work(node: Node, settings: Mapping[str, Scalar], keys: SiteKeys | None = None) -> int:
    """Answer tasks until the process must be restarted; return the exit code that says how.

    However it ends, this process then holds nothing of the site's records. ``keys`` as for ``reply_to``.
    """
    lookout = Lookout(settings)
    installed.process.keep_lookout(lookout, signed=keys is not None)
    try:
        ended = _work(node, settings, lookout, keys)
        installed.process.forget_between_tasks(settings)
        return ended
    finally:
        installed.process.keep_lookout(None)
        installed.process.forget()


def _work(node: Node, settings: Mapping[str, Scalar], lookout: Lookout, keys: SiteKeys | None) -> int:
    worked = math.inf
    while True:
        try:
            if time.monotonic() - worked > IDLE_SECONDS:
                worked = math.inf
                log.info("no round for %g seconds: what was made of the site's records is dropped", IDLE_SECONDS)
                installed.process.forget_between_tasks(settings)
            rounds = installed.process.rounds_trained
            if not _answered(node, settings, keys):
                ends = time.monotonic() + POLL_SECONDS
                lookout.go_on()
                if lookout.changed:
                    return _changed()
                installed.process.wait_until(ends, settings)
                continue
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
        if installed.process.rounds_trained != rounds or math.isinf(worked):  # a task that is refused renews nothing
            worked = time.monotonic()
        if lookout.changed:
            return _changed()
        if not installed.process.is_clean():
            log.warning("a task has changed the model for good: the worker starts anew")
            return ANEW


def _answered(node: Node, settings: Mapping[str, Scalar], keys: SiteKeys | None) -> bool:
    """Answer a task if one is there and the steward scores nothing meanwhile; return whether one was answered."""
    with _turn(settings) as free:
        token = node.acquire() if free else ""
        if not token:
            return False
        with node.task(token) as task:
            message, context, bundle = task.pull()
            task.push(reply_to(message, context, bundle, settings, keys), context)
        return True


@contextmanager
def _turn(settings: Mapping[str, Scalar]) -> Iterator[bool]:
    """Yield whether a task may be taken; with no ledger to lock every task is refused, and the server hears why."""
    try:
        ledger = ledger_of(settings)
    except LedgerError:
        yield True
        return
    with task_turn(ledger) as free:
        yield free


def _changed() -> int:
    log.info("the site's records have changed, or were withdrawn: the worker starts anew")
    return ANEW


def main() -> int:
    """Run from the supervisor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="the SuperNode's Runtime API on 127.0.0.1")
    parser.add_argument("--secret", type=Path, required=True, help="file with the secret that it was started with")
    parser.add_argument("--node", required=True, help="the node's settings as JSON")
    parser.add_argument("--authority", type=Path, required=True, help="the certificate of the server's authority")
    parser.add_argument("--key", type=Path, required=True, help="the node's private key, which signs the answers")
    words = parser.parse_args()
    require_system_entropy()
    require_installed_rows()
    write_no_dumps()
    set_up()
    settings: dict[str, Scalar] = json.loads(words.node)
    where = about("", None, name_of(settings))
    try:
        keys = SiteKeys.read(words.authority, words.key)
        allowed = ", ".join(digits[:12] for digits in policy_of(settings).allowed_bundles(own_digest()))
    except (ConfigError, DataError) as error:
        log.error("%s", error, extra=where)
        return 1
    log.info("the worker is ready; it joins runs of the bundle %s, by the installed code", allowed, extra=where)
    with closing(Node(words.port, words.secret.read_bytes())) as node:
        return work(node, settings, keys)


if __name__ == "__main__":
    sys.exit(main())
