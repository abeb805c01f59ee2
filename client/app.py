"""Flower wiring of a site: decode, train, encode. Everything else is in ``local_training``."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.local_training import train_round
from client.site import Site, open_site
from common.config import DataConfig
from common.device import own_cores
from common.errors import BudgetExhausted, ConfigError, FedVeilError, ProtocolError
from common.messages import Refusal, Reply
from common.model import FederatedModel, model_of
from common.tasks import Record
from common.types import AdapterState
from common.wire import decode_task, encode_reply, layout_of
from strategies import Job, configure

log = logging.getLogger("fedveil.site")
app = ClientApp()


@dataclass
class _Process:
    """What this process has built and keeps between rounds: the model and its untouched start."""

    model: FederatedModel | None = None
    start: AdapterState | None = None
    records: dict[tuple[DataConfig, str], list[Record]] = field(default_factory=dict)
    """Tokenised records of each site's data; of the current model's tokenizer."""


_process = _Process()


def _in_simulation() -> bool:
    """Whether this process is a worker of Flower's Ray simulation."""
    import sys

    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def _model(job: Job, site: Site) -> tuple[FederatedModel, AdapterState]:
    config = job.config
    labels = site.data.label_names
    model = model_of(config.model, job.adapter, config.head, config.seed, labels, config.device, config.precision)
    if _process.model is not model:
        _process.model, _process.start, _process.records = model, model.read(), {}
    return model, _process.start or {}


def _records(model: FederatedModel, config: DataConfig, site: Site) -> list[Record]:
    key = (config, site.data.name)
    if key not in _process.records:
        _process.records[key] = model.tokenise(site.data.examples)
    return _process.records[key]


def answer(content: RecordDict, node: dict[str, str | int | float | bool], settings: dict, run: str) -> Reply:  # type: ignore[type-arg]
    """Return a site's reply to a train message; every failure is a Refusal that names the site."""
    simulated = _in_simulation()
    name = str(node.get("site") or f"site-{node.get('partition-id', '?')}")
    header = content.config_records.get("header")
    number = header.get("round") if header else 0
    number = number if isinstance(number, int) else 0
    try:
        torch.set_num_threads(own_cores())
        job = configure(settings)
        site = open_site(node, job.config, run, simulated=simulated)
        model, start = _model(job, site)
        state = job.strategy.start(start)
        task = decode_task(content, layout_of(job.strategy.downlink(state)))
        if task.run != run:
            raise ProtocolError(f"the task is of run {task.run}, the message came in run {run}")
        return train_round(site, job, model, start, _records(model, job.config.data, site), task)
    except BudgetExhausted as error:
        return Refusal(run, number, name, "budget", str(error))
    except ProtocolError as error:
        return Refusal(run, number, name, "task", str(error))
    except (ConfigError, FedVeilError) as error:
        log.error("%s", error)
        return Refusal(run, number, name, "failed", _public_reason(error, simulated))
    except Exception as error:
        log.error("%s", traceback.format_exc())
        return Refusal(run, number, name, "failed", _public_reason(error, simulated))


def _public_reason(error: Exception, simulated: bool) -> str:
    """Return what may leave the site: a deployed site's errors can quote records, so only their kind goes out."""
    if simulated or isinstance(error, ConfigError):
        return f"{type(error).__name__}: {error}" if not isinstance(error, FedVeilError) else str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}; the site's own log says more"


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one round's task."""
    reply = answer(message.content, dict(context.node_config), dict(context.run_config), str(context.run_id))
    return Message(encode_reply(reply), reply_to=message)
