"""A run that names its sites: no other one gets a task or can be drawn, and the report says who was named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from faulty_rounds import Faulty, faulty, plain
from site_runs import CLIP, SITE, World, update

from audits.tiny_site import clinic
from audits.whole_sites import MadeUp
from fedveil.client.policy_file import parse_policy
from fedveil.common.config.text import parse_settings
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Refusal
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.experiments.simulate import simulate
from fedveil.reports import markdown_report, write_reports
from fedveil.reports.signature import make_key, verified
from fedveil.server import named
from fedveil.server.collect import trusted
from fedveil.server.model import ServerModel
from fedveil.server.named import NamedTransport
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

NAMES = {0: "clinic", 1: "ward", 2: "lab", 3: "north"}


def sites(folder: Path) -> list[dict[str, Any]]:
    return [{**node, "site": NAMES[i]} for i, node in enumerate(simulated_nodes(3, folder / "own"))]


def asked_in(settings: dict[str, Any], folder: Path, run: str) -> tuple[Path, list[set[int]]]:
    """Run two rounds that name two of three sites; return the folder and the nodes that got a task."""
    kind, made = faulty()
    own = {**plain(settings), "named-sites": "ward, clinic", "project": "stroke"}
    return run_in_process(own, sites(folder), run, kind), [set(nodes) for _, nodes in made[0].asked]


def test_a_site_that_is_not_named_gets_no_task_and_the_report_and_its_signature_say_who_was_named(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, asked = asked_in(toy_settings, tmp_path, "named")
    assert asked == [{0, 1}] * 2
    assert [line.participants for line in read_lines(RoundLine, folder)] == [["clinic", "ward"]] * 2
    words = "for the project stroke, by the server's word. It named the sites that it was for: ward, clinic."
    assert words in markdown_report(folder)
    public = make_key(tmp_path / "key.pem")
    write_reports(folder, tmp_path / "key.pem")
    signed = verified(folder, public)
    assert (signed["project"], signed["named_sites"]) == ("stroke", ["ward", "clinic"])


def test_a_server_that_asks_all_sites_is_found_and_who_is_not_named_refuses(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: the run's names choose nobody."""
    monkeypatch.setattr("fedveil.server.collect.door.to_named", lambda _, transport: transport)
    folder, asked = asked_in(toy_settings, tmp_path, "all")
    assert asked != [{0, 1}] * 2, "the fault is not found"
    (failure,) = read_lines(RoundLine, folder)[0].failures
    assert (failure.site, failure.kind) == ("lab", "policy")
    assert failure.reason == "the run names the sites that it is for, and 'lab' is none of them"


def test_a_key_that_is_no_named_sites_any_more_gets_no_task(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """Between a look-up and its task, a site is shut out and its name is another key's."""
    reached: list[set[int]] = []

    class Replaced(Faulty):
        def registered(self) -> Mapping[int, str]:
            return {0: "clinic", (2 if self.looked else 1): "ward"}

        def exchange(self, tasks: Any, timeout: float) -> Any:
            reached.append(set(tasks))
            return super().exchange(tasks, timeout)

    own = {**plain(toy_settings), "named-sites": "ward,clinic", "round-retries": 0, "rounds": 1}
    nodes = [{**node, "site": "clinic" if not i else "ward"} for i, node in enumerate(sites(tmp_path))]
    line = read_lines(RoundLine, run_in_process(own, nodes, "replaced", Replaced))[0]
    assert reached == [{0}]
    assert (line.participants, line.failures[0].kind) == (["clinic"], "failed")


def test_who_is_named_is_read_again_while_a_run_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "FRESH_SECONDS", 0.0)
    names = {7: "clinic"}

    class Waiting(MadeUp):
        def nodes(self, wanted: int, besides: Any) -> list[int]:
            assert [node for node in (7, 8, 9) if node not in besides] == [7]
            names[8] = "ward"
            return [node for node in (7, 8, 9) if node not in besides]

    assert NamedTransport(["clinic", "ward"], Waiting(update, 0, names)).nodes(2, ()) == [7, 8]
    assert NamedTransport(["clinic", "ward"], MadeUp(update, 10, names)).nodes(2, {7}) == [8]


# --- a draw -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted: the draw is over all sites"])
def test_whole_sites_are_drawn_among_the_named(
    planted: bool, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"privacy.cohort": 3, "privacy.clip-norm": CLIP, "privacy.epsilon": 60.0, "privacy.site-rate": 0.5}
    own |= {"privacy.delta": 1e-3, "named-sites": "lab,clinic,ward"}
    job = configure({**toy_settings, **SITE, **own})
    drawn_from: list[tuple[int, float]] = []

    def draw(size: int, rate: float) -> Any:
        drawn_from.append((size, rate))
        return sample(size, 1.0)

    sample = trusted.private_poisson_sample
    monkeypatch.setattr(trusted, "private_poisson_sample", draw)
    if planted:
        monkeypatch.setattr(NamedTransport, "nodes", lambda self, wanted, _: self._transport.nodes(wanted, ()))
    model, transport = ServerModel(job), MadeUp(update, 4, NAMES)
    world = World(job, model, job.start(model.start), tmp_path)
    got = world.sites(transport).collect(1, world.state)
    if planted:
        assert not got.counts, "planted: four sites are connected, more than the cohort, and the fault is not found"
        return
    assert (drawn_from, transport.asked) == ([(3, 0.5)], [[0, 1, 2]])
    assert got.participants == ("the cohort",)


# --- names that are wrong ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"named-sites": "ward, ward"}, "named-sites must be names, each once"),
        ({"named-sites": "ward,"}, "named-sites must be names, each once"),
        ({"named-sites": "a ward"}, "named-sites must be names, each once"),
        ({"project": "stroke,flu"}, "project must be one name"),
        ({"named-sites": "ward", "min-sites": 2}, "min-sites is 2, and named-sites names 1 site: lower it"),
        (
            {"named-sites": "a,b,c", "privacy.mode": "secure-sum", "privacy.honest-sites": 3},
            "names 3 sites, and a sum with these min-sites, privacy.honest-sites, colluders and drop-outs begins",
        ),
        (
            {"named-sites": "a,b", **SITE, "privacy.cohort": 1},
            "named-sites names 2 sites, more than privacy.cohort, which is 1",
        ),
    ],
)
def test_settings_that_do_not_fit_the_names_are_one_line(
    values: dict[str, Any], words: str, toy_settings: dict[str, Any]
) -> None:
    sums = {"training.optimizer": "sgd", "training.local-steps": 1} if "privacy.mode" in values else {}
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        configure({**toy_settings, **sums, **values})
    assert "\n" not in str(caught.value)


def test_an_unknown_name_ends_the_run_before_anything_is_sent(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    own = {**plain(toy_settings), "named-sites": "clinic,wrad"}
    with pytest.raises(ConfigError, match=r"names 'wrad' \(did you mean 'ward'\?\), which is not registered"):
        run_in_process(own, sites(tmp_path), "typo")
    with pytest.raises(ConfigError, match="neither Flower's simulation nor a server without a folder"):
        simulate(own, 3, lambda _: None)


def test_a_run_that_goes_on_lacks_a_site_that_was_shut_out(
    toy_settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    job = configure({**plain(toy_settings), "named-sites": "clinic,ward", "resume": "1"})
    named.check_named(job, {0: "clinic"})
    assert "goes on without a site: named-sites names 'ward', which is not registered" in caplog.text


def test_a_list_is_as_good_as_commas() -> None:
    assert parse_settings(['named-sites=["clinic", "ward"]']) == {"named-sites": "clinic,ward"}


# --- the steward's say ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("project", "joins"), [("stroke", True), ("flu", False), ("", False)])
def test_a_site_takes_the_projects_that_its_policy_names(
    project: str, joins: bool, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    site = clinic({**toy_settings, "privacy.delta": 1e-3, "project": project}, tmp_path)
    site.rule(projects=["heart", "stroke"])
    reply = site.ask(site.task())
    assert isinstance(reply, Refusal) != joins
    if isinstance(reply, Refusal):
        assert (reply.kind, f"projects = heart,stroke; the run asks for project = {project!r}" in reply.reason) == (
            "policy",
            True,
        )
        assert not site.charges()
    site.rule()
    assert not isinstance(site.ask(site.task()), Refusal), "a policy without the key takes all projects"


def test_a_site_that_a_signed_task_does_not_name_refuses_before_its_policy_or_a_record_is_looked_at(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    site = clinic({**toy_settings, "named-sites": "ward"}, tmp_path)
    reply = site.ask(site.task())
    assert isinstance(reply, Refusal)
    assert (reply.kind, "'clinic' is none of them" in reply.reason) == ("policy", True)
    assert not site.charges()


def test_a_project_of_a_policy_is_one_name() -> None:
    with pytest.raises(ConfigError, match="projects must be one name"):
        parse_policy('projects = ["all of them"]', "here")
