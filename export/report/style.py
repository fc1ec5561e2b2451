"""The style sheet of every report: light and dark, wide and narrow, no outside fonts or files."""

from tinymim_export.report.markup import Html

STYLE = Html("""
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #1c1d20; --soft: #5d6068; --line: #e3e3df; --grid: #ecece8; --code: #efefec;
  --good: #167a47; --bad: #b3261e; --on: #fff;
  --c0: #2f6fdb; --c1: #d8602a; --c2: #1a8f63; --c3: #9155c8; --c4: #b0850f;
  --c5: #d0467f; --c6: #218ca0; --c7: #7a7f88;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1c1e21; --ink: #ecedef; --soft: #a0a4ac; --line: #2e3136; --grid: #2a2d31;
    --code: #25282c;
    --good: #5fce95; --bad: #ff8a80; --on: #101113;
    --c0: #6ba0f5; --c1: #f08c58; --c2: #4cc495; --c3: #b98ae6; --c4: #e0bd55;
    --c5: #ee7fab; --c6: #5fc6d8; --c7: #9aa0a9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 72px; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; margin: 0 0 8px; letter-spacing: -.02em; }
h2 { font-size: 1.25rem; margin: 0 0 4px; letter-spacing: -.01em; }
section { margin-top: 44px; }
.lead { color: var(--soft); max-width: 70ch; margin: 0 0 24px; }
.note { color: var(--soft); max-width: 78ch; margin: 0 0 16px; font-size: .94rem; }
.verdict { overflow-wrap: anywhere; border-left: 4px solid var(--good); padding: 1px 0 1px 12px; margin: 10px 0 0; }
.cards + .verdict, .verdict + .cards { margin-top: 18px; }
.verdict.bad { border-color: var(--bad); }
.verdict.remark { border-color: var(--c4); }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; }
.card, figure, .flow > div, .scroll {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
}
.card { padding: 14px 16px; }
.card small { color: var(--soft); display: block; font-size: .8rem; line-height: 1.35; }
.card b {
  display: block; font-size: 1.7rem; line-height: 1.25; letter-spacing: -.02em; font-weight: 650;
  font-variant-numeric: tabular-nums;
}
.card b span { font-size: .95rem; font-weight: 500; letter-spacing: 0; color: var(--soft); }
.card.good b { color: var(--good); }
.card.bad b { color: var(--bad); }

.flow { display: flex; flex-wrap: wrap; gap: 10px 26px; }
.flow > div { position: relative; flex: 1 1 130px; padding: 12px 14px; font-size: .84rem; color: var(--soft); }
.flow span { display: block; }
.flow strong { display: block; color: var(--ink); font-size: .95rem; }
.flow > div:not(:last-child)::after {
  content: "\\2192"; position: absolute; right: -21px; top: 50%; transform: translateY(-50%); font-size: 1.05rem;
}

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.charts + .charts, pre + .charts { margin-top: 14px; }
figure { margin: 0; padding: 14px 16px 8px; container-type: inline-size; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); fill: none; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .28; }
svg.scatter { min-width: 740px; }
svg.scatter text { font-size: 12.5px; }
svg.cells { min-width: 500px; }
@container (max-width: 480px) { svg.curves text { font-size: 14px; } }
@container (max-width: 400px) {
  svg.curves text { font-size: 17px; }
  svg.curves text.unit { transform: translateY(5px); }
}
svg .front { stroke: var(--soft); stroke-width: 1.4; stroke-dasharray: 5 4; fill: none; }
svg .whisker { stroke-width: 1.3; fill: none; opacity: .75; }
svg .ring { stroke: var(--ink); stroke-width: 1.8; fill: none; }
svg .leader { stroke: var(--soft); stroke-width: .8; fill: none; }
svg text.name { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg text.marked { font-weight: 650; }
.wide { overflow-x: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .84rem; color: var(--soft); margin: 2px 0 6px; }
.keys i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.keys b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.bar { display: flex; gap: 2px; height: 34px; border-radius: 8px; overflow: hidden; margin: 4px 0 10px; }
.bar div {
  color: var(--on); font-size: .8rem; font-weight: 600; min-width: 2px;
  display: flex; align-items: center; justify-content: center;
}

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .8rem; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
ul.note { overflow-wrap: anywhere; padding-left: 20px; }
td code { font-size: .78rem; white-space: normal; overflow-wrap: anywhere; }
.ok { color: var(--good); }
.fail { color: var(--bad); }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }
.meter {
  display: inline-block; width: 110px; height: 8px; margin-right: 10px; border-radius: 4px; background: var(--grid);
  vertical-align: middle; overflow: hidden;
}
.meter + span { display: inline-block; min-width: 4.4em; }
.meter div { height: 100%; background: var(--c0); border-radius: 4px; }
td small { display: block; color: var(--soft); font-size: .76rem; line-height: 1.35; }
.missing { color: var(--soft); font-style: italic; }
.card:has(b) small:last-child { overflow-wrap: anywhere; }
.scroll + .note, .scroll + .scroll, .flow + .flow, section > figure + figure { margin-top: 14px; }
table.files td { vertical-align: top; }
table.files td small { white-space: normal; }
table.why td { white-space: normal; text-align: left; vertical-align: top; }
table.why ul { margin: 0; padding-left: 18px; }
table.provenance td { white-space: normal; text-align: left; vertical-align: top; font-size: .84rem; min-width: 130px; }
table.provenance th, table.why th { text-align: left; }
table.heat th { white-space: normal; vertical-align: bottom; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center; }
.bars { font-size: .86rem; margin: 8px 0; font-variant-numeric: tabular-nums; }
.bars div { position: relative; height: 14px; background: var(--grid); border-radius: 4px; overflow: hidden; }
.bars i { position: absolute; top: 0; bottom: 0; border-radius: 3px; }
.bars b { font-weight: 500; color: var(--soft); white-space: nowrap; }
h3 { font-size: 1rem; margin: 22px 0 6px; }
.quad { display: grid; grid-template-columns: repeat(4, 1fr); gap: 6px; margin-bottom: 16px; }
.quad img { display: block; width: 100%; border-radius: 7px; }
.quad img.mask { image-rendering: pixelated; }
.quad span { font-size: .8rem; color: var(--soft); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.two > div { min-width: 0; }

.course { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(45%, 160px), 1fr)); gap: 8px; }
.course { margin-bottom: 16px; }
.course img { width: 100%; display: block; }
.overlays { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 14px; }
.overlays img { display: block; width: 100%; border-radius: 7px; }
.overlays span { display: block; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.photos { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px 28px; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; }
.trio span { font-size: .8rem; color: var(--soft); white-space: nowrap; }
.trio img { display: block; width: 100%; border-radius: 7px; }
.trio img.mask { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .84rem; margin-top: 12px; }

pre {
  background: var(--code); border-radius: 10px; padding: 12px 14px; margin: 6px 0 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace;
}
summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  main { padding: 24px 14px 48px; }
  .flow { gap: 18px; }
  .flow > div { flex-basis: 100%; }
  .flow span { display: inline; }
  .flow span:not(:last-child)::after { content: ", "; }
  .flow > div:not(:last-child)::after {
    content: "\\2193"; right: 50%; top: auto; bottom: -21px; transform: translateX(50%);
  }
  th, td { padding: 7px 9px; }
  .meter { width: 56px; }
  .trio { gap: 4px; }
  .quad { grid-template-columns: repeat(2, 1fr); }
  .bars { grid-template-columns: max-content 1fr; }
  .bars b { grid-column: 1 / -1; white-space: normal; margin-top: -4px; }
}
""")
