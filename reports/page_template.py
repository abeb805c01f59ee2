"""The page's template (Jinja2). It places blocks and never computes a figure.

Kept in a module because a Flower bundle carries no template file.
"""

from __future__ import annotations

PAGE = """\
{% macro text(block) %}
<p{% if block.style %} class="{{ block.style }}"{% endif %}>
{%- if block.label %}<strong>{{ block.label }}</strong> {% endif %}{{ block.text }}</p>
{% endmacro %}
{% macro items(block) %}
{% if block.title %}<p>{{ block.title }}</p>{% endif %}
<ul>{% for row in block.rows %}<li>{{ row }}</li>{% endfor %}</ul>
{% endmacro %}
{% macro terms(block) %}
<dl class="words">
{% for name, words in block.rows %}
<dt>{{ name }}</dt><dd>{{ words }}</dd>
{% endfor %}
</dl>
{% endmacro %}
{% macro table(block) %}
{% if block.folded %}<details><summary>{{ block.folded }}</summary>{% endif %}
{% if block.matrix %}<p class="hint">Scroll the table sideways to see every column.</p>{% endif %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ block.caption }}">
<table role="table" class="{{ block.layout }}">
<caption><span>{{ block.caption }}</span></caption>
<thead role="rowgroup"><tr role="row">{% for column in block.columns %}<th scope="col" role="columnheader"
{%- if loop.index0 in block.figures %} class="n"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody role="rowgroup">{% for row in block.rows %}
<tr role="row"><th scope="row" role="rowheader" class="{{ block.style_of(0) }}" data-name="{{ block.columns[0] }}">
{{- row[0] }}</th>
{%- for cell in row[1:] %}<td role="cell" class="{{ block.style_of(loop.index) }} {{ cell|mark }}" data-name="
{{- block.columns[loop.index] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% if block.folded %}</details>{% endif %}
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
{% if progress %}<p class="care" role="status">{{ progress }}</p>
{% endif %}
<p class="meta"><span class="status {{ data.status }}">{{ data.status }}</span>
{{ data.method }} · run {{ data.run }}{% if data.started %} · started {{ data.started|moment }}{% endif %}
{% if data.reason %}<br>{{ data.reason }}{% endif %}
{% if data.status == "unfinished" %}
<br>The run is still going, or was killed: its folder holds no result yet.{% endif %}</p>
<p class="lead">{{ made }}</p>
{% for alarm in alarms %}{{ text(alarm) }}{% endfor %}
<dl class="figures">
{% for box in boxes %}
<div><dt>{{ box.label }}</dt><dd class="big">{{ box.figure }}</dd>
{% for note in box.notes %}<dd class="note">{{ note }}</dd>
{% endfor %}</div>
{% endfor %}
</dl>
{% for block in promise %}{{ text(block) }}{% endfor %}
<nav aria-label="Contents">
{% for group, names in groups.items() %}
<p><strong>{{ group }}:</strong>{% for anchor, title in names %} <a href="#{{ anchor }}">{{ title }}</a>{% endfor %}</p>
{% endfor %}
</nav>
{% for section in sections %}
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% for block in section.blocks %}
{% if block.kind == "text" %}{{ text(block) }}{% elif block.kind == "items" %}{{ items(block) }}
{% elif block.kind == "terms" %}{{ terms(block) }}{% else %}{{ table(block) }}{% endif %}
{% endfor %}
{% endfor %}
<footer>Made by FedVeil from the files in the run's folder alone. The same content as data: <code>report.json</code>
({{ data.schema }}); if <code>report.signed.json</code> lies beside it, <code>fedveil verify RUN_FOLDER --key
PUBLIC.pem</code> says who vouches for it.</footer>
</main>
</body>
</html>
"""
