"""Score models on a site's own held-out rows, for its steward alone: nothing of it leaves the site.

No task is answered meanwhile, and no base model is opened that the steward's policy does not name by its hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fedveil.client.kept_states import AboutState, kept_states, read_about, read_state, states_folder
from fedveil.client.ledger.file import now
from fedveil.client.node import ledger_of
from fedveil.client.own_records import prepared
from fedveil.client.policy import Policy
from fedveil.client.site import own_settings
from fedveil.client.turns import score_turn
from fedveil.common.data.sources import label_phrases_of
from fedveil.common.errors import ConfigError, DataError, ModelError
from fedveil.common.files import replace_file
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.device import autocast, choose_attention, choose_device
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.files import check_files, files_of
from fedveil.common.run_lines import AdapterFile, ConfigFile, read_if_there
from fedveil.common.tasks import TASKS, Scored
from fedveil.common.tasks.base import Sums
from fedveil.common.tasks.examples import Example
from fedveil.deploy.site_folder import SiteFolder, check_pinned, node_settings
from fedveil.experiments.evaluate import PRECISIONS, Result, about_of, load_result
from fedveil.experiments.site_alone import train_alone
from fedveil.experiments.site_rows import SiteRows, rows_to_score
from fedveil.experiments.site_scores import ModelScore, Scorer, SiteScores, Sum
from fedveil.strategies.job import configure

FOLDER = "scores"
"""Where the steward finds them again: beside the ledger, as the states that were kept."""


def evaluate_site(
    folder: SiteFolder, runs: Sequence[Path] = (), column: str = "", more: str = "", *, alone: bool = False
) -> tuple[SiteScores, Path]:
    """Score the base, the states that were kept and the final models of runs on a site's own held-out rows.

    Args:
        folder: the site's folder.
        runs: folders of runs that were handed over.
        column: by whose values scores are given as well; empty: by none.
        more: node settings that win over the folder's.
        alone: whether a model that this site trains alone, paid from its budget, stands beside them.

    Returns:
        The scores, and the file that has them, which no command sends anywhere.

    Raises:
        ConfigError: no rule holds rows out, settings or policy are wrong, or a run is of another task.
        DataError: rows or a run cannot be read, no row is left to be scored, or there are too many slices.
        PolicyRefusal: the records were withdrawn, or the policy does not allow a base model.
        ModelError: a base model is not here, or is another one than a state or a run belongs to.
        RunFailed: a task is being answered.
        BudgetExhausted: the budget cannot pay for ``alone``; nothing was charged.
    """
    settings = node_settings(folder, more)
    policy = check_pinned(folder, settings)
    with score_turn(ledger_of(settings)):
        rows = rows_to_score(settings, policy, column)
        models = list(_scores(rows, runs, alone=alone))
    if not models:
        raise ConfigError(
            "there is no model to score: set keep-states in the site's 'node' before a run, or name a run's folder by "
            "--run"
        )
    made = now()
    held_out = len(rows.data.examples) + rows.charged
    scores = SiteScores(
        str(settings["site"]), made, rows.rule, held_out, rows.charged, column, _share_of(policy.task), models
    )
    return scores, _written(ledger_of(settings).parent / FOLDER, scores)


def _share_of(task: str) -> str:
    """Return what a share of right ones is over; the figure of the run's report may be another, such as micro F1."""
    if not TASKS[task].counted:
        return "% of right tokens"
    plain = TASKS[task].scored.headline == Scored().headline
    return "% of right records" if plain else "% of records whose whole answer is right"


def _scores(rows: SiteRows, runs: Sequence[Path], *, alone: bool) -> Iterator[ModelScore]:
    """Score each run's base, then the states of it that were kept, then the final models that were handed over."""
    based = set[str]()
    last: AboutState | None = None
    for path in kept_states(states_folder(rows.settings)):
        about = read_about(path)
        last, model = about, _model_of(rows, about)
        if about.run not in based:
            based.add(about.run)
            yield rows.score(f"base of run {about.run}", _of_model(model, model.start))
        state = read_state(path)
        yield rows.score(f"run {about.run}, as sent in round {about.round_number}", _of_model(model, state))
    for run in runs:
        about_run = _checked(rows, run)
        config = read_if_there(ConfigFile, run)
        if config is not None and config.run not in based:
            based.add(config.run)
            last = began = AboutState(config.run, 0, config.settings, about_run.base_fingerprint)
            model = _model_of(rows, began)
            yield rows.score(f"base of run {config.run}", _of_model(model, model.start))
        yield rows.score(f"final model of {run.name}", _of_result(load_result(run / "adapter")))
    if alone:
        if last is None:
            raise ConfigError("--alone: there is no run to train as: name one by --run, or keep states of one")
        own = train_alone(rows, configure(last.settings), last.run)
        yield rows.score(f"this site alone, as in run {last.run}", _of_result(load_result(own / "adapter")))


def _model_of(rows: SiteRows, about: AboutState) -> FederatedModel:
    """Return the model of a run, of files that the steward allows and of the base that the run has."""
    job = configure(about.settings)
    name, policy = job.config.model.name, rows.policy
    _check_task(rows, job.config.model.task, name)
    check_base(policy, name, about.base_fingerprint, files_of(name))
    labels = rows.data.label_names  # with the phrases that a round's head starts from: a frozen head never travels
    phrases = label_phrases_of(own_settings(job.config, policy), labels)
    model = job.model(labels, phrases, files_of(name))
    if model.base.fingerprint != about.base_fingerprint:
        raise ModelError(f"run {about.run} has another base model than {name!r} is here: put the run's one there")
    return model


def _checked(rows: SiteRows, run: Path) -> AdapterFile:
    """Return what a run's folder says of its model, once no file of another base would be opened for it."""
    about = about_of(run / "adapter")
    _check_task(rows, about.task, str(run), about.label_names)
    check_base(rows.policy, about.base_model, about.base_fingerprint, about.base_files)
    check_files(about.base_model, about.base_files)
    return about


def check_base(policy: Policy, name: str, fingerprint: str, files: str) -> None:
    """Raise PolicyRefusal or ModelNotLoaded unless a base model is one that the policy names; none is opened."""
    policy.check_model_name(name)
    policy.check_files(name, files)
    policy.check_model(name, fingerprint, files)


def _check_task(rows: SiteRows, task: str, what: str, labels: Sequence[str] | None = None) -> None:
    """Raise ConfigError unless a model answers the question that the policy pins."""
    if task != rows.policy.task:
        raise ConfigError(f"{what} is a model of task {task!r}, and this site's policy pins {rows.policy.task!r}")
    if labels is not None and tuple(labels) != rows.data.label_names:
        raise ConfigError(f"{what} has the labels {', '.join(labels)}, and this site's policy pins others")


def _of_model(model: FederatedModel, state: AdapterState) -> Scorer:
    """Return what scores a run's model with an adapter in it."""
    model.write(state)
    model.module.eval()

    def sums(example: Example) -> Sums | None:
        records = model.featurise(prepared(model, [example]))
        with autocast(model.device, model.precision):
            return model.task.sums(model.module, model.batch(records)) if records else None

    return _guarded(sums, counted=model.task.counted)


def _of_result(result: Result) -> Scorer:
    """Return what scores a run's final model, as its users would load it."""
    about, task, base = result.about, result.task, result.base
    device = choose_device(str(about.settings.get("device", "auto")))
    choose_attention(base.module, device)
    module, limit = result.module.to(device).eval(), task.limit(base, about.max_length)

    def sums(example: Example) -> Sums | None:
        batch = task.collate(base, task.prepare(base, [example], limit))
        with autocast(device, PRECISIONS[about.precision]):
            return task.sums(module, {name: tensor.to(device) for name, tensor in batch.items()})

    return _guarded(sums, counted=task.counted)


def _guarded(sums: Callable[[Example], Sums | None], *, counted: bool) -> Scorer:
    """Return what gives a record's sums as numbers; a record that the model cannot take has none."""

    def score(example: Example) -> Sum | None:
        try:
            found = sums(example)
        except Exception:  # which of a tokenizer or a model it is says nothing that the number of such rows does not
            return None
        if found is None:
            return None
        right = found.whole if counted else found.correct
        return float(right.sum()), float(found.loss.sum()), float(found.weight.sum())

    return score


def _written(folder: Path, scores: SiteScores) -> Path:
    """Write scores down for the site's user alone, and return the file."""
    path = folder / f"{scores.made.replace(':', '-').partition('+')[0]}.json"
    content = json.dumps(asdict(scores), indent=2, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        replace_file(path, content.encode(), 0o600)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): check permissions and space") from error
    return path
