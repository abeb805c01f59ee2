"""The traffic of a run, counted from encoded messages before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedveil.common.adapters.attach import target_shapes
from fedveil.common.adapters.layers import layer_shape, layers_of
from fedveil.common.messages.blocks import bytes_of, layout_of, numbers_in, payload_bytes
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.formats import FLOAT32, FORMATS
from fedveil.common.messages.named import places_of
from fedveil.common.messages.round import Spending, TrainResult, TrainTask
from fedveil.common.messages.state import BASIS, HEAD, STATE, AdapterState, Factors, Place
from fedveil.common.messages.tensors import fingerprint
from fedveil.common.messages.wire import encode_reply, encode_task, message_bytes
from fedveil.experiments.planner.payers import payer_of
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secure_sum import KeyOffer
from fedveil.server.model import ServerModel
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import Job
from fedveil.strategies.payload import payload, preset_adapter
from fedveil.strategies.state import ServerState

FIGURES = (1, 1, *5 * (1.0,))
RUN = "1" * 20
"""A run's name as long as Flower's are."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one site: adapter payload, as in a run's report, unless said otherwise."""

    down: int
    """The whole state of a round, server to site; tensors that the site has are not sent again."""
    up: int
    """A round in which the adapter moves, site to server."""
    down_run: int
    """All rounds, server to site, with frozen factors; at most, where a strategy moves what sites do not train."""
    up_run: int
    """All rounds, site to server."""
    message_down: int
    """The whole message of a round, with header and framing."""
    message_up: int
    once_down: int
    """In the whole run: factors that are sent once."""
    once_up: int
    """Only before round 1: what the start is made from."""

    def run(self, sites: int) -> tuple[int, int]:
        """Return payload bytes down and up of a whole run in which every site joins every round."""
        return sites * self.down_run, sites * (self.up_run + self.once_up)


def traffic(job: Job, server_model: ServerModel, plans: Sequence[PrivacyPlan]) -> Traffic:
    """Return the bytes of the job's messages, by encoding them; ``plans`` are those of sites that are charged.

    Where factors take turns or columns are chosen, ``up`` is that of the first round in which the adapter moves.
    """
    strategy, rounds = job.strategy, range(1, job.config.rounds + 1)
    state = job.start(server_model.start)
    basis = job.basis(state)
    task = TrainTask(
        run=RUN,
        round_number=job.config.rounds,
        state=strategy.downlink(state),
        basis={},
        basis_fingerprint=fingerprint(basis) if basis else "",
        base_fingerprint=server_model.model.base.fingerprint,
        start_fingerprint=job.start_fingerprint(server_model.start),
        precision=(precision := job.config.wire.precision),
    )
    first = 1 + job.config.timeline.adapter_waits
    trained = _trained(job, server_model, first, task.state)
    spending = _spending(payer_of(job).stated(plans))
    result = TrainResult(RUN, job.config.rounds, "site-0", 1800, trained, spending, precision=precision)
    up_precision = precision
    if job.config.privacy.honest_sites:
        task = replace(task, offers=tuple(KeyOffer(f"site-{k}", bytes(32), bytes(64)) for k in range(len(plans))))
        up_precision, words = FLOAT32, bytes(4 * numbers_in(layout_of(trained)))
        result = replace(result, contribution={}, words=words, offer=task.offers[0])
    down, up = encode_task(task), encode_reply(result)
    statistic = server_model.reply_layout(0) if job.origin.asked == "sites" else {}
    return Traffic(
        down=payload_bytes(down),
        up=payload_bytes(up),
        down_run=_down_run(job, state),
        up_run=sum(_payload(_trained(job, server_model, number, task.state), up_precision) for number in rounds),
        message_down=message_bytes(down),
        message_up=message_bytes(up),
        once_down=_payload(basis, precision) + _payload(job.brought(state, 0), precision),
        once_up=bytes_of(statistic, precision),
    )


def _down_run(job: Job, state: ServerState) -> int:
    """Return the bytes of all rounds' tensors that a site has not acknowledged in the round before."""
    form = FORMATS[job.config.wire.precision]
    down, acknowledged, total = job.strategy.downlink(state), frozenset[Place](), 0
    for number in range(1, job.config.rounds + 1):
        basis = job.frozen_for(state, number)
        sent = {STATE: down, BASIS: basis}
        for part, layer, name in places_of(sent):
            if (part, layer, name) not in acknowledged:
                total += form.size(sent[part][layer][name].numel())
        lasting = job.lasting(number, down, basis)
        resting = {layer: _of_adapter(job, state, layer, factors) for layer, factors in lasting[STATE].items()}
        acknowledged = frozenset(places_of({**lasting, STATE: resting}))
    return total


def _of_adapter(job: Job, state: ServerState, layer: str, factors: Factors) -> Factors:
    """Return what of a layer that no site trains in a round stays as it is: not what the server makes of it anew."""
    if layer == HEAD:
        return factors
    return {} if job.strategy.facts.moves_frozen else {n: t for n, t in factors.items() if n in state.adapter[layer]}


def _trained(job: Job, server_model: ServerModel, round_number: int, state: AdapterState) -> AdapterState:
    """Return the factors that a site sends after a round in which it received ``state``, as they begin."""
    chosen = job.strategy.trained_columns(state, round_number, 0)
    return job.sent(round_number, narrowed(server_model.trained_start(), chosen))


def payload_by_strategy(server_model: ServerModel) -> dict[str, tuple[int, int]]:
    """Return payload bytes down and up of one site and round for every strategy, on this model at this rank.

    The job's own strategy has the job's adapter, every other its default one. A trained head counts; what a strategy
    sends once does not. If the job has no adapter, the others adapt the layers of ``adapter.targets``, if any.
    """
    model, own = server_model.model, server_model.job.strategy
    layers = [layer_shape(layer) for layer in layers_of(model.peft_model).values()]
    if model.head_only:
        layers = target_shapes(model.base.module, model.adapter.target_modules)
    precision = server_model.job.config.wire.precision
    head = _payload({HEAD: server_model.start[HEAD]}, precision) if model.head_trained else 0
    found = {}
    for name, strategy in {**STRATEGIES.core, own.name: type(own)}.items():
        if name == own.name:
            down, up = payload(own, model.adapter, layers, precision)
        elif not layers:
            continue
        else:
            down, up = payload(strategy(), preset_adapter(strategy, model.adapter.rank), layers, precision)
        found[name] = (head + down, head + up)
    return found


def _payload(state: AdapterState, precision: str) -> int:
    return bytes_of(layout_of(state), precision)


def _spending(plans: Sequence[PrivacyPlan]) -> Spending | None:
    """Return a spending of the usual length; the figures in it are not looked at."""
    return next((Spending(TRAINING, plan.event, *FIGURES, Accountant("pld", "0.6.0")) for plan in plans), None)
