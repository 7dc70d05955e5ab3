"""How fluid curves of many trials are: the page's own drawing next to plotly.js and uPlot, under the page's rules.

`PYTHONPATH=.:tests python tests/drawing.py --trials 1000 --epochs 60 --uplot node_modules/uplot/dist` opens, in headless
Chromium, one page per way of drawing, with the content security policy of `medtune serve`, and prints the time until the
curves can be used and the frames per second while the pointer moves over them and while they are zoomed. uPlot is left
out without --uplot; plotly.js is the one of plotly's Python package.
"""

import argparse
import http.server
import json
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from browsing import DESKTOP, chromium, complaints, opened, wait
from plotly.offline import get_plotlyjs

from tune_app.serve.access import HEADERS
from tune_app.serve.page_routes import STATIC

SECONDS = 4
"""For which frames are counted."""

START = "const data = await (await fetch('data.json')).json(); performance.mark('data');"
DONE = """
await new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(then)));
document.documentElement.dataset.ms = Math.round(performance.now()); document.documentElement.dataset.ready = 'yes';
"""
OWN = """
import { Link, Panel } from './curves.js';
const link = new Link({ onPick: () => {}, isDark: () => false });
link.groups.set('healthy', { colour: '#00609c', dash: 'solid' });
link.epochs = data.x.length;
for (const name of Object.keys(data.lines)) link.about(name, { group: 'healthy', ended: false });
const panel = new Panel(document.getElementById('plot'), link, 'val_auc_ema');
panel.set('val_auc_ema', 'epoch', Object.fromEntries(Object.entries(data.lines).map(([name, y]) => [name, { x: data.x, y }])));
window.zoom = (low, high) => { link.zoom = [low, high]; link.redraw(); };
"""
PLOTLY = """
const x = [], y = [], ids = []; // one trace with gaps, as in the report: a trace per trial takes many times longer
for (const [name, values] of Object.entries(data.lines)) { x.push(...data.x, null); y.push(...values, null); ids.push(...data.x.map(() => name), null); }
const plot = document.getElementById('plot');
await Plotly.newPlot(plot, [{ x, y, customdata: ids, mode: 'lines', line: { width: 1 }, opacity: 0.3 }], { hovermode: 'closest', width: 620, height: 350, showlegend: false }, { displayModeBar: false });
window.zoom = (low, high) => Plotly.relayout(plot, { 'xaxis.range': [low, high] });
"""
UPLOT = """
const series = [{}, ...Object.keys(data.lines).map((label) => ({ label, stroke: '#00609c', width: 1, alpha: 0.3, points: { show: false } }))];
const plot = new uPlot({ width: 620, height: 350, legend: { show: false }, scales: { x: { time: false } }, cursor: { focus: { prox: 20 } }, focus: { alpha: 0.1 }, series }, [data.x, ...Object.values(data.lines)], document.getElementById('plot'));
window.zoom = (low, high) => plot.setScale('x', { min: low, max: high });
"""
FRAMES = """
const [seconds, zooming, done] = arguments;
const end = performance.now() + 1000 * seconds, times = [];
const plot = document.getElementById('plot'), box = plot.getBoundingClientRect();
let i = 0;
const step = (now) => {
  times.push(now);
  i += 1;
  const x = box.left + 60 + (i * 7) % (box.width - 90), y = box.top + 60 + (i * 5) % (box.height - 120);
  if (zooming) { const half = 5 + 20 * Math.abs(Math.sin(i / 20)); window.zoom(30 - half, 30 + half); }
  else document.elementFromPoint(x, y)?.dispatchEvent(new (window.PointerEvent)('pointermove', { clientX: x, clientY: y, bubbles: true })),
       document.elementFromPoint(x, y)?.dispatchEvent(new MouseEvent('mousemove', { clientX: x, clientY: y, bubbles: true }));
  if (now < end) requestAnimationFrame(step); else done({ fps: Math.round(10000 * (times.length - 1) / (times.at(-1) - times[0])) / 10, worst: Math.round(Math.max(...times.slice(1).map((t, k) => t - times[k]))) });
};
requestAnimationFrame(step);
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with the page's content security policy."""

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def write_pages(folder: Path, trials: int, epochs: int, uplot: Path | None) -> list[str]:
    """Write a page per way of drawing, and the curves."""
    rng = np.random.default_rng(0)
    rise = 0.4 * (1 - np.exp(-np.arange(1, epochs + 1) / 8))
    lines = {
        f"{trial:05d}": np.round(0.5 + rise * rng.uniform(0.4, 1) + rng.normal(0, 0.01, epochs), 4).tolist()
        for trial in range(trials)
    }  # fmt: skip
    data = {"x": list(range(1, epochs + 1)), "lines": lines}
    (folder / "data.json").write_text(json.dumps(data))
    for name in ("curves.js", "charts.js"):
        (folder / name).write_bytes((STATIC / name).read_bytes())
    (folder / "page.css").write_text(
        "#plot { position: relative; width: 620px; height: 350px; } #plot canvas { position: absolute; inset: 0; width: 100%; height: 100%; }"
    )
    (folder / "plotly.js").write_text(get_plotlyjs(), encoding="utf-8")
    (folder / "icon.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    ways = {
        "own": (OWN, "", "page.css"),
        "plotly": (PLOTLY, '<script src="plotly.js"></script>', ""),
    }
    if uplot is not None:
        for name in ("uPlot.iife.min.js", "uPlot.min.css"):
            (folder / name).write_bytes((uplot / name).read_bytes())
        plain = UPLOT.replace("cursor: { focus: { prox: 20 } }, focus: { alpha: 0.1 }, ", "")
        ways["uplot-no-highlight"] = (
            plain,
            '<script src="uPlot.iife.min.js"></script>',
            "uPlot.min.css",
        )
        ways["uplot"] = (UPLOT, '<script src="uPlot.iife.min.js"></script>', "uPlot.min.css")
    for name, (script, library, style) in ways.items():
        imports = "\n".join(line for line in script.splitlines() if line.startswith("import"))
        rest = "\n".join(line for line in script.splitlines() if not line.startswith("import"))
        (folder / f"{name}-main.js").write_text(f"{imports}\n{START}\n{rest}\n{DONE}")
        sheet = f'<link rel="stylesheet" href="{style}">' if style else ""
        # With this element plotly.js adds no style element, which the policy would refuse
        none = '<template id="plotly.js-style-global" class="no-inline-styles"></template>'
        (folder / f"{name}.html").write_text(
            f'<!doctype html><meta charset="utf-8"><link rel="icon" href="icon.svg"><title>{name}</title>{none if name == "plotly" else ""}{sheet}{library}'
            f'<div id="plot"></div><script type="module" src="{name}-main.js"></script>'
        )
    return list(ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--uplot", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="Print what the page refused.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder) / "profile") as browser:
        pages = Path(folder) / "pages"
        pages.mkdir()
        ways = write_pages(pages, asked.trials, asked.epochs, asked.uplot)
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(Handler, directory=str(pages))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"{'way':20s} ms to use  fps pointing (worst ms)  fps zooming (worst ms)  complaints")
        for _ in range(asked.rounds):
            for name in ways:
                opened(browser, f"http://127.0.0.1:{server.server_port}/{name}.html", DESKTOP)
                ready_ms = int(wait(browser, "return document.documentElement.dataset.ms"))
                found = [
                    browser.execute_async_script(FRAMES, SECONDS, way) for way in (False, True)
                ]
                told = [f"{each['fps']:5.1f} ({each['worst']:5d})" for each in found]
                said = complaints(browser)
                print(
                    f"{name:8s} {ready_ms:9d}  {'           '.join(told)}  {len(said)}", flush=True
                )
                if asked.show:
                    print("\n".join(said[:5]))
        server.shutdown()


if __name__ == "__main__":
    main()
