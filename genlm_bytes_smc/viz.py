"""A run of `smc` as one HTML page that needs nothing else.

Charts and ancestry are SVG drawn here; a few lines of JavaScript let the reader go through the
steps of a recorded run.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.result import SMCResult

_MOST_TEXTS = 50  # rows of the posterior table
_MOST_LETTERED = 64  # particles up to which the ancestry shows the bytes they read


def run_page(
    result: SMCResult, about: Mapping[str, Any] | None = None, title: str = "SMC run"
) -> str:
    """The page, as HTML text.

    Args:
        result: of a run; with `record=True`, the page shows the particles of each step.
        about: what the run was asked for (prompt, model, constraint, ess_threshold), if known.
        title: of the page.

    Raises:
        ValueError: steps of another number of particles than the result has, as in a run that
            died inside a roll-out of several candidates.
    """
    about, n = about or {}, result.size
    for info in result.history:
        arrays = [a for a in (info.symbols, info.log_weights, info.ancestors) if a is not None]
        if any(len(a) != n for a in arrays):
            raise ValueError(
                f"step {info.step} notes {' and '.join(str(len(a)) for a in arrays)} particles, "
                f"and the result has {n}: only steps of all its particles can be drawn"
            )
    shown = html.escape(_shown_text(title))
    recorded = all(i.symbols is not None and i.log_weights is not None for i in result.history)
    parts = [
        f"<h1>{shown}</h1>",
        _asked(about),
        _facts(result),
        "<h2>Posterior</h2>",
        _posterior(result),
    ]
    if result.history:
        steps = [i.step + 1 for i in result.history]
        marks = [s for s, i in zip(steps, result.history, strict=True) if i.ancestors is not None]
        limit = about.get("ess_threshold")
        line = limit * result.size if isinstance(limit, int | float) else None
        ess = _chart(steps, result.ess_path.tolist(), marks, line, 0.0)
        log_ml = _chart(steps, result.log_ml_path.tolist(), marks, None, None)
        parts += [
            '<div class="two"><section><h2>Effective sample size</h2>',
            f"{ess}</section><section><h2>Log marginal likelihood</h2>{log_ml}</section></div>",
            '<p class="note">By step. Dots: the particles were resampled after it.'
            + (" Dashes: the threshold." if line is not None else "")
            + "</p>",
        ]
        if recorded:
            parts.append(_STEPS)
        parts += ["<h2>Ancestry</h2>", _ancestry(result, recorded)]
    body = "\n".join(parts)
    script = f"<script>const run={_data(result)};{_SCRIPT}</script>" if recorded else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{shown}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main>{script}</body></html>\n"
    )


def _asked(about: Mapping[str, Any]) -> str:
    names = [n for n in ("prompt", "constraint", "model", "resampling") if about.get(n)]
    rows = "".join(
        f"<dt>{n}</dt><dd><code>{html.escape(_shown_text(str(about[n])))}</code></dd>"
        for n in names
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _facts(result: SMCResult) -> str:
    error = result.log_ml_error
    dead = int(result.state.particles.dead.sum())
    tiles = [
        (
            "log marginal likelihood",
            f"{result.log_ml:.3f}",
            "" if error != error else f"{error:.3f}",
        ),
        ("effective sample size", f"{result.ess:.1f}", ""),
        ("particles", f"{result.size}" + (f", {dead} dead" if dead else ""), ""),
        ("steps", f"{len(result.history)}, {len(result.ancestry)} resampled", ""),
        ("language model rows", f"{result.rows:,}", ""),
        ("seconds", f"{result.seconds:.2f}", ""),
    ]
    inner = "".join(
        f"<div><b>{value}{f' <small>± {e}</small>' if e else ''}</b><span>{name}</span></div>"
        for name, value, e in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _posterior(result: SMCResult) -> str:
    found: dict[tuple[bytes, bool], list[float]] = {}
    samples = zip(result.texts, result.ended.tolist(), result.normalized_weights, strict=True)
    for text, ended, p in samples:
        if p > 0:
            found.setdefault((text, ended), []).append(float(p))
    if not found:
        return "<p>All particles are dead: no text has weight.</p>"
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    rows = "".join(
        f'<tr><td class="n">{sum(ps):.4f}</td><td class="bar"><i style="width:'
        f'{100 * sum(ps):.2f}%"></i></td><td class="n">{len(ps)}</td>'
        f"<td><code>{html.escape(_shown(text))}</code>"
        f"{'' if ended else ' <small>unfinished</small>'}</td></tr>"
        for (text, ended), ps in ordered[:_MOST_TEXTS]
    )
    left = len(ordered) - _MOST_TEXTS
    more = f'<p class="note">and {left} more</p>' if left > 0 else ""
    return (
        '<div class="wide"><table><tr><th class="n">probability</th><th></th>'
        f'<th class="n">particles</th><th>text</th></tr>{rows}</table></div>{more}'
    )


def _chart(
    xs: Sequence[int],
    ys: Sequence[float],
    marks: Sequence[int],
    line: float | None,
    bottom: float | None,
) -> str:
    """A line over steps as SVG."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not points:
        return "<p>nothing to draw</p>"
    width, height, left, top, right, base = 460, 220, 48, 10, 450, 190
    values = [y for _, y in points] + ([] if line is None else [line])
    low = min(values) if bottom is None else bottom
    high = max(values)
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    first, last = xs[0], max(xs[-1], xs[0] + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - first) / (last - first),
            base - (base - top) * (y - low) / (high - low),
        )

    out = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">']
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = at(first, value)
        out.append(
            f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for x in sorted({round(first + (last - first) * i / 4) for i in range(5)}):
        out.append(f'<text x="{at(x, low)[0]:.1f}" y="208" text-anchor="middle">{x}</text>')
    if line is not None:
        out.append(f'<path class="limit" d="M{left} {at(first, line)[1]:.1f}H{right}"/>')
    path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in points)
    out.append(f'<path class="line" d="M{path}"/>')
    known = dict(points)
    for x in marks:
        if x in known:
            cx, cy = at(x, known[x])
            out.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>')
    return "".join([*out, "</svg>"])


def _ancestry(result: SMCResult, recorded: bool) -> str:
    """Lines from ancestors to descendants, and the bytes on them if there is room."""
    n, history = result.size, result.history
    lettered = recorded and n <= _MOST_LETTERED
    dx, dy = (14, 17) if lettered else (6, max(2, min(10, 900 // n)))
    kept = np.zeros((len(history) + 1, n), dtype=bool)  # has a descendant of weight in the end
    kept[-1] = result.normalized_weights > 0
    for t in range(len(history) - 1, -1, -1):
        ancestors = history[t].ancestors
        kept[t] = kept[t + 1]
        if ancestors is not None:
            kept[t] = False
            kept[t][ancestors[kept[t + 1]]] = True
    paths: dict[bool, list[str]] = {False: [], True: []}
    alive = np.ones(n, dtype=bool)
    begin = np.zeros(n, dtype=np.int64)  # where each horizontal stretch begins
    letters: list[str] = []

    def y(i: int) -> float:
        return (i + 0.5) * dy + 4

    def x(t: float) -> float:
        return 10 + t * dx

    def close(i: int, t: float) -> None:
        if t > begin[i]:
            paths[bool(kept[min(int(t), len(history)), i])].append(
                f"M{x(begin[i]):g} {y(i):g}H{x(t):g}"
            )

    for t, info in enumerate(history):
        symbols, weights = info.symbols, info.log_weights
        if symbols is not None and weights is not None:
            for i in np.flatnonzero(alive & (symbols >= 0)).tolist():
                ends = symbols[i] == EOS_COLUMN or weights[i] == -np.inf
                if lettered:
                    letters.append(_letter(x(t + 0.5), y(i) + 4, int(symbols[i]), kept[t, i]))
                if ends:
                    close(i, t + 0.5)
                    alive[i] = False
        for i in range(n):
            if info.ancestors is None and t + 1 < len(history):
                break
            if alive[i]:
                close(i, t + 0.75)
        if info.ancestors is not None:
            old = alive
            for i, a in enumerate(info.ancestors.tolist()):
                if old[a]:
                    paths[bool(kept[t + 1, i])].append(
                        f"M{x(t + 0.75):g} {y(a):g}L{x(t + 1.1):g} {y(i):g}"
                    )
            alive = old[info.ancestors]
            begin[:] = t + 1
    width, height = x(len(history)) + 14, n * dy + 8
    return (
        f'<div class="wide"><svg class="tree" width="{width:g}" height="{height:g}" role="img">'
        f'<path class="lost" d="{"".join(paths[False])}"/>'
        f'<path class="kept" d="{"".join(paths[True])}"/>{"".join(letters)}</svg></div>'
        '<p class="note">One line a particle, steps from left to right. In colour: what the '
        "final particles of weight descend from; in grey: what resampling or death ended."
        + (" ■ is the end of the text, · a space.</p>" if lettered else "</p>")
    )


def _letter(x: float, y: float, symbol: int, kept: Any) -> str:
    if symbol == EOS_COLUMN:
        shown = "■"
    elif symbol == 32:
        shown = "·"
    else:
        shown = chr(symbol) if 32 < symbol < 127 else f"{symbol:02x}"
    small = ' font-size="8"' if len(shown) > 1 else ""
    kind = "" if kept else ' class="off"'
    return f'<text x="{x:g}" y="{y:g}"{kind}{small}>{html.escape(shown)}</text>'


def _data(result: SMCResult) -> str:
    steps = [
        {
            "s": [] if i.symbols is None else i.symbols.tolist(),
            "w": []
            if i.log_weights is None
            else [None if not math.isfinite(w) else round(w, 4) for w in i.log_weights.tolist()],
            "a": None if i.ancestors is None else i.ancestors.tolist(),
        }
        for i in result.history
    ]
    return json.dumps(steps, separators=(",", ":")).replace("<", "\\u003c")


def _shown(text: bytes) -> str:
    """Bytes as text, with escapes for what cannot be seen."""
    return _shown_text(text.decode("utf-8", errors="backslashreplace"))


def _shown_text(text: str) -> str:
    """Text with escapes for what cannot be seen, lone surrogates too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_STEPS = """<h2>Particles by step</h2>
<p class="pick"><input type="range" id="at" min="1" value="1" aria-label="step">
<output id="step"></output></p>
<div class="wide"><table id="now"></table></div>"""

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#667079;--rule:#dfe3e8;--hue:#2563c9;
--soft:#f4f6f9;--lost:#b9c0c8}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e7eb;--dim:#939ca6;--rule:#2c3239;
--hue:#6aa5ff;--soft:#1c2127;--lost:#4b545e}}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1000px;margin:auto;padding:24px 20px 60px}
h1{font-size:22px;margin:0 0 12px}h2{font-size:16px;margin:32px 0 8px}
code,.tree text{font-family:ui-monospace,Menlo,Consolas,monospace}
code{font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0 0 16px}
dt,.note,small,th,.tiles span{color:var(--dim)}dd{margin:0}.note{font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tiles div{background:var(--soft);border-radius:8px;padding:10px 12px}
.tiles b{display:block;font-size:18px}.tiles span{font-size:12px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:0 24px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th{font-weight:normal;font-size:13px;text-align:left}
th,td{padding:4px 10px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top}
.n{text-align:right;width:1%;white-space:nowrap;font-variant-numeric:tabular-nums}
.bar{width:120px;min-width:80px}.bar i{display:block;height:10px;margin-top:6px;
background:var(--hue);border-radius:2px;min-width:1px}
.chart{width:100%}.chart text{fill:var(--dim);font-size:11px}path{fill:none}
.grid{stroke:var(--rule)}.line{stroke:var(--hue);stroke-width:2}
.limit{stroke:var(--dim);stroke-dasharray:5 4}circle{fill:var(--hue)}
.kept{stroke:var(--hue)}.lost{stroke:var(--lost)}
.tree text{font-size:12px;text-anchor:middle;fill:var(--fg);stroke:var(--bg);stroke-width:4px;
paint-order:stroke}.tree .off{fill:var(--dim)}
.pick{display:flex;gap:14px;align-items:center}.pick input{flex:1;accent-color:var(--hue)}
"""

_SCRIPT = r"""
const at=document.getElementById('at'),now=document.getElementById('now');
function text(t,i){const b=[];for(;t>=0;t--){const s=run[t].s[i];if(s>=0&&s<256)b.push(s);
if(t>0&&run[t-1].a)i=run[t-1].a[i];}
return new TextDecoder().decode(new Uint8Array(b.reverse()))
.replace(/[\x00-\x1f\x7f]/g,c=>JSON.stringify(c).slice(1,-1));}
function cell(row,kind,content){const c=row.insertCell();c.className=kind;c.append(content);}
function show(){const t=at.value-1,w=run[t].w.map(x=>x===null?-Infinity:x),m=Math.max(...w);
const p=w.map(x=>m===-Infinity?0:Math.exp(x-m)),sum=p.reduce((a,b)=>a+b,0)||1,seen=new Map();
p.forEach((x,i)=>{const k=text(t,i),e=seen.get(k)||[0,0];e[0]+=x/sum;e[1]++;seen.set(k,e);});
const all=[...seen].sort((a,b)=>b[1][0]-a[1][0]);now.replaceChildren();
for(const [k,[x,n]] of all.slice(0,60)){const r=now.insertRow();cell(r,'n',x.toFixed(4));
const i=document.createElement('i');i.style.width=100*x+'%';cell(r,'bar',i);cell(r,'n','× '+n);
const c=document.createElement('code');c.textContent=k;cell(r,'',c);}
document.getElementById('step').textContent='step '+at.value+' of '+run.length+', '+all.length+
' texts'+(run[t].a?', then resampled':'');}
if(run.length){at.max=run.length;at.value=Math.ceil(run.length/2);at.oninput=show;show();}
"""
