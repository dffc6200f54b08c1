"""The style sheet that all pages share: light and dark by the reader's setting, no fonts or files from elsewhere."""

_LIGHT = """
color-scheme: light; --bg: #fff; --fg: #1c2128; --soft: #5b6570; --rule: #dfe3e8; --card: #f6f7f9; --heat: 222, 120, 20;
--s0: #2563a8; --s1: #c2571a; --s2: #3f7d20; --s3: #8a4fa3; --s4: #b3263b; --s5: #0e7c86; --s6: #7a6a00; --s7: #5b6570;
"""
_DARK = """
color-scheme: dark; --bg: #14171b; --fg: #e4e7eb; --soft: #9aa4af; --rule: #31373f; --card: #1c2126; --heat: 235, 135, 45;
--s0: #6fabeb; --s1: #eb9560; --s2: #8cc56a; --s3: #c79be0; --s4: #ef7d8c; --s5: #5cc4cd; --s6: #cdbb4a; --s7: #a9b2bc;
"""
# a page with a switch sets `data-theme` of its root to light or dark, which then counts for more than the reader's setting
_THEMES = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {_DARK} }} }}
:root[data-theme="dark"] {{ {_DARK} }}
"""

CSS = (
    _THEMES
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 64rem; background: var(--bg); color: var(--fg);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 2.8rem 0 0.4rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 0; }
p { margin: 0.3rem 0 0.8rem; max-width: 46rem; }
.note, .lead, figcaption { color: var(--soft); }
.note, figcaption { font-size: 0.88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 0.8rem;
  margin: 1.4rem 0 0; }
.card { background: var(--card); border-radius: 8px; padding: 0.85rem 1rem 0.9rem; }
.card .name { font-size: 0.82rem; font-weight: 600; color: var(--soft); }
.card .value { font-size: 1.65rem; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.card .value small { display: inline-block; font-size: 0.85rem; font-weight: 400; line-height: 1.2; color: var(--soft); }
.card .beside { font-size: 0.85rem; line-height: 1.4; color: var(--s1); margin: -0.1rem 0 0.2rem; }
.card .meaning { font-size: 0.82rem; line-height: 1.4; color: var(--soft); }
.warnings { border-left: 4px solid var(--s1); background: var(--card); border-radius: 0 8px 8px 0;
  padding: 0.6rem 1rem 0.5rem; margin: 1.2rem 0 0; }
.warnings p { margin: 0.15rem 0 0.25rem; max-width: none; }
.cards + .note { margin-top: 0.7rem; max-width: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 1.6rem; }
figure { margin: 0.6rem 0 0; max-width: 36rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg.hidden { position: absolute; width: 0; height: 0; }
svg text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .label { fill: var(--fg); font-size: 12px; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .line.s0 { stroke: var(--s0); } svg .line.s1 { stroke: var(--s1); }
svg .dot.s0 { fill: var(--s0); } svg .dot.s1 { fill: var(--s1); } svg .bar { fill: var(--s0); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.6rem 0 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: 0.32rem 1.4rem 0.32rem 0; border-bottom: 1px solid var(--rule); }
td.number, th.number { text-align: right; white-space: nowrap; }
code, pre, .text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.86em; white-space: pre; }
.lead code, .note code { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { font-size: 0.82rem; overflow-x: auto; background: var(--card); border-radius: 8px; padding: 1rem; }
.feature { border-top: 1px solid var(--rule); padding: 1rem 0 0.6rem; margin-top: 1rem; }
.feature p { margin: 0.1rem 0 0.5rem; max-width: none; }
.context { display: flex; gap: 0.9rem; padding: 0.22rem 0; align-items: baseline; }
.context .peak { flex: 0 0 3.6rem; text-align: right; font-size: 0.82rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.text { font-size: 0.8rem; line-height: 1.65; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.text span { border-radius: 3px; padding: 0.1em 0; background: rgba(var(--heat), var(--a)); }
.text span.top { outline: 1px solid rgba(var(--heat), 0.9); }
details { margin-top: 0.6rem; } summary { cursor: pointer; color: var(--soft); }
"""
).strip()
