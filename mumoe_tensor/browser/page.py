"""Experts on one page that needs no network; cards are drawn as they come into sight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mumoe_tensor.browser.collect import ExpertLevel
from mumoe_tensor.browser.plain import Sample, plain_levels, plain_sample
from mumoe_tensor.browser.samples import Images, Texts
from mumoe_tensor.html import html_text, script_json

STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, 'Helvetica Neue', Arial, sans-serif; color: #1a1a1a; margin: 0 auto;
       max-width: 1280px; padding: 0 16px 48px; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 20px 0 4px; }
.about { color: #555; margin: 0 0 8px; max-width: 80ch; }
nav { position: sticky; top: 0; z-index: 2; background: #fffffff2; border-bottom: 1px solid #ddd;
      padding: 8px 0; display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; }
nav label { display: inline-flex; gap: 6px; align-items: center; }
input, select { font: inherit; padding: 3px 6px; max-width: 60vw; }
#sample { border: 1px solid #ddd; border-radius: 6px; padding: 8px 10px; margin: 8px 0 12px; }
#sample h2 { font-size: 1rem; margin: 0; }
#sample p { margin: 0 0 6px; color: #555; font-size: .85rem; }
#sample .written { font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14em;
                   overflow-y: auto; color: #1a1a1a; }
.written span { cursor: pointer; border-bottom: 2px solid transparent; }
.written .given { font-style: italic; color: #444; }
.written .chosen { border-bottom-color: #1a1a1a; }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px;
         margin-top: 12px; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px 10px; height: 310px; overflow: hidden; }
.text .card { height: 440px; overflow-y: auto; }
.card h2 { font-size: 1rem; margin: 0; }
.card h2 button { font: inherit; font-size: .8rem; margin-left: 8px; cursor: pointer; }
.card p { margin: 0 0 6px; color: #555; font-size: .85rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, 56px); gap: 4px; max-height: 116px;
          overflow: hidden; }
.images div { position: relative; width: 56px; height: 56px; }
.images img { width: 56px; height: 56px; object-fit: contain; background: #f4f4f4;
              image-rendering: pixelated; }
.images .patches { position: absolute; inset: 0; display: grid; }
.line { font-size: .85rem; margin: 0 0 4px; padding: 2px 0; border-bottom: 1px solid #eee;
        white-space: pre-wrap; overflow-wrap: anywhere; }
.card .line { color: #1a1a1a; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 1px 6px; font-size: .78rem;
        margin: 6px 0; align-items: center; }
.bars span { white-space: pre; max-width: 11em; overflow: hidden; text-overflow: ellipsis; }
.bars i { display: block; height: 8px; background: #0072B2; border-radius: 2px; }
.bars b { font-weight: normal; color: #555; text-align: right; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const by = id => document.getElementById(id);
// NaN and infinity come as strings, which Number reads.
const fixed = (x, digits) => x == null ? '–' : Number.isFinite(+x) ? (+x).toFixed(digits)
  : Number.isNaN(+x) ? 'NaN' : x > 0 ? '∞' : '−∞';
const percent = x => fixed(Number.isFinite(x) ? 100 * x : x, x < 0.1 ? 2 : 1) + (x == null ? '' : ' %');
const largest = numbers => Math.max(...numbers.filter(Number.isFinite), 1e-9);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text != null) element.textContent = text;
  return element;
};
const visible = text => text.replace(/\\n/g, '↵').replace(/ /g, '·');
const shade = (element, a, most) => {
  element.style.background = a > 0 ? `rgba(213, 94, 0, ${(0.85 * Math.min(a / most, 1)).toFixed(3)})` : '';
};
const nameOf = label => String(data.classes[label] ?? label);
const shown = label => data.language ? visible(nameOf(label)) : nameOf(label);
data.levels.forEach((level, k) => by('level').append(
  new Option(`${level.layer}, level ${level.level + 1} (` + (level.experts.length < level.total
    ? `the ${level.experts.length} most used of ${level.total} experts)` : `${level.total} experts)`), k)));

// From the largest on; what is missing or NaN comes last.
const descending = key => (a, b) => {
  const [x, y] = [a, b].map(expert => Number.isNaN(+(expert[key] ?? NaN)) ? -Infinity : +expert[key]);
  return x === y ? a.n - b.n : x < y ? 1 : -1;
};
const orders = {
  number: (a, b) => a.n - b.n,
  use: descending('mean'),
  effect: descending('effect'),
  clarity: descending('clarity'),
};
const effectOf = expert => expert.effect == null ? '' : data.language
  ? `, loss ${expert.effect < 0 ? '−' : '+'}${fixed(Math.abs(expert.effect), 4)} nats without it`
  : `, effect ${fixed(expert.effect, 3)}`;

function text(tokens, top, most) {
  const line = make('p', 'line');
  tokens.forEach((token, k) => {
    const span = make('span', '', token), a = top.rows[k] || 0;
    if (a !== 0) { shade(span, a, most); span.title = fixed(a, 3); }
    line.append(span);
  });
  return line;
}

function image(source, top, most, grid) {
  const box = make('div'), picture = make('img');
  picture.src = source;
  picture.alt = box.title = `input ${top.i}, coefficient ${fixed(top.a, 3)}`;
  box.append(picture);
  if (grid && top.rows.length === grid[0] * grid[1]) {
    const patches = make('div', 'patches');
    patches.style.gridTemplate = `repeat(${grid[0]}, 1fr) / repeat(${grid[1]}, 1fr)`;
    for (const a of top.rows) {
      const patch = make('i');
      // Seen through, so that the image is too.
      shade(patch, 0.75 * a, most);
      patches.append(patch);
    }
    box.append(patches);
  }
  return box;
}

function barsOf(expert) {
  const bars = make('div', 'bars');
  for (const [label, share, remark] of expert.bars) {
    const bar = make('i'), told = percent(share) + (remark && ` (${remark})`);
    bar.style.width = `${100 * share}%`;
    bars.append(make('span', '', shown(label)), bar, make('b', '', told));
  }
  return bars;
}

function fill(card, expert) {
  const level = data.levels[+by('level').value], heading = make('h2', '', `Expert ${expert.n}`);
  if (data.sample) {
    const button = make('button', '', 'in the text above');
    button.addEventListener('click', () => { sampleExpert = expert.n; drawSample(); });
    heading.append(button);
  }
  const mean = level.shares ? percent(expert.mean) : fixed(expert.mean, 4);
  const use = `mean coefficient ${mean}, load ${percent(expert.load)}`;
  card.append(heading, make('p', '', use + effectOf(expert)));
  if (!expert.top.length) card.append(make('p', '', 'No input uses it.'));
  const most = largest(expert.top.flatMap(top => top.rows));
  const images = make('div', 'images'), lines = [];
  for (const top of expert.top) {
    const sample = data.samples[top.i];
    if (typeof sample === 'string') images.append(image(sample, top, most, data.grids[level.layer]));
    else if (sample != null) lines.push(text(sample, top, most));
  }
  if (images.childElementCount) card.append(images);
  if (data.language && expert.bars.length) card.append(barsOf(expert));
  card.append(...lines);
  if (!data.language && expert.bars.length) card.append(barsOf(expert));
}

// A card is filled when it comes near the window, and emptied when it has gone.
const watcher = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
  if (isIntersecting && !target.childElementCount) fill(target, target.expert);
  else if (!isIntersecting) target.replaceChildren();
}), {rootMargin: '400px'});

function show() {
  const experts = data.levels[+by('level').value].experts, text = by('search').value.trim().toLowerCase();
  const isNamed = expert => expert.bars.slice(0, 3).some(([label]) =>
    nameOf(label).toLowerCase().includes(text));
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

// The written text: shaded by one expert of the layer that is chosen.
let sampleExpert = null, sampleToken = null;
function drawSample() {
  const tokens = data.sample.levels[+by('level').value], sums = {};
  for (const token of tokens) for (const [n, a] of token) if (a > 0) sums[n] = (sums[n] || 0) + Number(a);
  const busiest = Object.keys(sums).sort((a, b) => sums[b] - sums[a])[0];
  const n = sampleExpert ?? +(busiest ?? 0);
  const own = tokens.map(token => (token.find(pair => pair[0] === n) || [n, 0])[1]);
  const most = largest(own);
  [...by('written').children].forEach((span, k) => {
    shade(span, own[k], most);
    span.classList.toggle('chosen', k === sampleToken);
  });
  by('shading').textContent = `Shaded: expert ${n}` + (sampleExpert == null ? ', the most active here' : '') +
    `; darkest ${most > 1e-9 ? most.toFixed(3) : 'nowhere'}. Click a token for its experts.`;
  by('strongest').textContent = sampleToken == null ? '' :
    `${visible(data.sample.tokens[sampleToken])} — ` +
    tokens[sampleToken].map(([m, a]) => `expert ${m}: ${fixed(a, 3)}`).join(', ');
}
if (data.sample) {
  data.sample.tokens.forEach((token, k) => {
    const span = make('span', k < data.sample.given ? 'given' : '', token);
    span.addEventListener('click', () => { sampleToken = k; drawSample(); });
    by('written').append(span);
  });
}
if (data.text) by('cards').classList.add('text');
for (const id of ['level', 'sort']) by(id).addEventListener('change', show);
by('level').addEventListener('change', () => { sampleExpert = null; if (data.sample) drawSample(); });
by('search').addEventListener('input', show);
show();
if (data.sample) drawSample();
"""


#: Where a text that the model wrote stands.
WRITTEN = """<section id="sample"><h2>A text it wrote</h2><p>{}</p>
<p id="written" class="written"></p><p id="shading"></p><p id="strongest"></p></section>"""


def page(
    levels: list[ExpertLevel],
    samples: Images | Texts | None = None,
    *,
    title: str = "Experts",
    about: str = "",
    classes: Sequence[str] | Mapping[int, str] = (),
    grids: Mapping[str, tuple[int, int]] | None = None,
    written: Sample | None = None,
    experts: int | None = None,
) -> str:
    """Make a page of experts.

    Parameters
    ----------
    levels : list of ExpertLevel
        As of `collect`.
    samples : Images or Texts, optional
        What the inputs look like; without, only their numbers are shown. Tokens of texts are shaded by
        the expert's coefficients.
    title, about : str
        Above the experts.
    classes : sequence or mapping of int to str, optional
        Names of the classes, or of tokens; their numbers by default.
    grids : mapping of str to (int, int), optional
        Layers that see the patches of images, and how many of these an image has below and beside each other:
        patches are shaded by the expert's coefficients.
    written : Sample, optional
        A text that the model wrote, shown above the experts.
    experts : int, optional
        Show the most used so many experts of a level only, and none that no input uses; all by default.

    Returns
    -------
    str
        HTML with everything in it.

    Raises
    ------
    ValueError
        If there are fewer samples than inputs.
    """
    grids = grids or {}
    plain = plain_levels(levels, True if isinstance(samples, Texts) else grids, experts)
    cards = [expert for level in plain for expert in level["experts"]]
    used = sorted({top["i"] for expert in cards for top in expert["top"]})
    if samples is not None and used and used[-1] >= len(samples):
        raise ValueError(
            f"there must be a sample for every input; input {used[-1]} of {len(samples)} is shown."
        )
    labels = sorted({label for expert in cards for label, *_ in expert["bars"]})
    known = classes if isinstance(classes, Mapping) else dict(enumerate(classes))
    is_language = any(level.is_language for level in levels)
    data: dict[str, Any] = {
        "levels": plain,
        "samples": {} if samples is None else {index: samples.shown(index) for index in used},
        "classes": {label: known[label] for label in labels if label in known},
        "grids": grids,
        "language": is_language,
        "text": isinstance(samples, Texts),
        "sample": None if written is None else plain_sample(written, levels),
    }
    label = "token" if is_language else "class"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html_text(title)}</title><style>{STYLE}</style></head><body>",
            f'<h1>{html_text(title)}</h1><p class="about">{html_text(about)}</p>',
            '<nav><label>Layer <select id="level"></select></label>',
            '<label>Sort <select id="sort"><option value="number">by number</option>'
            '<option value="use">by use</option><option value="effect">by effect</option>'
            f'<option value="clarity">by largest share of a {label}</option></select></label>',
            f'<label>Find <input id="search" type="search" placeholder="number or {label}"></label>',
            '<span id="count"></span></nav>',
            "" if written is None else WRITTEN.format(html_text(written.about)),
            '<main id="cards"></main>',
            f'<script id="data" type="application/json">{script_json(data)}</script>',
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )
