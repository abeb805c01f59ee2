"""Updates that the server made shorter: counted by round and site, and told in every form of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun

from fedveil.common.messages.round import Task, TrainResult, TrainTask
from fedveil.common.messages.tensors import apply
from fedveil.common.run_lines import RoundLine, ShortenedLine, read_lines
from fedveil.common.strict_json import to_json
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.reports import report_of
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html
from fedveil.server.sites import Exchange

pytestmark = pytest.mark.rough_prices


class Longer(InProcessTransport):
    """Whose second site sends nine times the change that it found, in the second round alone."""

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        exchange = super().exchange(tasks, timeout)
        task, reply = tasks.get(1), exchange.replies.get(1)
        if isinstance(task, TrainTask) and task.round_number == 2 and isinstance(reply, TrainResult):
            held = {layer: {name: task.state[layer][name] for name in own} for layer, own in reply.contribution.items()}
            reply.contribution.update(apply(lambda sent, old: old + 9.0 * (sent - old), reply.contribution, held))
        return exchange


def test_a_round_counts_the_updates_that_it_made_shorter_and_by_how_much(toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "privacy.mode": "none", "rounds": 3, "recipe": "plain"}
    folder = run_in_process(settings, 3, kind=Longer)
    first, second, third = (line.shortened for line in read_lines(RoundLine, folder))
    assert [one.site for one in second] == ["site-1"]
    assert 0 < second[0].factor < 1
    assert first == third == []
    assert report_of(folder).shortened.startswith("The server shortened 1 unusually long update,")


def test_every_form_of_the_report_tells_them_and_says_nothing_where_there_are_none(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run").start().round(1, 0.7)
    assert "shortened" not in to_markdown(report_of(made.folder)) + to_html(report_of(made.folder))
    (line,) = read_lines(RoundLine, made.folder)
    for number, factors in ((2, {"site-1": 0.25, "site-10": 0.125}), (3, {"site-1": 0.5})):
        shorter = [to_json(ShortenedLine(site, factor)) for site, factor in factors.items()]
        made.append(RoundLine.NAME, {**to_json(line), "round": number, "shortened": shorter})
    data = report_of(made.folder)
    assert "3 unusually long updates, to 0.125 to 0.5 of the length: from site-1, site-10." in data.shortened
    for form in (to_markdown(data), to_html(data)):
        assert data.shortened in form
