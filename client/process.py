"""The process of a site: its model, what it keeps of records, and its answer to one task after another."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedveil.client.budget import check_budget, note_failure, shares_noise
from fedveil.client.cache import RecordCache
from fedveil.client.cores import Cores, pays
from fedveil.client.deadline import Deadline
from fedveil.client.door import at_work
from fedveil.client.kept_states import keep_state
from fedveil.client.leftovers import left_nothing, tensors_digest
from fedveil.client.local_training import check_task, hides_failures, train_round
from fedveil.client.lookout import Lookout
from fedveil.client.memory import Memory
from fedveil.client.node import policy_of
from fedveil.client.outgoing import own_words, refused
from fedveil.client.party import Party, party_of
from fedveil.client.rehearsals import Rehearsals
from fedveil.client.site import Site, check_job, open_site
from fedveil.client.sums import agreed, next_key, reply_for_sum
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, ProtocolError
from fedveil.common.log import about, set_up
from fedveil.common.messages.blocks import layout_of
from fedveil.common.messages.round import KeyTask, Reply, SumReply, SumTask, TrainResult, TrainTask
from fedveil.common.messages.signed import check_unsigned
from fedveil.common.messages.sum_messages import decode_sum_task
from fedveil.common.messages.wire import decode_task, kind_of_task, round_of
from fedveil.common.model.device import denormals_flushed, set_process_threads
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.files import files_of
from fedveil.common.paths import reply_file, run_name
from fedveil.common.registered import require_installed_rows
from fedveil.common.threads import is_ours, site_cores
from fedveil.privacy.secure_sum import KeyOffer
from fedveil.strategies.job import Job, configure

FORGET_SECONDS = 5.0
"""With ``reply-after``: no task is taken for this long after record data are dropped. How long that takes follows from
how many records there are: 20,000 took 58 ms."""
log = logging.getLogger("fedveil.site")


@dataclass(frozen=True)
class _Asked:
    """One task's circumstances, once the site is open."""

    job: Job
    site: Site
    run: str
    party: Party | None
    """The site in a secure sum; None: the run has none."""
    memory: MutableMapping[str, bytes]
    deadline: Deadline
    simulated: bool
    node: Mapping[str, Scalar]


@dataclass
class SiteProcess:
    """What a process of a site has built and keeps from task to task.

    Of records it keeps what ``cache`` holds and nothing else, no longer than ``RecordCache.forget`` allows.
    """

    cache: RecordCache = field(default_factory=RecordCache)
    model: FederatedModel | None = None
    cores: Cores = field(default_factory=lambda: Cores(1))
    """The workers that share passes of long runs (``client.cores``)."""
    rehearsals: Rehearsals = field(init=False)
    rounds_trained: int = 0
    """Rounds that were paid for and trained. A task for no more than these keeps nothing longer in memory."""
    lookout: Lookout | None = None
    """Looks, once the time of an answer runs, whether the site's records have changed. None: the process does not live
    from task to task."""
    signed: bool = False
    """Whether the caller checks that tasks are the server's, and signs the answers (``client.worker``)."""
    _deadline: Deadline | None = None
    """Of the answer that is under way; None: no answer has a time of its own."""
    _threads: int = 0
    """Of torch when what is kept was rehearsed; 0: nothing was yet."""
    _built: str = ""
    """Digest of the current model's tensors as it was built."""

    def __post_init__(self) -> None:
        self.rehearsals = Rehearsals(self.cache)

    def forget(self) -> None:
        """Drop all that this process holds of records, and end its workers; what was rehearsed is of made-up ones."""
        self.cache.forget()
        self.cores.close()

    def forget_between_tasks(self, node: Mapping[str, Scalar]) -> None:
        """Forget; with ``reply-after`` the next task is taken at a time that says nothing of the records."""
        ends = time.monotonic() + (FORGET_SECONDS if reply_after(node) else 0.0)
        self.forget()
        self.wait_until(ends, node)

    def wait_until(self, ends: float, node: Mapping[str, Scalar]) -> None:
        """Return at a time; with ``reply-after``, say in the site's log if it is over."""
        left = ends - time.monotonic()
        if left > 0:
            time.sleep(left)
        elif left < 0 and reply_after(node):
            log.error("asked for a task %.2f seconds late: when its answer leaves, is not covered by the claim", -left)

    @contextmanager
    def answering(self, node: Mapping[str, Scalar]) -> Iterator[None]:
        """Begin the time of an answer that is made within, and end when it may leave.

        What was read of records that have changed since is dropped first.
        """
        self._deadline = deadline = Deadline(reply_after(node))
        try:
            if self.lookout is not None and self.lookout.look():
                self.forget()
            yield
        finally:
            self._deadline = None
        deadline.wait()

    def keep_lookout(self, lookout: Lookout | None, *, signed: bool = False) -> None:
        """Begin every task with a look of this lookout; None: without one. ``signed`` as the field."""
        self.lookout, self.signed = lookout, signed

    def is_clean(self) -> bool:
        """Bring the model back to its start, and return whether nothing that was trained here is left in it."""
        return self.model is None or left_nothing(self.model, self._built)

    def answer(
        self,
        content: Any,
        node: Mapping[str, Scalar],
        settings: Mapping[str, Scalar],
        run: str,
        memory: MutableMapping[str, bytes],
        *,
        simulated: bool | None = None,
    ) -> Reply | SumReply:
        """Return a site's reply to a train message; every failure is a Refusal that names the site.

        Args:
            content: the message, a RecordDict of Flower's.
            node, settings: the node's configuration, and the run's, flat.
            run: the run's id as Flower knows it.
            memory: what this node keeps from message to message (``client.memory``); may be lost.
            simulated: whether site and server are one machine's own experiment; None: whether Flower's Ray simulates.
        """
        deadline = self._deadline or Deadline(reply_after(node))
        simulated = in_simulation() if simulated is None else simulated
        number = round_of(content)
        try:
            with deadline.extended():
                set_up()
                self.set_threads()
                job = configure(settings)
                run = run_name(job.config, run)
                check_job(node, job, simulated=simulated)
                if not simulated:
                    require_installed_rows()
                    if not self.signed:
                        check_unsigned(job.config)
            self.cache.free()
            self.cache.forget_other_runs(run)
            site = replace(open_site(node, job.config, run, simulated=simulated), apart=deadline.extended)
            if simulated and not site.rank:
                site = replace(site, rank=job.config.adapter.rank_of_site(int(node.get("partition-id", 0))))
            kind = kind_of_task(content)
            party = party_of(site.name, node, site.policy, run, simulated=simulated) if shares_noise(job) else None
            if party and job.config.site_names:
                party.check_named(job.config.site_names, job.config.privacy.honest_sites)
            asked = _Asked(job, site, run, party, memory, deadline, simulated, node)
            if kind is not TrainTask:
                return _reply_for_sum(decode_sum_task(content), asked)
            return self._answer_round(content, asked)
        except Exception as error:
            return refused(error, node, run, number, simulated=simulated)

    def set_threads(self, asked: _Asked | None = None) -> None:
        """Let torch use this process's threads, or one where its cores share the passes of what is ``asked``.

        How rows of a product round follows from how many there are. So what was rehearsed with another number says
        nothing.
        """
        set_process_threads()
        if asked is None:
            return
        shares = is_ours() and not asked.deadline.seconds and pays(asked.job, asked.site.public_size, self.model)
        self.cores.count = site_cores() if shares and not self.cores.given_up else 1
        if self.cores.count > 1:
            torch.set_num_threads(1)
        if (threads := torch.get_num_threads()) != self._threads:
            self._threads = threads
            self.rehearsals.forget()

    def model_of(self, job: Job, site: Site) -> FederatedModel:
        """Return the run's model; where it is another than before, drop what was made for that one."""
        config, data = job.config, site.data
        # Its name was allowed before. What its files say is read once they are known to be the steward's, and nothing
        # of a record reaches a model that is not.
        files = files_of(config.model.name)
        site.policy.check_files(config.model.name, files)
        model = job.model(data.label_names, data.label_phrases, files)
        site.policy.check_model(config.model.name, model.base.fingerprint, files)
        if self.model is not model:
            self.cache.set_aside(vectors=True)
            self.rehearsals.forget()
            self.model, self._built = model, tensors_digest(model.module)
        return model

    def _answer_round(self, content: Any, asked: _Asked) -> Reply:
        """Return the reply to a round's task: what was answered before, a refusal, or what is trained now."""
        job, run, site, deadline = asked.job, asked.run, asked.site, asked.deadline
        with deadline.extended():
            model = self.model_of(job, site)
            state = job.start(model.start)
            basis_layout = job.brought_layout(model.start, state, round_of(content))
            # Of what no site noises by itself nothing is written: neither raw updates nor vectors of sums, of which a
            # resumed run asks for others, under new masks.
            on_disk = asked.simulated and job.mechanism.noised == "at the site"
            memory = Memory(asked.memory, reply_file(job.config, run, site.name) if on_disk else None)
            layouts, precision = (layout_of(job.strategy.downlink(state)), basis_layout), job.config.wire.precision
            task = decode_task(content, *layouts, memory.tensors(run), precision)
            if task.run != run:
                raise ProtocolError(f"the task is of run {task.run}, the message came in run {run}")
            answered = memory.recall(task, job.lasting(task.round_number, task.state, task.basis))
            if answered is not None:
                return answered
        self.cache.free()
        try:
            result = self._train(task, asked, model, memory)
        finally:
            set_process_threads()
            if task.round_number >= job.config.rounds:
                self.cache.forget_computed(site.name)  # whatever became of it: no later round of this run needs them
                if not asked.simulated:  # others of a simulation's sites may come
                    self.cores.close()
        if site.unreadable and hides_failures(job):
            note_failure(site, task, site.unreadable, deadline.left() / 2)
        log.info("trained and answered", extra=about(run, task.round_number, site.name))
        return result

    def _train(self, task: TrainTask, asked: _Asked, model: FederatedModel, memory: Memory) -> TrainResult:
        """Check, rehearse, pay for and train a round, and return what is sent; ``memory`` gets it too."""
        job, site, deadline = asked.job, asked.site, asked.deadline
        with deadline.extended():
            check_task(task, job, model)
            keep_state(asked.node, job, model, task)
            model.sharing = self.cores
            self.set_threads(asked)
            with denormals_flushed():
                for worst, reserve in self.rehearsals.forecasts(job, site, model, task):
                    deadline.allow(worst, reserve)
            masked = agreed(task, job, model, site.public_size, asked.party, asked.memory) if asked.party else None
        self.cache.free()
        _log_if_more(asked)
        records = self.cache.prepare(model, site, job, asked.run)
        with at_work():
            result = train_round(site, job, model, records, task, deadline, self.cache.vectors, masked)
            self.rounds_trained += 1
            if asked.party is not None:
                result = replace(result, offer=_next_key(task, asked, asked.party))
            memory.keep(task, result, job.lasting(task.round_number, task.state, task.basis))
        return result


def in_simulation() -> bool:
    """Return whether this process is a worker of Flower's Ray simulation."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def reply_after(node: Mapping[str, Scalar]) -> float:
    """Return the policy's ``reply-after``; 0 where the policy cannot be read: such a site refuses everything."""
    try:
        return policy_of(node).reply_after
    except ConfigError:
        return 0.0


def _log_if_more(asked: _Asked) -> None:
    """Say in the site's own log that its public size is too small for what is claimed of the time of its answers."""
    job, site = asked.job, asked.site
    if asked.deadline.seconds and job.mechanism.rehearsed and job.unit.count(site.data) > site.public_size:
        log.error(
            "there are more %ss than public-size says: when it answers, is not covered by the claim", job.unit.name
        )


def _reply_for_sum(task: SumTask, asked: _Asked) -> SumReply:
    if task.run != asked.run or asked.party is None:
        raise ProtocolError("a key is asked for in a run whose vectors are not summed, or of another run")
    return reply_for_sum(task, asked.job, asked.site, asked.party, asked.memory)


def _next_key(task: TrainTask, asked: _Asked, party: Party) -> KeyOffer | None:
    """Return the site's key for the next round, which goes out with its vector; None where the server has to ask.

    That is after the last round, and where the site could not pay, or anything fails: then it says so when the server
    asks. The vector that the ledger has paid for leaves in any case.
    """
    if task.round_number >= asked.job.config.rounds:
        return None
    try:
        check_budget(asked.site, asked.job, KeyTask(task.run, task.round_number + 1, 0))
        return next_key(task, asked.job, party, asked.memory)
    except Exception as error:
        log.warning("no key for the next round: %s", own_words(error), extra=about(task.run, task.round_number))
        return None
