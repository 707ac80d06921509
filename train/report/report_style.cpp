#include "train/report/report_style.h"

namespace rwkv {

const std::string_view kReportStyle = R"(
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --text: #1c1d1f; --quiet: #63676d; --line: #e3e4e6; --grid: #ecedef;
  --k0: #0067a5; --k1: #c84e00; --k2: #00805a; --k3: #a8428a; --k4: #8f6a00; --k5: #2f94c9;
  --k6: #44474c; --k7: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131416; --card: #1b1d20; --text: #e6e7e9; --quiet: #9aa0a8; --line: #303338; --grid: #292c30;
  --k0: #6cb8f0; --k1: #ff9a52; --k2: #3fcb9b; --k3: #e79ccb; --k4: #e3c14f; --k5: #a5defb;
  --k6: #d3d6da; --k7: #ff8a80; } }
.c0 { --c: var(--k0); } .c1 { --c: var(--k1); } .c2 { --c: var(--k2); } .c3 { --c: var(--k3); }
.c4 { --c: var(--k4); } .c5 { --c: var(--k5); } .c6 { --c: var(--k6); } .c7 { --c: var(--k7); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 12px; }
p { margin: 0 0 8px; }
.quiet { color: var(--quiet); }
.note { border-left: 3px solid var(--k1); padding: 2px 0 2px 10px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr));
  margin: 20px 0 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
.tiles div { padding: 10px 14px; box-shadow: 1px 1px 0 var(--line); }
.tiles dt { color: var(--quiet); font-size: 13px; }
.tiles dd { margin: 0; font-size: 19px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 16px; }
.chart { margin: 0; padding: 14px 18px 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; min-width: 0; }
.chart.wide { grid-column: 1 / -1; }
figcaption { min-height: 24px; margin-bottom: 10px; }
.unit { color: var(--quiet); font-size: 13px; margin-right: 12px; }
.key { display: inline-block; font-size: 13px; margin-right: 14px; overflow-wrap: anywhere; }
.key::before { content: ""; display: inline-block; width: 16px; margin-right: 6px;
  border-top: 2.5px solid var(--c); vertical-align: middle; }
.key.broken::before { border-top-style: dashed; }
.key.faint::before { opacity: .4; }
.key.dots::before { border-top: 0; width: 8px; height: 8px; border-radius: 4px; background: var(--c); }
.plot { position: relative; height: 190px; margin: 0 8px 40px 50px; touch-action: pan-y; }
.chart.wide .plot { height: 320px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; stroke: var(--c); vector-effect: non-scaling-stroke; }
.plot path.grid { stroke: var(--grid); stroke-width: 1; }
.plot path.line { stroke-width: 1.8; stroke-linejoin: round; }
.plot path.line.broken { stroke-dasharray: 7 3; }
.plot path.faint { stroke-width: 1; opacity: .38; stroke-linejoin: round; }
.plot path.dots { stroke-width: 1; stroke-dasharray: 2 3; }
.plot path.dot { stroke-width: 7; stroke-linecap: round; }
.plot path.mark { stroke-width: 1.2; stroke-dasharray: 4 4; opacity: .8; }
.plot .y, .plot .x { position: absolute; font-size: 12px; line-height: 15px; color: var(--quiet);
  white-space: nowrap; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 6px); transform: translateX(-50%); text-align: center; }
.plot .x.start { transform: none; text-align: left; }
.plot .x i { display: block; font-style: normal; opacity: .75; }
.plot .axis { position: absolute; top: calc(100% + 6px); right: calc(100% + 8px); font-size: 12px;
  line-height: 15px; color: var(--quiet); text-align: right; }
.plot .axis i { display: block; font-style: normal; opacity: .75; }
.ruler { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--quiet);
  pointer-events: none; }
.tip { position: absolute; top: 0; z-index: 1; padding: 6px 10px; font-size: 13px; line-height: 1.4;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  width: max-content; max-width: calc(100vw - 24px); white-space: pre-wrap; overflow-wrap: anywhere;
  box-shadow: 0 2px 10px rgb(0 0 0 / .18); pointer-events: none; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; white-space: nowrap; }
thead th { color: var(--quiet); font-size: 13px; font-weight: 500; }
td.n, th.n { text-align: right; white-space: nowrap; }
.facts th { width: 1%; font-weight: 400; color: var(--quiet); }
.facts td { overflow-wrap: anywhere; }
.facts .section th { color: var(--text); font-weight: 600; padding-top: 12px; }
code, pre, .facts td { font: 13px/1.55 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
pre { margin: 8px 0 0; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
pre b { color: var(--k0); font-weight: 600; }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 2px 0; }
footer { margin-top: 40px; font-size: 13px; color: var(--quiet); }
@media (max-width: 600px) {
  main { padding: 18px 12px 40px; }
  .chart { padding: 12px 10px 8px; }
  .plot .odd { display: none; }
  .chart.wide .plot { height: 240px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles dd { font-size: 16px; overflow-wrap: anywhere; }
  .facts th, .facts td { display: block; width: auto; padding: 2px 14px; }
  .facts td { border-top: 0; padding-bottom: 6px; }
}
)";

const std::string_view kReportScript = R"(
for (const figure of document.querySelectorAll('.chart')) {
  const plot = figure.querySelector('.plot'), d = plot.dataset;
  const x0 = +d.x0, x1 = +d.x1, y0 = +d.y0, y1 = +d.y1;
  const value = v => (f => +d.log ? y0 * (y1 / y0) ** f : y0 + (y1 - y0) * f)(1 - v / 1e4);
  const whole = v => v.toLocaleString('en', { maximumFractionDigits: 0 });
  const text = v => Math.abs(v) < 1e4 ? +v.toPrecision(4) + '' : whole(v);
  const step = place => Math.round(x0 + (x1 - x0) * place / 1e4);
  let curves;
  const read = () => [...plot.querySelectorAll('path[data-name]')].map(path => {
    const n = (path.getAttribute('d').match(/-?[\d.]+/g) || []).map(Number);
    return { name: path.dataset.name, x: n.filter((_, i) => i % 2 == 0), y: n.filter((_, i) => i % 2) };
  }).filter(curve => curve.x.length);
  const ruler = document.createElement('div'), tip = document.createElement('div');
  ruler.className = 'ruler';
  tip.className = 'tip';
  const show = event => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * 1e4;
    curves = curves || read();
    const nearer = (a, b) => Math.abs(b - at) < Math.abs(a - at);
    const near = curves.map(c => c.x.reduce((b, x, i) => nearer(c.x[b], x) ? i : b, 0));
    const places = curves.map((c, i) => c.x[near[i]]);
    const place = places.reduce((b, x) => nearer(b, x) ? x : b);
    const lines = [d.x + ' ' + whole(step(place))];
    if (d.second) lines[0] += ' (' + whole(step(place) * d.ratio) + ' ' + d.second + ')';
    curves.forEach((c, i) => {
      const elsewhere = step(places[i]) != step(place);
      lines.push(c.name + '  ' + text(value(c.y[near[i]])) +
                 (elsewhere ? '  at ' + d.x + ' ' + whole(step(places[i])) : ''));
    });
    tip.textContent = lines.join('\n');
    ruler.style.left = place / 100 + '%';
    plot.append(ruler, tip);
    // On the side with more room, and within the page.
    const x = box.left + box.width * place / 1e4, width = tip.offsetWidth;
    const most = document.documentElement.clientWidth - 8 - width;
    tip.style.left = Math.max(8, Math.min(most, place < 5000 ? x + 10 : x - 10 - width)) - box.left + 'px';
  };
  const hide = () => { ruler.remove(); tip.remove(); };
  // On all of the figure, so that the ends of the curves can be reached.
  figure.addEventListener('pointermove', show);
  figure.addEventListener('pointerdown', show);
  // A finger leaves with each tap: what it showed stays until a tap elsewhere.
  figure.addEventListener('pointerleave', event => { if (event.pointerType != 'touch') hide(); });
  document.addEventListener('pointerdown', event => { if (!figure.contains(event.target)) hide(); });
}
)";

}  // namespace rwkv
