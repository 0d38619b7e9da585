"""Building stones of a self-contained report page: style, tables, bars with intervals, curves, images.

No script, nothing fetched: the page opens anywhere, also years later.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from llava.constants import RESEARCH_NOTICE

COLORS = ("#2f6f9f", "#c8743c", "#5b9a68", "#8a6bb0", "#b0506a", "#77808a")


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page; `sections` are (heading, HTML), empty ones left out."""
    sections = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#s{number}">{escape(heading)}</a>' for number, (heading, _) in enumerate(sections))
    bodies = "".join(
        f'<section id="s{number}"><h2>{escape(heading)}</h2>{body}</section>'
        for number, (heading, body) in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f"<p>{escape(subtitle)}</p><nav>{links}</nav></header><main>{bodies}</main>"
        f"<footer>{escape(RESEARCH_NOTICE)}</footer></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table of escaped cells; numbers stand right. `classes`: one CSS class per row ("published", "best")."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        kind = f' class="{classes[index]}"' if index < len(classes) and classes[index] else ""
        cells = "".join(f"<td{_number_class(cell)}>{escape(cell)}</td>" for cell in row)
        body += f"<tr{kind}>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, float | None, float | None, float | None]]]]) -> str:
    """Horizontal bars from 0 to 100 %: (group, [(label, value, low, high)]), one colour per label."""
    labels = list(dict.fromkeys(label for _, rows in groups for label, *_ in rows))
    colors = {label: COLORS[index % len(COLORS)] for index, label in enumerate(labels)}
    left, width, step = 230, 520, 20
    parts, y = [], 8
    bottom = 8 + sum(step * len(rows) + 30 for _, rows in groups)
    for mark in range(0, 101, 20):
        x = left + width * mark / 100
        parts.append(f'<line x1="{x}" y1="4" x2="{x}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" class="tick" text-anchor="middle">{mark}</text>')
    for name, rows in groups:
        parts.append(f'<text x="0" y="{y + 13}" class="group">{escape(_short(name, 60))}</text>')
        y += 20
        for label, value, low, high in rows:
            middle = y + step / 2
            shown, text = "no question" if value is None else f"{value:.1f}", escape(_short(label, 34))
            parts.append(f'<text x="{left - 8}" y="{middle + 4}" class="label" text-anchor="end">{text}</text>')
            end = left
            if value is not None:
                end = left + width * value / 100
                parts.append(
                    f'<rect x="{left}" y="{y + 3}" width="{end - left:.1f}" height="{step - 6}" rx="2" '
                    f'fill="{colors[label]}"/>'
                )
            if low is not None and high is not None:
                a, b = (left + width * bound / 100 for bound in (low, high))
                parts.append(
                    f'<path class="err" d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 4}v8M{b:.1f} {middle - 4}v8"/>'
                )
                end = max(end, b)
            parts.append(f'<text x="{end + 6:.1f}" y="{middle + 4}" class="value">{shown}</text>')
            y += step
        y += 10
    return f'<svg viewBox="0 0 {left + width + 60} {bottom + 24}" role="img">{"".join(parts)}</svg>'


def reliability(bins: Sequence[Any], title: str, caption: str) -> str:
    """Share of right answers over confidence (both fractions), areas of the points by their number."""
    size, edge = 260, 36
    most = max((one.count for one in bins), default=1)

    def place(x: float, y: float) -> tuple[float, float]:
        return edge + x * size, 10 + (1 - y) * size

    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts = [
        f'<rect x="{x0}" y="{y1}" width="{size}" height="{size}" class="frame"/>',
        f'<path d="M{x0} {y0}L{x1} {y1}" class="diagonal"/>',
    ]
    for mark in (0, 0.5, 1):
        x, y = place(mark, mark)
        parts.append(f'<text x="{x}" y="{y0 + 16}" class="tick" text-anchor="middle">{100 * mark:.0f}</text>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4}" class="tick" text-anchor="end">{100 * mark:.0f}</text>')
    for one in bins:
        x, y = place(one.confidence, one.accuracy)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 + 9 * (one.count / most) ** 0.5:.1f}" fill="{COLORS[0]}" '
            f'fill-opacity=".65"><title>{one.count} answers</title></circle>'
        )
    parts.append(f'<text x="{edge + size / 2}" y="{y0 + 34}" class="tick" text-anchor="middle">confidence (%)</text>')
    svg = f'<svg class="square" viewBox="0 0 {size + edge + 16} {size + 52}" role="img">{"".join(parts)}</svg>'
    return f"<figure><b>{escape(title)}</b>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def example_card(image: Image.Image | None, question: str, reference: str, prediction: str, right: bool) -> str:
    """An image with question, reference and the model's answer."""
    shown = "" if image is None else f'<img alt="" src="{_data_url(image)}">'
    mark = "right" if right else "wrong"
    return (
        f'<div class="card {mark}">{shown}<p class="q">{escape(question)}</p>'
        f"<p><span>reference</span> {escape(reference)}</p>"
        f"<p><span>answer</span> {escape(_short(prediction, 240))}</p></div>"
    )


def paragraphs(lines: Sequence[str]) -> str:
    """Lines as a block that keeps its indentation."""
    return f'<pre class="text">{escape(chr(10).join(lines))}</pre>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _data_url(image: Image.Image, side: int = 280) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    if max(small.size) < side // 2:  # small drawn images stay sharp
        scale = side // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number_class(cell: str) -> str:
    return ' class="n"' if cell[:1].isdigit() or cell[:1] in "+-−" else ""


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


_STYLE = """
:root{--ink:#1d2733;--soft:#5c6875;--line:#dde3e9;--paper:#fff;--back:#f4f6f8;--accent:#2f6f9f}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header{background:#17364d;color:#fff;padding:28px max(24px,calc(50vw - 540px)) 18px}
h1{margin:0;font-size:26px;font-weight:650}
header p{margin:6px 0 14px;color:#c9d8e4}
nav a{color:#fff;margin-right:18px;text-decoration:none;border-bottom:1px solid #6d93b0;font-size:14px}
main{max-width:1080px;margin:0 auto;padding:8px 24px}
section{background:var(--paper);border:1px solid var(--line);border-radius:8px;margin:18px 0;padding:6px 22px 18px}
h2{font-size:18px;margin:14px 0 10px}
h3{font-size:15px;margin:18px 0 8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;margin:6px 0 10px}
th{text-align:left;color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);padding:6px 10px 6px 0}
td{border-bottom:1px solid var(--line);padding:6px 10px 6px 0;vertical-align:top;overflow-wrap:anywhere}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
tr.published td{color:var(--soft);background:#fafbfc}
svg{width:100%;max-width:860px;height:auto;font:12px system-ui,sans-serif}
svg.square{max-width:320px}
.grid{stroke:var(--line)}.err{stroke:#1d2733;fill:none;stroke-width:1.4}.frame{fill:#fafbfc;stroke:var(--line)}
.diagonal{stroke:#9aa5b0;stroke-dasharray:4 4}
.tick{fill:var(--soft)}.label{fill:var(--ink)}.value{fill:var(--ink);font-weight:600}
.group{fill:var(--ink);font-weight:650;font-size:13px}
.figures{display:flex;flex-wrap:wrap;gap:10px 26px}
figure{margin:6px 0;width:310px}
td:first-child{min-width:150px}
figcaption,.note{color:var(--soft);font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:14px}
.card{border:1px solid var(--line);border-top:4px solid #5b9a68;border-radius:6px;padding:10px;font-size:13.5px}
.card.wrong{border-top-color:#b0506a}
.card img{width:100%;height:180px;object-fit:contain;background:#0d1117;border-radius:4px}
.card p{margin:6px 0 0;overflow-wrap:anywhere}.card .q{font-weight:600}
.card span{color:var(--soft);font-size:12px;margin-right:4px}
pre.text{font:13.5px/1.55 ui-monospace,Menlo,monospace;white-space:pre-wrap;margin:4px 0 12px}
footer{max-width:1080px;margin:0 auto;padding:4px 24px 40px;color:var(--soft);font-size:13px}
"""
