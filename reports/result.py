"""The result of a run in figures, and what every form of its report says first."""

from __future__ import annotations

from fedveil.common.config.run import HEAD_ONLY
from fedveil.common.words import UNKNOWN, bytes_text, capital, counted, number_text, percent_text, seconds_text
from fedveil.privacy.figures import epsilon_text
from fedveil.reports.audits import bound_note
from fedveil.reports.data import ReportData, setting_of
from fedveil.reports.document import Box, Text
from fedveil.reports.scores import Share, interval_text
from fedveil.reports.sharing import THIS_RUN, others_of, rests_on
from fedveil.reports.trials import trials_figure


def made_of(data: ReportData) -> str:
    """Return what was trained, on whose records, for how many rounds, and whether the run ended early."""
    head, base = data.headline, str(setting_of(data, "model.name")).rstrip("/").rpartition("/")[2]
    what = f"{base} was fine-tuned by {data.method}"
    if data.method == HEAD_ONLY:
        what = f"A classification head on the frozen model {base} was trained"
    few = f" Only {counted(head.last_sites, 'site')} took part in the last round." if head.last_sites else ""
    ended = {"completed": "", "unfinished": " The run is still going, or was cut off."}
    return (
        f"{what} on the records of {_most(data)}{counted(head.sites, 'site')}, for {head.rounds_done} of "
        f"{counted(head.rounds_planned, 'planned round')}."
        + few * (head.last_sites < head.sites)
        + ended.get(data.status, f" It ended early ({data.status}).")
    )


def alarms_of(data: ReportData) -> list[Text]:
    """Return what every form says first and loudly."""
    off = [Text(data.claim.sentence, "alarm")] if data.claim.off else []
    return off + [Text(text, "alarm", "AUDIT FAILED:") for text in data.alarms]


def promise_of(data: ReportData) -> list[Text]:
    """Return the promise with everything that weakens it, which every form says beside the result."""
    promise = [] if data.claim.off else [Text(data.claim.sentence, "claim")]
    return promise + [Text(text, "care", "Warning:") for text in [*data.problems, *data.claim.gaps]]


def boxes_of(data: ReportData) -> list[Box]:
    """Return the result in figures."""
    head, central = data.headline, data.claim.trusts_server
    scored = data.accuracy[0].after if data.accuracy else None
    figures = {figure.name: figure for figure in data.figures}
    if headline := figures.pop(data.judged_by, None):
        scored = headline.after
    whole = [f"95 % interval after training: {interval_text(scored)}"] if scored else []
    whole += [f"{name}: {_value(figure.before)} → {_value(figure.after)}" for name, figure in figures.items()]
    if head.macro_f1_after is not None:
        whole.append(f"macro-F1: {percent_text(head.macro_f1_before)} → {percent_text(head.macro_f1_after)}")
    in_last = "" if central or not head.rounds_done else f", {head.last_sites} in the last round"
    rounds = [f"{_most(data)}{counted(head.sites, 'site')}{in_last}"] + [seconds_text(head.seconds)] * (not central)
    precision = setting_of(data, "wire.precision")
    rounding = [f"in {precision}: new weights are the mean but for rounding"] * (precision not in ("", "float32"))
    return [
        Box(
            f"{capital(data.judged_by)} on public test data",
            f"{percent_text(head.accuracy_before)} → {percent_text(head.accuracy_after)}",
            ["before → after training", *([data.control] if data.control else []), *whole],
        ),
        Box("Privacy spent, ε", *_spent_in_all(data)),
        Box("Rounds", f"{head.rounds_done} of {head.rounds_planned}", rounds),
        Box(
            "Traffic",
            f"{bytes_text(head.bytes_down)} down, {bytes_text(head.bytes_up)} up",
            ["adapter payload " + ("of the usual draw" if central else "of all sites and rounds"), *rounding],
        ),
    ]


def _value(share: Share | None) -> str:
    return percent_text(share.value if share else None)


def _most(data: ReportData) -> str:
    return "at most " * data.claim.trusts_server


def _spent_in_all(data: ReportData) -> tuple[str, list[str]]:
    head = data.headline
    if head.epsilon is None or head.delta is None:
        off = data.claim.off
        return ("no claim", ["privacy was OFF"]) if off else (UNKNOWN, ["no site has reported a release yet"])
    basis = "by the server's ledger" if data.claim.trusts_server else f"worst site: {head.worst_site}"
    on = rests_on(data.sharing)
    notes = [f"at δ {head.delta:g}, {basis}{on and f', {on}'}"]
    notes += [f"{THIS_RUN}, {other}" for other in (others_of(data.sharing) if data.sharing else ())]
    notes += [trials_figure(data.tuning)] if data.tuning else []
    notes += [bound_note(data.audit_results)] if bound_note(data.audit_results) else []
    return f"{epsilon_text(head.epsilon)} of {number_text(head.epsilon_budget)}", notes
