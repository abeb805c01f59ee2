"""The page's style: light and dark, print, phone width.

Kept in a module because a Flower bundle carries no ``.css`` file.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1c2126; --soft: #59636e; --rule: #dfe2e5; --hair: #eceef0;
  --accent: #0b5a8f; --alarm: #a61b1b; --alarm-paper: #fdf1f0; --care: #7a4b00; --care-paper: #fdf6e7;
  --good: #00805f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --card: #1a1f25; --ink: #e7eaed; --soft: #a0abb6; --rule: #343c45; --hair: #262d34;
    --accent: #6cb8ee; --alarm: #ff9d95; --alarm-paper: #331b1c; --care: #f0c36a; --care-paper: #2f2818;
    --good: #35c8a0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 "Source Sans 3", "Segoe UI", "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1, h2, h3 { font-family: "Iowan Old Style", "Source Serif 4", Charter, Georgia, "Noto Serif", serif;
  line-height: 1.2; }
h1 { font-size: 2.1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 .9rem; padding-top: .9rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .5rem; }
p, ul, dl { margin: 0 0 .9rem; max-width: 46rem; }
p, li { overflow-wrap: anywhere; }
li { margin: .15rem 0; }
.meta { color: var(--soft); margin-bottom: 1.6rem; max-width: none; overflow-wrap: anywhere; }
.lead { font-size: 1.05rem; }
nav { margin: 0 0 1.5rem; font-size: .92rem; }
nav p { margin: 0 0 .3rem; max-width: none; display: flex; flex-wrap: wrap; gap: 0 .9em; }
nav a { white-space: nowrap; }
a { color: var(--accent); }
.status {
  display: inline-block; padding: 0 .55em; border: 1px solid currentColor; border-radius: 1em; font-size: .85em;
  font-weight: 600; color: var(--accent); margin-right: .35em;
}
.status.failed { color: var(--alarm); }
.status.stopped, .status.unfinished { color: var(--care); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1px; max-width: none;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; margin: 0 0 1.5rem; }
.figures div { background: var(--card); padding: .9rem 1.1rem 1rem; }
.figures dt { color: var(--soft); font-size: .86rem; }
.figures dd { margin: 0; }
.figures .big {
  font-size: 1.5rem; line-height: 1.3; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
.figures .note { color: var(--soft); font-size: .86rem; }
.alarm, .care { padding: .8rem 1.1rem; border-left: 4px solid; border-radius: 4px; margin: 0 0 1rem; max-width: none; }
.alarm { background: var(--alarm-paper); border-color: var(--alarm); }
.alarm strong { color: var(--alarm); }
.care { background: var(--care-paper); border-color: var(--care); }
.care strong { color: var(--care); }
figure { margin: 0 0 1rem; min-width: 0; }
figcaption { font-size: .9rem; margin-bottom: .4rem; color: var(--soft); }
.claim { font-size: 1.12rem; max-width: 46rem; }
dl.words { display: grid; grid-template-columns: 17rem 1fr; gap: .3rem 1rem; }
dl.words dt { color: var(--soft); }
dl.words dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; border: 1px solid var(--rule); border-radius: 6px;
  background: linear-gradient(90deg, var(--card) 1rem, transparent 2.4rem) local,
    linear-gradient(270deg, var(--card) 1rem, transparent 2.4rem) local right,
    linear-gradient(90deg, var(--rule) 0, transparent .7rem), linear-gradient(270deg, var(--rule) 0, transparent .7rem),
    var(--card); }
.hint { display: none; color: var(--soft); font-size: .88rem; margin: 0 0 .3rem; }
details { margin: 0 0 1.2rem; }
summary { color: var(--accent); margin: 0 0 .6rem; cursor: pointer; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .8rem; color: var(--soft); font-size: .88rem; }
caption span { position: sticky; left: .8rem; display: inline-block; max-width: min(46rem, calc(100vw - 4rem)); }
th, td { padding: .42rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--hair); }
thead th { border-top: 0; border-bottom: 1px solid var(--rule); color: var(--soft); font-weight: 600; font-size: .84rem;
  vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--card); }
tbody th[scope=row]:not(.n), td.name { min-width: 8.5rem; max-width: 14rem; overflow-wrap: anywhere; }
th.n, td.n { text-align: right; white-space: nowrap; }
td.wide { min-width: 11rem; overflow-wrap: anywhere; }
.matrix th, .matrix td { padding: .42rem .5rem; }
.ok { color: var(--good); font-weight: 600; } .bad { color: var(--alarm); font-weight: 600; }
code { font-size: .88em; overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .88rem; }
@media (max-width: 40rem) {
  main { padding: 1.4rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  h2 { margin-top: 2.2rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures div { padding: .7rem .8rem; }
  .figures .big { font-size: 1.3rem; }
  dl.words { grid-template-columns: 1fr; gap: 0; }
  dl.words dd { margin-bottom: .6rem; }
  th, td { padding: .38rem .5rem; }
  th.n, td.n { white-space: normal; }
  .wraps tbody th[scope=row]:not(.n), .wraps td.name { min-width: 5.6rem; }
  .wraps tbody th, .wraps td { overflow-wrap: anywhere; }
  .matrix tbody th[scope=row]:not(.n) { min-width: 0; max-width: 7rem; }
  .hint { display: block; }
  .cards, .cards caption, .cards tbody, .cards tr, .cards th { display: block; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards tr { padding: .5rem .8rem .6rem; border-top: 1px solid var(--hair); }
  .cards tbody th[scope=row], .cards td { position: static; padding: 0; border: 0; text-align: left; min-width: 0;
    max-width: none; }
  .cards td { display: inline-block; margin-right: 1rem; }
  .cards td.wide { display: block; margin-right: 0; }
  .cards td:empty { display: none; }
  .cards td::before, .cards tbody th.n::before { content: attr(data-name) " "; color: var(--soft); font-weight: 400; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb; --hair: #ddd; --accent: #004a7c;
    --alarm: #8b0000; --alarm-paper: #fff; --care: #5c3900; --care-paper: #f6f1e4; --good: #00805f; }
  @page { margin: 16mm 14mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3, figcaption, caption { break-after: avoid; }
  h2 { margin-top: 1.6rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; border: 0; }
  table, thead th, caption { font-size: 7.5pt; }
  caption span { max-width: none; }
  th, td { padding: .2rem .3rem; }
  thead th.n { white-space: normal; }
  tbody th[scope=row] { position: static; }
  tbody th[scope=row]:not(.n), td.name { min-width: 4.5rem; max-width: none; }
  td.wide { min-width: 0; max-width: none; }
  main > .scroll { break-inside: avoid; }
  h2 + p { break-after: avoid; }
  figure, .figures, tr, .alarm, .care { break-inside: avoid; }
  thead { display: table-header-group; }
}
"""
