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
const visible = text => text.replace(/\n/g, '↵').replace(/ /g, '·');
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
