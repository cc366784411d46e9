"""The style sheet of report.html: one file, no font or script from elsewhere, light and dark by the reader's setting."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1b1d22; --soft: #5d636e; --faint: #8d939e; --line: #e5e5e0; --wash: #f3f3ef;
  --good: #17794c; --bad: #b3362b; --m0: #8b919c; --m1: #2f6fd0; --m2: #0f9488; --m3: #dd5f27; --m4: #8a4bc4; --m5: #c2356f;
  --m6: #8f7a12; --m7: #4f5d73;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1a1d22; --ink: #e8e9ec; --soft: #a5abb6; --faint: #767d89; --line: #2d3138; --wash: #20242a;
    --good: #55c08a; --bad: #f08377; --m0: #99a0ac; --m1: #6ea3f5; --m2: #45c4b5; --m3: #ff9361; --m4: #bd8bf0; --m5: #f0709f;
    --m6: #d3bb4a; --m7: #93a3bd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-font-smoothing: antialiased;
}
main { max-width: 1180px; margin: 0 auto; padding: 0 28px 96px; }
header { padding: 64px 0 20px; }
.over { margin: 0; color: var(--faint); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; }
h1, h2 { font-weight: 660; }
h1 { font-size: 40px; line-height: 1.14; letter-spacing: -.025em; margin: 10px 0 14px; max-width: 22ch; }
h2 { font-size: 25px; letter-spacing: -.018em; margin: 76px 0 6px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 2px; }
p, li { max-width: 76ch; }
.lead { font-size: 18px; color: var(--soft); margin: 0; }
.note { color: var(--soft); margin: 0 0 20px; font-size: 15px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 26px 0 0; font-size: 14px; }
nav a { color: var(--soft); text-decoration: none; border-bottom: 1px solid var(--line); }
nav a:hover { color: var(--ink); border-color: var(--ink); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .88em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 13px; font-weight: 500; color: var(--soft); vertical-align: bottom; }
th, td { padding: 10px 14px 10px 0; border-bottom: 1px solid var(--line); }
.model { white-space: nowrap; font-weight: 600; }
.model::before, .chip::before {
  content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px; background: var(--c); margin-right: 9px;
}
.big td { padding-top: 13px; padding-bottom: 13px; }
.value { font-size: 20px; font-weight: 600; letter-spacing: -.01em; }
.ends { color: var(--faint); font-size: 12.5px; margin: 0 6px; white-space: nowrap; }
.track { display: block; width: 120px; height: 5px; margin-top: 5px; background: var(--wash); border-radius: 3px; }
.track rect { fill: var(--c); }
.track .range { opacity: .35; }
.small { font-size: 13.5px; }
.small td, .small th { padding: 6px 14px 6px 0; white-space: nowrap; }
.wrap td { white-space: normal; vertical-align: top; }
.findings {
  padding: 0; list-style: none; display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr));
}
.findings li {
  max-width: none; padding: 18px 22px; background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--c);
  border-radius: 10px; font-variant-numeric: tabular-nums;
}
.findings p { margin: 12px 0 4px; font-size: 12.5px; font-weight: 600; letter-spacing: .04em; text-transform: uppercase; }
.findings div {
  display: grid; grid-template-columns: 1fr 74px 132px; align-items: baseline; font-size: 15px; line-height: 1.75;
}
.findings div b { text-align: right; } .findings small { color: var(--faint); text-align: right; font-size: 13px; }
.better { color: var(--good); } .worse { color: var(--bad); } .open { color: var(--faint); }
.notes { padding: 0 0 0 18px; margin: 16px 0 24px; color: var(--soft); font-size: 15px; }
.notes li { max-width: 110ch; margin: 4px 0; } .notes .warning { color: var(--bad); }
.grid { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 14px; }
.grid.narrow figure { padding: 14px 12px 10px; }
figure {
  display: flex; flex-direction: column; margin: 0; padding: 18px 18px 14px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
}
figcaption { color: var(--soft); font-size: 13px; line-height: 1.45; margin-bottom: 6px; }
figure svg { margin-top: auto; }
figcaption i { display: inline-block; width: 16px; border-top: 2.4px solid var(--c); vertical-align: 4px; margin-right: 3px; }
figcaption i.dash { border-top-style: dashed; }
svg { display: block; width: 100%; height: auto; font-family: inherit; overflow: visible; }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--faint); font-size: 11px; }
svg .name { fill: var(--ink); font-size: 12.5px; }
svg .value { fill: var(--ink); font-size: 12.5px; font-weight: 500; letter-spacing: 0; }
svg .group { fill: var(--faint); font-size: 11.5px; paint-order: stroke; stroke: var(--card); stroke-width: 5px; }
svg .grid { stroke: var(--line); } svg .zero { stroke: var(--faint); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .band { opacity: .13; } svg .dot { opacity: .45; }
svg .fit { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 5 4; }
svg .whisker { stroke: var(--c); stroke-width: 2.2; stroke-linecap: round; }
svg .mean { fill: var(--c); stroke: var(--c); stroke-width: 2; }
svg .unclear .mean { fill: var(--card); } svg .unclear .value { fill: var(--faint); font-weight: 400; }
.prompt { margin: 26px 0 0; padding: 20px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.prompt > p { margin: 0 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }
.prompt .id { color: var(--faint); font-size: 13px; margin: 0 0 6px; }
.answers { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(180px, 1fr); gap: 18px; overflow-x: auto; }
.answers h4 { margin: 0 0 6px; font-size: 14px; }
.answers pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
.answers .drawn { color: var(--soft); border-top: 1px dashed var(--line); margin-top: 10px; padding-top: 10px; }
.answers small { color: var(--faint); }
.right, .wrong { float: right; font-weight: 600; font-size: 13px; } .right { color: var(--good); } .wrong { color: var(--bad); }
details { margin-top: 28px; border-top: 1px solid var(--line); padding-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
details pre { columns: 3 260px; column-gap: 32px; line-height: 1.5; color: var(--soft); }
footer { margin-top: 72px; color: var(--faint); font-size: 13px; }
@media (max-width: 620px) {
  .findings { grid-template-columns: 1fr; } .findings div { grid-template-columns: 1fr auto; }
  .findings small { grid-column: 1 / -1; text-align: left; }
  main { padding: 0 16px 64px; } h1 { font-size: 32px; } .grid, .grid.wide { grid-template-columns: 1fr; }
}
@media print { nav { display: none; } figure, .prompt, .findings li { break-inside: avoid; } }
"""
