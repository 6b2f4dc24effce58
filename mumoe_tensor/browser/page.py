"""Experts on one page that needs no network; cards are drawn as they come into sight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from mumoe_tensor.browser.collect import ExpertLevel, as_plain
from mumoe_tensor.browser.samples import Images, Texts

STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, 'Helvetica Neue', Arial, sans-serif; color: #1a1a1a; margin: 0 auto;
       max-width: 1280px; padding: 0 16px 48px; }
h1 { font-size: 1.4rem; margin: 20px 0 4px; }
.about { color: #555; margin: 0 0 8px; max-width: 80ch; }
nav { position: sticky; top: 0; z-index: 2; background: #fffffff2; border-bottom: 1px solid #ddd;
      padding: 8px 0; display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; }
nav label { display: inline-flex; gap: 6px; align-items: center; }
input, select { font: inherit; padding: 3px 6px; max-width: 60vw; }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px;
         margin-top: 12px; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px 10px; height: 310px; overflow: hidden; }
.card.text { height: 420px; overflow-y: auto; }
.card h2 { font-size: 1rem; margin: 0; }
.card p { margin: 0 0 6px; color: #555; font-size: .85rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, 56px); gap: 4px; max-height: 116px;
          overflow: hidden; }
.images img { width: 56px; height: 56px; object-fit: contain; background: #f4f4f4;
              image-rendering: pixelated; }
.line { font-size: .85rem; margin: 0 0 4px; padding: 2px 0; border-bottom: 1px solid #eee;
        white-space: pre-wrap; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 1px 6px; font-size: .78rem;
        margin-top: 6px; align-items: center; }
.bars i { display: block; height: 8px; background: #0072B2; border-radius: 2px; }
.bars b { font-weight: normal; color: #555; text-align: right; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const by = id => document.getElementById(id);
const percent = x => x == null ? '–' : (100 * x).toFixed(x < 0.1 ? 2 : 1) + ' %';
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text != null) element.textContent = text;
  return element;
};
data.levels.forEach((level, k) => by('level').append(
  new Option(`${level.layer}, level ${level.level + 1} (${level.experts.length} experts)`, k)));

// The classes of an expert, those it is used for most first.
const ranked = expert => (expert.classes || []).map((count, c) => [count, c]).sort((a, b) => b[0] - a[0]);
const clarity = expert => {
  const sum = (expert.classes || []).reduce((a, b) => a + b, 0);
  return sum ? ranked(expert)[0][0] / sum : 0;
};
const orders = {
  number: (a, b) => a.n - b.n,
  use: (a, b) => b.mean - a.mean,
  effect: (a, b) => (b.effect || 0) - (a.effect || 0),
  clarity: (a, b) => clarity(b) - clarity(a),
};

function fill(card, expert) {
  card.append(make('h2', '', `Expert ${expert.n}`));
  const effect = expert.effect == null ? '' : `, effect ${expert.effect.toFixed(3)}`;
  const use = `mean coefficient ${percent(expert.mean)}, load ${percent(expert.load)}`;
  card.append(make('p', '', use + effect));
  if (!expert.top.length) card.append(make('p', '', 'No input uses it.'));
  const images = make('div', 'images');
  for (const top of expert.top) {
    const sample = data.samples[top.i];
    if (sample == null) continue;
    const told = `input ${top.i}, coefficient ${top.a.toFixed(3)}`;
    if (typeof sample === 'string') {
      const image = make('img');
      image.src = sample; image.alt = image.title = told;
      images.append(image);
    } else {
      card.classList.add('text');
      const line = make('p', 'line');
      line.title = told;
      sample.forEach((token, k) => {
        const span = make('span', '', token);
        const a = top.tokens ? top.tokens[k] : 0;
        if (a > 0) span.style.background = `rgba(213, 94, 0, ${Math.min(1, a)})`;
        line.append(span);
      });
      card.append(line);
    }
  }
  if (images.childElementCount) card.append(images);
  const counts = ranked(expert).filter(pair => pair[0] > 0).slice(0, 5);
  if (counts.length) {
    const sum = expert.classes.reduce((a, b) => a + b, 0), bars = make('div', 'bars');
    for (const [count, c] of counts) {
      const bar = make('i');
      bar.style.width = `${100 * count / sum}%`;
      const change = expert.effects ? ` (${(100 * expert.effects[c]).toFixed(1)})` : '';
      bars.append(make('span', '', data.classes[c] ?? c), bar, make('b', '', percent(count / sum) + change));
    }
    card.append(bars);
  }
}

// A card is filled when it comes near the window, and emptied when it has gone.
const watcher = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
  if (isIntersecting && !target.childElementCount) fill(target, target.expert);
  else if (!isIntersecting) target.replaceChildren();
}), {rootMargin: '400px'});

function show() {
  const experts = data.levels[+by('level').value].experts, text = by('search').value.trim().toLowerCase();
  const isNamed = expert => ranked(expert).slice(0, 3)
    .some(([count, c]) => count > 0 && String(data.classes[c] ?? c).toLowerCase().includes(text));
  const found = experts.filter(expert => !text || String(expert.n) === text || isNamed(expert))
    .sort(orders[by('sort').value]);
  watcher.disconnect();
  by('cards').replaceChildren(...found.map(expert => {
    const card = make('article', 'card');
    card.expert = expert;
    watcher.observe(card);
    return card;
  }));
  by('count').textContent = `${found.length} of ${experts.length}`;
}
for (const id of ['level', 'sort']) by(id).addEventListener('change', show);
by('search').addEventListener('input', show);
show();
"""


def page(
    levels: list[ExpertLevel],
    samples: Images | Texts | None = None,
    *,
    title: str = "Experts",
    about: str = "",
    classes: Sequence[str] = (),
) -> str:
    """Make a page of experts.

    Parameters
    ----------
    levels : list of ExpertLevel
        As of `collect`.
    samples : Images or Texts, optional
        What the inputs look like; without, they are told by their numbers only.
    title, about : str
        Above the experts.
    classes : sequence of str, optional
        Names of the classes; their numbers by default.

    Returns
    -------
    str
        HTML with everything in it.

    Raises
    ------
    ValueError
        If there are fewer samples than inputs.
    """
    plain = as_plain(levels)
    used = sorted({top["i"] for level in plain for expert in level["experts"] for top in expert["top"]})
    if samples is not None and used and used[-1] >= len(samples):
        raise ValueError(
            f"there must be a sample for every input; input {used[-1]} of {len(samples)} is shown."
        )
    shown = {} if samples is None else {index: samples.shown(index) for index in used}
    told: dict[str, Any] = {"levels": plain, "samples": shown, "classes": list(classes)}
    content = json.dumps(told, separators=(",", ":")).replace("</", "<\\/")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p>',
            '<nav><label>Layer <select id="level"></select></label>',
            '<label>Sort <select id="sort"><option value="number">by number</option>'
            '<option value="use">by use</option><option value="effect">by effect</option>'
            '<option value="clarity">by largest share of a class</option></select></label>',
            '<label>Find <input id="search" type="search" placeholder="number or class"></label>',
            '<span id="count"></span></nav><main id="cards"></main>',
            f'<script id="data" type="application/json">{content}</script>',
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )
