"""Silence of a trusted server: no form of what it shows says who was drawn."""

from __future__ import annotations

import html
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from markupsafe import escape
from site_runs import COHORT_SIZE, content

from fedveil.cli.summary import print_summary
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Refusal, Task, TrainResult, TrainTask
from fedveil.common.messages.tensors import entries
from fedveil.common.run_lines import COHORT, Absence, ProgressFile, RoundLine
from fedveil.common.trackers import TRACKERS
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.figures import bound_text
from fedveil.reports import markdown_report, report_of
from fedveil.reports.claim import UNTOLD
from fedveil.reports.page import to_html
from fedveil.reports.watch import TO_NOBODY, Watched
from fedveil.server.app import FlowerTransport
from fedveil.server.collect.base import Collected
from fedveil.server.collect.door import shown_of
from fedveil.server.collect.shown import Shown, ShownOfCohort
from fedveil.server.collect.trusted import TrustedCollector
from fedveil.server.records import RunFolder
from fedveil.server.sites import Exchange, Sites
from fedveil.server.terminal import round_line
from fedveil.server.tracking import rounds_of
from fedveil.strategies import ServerState
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


NAMES = re.compile(r"site-[0-9]")


class Later(datetime):
    """A clock that goes ahead by days, hours and minutes: no run may begin in the same minute as another by chance."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Later:
        return super().now(tz) + timedelta(days=40, hours=5, minutes=7)


class Restless(InProcessTransport):
    """Sites of which some cannot read their task; each plays the part of ``part``."""

    odd = 0

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        return super().deliver(node, task, type(content)() if node % 3 == self.odd else content)


class Others(Restless):
    """Other sites that cannot, and all the others with other records, which take them longer."""

    odd = 1

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        time.sleep(0.05)
        self._nodes[node]["partition-id"] = len(self._nodes) - 1 - node
        return super().deliver(node, task, content)


def given_away(settings: dict[str, Any], kind: type[InProcessTransport]) -> dict[str, str]:
    """Return the files of a run's folder, without clocks."""
    folder = run_in_process({**settings, "privacy.site-rate": 0.5}, 6, "1", kind)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): content(path) for path in paths}
    shutil.rmtree(folder)
    return files


def leaks(settings: dict[str, Any]) -> set[str]:
    """Return the files that tell of single sites, or differ though all that was noised is the same.

    Two runs have other draws, other failures and other records; their noised sums are made equal. So whatever differs
    came from a site by another way than through the noise.
    """
    with patch("fedveil.server.collect.trusted.add_private_noise", lambda total, std: torch.full_like(total, 0.01)):
        one = given_away(settings, Restless)
        with patch("fedveil.server.records.datetime", Later):
            other = given_away(settings, Others)
    assert (
        {"checkpoint.safetensors", "rounds.jsonl", "log.jsonl", "report.json", "run.log"} <= one.keys() == other.keys()
    )
    return {name for name in one if one[name] != other[name] or NAMES.search(one[name])}


def test_nothing_of_a_site_is_in_the_run_s_folder_but_through_the_noise(settings: dict[str, Any]) -> None:
    assert leaks(settings) == set()


def of_the_exchange(got: Collected, exchange: Exchange) -> None:
    got.bytes_up = exchange.bytes_up


def naming(got: Collected, exchange: Exchange) -> None:
    got.refusals = {
        node: Absence(1, 1, reply.site, reply.kind, "no")
        for node, reply in exchange.replies.items()
        if isinstance(reply, Refusal)
    }


@pytest.mark.parametrize("leak", [of_the_exchange, naming])
def test_a_server_that_tells_of_replies_is_found(
    settings: dict[str, Any], leak: Callable[[Collected, Exchange], None]
) -> None:
    seen: list[Exchange] = []
    ask, collect = Sites.ask, TrustedCollector.collect

    def watched(sites: Sites, *rest: Any) -> Exchange:
        seen.append(ask(sites, *rest))
        return seen[-1]

    def telling(sites: TrustedCollector, *rest: Any) -> Collected:
        got = collect(sites, *rest)
        leak(got, seen[-1]) if seen else None
        return got

    with patch.object(Sites, "ask", watched), patch.object(TrustedCollector, "collect", telling):
        assert "rounds.jsonl" in leaks({**settings, "rounds": 6, "privacy.epsilon": 200.0})


PUBLISHED = {"report.json", "report.md", "report.html"}


def timed(folder: RunFolder, *lines: Any, real: Any = RunFolder._append) -> None:
    """Write down when a round ended."""
    real(folder, *(replace(line, seconds=time.monotonic()) if isinstance(line, RoundLine) else line for line in lines))


def test_a_server_that_tells_how_long_a_round_took_is_found(settings: dict[str, Any]) -> None:
    settings |= {"rounds": 3, "privacy.epsilon": 200.0}
    with patch.object(RunFolder, "_append", timed):
        found = leaks(settings)
        # A report drops what such a file holds.
        assert "rounds.jsonl" in found
        assert not found & PUBLISHED
        with patch("fedveil.reports.folder.RunFiles.trusts_server", False):
            assert "report.json" in leaks(settings)


def test_a_line_that_tells_how_long_a_round_took_is_found(settings: dict[str, Any]) -> None:
    def line(shown: Shown, outcome: Any, *others: Any) -> str:
        return f"{round_line(shown, outcome, *others)}  {outcome.seconds:.3f} s"

    with patch("fedveil.server.conduct.round_line", line):
        assert "run.log" in leaks({**settings, "rounds": 3, "privacy.epsilon": 200.0})


def test_the_log_says_that_it_is_not_to_be_published(settings: dict[str, Any]) -> None:
    folder = run_in_process(settings, 3)
    assert ShownOfCohort.log_note in (folder / "log.jsonl").read_text(encoding="utf-8")
    assert "is not to be published" in ShownOfCohort.log_note


@pytest.mark.parametrize("tracker", TRACKERS)
def test_no_tracker_notes_when_a_round_ended_that_sites_were_drawn_for(settings: dict[str, Any], tracker: str) -> None:
    with pytest.raises(ConfigError, match="which may show who was drawn"):
        configure({**settings, "privacy.site-rate": 0.5, "tracker": tracker})
    assert configure({**settings, "tracker": tracker}).config.tracker == tracker


def test_a_tracker_hears_neither_time_nor_number_of_sites(settings: dict[str, Any]) -> None:
    told = rounds_of(run_in_process(settings, 3))
    assert set(told) == {0, 1, 2}
    assert {"accuracy", "epsilon", "bytes_up"} <= set(told[2])
    assert not {"seconds", "sites"} & set(told[2])


def test_a_watched_page_says_for_whom_it_is_and_nothing_of_the_round(settings: dict[str, Any]) -> None:
    folder = run_in_process(settings, 3)
    (folder / "result.json").unlink()
    (folder / "progress.json").write_text('{"phase": "training", "round": 2, "asked": 3}', encoding="utf-8")
    watched = Watched(folder)
    try:
        _, page, goes_on = watched.page("/")
    finally:
        watched.server_close()
    assert goes_on
    assert escape(TO_NOBODY) in page.decode()
    assert "sites have answered" not in page.decode()


def test_the_report_has_a_cohort_and_no_sites(settings: dict[str, Any]) -> None:
    folder = run_in_process({**settings, "privacy.site-rate": 0.5}, 6)
    page, text = (
        (folder / "report.html").read_text(encoding="utf-8"),
        (folder / "report.md").read_text(encoding="utf-8"),
    )
    assert ">The cohort</h2>" in page
    assert "## The cohort" in text
    for form in (page, text):
        assert UNTOLD in html.unescape(form)
        assert not re.search(r">Sites</h2>|## Sites|rounds joined|refused<|seconds|>time<", form)
    assert {line.seconds for line in report_of(folder).rounds} == {None}
    assert report_of(folder).headline.seconds is None


class OneReply:
    """A grid with three nodes, each of which says that it has failed."""

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]

    def push_messages(self, messages: list[Any]) -> list[str]:
        return [f"m{number}" for number, _ in enumerate(messages)]

    def pull_messages(self, wanted: list[str]) -> list[Any]:
        return [SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason="away"))]


def shown(mode: Mapping[str, Any], settings: dict[str, Any], drawn: Sequence[int]) -> list[ProgressFile]:
    """Return what a run's folder shows to whoever watches, in a round in which these nodes are asked."""
    told: list[ProgressFile] = []
    job = configure({**settings, **mode})
    folder = SimpleNamespace(progress=lambda line: told.append(line) if line else None, shown=shown_of(job))
    parts = (OneReply(), job, SimpleNamespace(reply_layout=lambda _: {}))
    transport = FlowerTransport(*cast(Any, (*parts, folder)))
    with patch("fedveil.server.app.Message", lambda *content, **terms: content):
        transport.nodes(1, ())
        if drawn:
            task = TrainTask("1", 1, {"x": {"B": torch.zeros(2)}}, {}, "", "ab" * 16, "cd" * 16)
            transport.exchange(dict.fromkeys(drawn, task), 5.0)
    return told


def test_whoever_watches_sees_the_same_whoever_is_drawn(settings: dict[str, Any]) -> None:
    found = [shown({}, settings, drawn) for drawn in ([], [1], [1, 2, 3])]
    assert found == [[ProgressFile("training")]] * 3
    # Where no server is trusted, it does tell.
    plain = {"privacy.mode": "dp-sgd", "privacy.unit": "record", "privacy.cohort": 0}
    assert shown(plain, settings, [1])[-1].asked == 1


def test_a_progress_line_that_tells_of_those_who_were_drawn_is_found(settings: dict[str, Any]) -> None:
    with patch.object(ShownOfCohort, "answered", Shown.answered):
        found = [shown({}, settings, drawn) for drawn in ([], [1], [1, 2, 3])]
    assert found != [[ProgressFile("training")]] * 3


def test_a_log_line_about_who_was_drawn_is_found(settings: dict[str, Any]) -> None:
    """A collector that notes what went wrong with a site, as the others do."""
    ask = Sites.ask

    def telling(sites: Sites, nodes: Any, round_number: int, state: ServerState) -> Exchange:
        exchange = ask(sites, nodes, round_number, state)
        told = {n: (r.site, r.kind, r.reason) for n, r in exchange.replies.items() if isinstance(r, Refusal)}
        sites.absent(Collected(attempts=1), round_number, told, set(exchange.replies))
        return exchange

    with patch.object(Sites, "ask", telling):
        assert "log.jsonl" in leaks({**settings, "rounds": 6, "privacy.epsilon": 200.0})


def test_no_update_lies_in_the_run_s_folder(settings: dict[str, Any]) -> None:
    sent: list[TrainResult] = []
    real = TrustedCollector._mean

    def seen(sites: TrustedCollector, results: Any, number: int, state: ServerState) -> Any:
        held = list(results)
        sent.extend(held)
        return real(sites, iter(held), number, state)

    with patch.object(TrustedCollector, "_mean", seen):
        folder = run_in_process(settings, 3)
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(sent) == 6
    assert {one.public_size for one in sent} == {1}, "how many records a site has is none of the server's business"
    for one in sent:
        for _, _, tensor in entries(one.contribution):
            whole = tensor.numpy().tobytes()[:16]  # four numbers in a row
            assert not [name for name, content in files.items() if whole in content]
    assert not {path.name for path in folder.rglob("*.sqlite")}, "a site's ledger tells who was drawn"


def test_the_report_says_who_is_trusted_and_promises_no_record_anything(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_in_process(settings, 2)
    report, text = report_of(folder), markdown_report(folder)
    capsys.readouterr()
    print_summary(folder)
    forms = {"Markdown": text, "page": to_html(report)}
    assert "of the cohort" in capsys.readouterr().out
    assert report.claim.made
    assert report.claim.per == "site"
    assert "no record is protected from it" in report.claim.sentence
    assert "Everything that the sites sent" not in text
    (server,) = [actor for actor in report.actors if "server" in actor.who]
    assert server.trusted.startswith("every record (central model")
    assert [site.site for site in report.sites] == [COHORT]
    assert report.headline.sites == COHORT_SIZE
    assert report.unprotected[0] == f"the number of sites in the cohort ({COHORT_SIZE})"
    assert "trusted server" in (folder / "run.log").read_text(encoding="utf-8")
    assert report.meaning is not None
    assert report.meaning.bounds.several == []
    for name, form in forms.items():
        said = " ".join(form.split())
        assert "who sees all that the server gave away, knows every other site" in said, name
        for attack in report.meaning.bounds.attacks:
            rate = f"at {100 * attack.false_positives:g} % false alarms finds at most"
            assert f"{rate} {bound_text(attack.true_positives)} of members" in said, name
        assert f"finds more than {bound_text(report.meaning.bounds.advantage)} beyond that" in said, name
    for page in (text, (folder / "report.html").read_text(encoding="utf-8")):
        assert "which is noised already" not in page
        assert "worst site" not in page
        assert f"at most {COHORT_SIZE} sites" in page
        assert "that sites state" not in page
