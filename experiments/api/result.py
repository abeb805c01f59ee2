"""A finished run as an object: its figures as tables, its model, its report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.config.run import HEAD_ONLY, method_of
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.paths import check_adapter, check_vacant
from fedveil.common.run_lines import (
    ConfigFile,
    read_file,
    read_if_there,
)
from fedveil.common.server_file import ServerFile
from fedveil.common.words import counted, percent_text
from fedveil.experiments.api.tables import history_of, privacy_of
from fedveil.privacy.figures import epsilon_text

if TYPE_CHECKING:
    import pandas as pd

    from fedveil.common.tasks import Finished
    from fedveil.reports.data import ReportData

CHUNK = 32
"""Texts that go through the model at once."""


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out records that the model gets right, from 0 to 1, with its 95 % interval (Wilson's).

    >>> Accuracy(0.8, 0.711, 0.867, 100, 0.5)
    80.0 % (71.1 to 86.7, 95 % interval, on 100 held-out records; 50.0 % before training)
    >>> float(Accuracy(0.8, 0.711, 0.867, 100, 0.5))
    0.8
    """

    value: float
    low: float | None
    """None, as ``high``: the task does not count right records, so it has no interval."""
    high: float | None
    records: int | None
    before: float | None
    """The share before training, on the same records."""
    name: str = "accuracy"
    """What the task is judged by, where that is something else, such as ``micro F1``."""

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        known = self.low is not None and self.high is not None
        interval = f"{100 * (self.low or 0):.1f} to {100 * (self.high or 0):.1f}, 95 % interval" if known else ""
        on = f"on {counted(self.records, 'held-out record')}" if self.records else ""
        before = "" if self.before is None else f"{percent_text(self.before)} before training"
        more = "; ".join(text for text in (", ".join(text for text in (interval, on) if text), before) if text)
        name = f"{self.name} " * (self.name != "accuracy")
        return name + percent_text(self.value) + (f" ({more})" if more else "")


class Run:
    """A run and all that its folder holds. ``fedveil.run`` and ``fedveil.load`` return one.

    Shown in a notebook it is a small table; every figure is read from the folder when it is asked for.

    Args:
        folder: of the run.

    Raises:
        DataError: it is not the folder of a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder: Path = expanded(folder).absolute()
        """The run's folder: settings, lines of each round, report, adapter."""
        read_file(ConfigFile, self.folder)

    @property
    def status(self) -> str:
        """``completed``, ``stopped`` (early, and well), ``failed``, or ``unfinished`` (it goes on, or was cut off)."""
        return self._report.status

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        """Every setting of the run with the value that it had."""
        return read_file(ConfigFile, self.folder).settings

    @property
    def history(self) -> pd.DataFrame:
        """A row for each round: ``accuracy``, ``loss``, ``epsilon``, ``sites``, ``seconds`` and bytes sent.

        Round 0 is the model before training. ``accuracy`` is missing in a round that was not scored. ``epsilon`` is the
        largest over the sites by then, and missing in a run without privacy. Where a column names the sites and the
        test set is cut from it, ``accuracy_of_leeds`` is that on the test records of ``leeds``. A task that is
        judged by something else has that in place of ``accuracy``, and what is beside it in more columns: ``micro_f1``.
        """
        return history_of(self.folder)

    @property
    def privacy(self) -> pd.DataFrame:
        """A row for each release of a site: ``epsilon`` so far by its ledger, ``delta``, ``unit``, what is ``left``.

        Empty in a run that makes no claim. With a trusted server, whose sites have no rows, the rows are the cohort's.
        """
        return privacy_of(self.folder)

    @property
    def accuracy(self) -> Accuracy | None:
        """The accuracy on held-out records with its interval; None before a round is complete.

        Of a task that is judged by something else, such as micro F1, that figure, with its name.
        """
        data = self._report
        head, scores = data.headline, data.accuracy
        if head.accuracy_after is None:
            return None
        share, records = (scores[0].after, scores[0].records) if scores else (None, None)
        share = next((figure.after for figure in data.figures if figure.name == data.judged_by), share)
        low, high = (share.low, share.high) if share else (None, None)
        return Accuracy(head.accuracy_after, low, high, records, head.accuracy_before, data.judged_by)

    @property
    def epsilon(self) -> float | None:
        """The ε of the run, the largest over its sites; None without a claim."""
        return self._report.headline.epsilon

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter in PEFT's format, with the head's tensors and a model card beside it.

        Raises:
            DataError: no round is complete.
        """
        check_adapter(self.folder / "adapter")
        return self.folder / "adapter"

    @property
    def report(self) -> Path:
        """The privacy report as one HTML page."""
        return self.folder / "report.html"

    def predict(self, texts: str | Sequence[str] | Sequence[tuple[str, ...]]) -> pd.DataFrame:
        """Return a row for each text: its ``label``, the label's ``probability``, and that of each label by its name.

        ::

            run.predict(["What a film!", "Dull."])

        Args:
            texts: one text, or several; tuples of two where records are pairs. Images are given by their paths. A
                language model takes prompts, and each row is its ``completion``. Where a text may have several labels,
                a row has the list of its ``labels``, which may be empty.

        Raises:
            ConfigError: a text is empty or none, or has not the parts that this run's records have.
            DataError: no round is complete.
            ModelError: the base model on this machine is not the run's.
        """
        import pandas as pd

        asked: list[Any] = [texts] if isinstance(texts, str) else list(texts) if hasattr(texts, "__len__") else [None]
        named = isinstance(texts, Mapping | pd.DataFrame)  # whose names would be taken for texts
        if named or not all(isinstance(part, str) for one in asked for part in _parts(one)):
            raise ConfigError("texts must be a text, or a list of texts, such as frame['text'].tolist()")
        words = [(one,) if isinstance(one, str) else tuple(one) for one in asked]
        if empty := [i for i, parts in enumerate(words) if not all(str(part).strip() for part in parts)]:
            raise ConfigError(f"text {empty[0]} is empty: leave it out")
        model = self._model
        answers = [answer for i in range(0, len(words), CHUNK) for answer in model.answers(words[i : i + CHUNK])]
        if not model.labels:
            return pd.DataFrame({"completion": [one[0].text for one in answers]})
        if model.task.scored.several:
            chosen = [[answer.text for answer in one if answer.chosen] for one in answers]
            found = [[labels, *_by_label(one, model.labels)] for labels, one in zip(chosen, answers, strict=True)]
            return pd.DataFrame(found, columns=["labels", *model.labels])
        rows = [[one[0].text, one[0].probability, *_by_label(one, model.labels)] for one in answers]
        return pd.DataFrame(rows, columns=["label", "probability", *model.labels])

    def merge(self, folder: str | Path) -> Path:
        """Write the adapter merged into its base model, as transformers or sentence-transformers load it.

        ::

            run.merge("model")

        Args:
            folder: a new one.

        Returns:
            The folder.

        Raises:
            DataError: no round is complete, or something is in the folder.
            ModelError: the base model on this machine is not the run's.
        """
        target = expanded(folder)
        check_adapter(self.folder / "adapter")
        check_vacant(target)
        from fedveil.experiments.serving.merge import merge_run

        merge_run(self.folder, target)
        return target

    @property
    def _report(self) -> ReportData:
        from fedveil.reports import report_of

        return report_of(self.folder)

    @cached_property
    def _model(self) -> Finished:
        check_adapter(self.folder / "adapter")
        from fedveil.experiments.serving.merge import load_finished

        return load_finished(self.folder)

    def _lines(self) -> dict[str, str]:
        """Return what the run came to, by the name of each line."""
        data = self._report
        head, settings = data.headline, self.settings
        rounds = f"{head.rounds_done} of {counted(head.rounds_planned, 'round')}"
        ended = f"{data.status}, {rounds}, {counted(head.sites, 'site')}"
        if head.epsilon is None:
            privacy = "no claim: this run protects no record" if data.claim.off else "no site has reported a release"
        else:
            budget = "" if head.epsilon_budget is None else f" of {head.epsilon_budget:g}"
            privacy = f"ε {epsilon_text(head.epsilon)}{budget} at δ {head.delta:g} per {data.claim.per}{self._alone()}"
        method = method_of(str(settings["strategy"]), str(settings["adapter.name"]))
        what = "a classification head on the frozen" if method == HEAD_ONLY else f"an adapter by {method} on"
        trained = f"{what} {settings['model.name']}"
        lines = {"status": ended + (f" ({data.reason})" if data.reason else "")}
        if self.accuracy:
            lines["accuracy" if self.accuracy.name == "accuracy" else "score"] = repr(self.accuracy)
        return {**lines, "privacy": privacy, "trained": trained, "folder": str(self.folder), "report": str(self.report)}

    def _alone(self) -> str:
        """Return what the figure leaves out: a ledger in the run's own folder has no other run."""
        server = read_if_there(ServerFile, self.folder)
        own = server is not None and all(start.fresh_ledgers for start in server.starts)
        return ", of this run alone: other runs on these records are not counted" if own else ""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<9} {text}" for name, text in {"run": self.folder.name, **self._lines()}.items())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._lines().items()
        )
        return f"<table><caption>{html.escape(self.folder.name)}</caption>{rows}</table>"


def _parts(one: object) -> Sequence[object]:
    return one if isinstance(one, tuple | list) else [one]


def _by_label(answers: Sequence[Any], labels: Sequence[str]) -> list[float]:
    """Return the probabilities in the labels' order."""
    found = {answer.text: answer.probability for answer in answers}
    return [found[label] for label in labels]
