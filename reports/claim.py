"""The privacy claim of a run in words: for whom, against whom, how it is counted, and what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedveil.common.config.flat import Scalar
from fedveil.common.data.sources import unprotected_test
from fedveil.common.derived import Source, together
from fedveil.common.starts.public_text import words_of
from fedveil.common.tasks import scored_of
from fedveil.common.words import EACH, counted, names_text, natural
from fedveil.privacy import mechanism_of, promise_of, trusting_the_server
from fedveil.privacy.claim import Claim as Promise
from fedveil.privacy.figures import epsilon_text
from fedveil.reports.folder import RunFiles
from fedveil.reports.sharing import Sharing, at_h, others_of, rests_on, sharing_of
from fedveil.reports.sites import SiteReport, federation_delta, worst_site
from fedveil.reports.trials import at_least, trials_sentence
from fedveil.reports.unseen import unseen_charges

COVERED = (
    "every adapter and head tensor that a site sent in a round that counted, and everything computed from them: "
    "the final model, its accuracy, the choice of a round",
    "every release other than training that this report lists",
    "all rounds together, and earlier runs on the same records that are in the site's ledger",
)
COVERED_ALONE = (*COVERED[:-1], "all rounds of this run together")
OTHER_RUNS = "other runs on the same records: ε is of this run alone, whose ledgers began empty with it"
"""Of a simulation that keeps its ledgers to itself."""
ENDED = "stopping early because of results: then the ε of the planned end holds, not that of the rounds that ran"
"""The ε of fewer rounds is known only once their results are, and theorems on composition are of a plan."""
NOT_COVERED = (
    "settings that were chosen by looking at earlier runs on the same records",
    ENDED,
    "side channels, such as how long a site takes",
    "the base model, which may have been trained on the same records before",
    "rounds that a site paid for but whose reply was lost: the site's own ledger counts them",
)
COVERED_BY_SERVER = (
    "every model that the server gave away after a round, and everything computed from it: the final model, its "
    "accuracy, the choice of a round",
    "this run's folder: its lines, its report and its checkpoint hold nothing of one site. Excepted is what has the "
    "times of rounds (log.jsonl, ledgers/, the dates of files), which the server keeps to itself",
    "all rounds together, and earlier runs that are in the server's ledger",
)
"""The same where the server is trusted with every update."""
BY_SERVER = (
    "settings that were chosen by looking at earlier runs of the same sites",
    ENDED,
    "side channels, such as what the sites' network shows",
    "the base model, which may have been trained on the same records before",
    "what a site has released elsewhere, such as in runs of another server or under another ledger of this one",
)
UNTOLD = (
    "No site has a line here. Who was drawn and who answered is kept secret, and so are a round's time and bytes, from "
    "which that could be inferred; the bytes shown are those of the usual draw. Where privacy.site-rate is below 1, ε "
    "holds only while it stays secret who was drawn."
)
"""What a report leaves out where a trusted server draws whole sites, and why."""
OFF = (
    "Privacy was OFF. This run promises nothing about any record: what the sites sent, and the final model, "
    "may reveal their records."
)
EXPOSED_RUN = (
    "ε is ∞: records of a site were released without privacy before, so nothing is promised about them, whatever noise "
    "this run added. The table of sites shows what each site has spent."
)
"""Without names, which the page would not escape here: the gaps name the sites."""
NOTHING_YET = "Privacy is on. No site has reported a release yet, so there is no figure."
REGISTERED = "{} is not part of FedVeil: none of FedVeil's tests says whether the claim holds with it"
SEEDED = "noise and samples came from a test's random numbers, so this run protects no record"
UNKNOWN = (
    "This FedVeil does not know the run's privacy.mode {!r}, or not with privacy.unit {!r}. It can say nothing about "
    "any record."
)


@dataclass(frozen=True)
class Claim:
    """The claim in words. Without one (``made`` false) only ``sentence`` and ``head`` are filled."""

    made: bool
    off: bool
    """Whether the run promises nothing at all, so that no release will make a claim of it."""
    privacy_mode: str
    sentence: str
    per: str
    """The unit in one word."""
    unit: str
    neighbours: str
    adversary: str
    sampler: str
    accountant: str
    head: str
    covered: list[str]
    not_covered: list[str]
    gaps: list[str]
    """Why the claim is weaker than it reads; empty without objections."""
    public_text: str
    """Which public text the adapter's start was made from; empty: from none."""

    @property
    def trusts_server(self) -> bool:
        """Whether the server is trusted, which then sees what sites send as it is."""
        return bool(trusting_the_server([self.privacy_mode]))


def claim_of(files: RunFiles, sites: Sequence[SiteReport]) -> Claim:
    """Return what the run may claim, from its files alone."""
    mode = str(files.config.settings.get("privacy.mode", "none"))
    heads = sorted({*(line.head for line in files.privacy), *(line.head for line in files.rounds)})
    head = "; ".join(heads) or "not recorded yet"
    worst, delta = worst_site(sites), federation_delta(sites)
    unpaid = sorted({line.site for line in files.privacy if line.spent is None}, key=natural)
    text = _public_text(files.config.settings)
    claim = promise_of(files.config.settings)
    if claim is None:
        unknown = UNKNOWN.format(mode, files.config.settings.get("privacy.unit", "record"))
        sentence = OFF if mechanism_of(files.config.settings) else unknown
        return Claim(False, True, mode, sentence, *6 * ("",), head, [], [], [], text)
    gaps = _gaps(files, sites, unpaid)
    if worst is None or delta is None:
        return Claim(False, False, mode, NOTHING_YET, *6 * ("",), head, [], [], gaps, text)
    central = files.trusts_server
    fresh = not central and _has_fresh_ledgers(files)
    scored = scored_of(files.config.settings)
    return Claim(
        made=True,
        off=False,
        privacy_mode=mode,
        sentence=_sentence(files, sites, claim, worst.epsilon_worst, delta),
        per=claim.per,
        unit=f"{claim.unit}: {scored.record}" if scored.record else claim.unit,
        neighbours=claim.adjacency,
        adversary=claim.adversary,
        sampler=claim.sampler,
        accountant=", ".join(sorted({site.accountant for site in sites if site.epsilon_worst is not None})),
        head=head,
        covered=[
            *([scored.stays] if scored.stays else []),
            *(COVERED_BY_SERVER if central else COVERED_ALONE if fresh else COVERED),
        ],
        not_covered=[*claim.leaves_out, *[OTHER_RUNS] * fresh, *(BY_SERVER if central else NOT_COVERED)],
        gaps=gaps,
        public_text=text,
    )


def _has_fresh_ledgers(files: RunFiles) -> bool:
    """Return whether the ledgers of the run's sites are its own, so that no other run is in them."""
    return bool(files.server and all(start.fresh_ledgers for start in files.server.starts))


def _sentence(files: RunFiles, sites: Sequence[SiteReport], claim: Promise, epsilon: float | None, delta: float) -> str:
    """Return the claim, and what it is together with other trials and with the runs that the run begins with."""
    sentence = EXPOSED_RUN
    if not any(site.agreement == "exposed" for site in sites):
        sentence = _promise(claim, epsilon, delta, central=files.trusts_server)
        sentence += _shared(sharing_of(files, sites), sites)
    if tuning := at_least(files.tuning, epsilon):
        sentence += f" {trials_sentence(tuning, claim.per)}"
        epsilon, delta = tuning.epsilon, tuning.delta
    return f"{sentence} {_began_at(files.earlier, claim, epsilon, delta)}".rstrip()


def _promise(claim: Promise, epsilon: float | None, delta: float, *, central: bool) -> str:
    """Return what is private at this ε and δ."""
    at = f"is (ε, δ) = ({epsilon_text(epsilon)}, {delta:g}) differentially private for {claim.unit}"
    if central:
        return (
            f"What a trusted server gave away {at}: {claim.across} Nothing is promised against the server, which "
            "saw every update without noise: no record is protected from it."
        )
    return f"Everything that the sites sent {at}. Both are the maximum over sites: {claim.across}"


def _began_at(earlier: Sequence[Source], claim: Promise, epsilon: float | None, delta: float) -> str:
    """Return what one has that was also in the earlier runs whose releases a run of this ε and δ begins with."""
    if not earlier:
        return ""
    own = replace(earlier[0], epsilon=epsilon, delta=delta, unit=claim.unit)
    total, at = together([own, *earlier])
    runs = f"{counted(len(earlier), 'earlier run')} ({', '.join(source.run for source in earlier)})"
    text = (
        f"The run begins with what {runs} released. A {claim.per} that was in {'all of them' if earlier[1:] else 'it'}"
    )
    if total is None or at is None:
        return f"{text} too has no ε for all: one of the runs promises nothing, or their units differ."
    each = " + ".join(epsilon_text(source.epsilon) for source in (own, *earlier))
    return f"{text} too has at most (ε, δ) = ({epsilon_text(total)}, {at:g}), of {each}."


def none_refused(*, central: bool) -> str:
    """Return the text in place of an empty list of refusals; a trusted server (``central``) records none."""
    return "Kept secret: see the cohort." if central else "None."


def _shared(sharing: Sharing | None, sites: Sequence[SiteReport]) -> str:
    """Return the honest sites that a claim counts on, and the other claims; empty where sites share no noise."""
    if sharing is None:
        return ""
    own = sharing.honest_sites == 1
    text = f" That holds {rests_on(sharing)}" + own * ": each site adds all of the noise that its records need"
    if any(site.agreement == "larger" for site in sites):
        text += ". Earlier runs in a site's ledger hold under their own conditions"
    if others := others_of(sharing):
        text += f". The sums of this run that counted cost, at the same δ, {'; '.join(others)}"
    return f"{text}. A site's ledger also counts attempts that failed."


def _public_text(settings: Mapping[str, Scalar]) -> str:
    if "start.text" not in settings:
        return ""
    return words_of(str(settings["start.text"]), str(settings.get("start.text-sha256", "")))


def _by_note(wrong: Sequence[SiteReport], sites: int) -> list[str]:
    """Return why the claim is weak at these sites, grouped by reason if the federation is large."""
    if sites <= EACH:
        return [f"{site.site}: {site.note}" for site in wrong]
    notes = dict.fromkeys(site.note for site in wrong)
    return [f"{names_text([site.site for site in wrong if site.note == note])}: {note}" for note in notes]


def _gaps(files: RunFiles, sites: Sequence[SiteReport], unpaid: list[str]) -> list[str]:
    settings = files.config.settings
    sharing = sharing_of(files, sites)
    name, test = (str(settings.get(f"data.{key}", "")) for key in ("name", "test"))
    cut_test = unprotected_test(name, test, int(settings.get("data.test-size", 0)))
    gaps = [cut_test] if cut_test and "data.name" in settings else []
    if files.server and not all(start.system_entropy for start in files.server.starts):
        gaps.append(SEEDED)
    if files.server and (rows := sorted({row for start in files.server.starts for row in start.registered})):
        gaps.append(REGISTERED.format(", ".join(rows)))
    gaps += _by_note([site for site in sites if site.agreement in ("smaller", "unknown", "exposed")], len(sites))
    gaps += [
        f"{site.site}: ε {epsilon_text(site.epsilon_total)}{at_h(sharing)} is above its budget of "
        f"{site.epsilon_budget:g}: it shares records with other names in its ledger, and the largest of their figures "
        "counts"
        for site in sites
        if site.epsilon_total is not None
        and site.epsilon_budget is not None
        and site.epsilon_budget < site.epsilon_total < math.inf
    ]
    if unpaid:
        gaps.append(f"no claim for {names_text(unpaid)}: an update came without a charge")
    accounted = {(line.round_number, line.site) for line in files.privacy}
    for line in files.rounds:
        missing = [site for site in line.participants if (line.round_number, site) not in accounted]
        if missing:
            names = names_text(sorted(missing, key=natural))
            gaps.append(f"round {line.round_number}: no line in privacy.jsonl for {names}; ε is too low")
    gaps += unseen_charges(files)
    if files.result is None or files.result.status == "failed":
        gaps.append("the run failed or is not finished: sites may have charged a round that is not in these files")
    return gaps
