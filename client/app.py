"""Flower wiring of a site: decode, train, encode. Everything else is in ``local_training``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.budget import check_budget, evaluation_releases, note_failure, shares_noise
from client.deadline import Deadline, Timing
from client.door import at_work
from client.failures import HiddenFailures, failures_of
from client.ledger.ledger import Ledger
from client.leftovers import left_nothing, tensors_digest
from client.linearised import Derivatives, check_memory, contrasts, forget_records
from client.local_training import check_task, train_round
from client.lookout import Lookout
from client.memory import Memory
from client.outgoing import own_words, public_reason
from client.own_records import prepared
from client.rehearsal import (
    rehearse,
    rehearse_columns,
    rehearse_features,
    rehearse_head,
    rehearse_initial,
    rehearse_linearised,
    rehearse_turn,
)
from client.site import Site, check_job, forget_readings, name_of, open_site, policy_of
from client.sums import Party, agreed, make_key, next_key, party_of, told_for_sum
from common.config.sections import Scalar
from common.errors import BudgetExhausted, ConfigError, PolicyRefusal, ProtocolError
from common.log import about, set_up
from common.messages.round import KeyTask, Refusal, Reply, SumReply, SumTask, TrainTask
from common.messages.signed import check_unsigned
from common.messages.wire import decode_sum_task, decode_task, encode_reply, kind_of_task, layout_of, round_of
from common.model.device import denormals_flushed, make_threads, own_cores
from common.model.federated import FederatedModel
from common.model.files import files_of
from common.paths import reply_file, run_name
from common.starts import PaidStart
from common.tasks import Record
from common.tasks.examples import Dataset
from common.tasks.featured import FEATURES
from privacy.secure_sum import KeyOffer
from privacy.together import units_at_once
from strategies.job import Job, configure

log = logging.getLogger("fedveil.site")
app = ClientApp()


PLAIN, INITIAL, FEATURED = "plain steps", "round 0", "features"
VECTORS, REFIT = "steps on vectors", "the head's steps on features"
"""What a model rehearses, in this order."""


@dataclass(frozen=True)
class _Prepared:
    """A site's records as the current model takes them."""

    run: str
    """The run that asked last."""
    source: Dataset
    """What they were read as."""
    unit: tuple[str, int]
    """The run's unit, and the most records of one."""
    records: list[Record] | None
    """Their features where the head alone is trained. None: these were dropped, and a round makes them once it is paid.
    """


@dataclass
class _Process:
    """What this process has built and keeps between rounds; of records no longer than ``forget`` lets it."""

    model: FederatedModel | None = None
    records: dict[str, _Prepared] = field(default_factory=dict)
    """What is made of each site's records."""
    rehearsed: dict[str, Timing] = field(default_factory=dict)
    """What of private training the current model is known to do rightly, and how fast, by the names above."""
    trained: int = 0
    """Rounds that were paid for and trained: what asks for no more than these keeps nothing longer in memory."""
    derivatives: dict[str, Derivatives] = field(default_factory=dict)
    """Each site's records as the steps of a linearised run take them."""
    built: str = ""
    """Digest of the current model's tensors as it was built."""
    left: list[object] = field(default_factory=list)
    """What was dropped of records while the time of the answer stood still: freed once it runs, for how long that takes
    follows from their number and lengths."""
    signed: bool = False
    """Whether the tasks that come are checked to be the server's, and the answers signed (``client.worker``)."""
    lookout: Lookout | None = None
    """What looks, once the time of an answer runs, whether the site's records have changed; None: no process that lives
    from task to task."""


_process = _Process()


def _in_simulation() -> bool:
    """Whether this process is a worker of Flower's Ray simulation."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def _set_threads() -> None:
    """Let torch use this process's cores.

    How rows of a product round follows from how many there are. So what was rehearsed with another number says nothing.
    """
    if (cores := own_cores()) != torch.get_num_threads():
        torch.set_num_threads(cores)
        _process.rehearsed = {}
    make_threads()


def _model(job: Job, site: Site) -> FederatedModel:
    config, data = job.config, site.data
    # Its name was allowed before. What its files say is read once they are known to be the steward's, and nothing of a
    # record reaches a model that is not.
    files = files_of(config.model.name)
    site.policy.check_files(config.model.name, files)
    model = job.model(data.label_names, data.label_phrases, files)
    site.policy.check_model(config.model.name, model.base.fingerprint, files)
    if _process.model is not model:
        _process.left += [_process.records, _process.derivatives]
        _process.model, _process.records, _process.rehearsed = model, {}, {}
        _process.derivatives = {}
        _process.built = tensors_digest(model.module)
    return model


def _hold_to(deadline: Deadline, job: Job, site: Site, model: FederatedModel, task: TrainTask) -> None:
    """Let the model rehearse the rest of the run, and hold its rounds to the time of the answer.

    What a later phase would be refused for is told now: the rounds before it would be paid for, and buy nothing.

    The public size counts, since how many records there are must decide nothing that shows; ``fedveil site check``
    and a start refuse fewer than there are.

    Raises:
        ModelError: it cannot be trained privately.
        PolicyRefusal: a round may take longer than the policy's ``reply-after`` leaves it.
    """
    config = job.config
    if config.training.linearised:
        check_memory(model, config.privacy.rows_of_unit * site.public_size)
    if not job.mechanism.rehearsed:
        if failures_of(job, deadline).deadline.seconds:
            raise PolicyRefusal(
                f"the site's policy has reply-after = {deadline.seconds:g}, and with privacy.mode = "
                f"{config.privacy.mode!r} nobody knows how long a round takes"
            )
        return
    later = [number for number in config.phases if number > task.round_number]
    steps = _rehearse(job, site, model, task, later)
    for number in (*later, task.round_number):  # its own last, to which the deadline keeps
        _allow(deadline, job, site, model, number, steps)


def _say_if_more(deadline: Deadline, job: Job, site: Site) -> None:
    """Say in the site's own log that its public size is too small for what is claimed of the time of its answers."""
    unit = job.unit
    if deadline.seconds and job.mechanism.rehearsed and unit.count(site.data) > site.public_size:
        log.error("there are more %ss than public-size says: when it answers, is not covered by the claim", unit.name)


def _rehearse(job: Job, site: Site, model: FederatedModel, task: TrainTask, later: Sequence[int]) -> str:
    """Let the model rehearse what it has not, for a task and ``later`` rounds; return what the task's steps are called.

    What changes how the model computes, such as how it attends or which shapes it takes, has all that passed before it
    pass anew: another kind of round is to be no question that makes a rehearsed one untrue.
    """
    rounds = [task.round_number, *later]
    steps, rehearsal = _steps(job, site, model, task)
    wanted: dict[str, Callable[[], Timing]] = {steps: rehearsal}
    if start := _paid_start(job, task.round_number):
        wanted[INITIAL] = partial(rehearse_initial, model, start)
    if any(_on_features(job, model, number) for number in rounds):
        wanted[FEATURED] = partial(_featured, model)
    if any(_on_vectors(job, number) for number in rounds):
        wanted[VECTORS] = partial(rehearse_linearised, model)
    if any(map(job.config.rests, rounds)):
        wanted[REFIT] = partial(rehearse_head, model)
    while missing := next((name for name in wanted if name not in _process.rehearsed), ""):
        before = _ways(model)
        try:
            timing = wanted[missing]()
        finally:  # also where it fails: the next task may be for a round that has passed
            now = _ways(model)
            if any(now[way] != what for way, what in before.items()):
                _process.rehearsed = {}
        _process.rehearsed[missing] = timing
    return steps


def _ways(model: FederatedModel) -> dict[str, object]:
    """Return what a rehearsal may change of how the model computes records of other rehearsals."""
    of_vectors = {str(tangents): shapes for tangents, shapes in model.vector_shapes.items()}
    return {"attention": model.attention, "lowers": model.lowers, "shapes": model.shapes, **of_vectors}


def _featured(model: FederatedModel) -> Timing:
    """Let features be rehearsed, and drop those that were computed before."""
    _process.left.append(_process.records)
    _process.records = {}
    return rehearse_features(model)


def _paid_start(job: Job, number: int) -> PaidStart | None:
    """Return what is paid for in a round, if that is number 0."""
    return job.origin if not number and isinstance(job.origin, PaidStart) else None


def _on_features(job: Job, model: FederatedModel, number: int) -> bool:
    """Whether the steps of a round are on features of the records."""
    start = _paid_start(job, number)
    return model.head_only or job.config.rests(number) or bool(start and start.on_features)


def _on_vectors(job: Job, number: int) -> bool:
    """Whether the steps of a round are on derivatives of the records."""
    return number > 0 and bool(job.config.training.linearised) and not job.config.rests(number)


def _allow(deadline: Deadline, job: Job, site: Site, model: FederatedModel, number: int, steps: str) -> None:
    """Hold a round to the time of the answer, by how long what it does took as it was rehearsed.

    Args:
        deadline: of the answer.
        job: what is run.
        site: who answers.
        model: as it was rehearsed.
        number: the round's.
        steps: what its steps through the model are called, if it makes any.
    """
    config, rehearsed = job.config, _process.rehearsed
    start, rests, on_vectors = _paid_start(job, number), config.rests(number), _on_vectors(job, number)
    timing = rehearsed[INITIAL if start else REFIT if rests else VECTORS if on_vectors else steps]
    if on_vectors or rests:
        timing = replace(timing, score=rehearsed[steps].score)  # records are scored as they are
    paid = start.release() if start else None
    count, rate = (paid.count, paid.event.sample_rate) if paid else (config.training.local_steps, job.sample_rate)
    scored = site.public_size if number and evaluation_releases(job, site, 1) else 0
    each = config.privacy.rows_of_unit
    most = float(each * site.public_size)
    # A process that began anew computes them in whatever round it is.
    ahead = None
    if on_vectors:
        ahead = (rehearsed[steps], contrasts(model), most)
    elif _on_features(job, model, number):
        ahead = (rehearsed[FEATURED], 1, most)
    deadline.allow(timing, count, rate * site.public_size, scored, ahead, each, _units_at_once(job, model, start))


def _units_at_once(job: Job, model: FederatedModel, start: PaidStart | None) -> int:
    """Return how many units of several rows a step passes together at least, by what it trains."""
    if not job.unit.grouped:
        return sys.maxsize
    with start.opened(model) if start else nullcontext():
        return units_at_once(sum(p.numel() for p in model.module.parameters() if p.requires_grad))


def _steps(job: Job, site: Site, model: FederatedModel, task: TrainTask) -> tuple[str, Callable[[], Timing]]:
    """Return what the steps of a task's round are called, and what rehearses them."""
    number = task.round_number
    chosen = job.strategy.columns(task.state, site.declared_rank(job)) if number else None
    turn = job.strategy.turn(number) if number else None
    if chosen is not None:
        name = f"steps on columns: {[len(chosen[layer]) for layer in sorted(chosen)]}"
        return name, partial(rehearse_columns, model, chosen)
    if turn is not None:
        return f"steps on {', '.join(turn)}", partial(rehearse_turn, model, turn)
    return PLAIN, partial(rehearse, model)


def _records(
    model: FederatedModel, site: Site, job: Job, run: str
) -> Sequence[Record] | Callable[[], Sequence[Record]]:
    """Return the site's records as the model takes them, made once for all settings that read them alike.

    Where features of them were dropped, what makes them once the round is paid for: a server that asks in the name of
    ever another run is to get nothing of a record computed for free.
    """
    unit, most = job.unit, job.config.privacy.rows_of_unit

    def make() -> Sequence[Record]:
        records = prepared(model, site.data.examples, unit, most)
        _process.records[site.name] = _Prepared(run, site.data, (unit.name, most), records)
        return records

    kept = _process.records.get(site.name)
    if kept is None or kept.source is not site.data or kept.unit != (unit.name, most):
        forget_records(_process.derivatives, site.name)  # vectors say whose a record is by the old numbers
        return make()
    _process.records[site.name] = replace(kept, run=run)
    return make if kept.records is None else kept.records


def forget() -> None:
    """Drop all that this process holds of records: as read, as the model takes them, features and derivatives.

    What the model has rehearsed is of made-up records, and the point of a linearisation of what was received: they
    stay.
    """
    _process.records.clear()
    _process.left.clear()
    for name in list(_process.derivatives):
        forget_records(_process.derivatives, name)
    forget_readings()


def keep_lookout(lookout: Lookout | None, *, signed: bool = False) -> None:
    """Begin every task with a look of this lookout, and drop what was read of records that changed; None: no more.

    ``signed``: whether whoever calls lets no task through that the server has not signed.
    """
    _process.lookout, _process.signed = lookout, signed


def _forget_other_runs(run: str) -> None:
    """Drop what was computed of any site's records for another run, which may have been abandoned."""
    stale = {name for name, kept in _process.records.items() if kept.run != run}
    for name in stale | {name for name, kept in _process.derivatives.items() if kept.of.run != run}:
        _drop(name)


def _drop(site: str) -> None:
    """Drop features and derivatives of a site's records; other sites of a simulation's process keep theirs.

    Records that are as they were read stay: to tokenise them anew before a round is paid for would show in time.
    """
    kept = _process.records.get(site)
    if kept and any(FEATURES in record for record in kept.records or ()):
        _process.records[site] = replace(kept, records=None)
    forget_records(_process.derivatives, site)


def answer(
    content: RecordDict,
    node: Mapping[str, Scalar],
    settings: Mapping[str, Scalar],
    run: str,
    memory: MutableMapping[str, bytes],
    deadline: Deadline | None = None,
    *,
    simulated: bool | None = None,
) -> Reply | SumReply:
    """Return a site's reply to a train message; every failure is a Refusal that names the site.

    Args:
        content: the message.
        node: the node's configuration.
        settings: the run's configuration, flat.
        run: the run's id as Flower knows it.
        memory: what this node keeps from message to message (``client.memory``); may be lost.
        deadline: when the reply is to leave; whoever calls waits for it.
        simulated: whether site and server are one machine's own experiment; None: whether Flower's Ray simulates.
    """
    deadline = deadline or Deadline(reply_after(node))
    simulated = _in_simulation() if simulated is None else simulated
    name, number = name_of(node), round_of(content)
    try:
        with deadline.extended():
            set_up()
            _set_threads()
            job = configure(settings)
            run = run_name(job.config, run)
            check_job(node, job, simulated=simulated)
            if not (simulated or _process.signed):
                check_unsigned(job.config)
        _process.left.clear()
        _forget_other_runs(run)
        site = open_site(node, job.config, run, simulated=simulated)
        if simulated and not site.rank:
            site = replace(site, rank=job.strategy.simulated_rank(int(node.get("partition-id", 0))))
        asked = kind_of_task(content)
        party = party_of(site.name, node, site.policy, run, simulated=simulated) if shares_noise(job) else None
        if asked is not TrainTask:
            return _for_sum(decode_sum_task(content), job, site, party, run, memory, deadline)
        with deadline.extended():
            model = _model(job, site)
            state = job.start(model.start)
            basis_layout = layout_of(job.due(state, number))
            task = decode_task(content, layout_of(job.strategy.downlink(state)), basis_layout)
            if task.run != run:
                raise ProtocolError(f"the task is of run {task.run}, the message came in run {run}")
            # Of what no site noises by itself nothing is written: neither raw updates nor vectors of sums, of which a
            # resumed run asks for others, under new masks.
            on_disk = simulated and job.mechanism.noised == "at the site"
            kept = Memory(memory, reply_file(job.config, run, name) if on_disk else None)
            told = kept.recall(task)
            if told is not None:
                return told
            whole = kept.with_basis(task, basis_layout)
            if whole is None:
                return Refusal(run, number, name, "basis", "this site does not have the factors that are sent once")
        _process.left.clear()
        try:
            with deadline.extended():
                check_task(whole, job, model)
                with denormals_flushed():
                    _hold_to(deadline, job, site, model, whole)
                masked = agreed(whole, job, model, site.public_size, party, memory) if party else None
            _process.left.clear()
            _say_if_more(deadline, job, site)
            records = _records(model, site, job, run)
            with at_work():
                result = train_round(site, job, model, records, whole, deadline, _process.derivatives, masked)
                _process.trained += 1
                if party is not None:
                    result = replace(result, offer=_next_key(task, job, site, party, memory, deadline))
                kept.keep(task, result, whole.basis)
        finally:
            if number >= job.config.rounds:
                _drop(name)  # whatever became of it: no later round of this run needs them
        if site.unreadable and isinstance(failures_of(job, deadline), HiddenFailures):
            note_failure(site, task, site.unreadable, deadline)
        log.info("trained and answered", extra=about(run, number, name))
        return result
    except Exception as error:
        return refused(error, node, run, number, simulated=simulated)


def _for_sum(
    task: SumTask,
    job: Job,
    site: Site,
    party: Party | None,
    run: str,
    memory: MutableMapping[str, bytes],
    deadline: Deadline,
) -> SumReply:
    """Return what is asked for a sum beside the vector: the key for an attempt, if the site could pay for it."""
    if task.run != run or party is None:
        raise ProtocolError("a key is asked for in a run whose vectors are not summed, or of another run")
    if isinstance(task, KeyTask):
        check_budget(site, job, task, deadline)
        return make_key(task, job, party, memory)

    def write_down(context: bytes, survivors: Sequence[str]) -> None:
        with Ledger(site.ledger_path, apart=deadline.extended) as ledger:
            ledger.sums.sign(context, survivors)

    return told_for_sum(task, job, party, memory, write_down)


def _next_key(
    task: TrainTask, job: Job, site: Site, party: Party, memory: MutableMapping[str, bytes], deadline: Deadline
) -> KeyOffer | None:
    """Return the site's key for the next round, which goes out with its vector; None where the server has to ask.

    That is after the last round, and where the site could not pay, or anything fails: then it says so when it is asked.
    The vector that the ledger has paid for leaves in any case.
    """
    if task.round_number >= job.config.rounds:
        return None
    try:
        check_budget(site, job, KeyTask(task.run, task.round_number + 1, 0), deadline)
        return next_key(task, job, party, memory)
    except Exception as error:
        log.warning("no key for the next round: %s", own_words(error), extra=about(task.run, task.round_number))
        return None


def refused(error: Exception, node: Mapping[str, Scalar], run: str, number: int, *, simulated: bool = False) -> Refusal:
    """Return what the server is told of an error in round ``number``, and say it in the site's own log."""
    reason = public_reason(error, node, simulated=simulated)
    return _refuse(Refusal(run, number, name_of(node), _kind_of(error), reason), error)


def rounds_trained() -> int:
    """Return how many rounds this process has trained, each of them paid for."""
    return _process.trained


def is_clean() -> bool:
    """Bring this process's model back to its start; whether nothing that was trained here is left in it."""
    return _process.model is None or left_nothing(_process.model, _process.built)


def _kind_of(error: Exception) -> str:
    kinds = {BudgetExhausted: "budget", PolicyRefusal: "policy", ProtocolError: "task"}
    return next((kind for error_type, kind in kinds.items() if isinstance(error, error_type)), "failed")


def _refuse(refusal: Refusal, error: Exception) -> Refusal:
    """Say in the site's own log, which may name its paths, what was refused or failed and why."""
    where = about(refusal.run, refusal.round_number, refusal.site)
    if refusal.kind == "failed":
        log.error("failed: %s", own_words(error), extra=where)
    else:
        log.warning("refused (%s): %s", refusal.kind, own_words(error), extra=where)
    return refusal


def reply_after(node: Mapping[str, Scalar]) -> float:
    """Return the policy's ``reply-after``; 0 where the policy cannot be read: such a site refuses everything."""
    try:
        return policy_of(node).reply_after
    except ConfigError:
        return 0.0


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one round's task."""
    kept = context.state.config_records.get("kept", ConfigRecord())
    memory = {key: value for key, value in kept.items() if isinstance(value, bytes)}
    deadline = Deadline(reply_after(context.node_config))
    if _process.lookout is not None and _process.lookout.look():
        forget()
    reply = answer(message.content, context.node_config, context.run_config, str(context.run_id), memory, deadline)
    context.state["kept"] = ConfigRecord(dict(memory))
    encoded = encode_reply(reply)
    deadline.wait()  # for a key too: on the way to it a process that begins anew reads the records
    return Message(encoded, reply_to=message)
