"""The page's template (Jinja2). It places figures and never computes one.

Kept in a module because a Flower bundle carries no template file.
"""

from __future__ import annotations

PAGE = """\
{% macro table(label) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ label }}"><table>
<caption><span>{{ label }}</span></caption>
{{ caller() }}
</table></div>
{% endmacro %}
{% macro figure(chart, title, text) %}
{% if chart %}
<figure aria-labelledby="{{ chart.name }}-caption">
<figcaption id="{{ chart.name }}-caption"><strong>{{ title }}</strong> {{ text }}</figcaption>
{{ chart.svg }}
{% if chart.legend %}
<ul class="legend">{% for swatch, label in chart.legend %}<li>{{ swatch }}{{ label }}</li>{% endfor %}</ul>
{% endif %}
</figure>
{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Privacy report: {{ data.method }}, run {{ data.run }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>Privacy report</h1>
<p class="meta"><span class="status {{ data.status }}">{{ data.status }}</span>
{{ data.method }} · run {{ data.run }}{% if data.started %} · started {{ data.started|moment }}{% endif %}
{% if data.reason %}<br>{{ data.reason }}{% endif %}
{% if data.status == "unfinished" %}<br>The run goes on, or was killed: its folder holds no result yet.{% endif %}</p>

<p class="lead">{{ made }}</p>

{% if claim.off %}
<p class="alarm"><strong>{{ claim.sentence }}</strong></p>
{% endif %}
{% for text in data.alarms %}
<p class="alarm"><strong>AUDIT FAILED:</strong> {{ text }}</p>
{% endfor %}
{% for text in data.problems + claim.gaps %}
<p class="care"><strong>Take care:</strong> {{ text }}</p>
{% endfor %}

<dl class="figures">
<div><dt>Privacy spent, ε</dt>
{% if head.epsilon is not none %}
<dd class="big">{{ head.epsilon|epsilon }} <small>of {{ head.epsilon_budget|number }}</small></dd>
{% set basis = "by the server's ledger" if central else "worst site: " ~ head.worst_site %}
<dd class="note">at δ = {{ "%g"|format(head.delta) }}, {{ basis }}{% if rests %}, {{ rests }}{% endif %}</dd>
{% for other in others %}
<dd class="note">{{ sums }}, {{ other }}</dd>
{% endfor %}
{% if data.tuning %}
<dd class="note">{{ data.tuning|trials }}</dd>
{% endif %}
{% if bound_note %}<dd class="note">{{ bound_note }}</dd>{% endif %}
{% elif claim.off %}
<dd class="big">no claim</dd><dd class="note">privacy was OFF</dd>
{% else %}
<dd class="big">–</dd><dd class="note">no site has reported a release yet</dd>
{% endif %}
</div>
<div><dt>Accuracy on public test data</dt>
<dd class="big"><span>{{ head.accuracy_before|percent }}</span>
<span><small>→</small> {{ head.accuracy_after|percent }}</span></dd>
<dd class="note">before and after training
{%- if data.accuracy and data.accuracy[0].after %}; after it with its 95 % interval
{{ data.accuracy[0].after|share }}{% endif %}</dd></div>
<div><dt>Rounds</dt>
<dd class="big">{{ head.rounds_done }} <small>of {{ head.rounds_planned }}</small></dd>
<dd class="note">{% if central %}a cohort of at most {{ head.sites }} site{{ 's' if head.sites != 1 }}
{%- else %}{{ head.sites }} site{{ 's' if head.sites != 1 }} took part
{%- if head.rounds_done %}, {{ head.last_sites }} in the last round{% endif %};
{{ head.seconds|seconds }}{% endif %}</dd></div>
<div><dt>Traffic, adapter payload</dt>
<dd class="big">{{ head.bytes_down|bytes }} <small>down</small></dd>
<dd class="note">{{ head.bytes_up|bytes }} up,
{{ "of the usual draw" if central else "all sites and rounds" }}</dd></div>
</dl>

<nav aria-label="Contents">
<p><strong>Privacy:</strong> <a href="#promise">what is promised</a>
{% if data.meaning or data.unbounded %}<a href="#meaning">what ε means</a>{% endif %}
<a href="#trust">who is trusted with what</a> <a href="#audit">audit</a>
<a href="#sites">{{ "the cohort" if central else "sites" }}</a> <a href="#refusals">refusals and failures</a>
<a href="#releases">other releases</a> <a href="#server">server and connections</a></p>
<p><strong>The model:</strong>
{% if data.accuracy %}<a href="#accuracy">accuracy</a>{% endif %}
{% if data.beside %}<a href="#beside">beside other runs</a>{% endif %}
{% if epsilon_chart or accuracy_chart %}<a href="#course">course of the run</a>{% endif %}
<a href="#rounds">rounds</a></p>
<p><strong>To check it:</strong> <a href="#settings">settings</a> <a href="#versions">versions</a>
{% if data.origin %}<a href="#origin">what the adapter is made of</a>{% endif %}</p>
</nav>

<h2 id="promise">What is promised</h2>
<p class="claim">{% if claim.off %}Nothing. {% endif %}{{ claim.sentence }}</p>
<dl class="words">
{% if claim.made %}
<dt>who is protected (unit)</dt><dd>{{ claim.unit }}</dd>
<dt>what may differ (neighbours)</dt><dd>{{ claim.neighbours }}</dd>
<dt>from whom (adversary)</dt><dd>{{ claim.adversary }}</dd>
<dt>how records are drawn (sampler)</dt><dd>{{ claim.sampler }}</dd>
<dt>how ε is counted (accountant)</dt><dd>{{ claim.accountant }}</dd>
{% endif %}
<dt>the last layer (head)</dt><dd>{{ claim.head }}</dd>
{% if claim.public_text %}<dt>public text of the start</dt><dd>{{ claim.public_text }}</dd>{% endif %}
</dl>
{% if claim.made %}
<div class="pair">
<section><h3>Covered</h3><ul>{% for text in claim.covered %}<li>{{ text }}</li>{% endfor %}</ul></section>
<section><h3>Not covered</h3><ul>{% for text in claim.not_covered %}<li>{{ text }}</li>{% endfor %}</ul></section>
</div>
{% endif %}

{% if data.unbounded %}
<h2 id="meaning">What ε means</h2>
<p>{{ data.unbounded }}</p>
{% elif data.meaning %}
{% set meaning = data.meaning %}
<h2 id="meaning">What ε means</h2>
<p>{{ whose_meaning }}</p>
<p>{{ meaning|attacks }}</p>
{% if meaning|several %}
<p>{{ meaning|several }}</p>
{% endif %}
{% if meaning.caution %}
<p class="care">{{ meaning.caution }}</p>
{% endif %}
<div class="pair">
{% call table("Bounds on every attack that asks whether one " ~ meaning.per ~ " was trained on") %}
<thead><tr><th scope="col" class="n">false positives</th>
<th scope="col" class="n">true positives, at most{{ at }}</th>
{% if meaning.alone %}<th scope="col" class="n">the same, alone</th>{% endif %}</tr></thead>
<tbody>{% for attack in meaning.bounds.attacks %}
<tr><th scope="row" class="n">{{ "%g"|format(100 * attack.false_positives) }} %</th>
<td class="n">{{ attack.true_positives|bound }}</td>
{% if meaning.alone %}<td class="n">{{ meaning.alone.attacks[loop.index0].true_positives|bound }}</td>
{% endif %}</tr>
{% endfor %}</tbody>
{% endcall %}
{% if meaning.bounds.several %}
{% call table("ε of a person at δ = " ~ "%g"|format(meaning.delta) ~ at) %}
<thead><tr><th scope="col" class="n">{{ meaning.counted }} of the person</th>
<th scope="col" class="n">ε</th></tr></thead>
<tbody><tr><th scope="row" class="n">1</th><td class="n">{{ meaning.epsilon|epsilon }}</td></tr>
{% for several in meaning.bounds.several %}
<tr><th scope="row" class="n">{{ several.units }}</th><td class="n">{{ several.epsilon|epsilon }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}
</div>
{% endif %}

<h2 id="trust">Who is trusted with what</h2>
{% call table("Each party of the run, in the words of NIST SP 800-226") %}
<thead><tr><th scope="col">who</th><th scope="col">sees</th><th scope="col">is trusted</th></tr></thead>
<tbody>{% for actor in data.actors %}
<tr><th scope="row" class="wide">{{ actor.who }}</th><td class="wide">{{ actor.sees }}</td>
<td class="wide">{{ actor.trusted }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
<p>No noise protects:</p>
<ul>{% for text in data.unprotected %}<li>{{ text }}</li>{% endfor %}</ul>

<h2 id="audit">Audit</h2>
{% if data.audit_results %}
{% call table("Attacks on the code, and faults built in to see whether an attack would find them") %}
<thead><tr><th scope="col">audit</th><th scope="col">outcome</th><th scope="col">the code as it is</th>
<th scope="col">faults built in</th><th scope="col">with</th>
<th scope="col">when</th><th scope="col">file</th></tr></thead>
<tbody>{% for result in data.audit_results %}
{% set outcome, checks, faults, versions = result|audit %}
<tr><th scope="row">{{ result.audit }}</th><td class="{{ "ok" if result.passed else "bad" }}">{{ outcome }}</td>
<td>{{ checks }}</td><td>{{ faults }}</td><td>{{ versions }}</td>
<td>{{ result.date }}</td><td>{{ result.file }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% else %}
<p>{{ none_run }}</p>
{% endif %}
{% if bounds %}
<ul>{% for text in bounds %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if data.audits %}
<p>{{ whose }}</p>
<ul>{% for name, digest in data.audits.items() %}<li>{{ name }}<br>
<code>SHA-256 {{ digest }}</code></li>{% endfor %}</ul>
{% endif %}

<h2 id="sites">{{ "The cohort" if central else "Sites" }}</h2>
{% if central %}
<p>{{ untold }}</p>
{% endif %}
{% if data.sites %}
{% if central %}
{% call table("What the server charged for all sites together; the noise multiplier σ is noise over clip") %}
<thead><tr><th scope="col">whose</th><th scope="col" class="n">sites</th>
<th scope="col" class="n">rounds charged</th><th scope="col" class="n">σ</th>
<th scope="col" class="n">chance to be drawn</th><th scope="col" class="n">clip</th></tr></thead>
<tbody>{% for site in data.sites %}
<tr><th scope="row">{{ site.site }}</th><td class="n">{{ site.public_size|number }}</td>
<td class="n">{{ site.rounds_joined }}</td><td class="n">{{ site.events|figures("noise_multiplier")|numbers }}</td>
<td class="n">{{ site.events|figures("sample_rate")|numbers }}</td>
<td class="n">{{ site.events|figures("clip_norm")|numbers }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% else %}
{% call table("What each site did in this run; the noise multiplier σ is noise over clip, q is the sample rate") %}
<thead><tr><th scope="col">site</th><th scope="col" class="n">public size</th>
<th scope="col" class="n">rounds joined</th><th scope="col" class="n">refused</th>
<th scope="col" class="n">steps</th><th scope="col" class="n">σ</th><th scope="col" class="n">q</th>
<th scope="col" class="n">clip</th></tr></thead>
<tbody>{% for row in site_rows %}
<tr><th scope="row">{{ row.names }}</th><td class="n">{{ row.sizes }}</td>
<td class="n">{{ row.joined }}</td><td class="n">{{ row.refused }}</td>
<td class="n">{{ row.steps }}</td><td class="n">{{ row.noises }}</td>
<td class="n">{{ row.rates }}</td><td class="n">{{ row.clips }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}
{% call table("What " ~ ("the cohort has spent, by the server's ledger" if central else
"each site has spent, by its own ledger") ~ ", and this run's releases computed again here") %}
<thead><tr><th scope="col">{{ "whose" if central else "site" }}</th>
<th scope="col" class="n">ε spent{{ at }}</th><th scope="col" class="n">at δ</th>
<th scope="col" class="n">ε budget</th><th scope="col" class="n">ε left{{ at }}</th>
<th scope="col" class="n">again, PLD{{ at }}</th><th scope="col" class="n">cross-check, RDP{{ at }}</th>
{% if data.sharing and data.sharing.on_others %}<th scope="col" class="n">ε alone, this run</th>{% endif %}
<th scope="col">agreement</th></tr></thead>
<tbody>{% for row in site_rows %}
<tr><th scope="row">{{ row.names }}</th><td class="n">{{ row.spent }}</td><td class="n">{{ row.deltas }}</td>
<td class="n">{{ row.budgets }}</td><td class="n">{{ row.left }}</td>
<td class="n">{{ row.again }}</td><td class="n">{{ row.rdp }}</td>
{% if data.sharing and data.sharing.on_others %}<td class="n">{{ row.alone }}</td>{% endif %}
<td class="{{ "ok" if row.agreement == "agrees" else "wide bad" if row.agreement in ("smaller", "unknown") else "wide"
}}">{{ row.note }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% if claim.made %}
<p class="soft">The figure that counts is the ledger's total, by PLD (privacy loss distributions). RDP (Rényi
differential privacy) is an upper bound of its own and nearly always the larger one. Both are computed here from σ, q
and the {{ "rounds that the server wrote down" if central else "steps that each site reported" }}, without {{
"the" if central else "its" }} ledger.</p>
{% endif %}
{% else %}
<p>{{ "No round was charged yet." if central else "No site has answered yet." }}</p>
{% endif %}

<h2 id="refusals">Refusals and failures</h2>
{% if data.refusals %}
{% call table("Sites that did not take part in a round, and why") %}
<thead><tr><th scope="col" class="n">round</th><th scope="col" class="n">attempt</th><th scope="col">site</th>
<th scope="col">kind</th><th scope="col">reason</th></tr></thead>
<tbody>{% for names, refusal in refusal_rows %}
<tr><th scope="row" class="n">{{ refusal.round_number }}</th><td class="n">{{ refusal.attempt }}</td>
<td class="name">{{ names }}</td><td>{{ refusal.kind }}</td>
<td class="wide">{{ refusal.reason }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% else %}
<p>{{ none_refused }}</p>
{% endif %}

{% if data.shortened %}
<p>{{ data.shortened }}</p>
{% endif %}

<h2 id="releases">Releases other than training</h2>
{% if data.other_releases %}
{% call table("Each was paid for from the same budget") %}
<thead><tr><th scope="col" class="n">round</th><th scope="col">site</th><th scope="col">kind</th>
<th scope="col" class="n">releases</th><th scope="col" class="n">σ</th><th scope="col" class="n">q</th>
<th scope="col" class="n">clip</th><th scope="col" class="n">ε added</th>
<th scope="col" class="n">value</th></tr></thead>
<tbody>{% for row in release_rows %}
<tr><th scope="row" class="n">{{ row.round_number }}</th><td class="name">{{ row.names }}</td>
<td>{{ row.purpose }}</td><td class="n">{{ row.count }}</td><td class="n">{{ row.noises }}</td>
<td class="n">{{ row.rates }}</td><td class="n">{{ row.clips }}</td><td class="n">{{ row.added }}</td>
<td class="n">{{ row.value }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% else %}
<p>None.</p>
{% endif %}

<h2 id="server">The server and its connections</h2>
{% for report in data.connections %}
<p>When the server began ({{ report.began|join(", ") }}):</p>
<ul>{% for text in report.said %}<li>{{ text }}</li>{% endfor %}
{% for text in report.unknown %}<li>{{ not_known }} {{ text }}.</li>{% endfor %}
<li>Bundle, the server's code:<br><code>SHA-256 {{ report.bundle }}</code></li></ul>
{% if report.checks %}
{% call table("The server's own check, begun " ~ report.began|join(", ")) %}
<thead><tr><th scope="col">outcome</th><th scope="col">of</th><th scope="col">found</th></tr></thead>
<tbody>{% for check in report.checks %}
<tr><td class="{{ "ok" if check.ok else "bad" }}">{{ "ok" if check.ok else "FAILED" }}</td>
<th scope="row">{{ check.what }}</th><td class="wide">{{ check.found }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}
{% endfor %}
<p>{{ sites_own if data.connections else not_recorded }}</p>

{% if data.accuracy %}
<h2 id="accuracy">Accuracy on public data</h2>
{% call table("Of all records and by label, with Wilson's 95 % interval in percent") %}
<thead><tr><th scope="col">label</th><th scope="col" class="n">records</th><th scope="col" class="n">before</th>
<th scope="col" class="n">after</th></tr></thead>
<tbody>{% for row in data.accuracy %}
<tr><th scope="row">{{ row.label }}</th><td class="n">{{ row.records|number }}</td>
<td class="n">{{ row.before|share }}</td><td class="n">{{ row.after|share }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% if data.slices %}
{% call table("By " ~ slice ~ ", as the public test file has it") %}
<thead><tr><th scope="col">{{ slice }}</th><th scope="col" class="n">records</th><th scope="col" class="n">before</th>
<th scope="col" class="n">after</th></tr></thead>
<tbody>{% for row in data.slices %}
<tr><th scope="row">{{ row.label }}</th><td class="n">{{ row.records|number }}</td>
<td class="n">{{ row.before|share }}</td><td class="n">{{ row.after|share }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}
{% endif %}

{% if data.beside %}
<h2 id="beside">Beside other runs</h2>
<p>{{ beside }}</p>
{% call table("Accuracy on public data of other runs on the same base model and data") %}
<thead><tr><th scope="col">variant</th><th scope="col">arm</th><th scope="col" class="n">ε</th>
<th scope="col" class="n">runs</th><th scope="col" class="n">before</th>
<th scope="col" class="n">after</th></tr></thead>
<tbody>{% for row in data.beside %}
{% set variant, arm, epsilon, runs, before, after = row|beside %}
<tr><th scope="row">{{ variant }}</th><td>{{ arm }}</td><td class="n">{{ epsilon }}</td><td class="n">{{ runs }}</td>
<td class="n">{{ before }}</td><td class="n">{{ after }}</td></tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}

{% if epsilon_chart or accuracy_chart %}
<h2 id="course">Course of the run</h2>
<div class="pair">
{{ figure(epsilon_chart, "Privacy spent over rounds.",
"ε by " ~ ("the server's ledger" if central else "the sites' own ledgers")
~ at ~ "; the dashed line is the budget." ~ courses.text) }}
{% if head.epsilon is not none and head.epsilon|epsilon != "∞" %}
{{ figure(accuracy_chart, "Accuracy against privacy.", "One point a round" ~ at ~ "; right is dearer, up is better.") }}
{% else %}
{{ figure(accuracy_chart, "Accuracy over rounds.", "On public test data; round 0 is before round 1.") }}
{% endif %}
</div>
{% if courses.shown %}
{% call table("ε spent after each round" ~ at ~ "; sites that have spent alike share a column." ~ courses.text) %}
<thead><tr><th scope="col" class="n">round</th>
{% for name, spent in courses.shown %}<th scope="col" class="n course">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for number, values in courses.rows() %}
<tr><th scope="row" class="n">{{ number }}</th>
{% for value in values %}<td class="n">{{ value|epsilon("–") }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}
{% endif %}

<h2 id="rounds">Rounds</h2>
{% if data.rounds %}
{% call table("Scores on public test data; bytes are adapter payload of all messages of the round") %}
<thead><tr><th scope="col" class="n">round</th><th scope="col" class="n">accuracy</th>
<th scope="col" class="n">loss</th>
<th scope="col" class="n">{{ "ε" if central else "ε, worst site" ~ at }}</th><th scope="col">participants</th>
<th scope="col" class="n">bytes down</th><th scope="col" class="n">bytes up</th>
{% if not central %}<th scope="col" class="n">time</th>{% endif %}</tr></thead>
<tbody>{% for round in data.rounds %}
<tr><th scope="row" class="n">{{ round.round_number }}</th><td class="n">{{ round.accuracy|percent }}</td>
<td class="n">{{ round.loss|decimal(4) }}</td>
<td class="n">{{ round.epsilon_worst|epsilon("no claim" if round.round_number or not claim.made else "–") }}</td>
<td class="wide">{% if round.counted %}{{ round.participants|took_part(data.sites) }}
{%- else %}<span class="bad">did not count</span>{% endif %}</td><td class="n">{{ round.bytes_down|number }}</td>
<td class="n">{{ round.bytes_up|number }}</td>
{% if not central %}<td class="n">{{ round.seconds|seconds }}</td>{% endif %}</tr>
{% endfor %}</tbody>
{% endcall %}
{% else %}
<p>No round has finished yet.</p>
{% endif %}

<h2 id="settings">Settings</h2>
<div class="settings">
{% call table("Every setting; those that differ from the default are marked") %}
<thead><tr><th scope="col">setting</th><th scope="col">value</th><th scope="col">default</th></tr></thead>
<tbody>{% for setting in data.settings %}
<tr{% if setting.changed %} class="changed"{% endif %}><th scope="row">{{ setting.key }}</th>
<td>{{ setting.value|value }}</td>
<td>{% if setting.changed %}{{ setting.default|value }} <span class="tag">changed</span>{% endif %}</td></tr>
{% endfor %}</tbody>
{% endcall %}
</div>

<h2 id="versions">Versions</h2>
{% call table("What computed this run") %}
<thead><tr><th scope="col">package</th><th scope="col">version</th></tr></thead>
<tbody>{% for name, number in data.versions.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ number }}</td></tr>
{% endfor %}</tbody>
{% endcall %}

{% if data.origin %}
<h2 id="origin">What the adapter is made of</h2>
{% call table("SHA-256 of the base model, of the server's code and of each file of the adapter") %}
<thead><tr><th scope="col">what</th><th scope="col">SHA-256</th></tr></thead>
<tbody><tr><th scope="row">{{ data.origin.base_model }}</th><td><code>{{ data.origin.base }}</code></td></tr>
{% if data.origin.bundle %}
<tr><th scope="row">the server's code</th><td><code>{{ data.origin.bundle }}</code></td></tr>
{% endif %}
{% for name, digest in data.origin.files.items() %}
<tr><th scope="row">{{ name }}</th><td><code>{{ digest }}</code></td></tr>
{% endfor %}</tbody>
{% endcall %}
{% endif %}
<footer>Made by FedVeil from the files in the run's folder alone. The same content as data: <code>report.json</code>
({{ data.schema }}); if <code>report.signed.json</code> lies beside it, <code>fedveil verify RUN_FOLDER --key
PUBLIC.pem</code> says who vouches for it.</footer>
</main>
</body>
</html>
"""
