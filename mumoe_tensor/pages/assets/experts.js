const data = JSON.parse(document.getElementById('data').textContent);
const by = id => document.getElementById(id);
// NaN and infinity are strings, which Number parses.
const fixed = (x, digits) => x == null ? '–' : Number.isFinite(+x) ? (+x).toFixed(digits)
  : Number.isNaN(+x) ? 'NaN' : x > 0 ? '∞' : '−∞';
const percent = x => x > 0 && x < 5e-5 ? '< 0.01 %' : fixed(Number.isFinite(x) ? 100 * x : x, x < 0.1 ? 2 : 1) + (x == null ? '' : ' %');
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

// In descending order; missing values and NaN come last.
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

// ---- cards ----

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
      // Transparent, so that the image stays visible.
      shade(patch, 0.75 * a, most);
      patches.append(patch);
    }
    box.append(patches);
  }
  return box;
}

// Number of experts per chunk, a multiple of the cards side by side. A chunk contains cards only near the visible
// area; elsewhere it keeps its height, or has that of another chunk.
const CHUNK = 24;
const watcher = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting, boundingClientRect}) => {
  if (isIntersecting) target.fill();
  else if (target.childElementCount) {
    target.style.minHeight = `${boundingClientRect.height}px`;
    target.replaceChildren();
  }
}), {rootMargin: '600px'});

// ---- one model ----

class View {
  constructor(root, select, count, run, number) {
    Object.assign(this, {root, select, count, run, number, sampleExpert: null, sampleToken: null});
    this.rows = this.find('.overview tbody');
    run.levels.forEach((level, k) => {
      select.append(new Option(`${level.layer}, level ${level.level} (` + (level.experts.length < level.total
        ? `the ${level.experts.length} most used of ${level.total} experts)` : `${level.total} experts)`), k));
      const row = make('tr');
      row.append(...[level.layer, level.level, level.total, level.dead, fixed(level.active, 1),
        fixed(level.entropy, 2)].map(cell => make('td', '', cell)));
      row.addEventListener('click', () => this.choose(k));
      this.rows.append(row);
    });
    select.addEventListener('change', () => this.choose(+select.value));
    if (run.sample) run.sample.tokens.forEach((token, k) => {
      const span = make('span', k < run.sample.given ? 'given' : '', token);
      span.addEventListener('click', () => { this.sampleToken = k; this.drawSample(); });
      this.find('.written').append(span);
    });
    const canvas = this.find('canvas');
    canvas.addEventListener('mousemove', event => this.tell(event));
    canvas.addEventListener('click', event => { location.hash = this.link(this.place(event).expert.n); });
    this.choose(0);
  }

  find(selector) { return this.root.querySelector(selector); }
  get level() { return this.run.levels[+this.select.value]; }
  nameOf(label) { return String(this.run.classes[label] ?? label); }
  shown(label) { return this.run.language ? visible(this.nameOf(label)) : this.nameOf(label); }
  link(n) {
    const place = {expert: n, layer: this.level.layer, level: this.level.level};
    return '#' + new URLSearchParams(data.length > 1 ? {...place, model: this.number + 1} : place);
  }

  choose(k) {
    this.select.value = k;
    this.sampleExpert = null;
    [...this.rows.children].forEach((row, each) => row.classList.toggle('chosen', each === k));
    this.show();
    this.drawMap();
    if (this.run.sample) this.drawSample();
  }

  show() {
    const text = by('search').value.trim().toLowerCase(), {experts} = this.level;
    const isNamed = expert => expert.bars.slice(0, 3).some(([label]) =>
      this.nameOf(label).toLowerCase().includes(text));
    this.matches = experts.filter(expert => !text || String(expert.n) === text || isNamed(expert))
      .sort(orders[by('sort').value]);
    this.count.textContent = `${this.matches.length} of ${experts.length}`;
    for (const chunk of this.find('.cards').children) watcher.unobserve(chunk);
    this.find('.cards').replaceChildren(...Array.from({length: Math.ceil(this.matches.length / CHUNK)}, (_, k) => {
      const chunk = make('div', 'chunk');
      chunk.fill = () => this.fill(chunk, k);
      watcher.observe(chunk);
      return chunk;
    }));
    this.find('.chunk')?.fill();
  }

  fill(chunk, k) {
    if (chunk.childElementCount) return;
    chunk.style.minHeight = '';
    chunk.append(...this.matches.slice(k * CHUNK, (k + 1) * CHUNK).map(expert => this.card(expert)));
    if (k === 0) this.find('.cards').style.setProperty('--height', `${chunk.offsetHeight}px`);
  }

  card(expert) {
    const {run, level} = this, card = make('article', 'card'), heading = make('h2');
    const link = make('a', '', `Expert ${expert.n}`);
    link.href = this.link(expert.n);
    heading.append(link);
    card.expert = expert;
    if (run.sample) {
      const button = make('button', '', 'in the text above');
      button.addEventListener('click', () => { this.sampleExpert = expert.n; this.drawSample(); });
      heading.append(button);
    }
    const mean = level.shares ? percent(expert.mean) : fixed(expert.mean, 4);
    const effect = expert.effect == null ? '' : run.language
      ? `, loss ${expert.effect < 0 ? '−' : '+'}${fixed(Math.abs(expert.effect), 4)} nats without it`
      : `, effect ${fixed(expert.effect, 3)}`;
    card.append(heading, make('p', '', `mean coefficient ${mean}, load ${percent(expert.load)}${effect}`));
    if (!expert.top.length) card.append(make('p', '', 'Not used by any input.'));
    const most = largest(expert.top.flatMap(top => top.rows));
    const images = make('div', 'images'), lines = [];
    for (const top of expert.top) {
      const sample = run.samples[top.i];
      if (typeof sample === 'string') images.append(image(sample, top, most, run.grids[level.layer]));
      else if (sample != null) lines.push(text(sample, top, most));
    }
    if (images.childElementCount) card.append(images);
    else if (!lines.length && expert.top.length) card.append(make('p', '', 'Inputs ' +
      expert.top.map(top => `${top.i} (${fixed(top.a, 3)})`).join(', ')));
    if (expert.bars.length) card.append(this.bars(expert));
    card.append(...lines);
    return card;
  }

  bars(expert) {
    const bars = make('div', 'bars');
    for (const [label, share, remark] of expert.bars) {
      const bar = make('i'), text = percent(share) + (remark && ` (${remark})`);
      bar.style.width = `${100 * share}%`;
      bars.append(make('span', '', this.shown(label)), bar, make('b', '', text));
    }
    return bars;
  }

  // Opens the expert of an address.
  open(n) {
    if (!this.matches.some(expert => expert.n === n)) { by('search').value = ''; this.show(); }
    const place = this.matches.findIndex(expert => expert.n === n);
    if (place < 0) return;
    const chunk = this.find('.cards').children[Math.floor(place / CHUNK)];
    chunk.fill();
    const card = chunk.children[place % CHUNK];
    card.classList.add('opened');
    // Again when the surrounding chunks have their cards.
    card.scrollIntoView();
    requestAnimationFrame(() => requestAnimationFrame(() => card.scrollIntoView()));
  }

  // ---- map of classes and experts: one pixel per pair, enlarged by the style ----

  drawMap() {
    const {map, experts} = this.level;
    this.find('.map').hidden = !map;
    if (!map) return;
    const bytes = Uint8Array.from(atob(map.data), c => c.charCodeAt(0)), count = map.labels.length;
    const top = experts.map((_, e) => {
      const row = bytes.subarray(e * count, (e + 1) * count), share = Math.max(...row);
      return {e, share, label: row.indexOf(share)};
    });
    // Experts of the same class side by side; unused experts last.
    top.sort((a, b) => (a.share === 0) - (b.share === 0) || a.label - b.label || b.share - a.share || a.e - b.e);
    this.columns = top.map(({e}) => ({expert: experts[e], row: bytes.subarray(e * count, (e + 1) * count)}));
    const canvas = this.find('canvas'), [width, height] = [canvas.width, canvas.height] = [top.length, count];
    const context = canvas.getContext('2d'), pixels = context.createImageData(width, height);
    const hue = getComputedStyle(document.body).getPropertyValue('--bar').match(/[0-9a-f]{2}/g).map(x => parseInt(x, 16));
    this.columns.forEach(({row}, x) => row.forEach((share, y) =>
      pixels.data.set([...hue, share], 4 * (y * width + x))));
    context.putImageData(pixels, 0, 0);
    canvas.style.setProperty('--rows', height);
    canvas.style.width = `${width * Math.max(1, Math.min(18, Math.floor(900 / width)))}px`;
    this.find('.names').replaceChildren(...map.labels.map(label => make('div', '', this.nameOf(label))));
    this.find('output').textContent = 'Each column is an expert. The colour shows the share of its coefficients that ' +
      'belongs to inputs of the class. Click a column to open its card.';
  }

  place({target, offsetX, offsetY}) {
    const at = (offset, size, count) => Math.max(0, Math.min(count - 1, Math.floor(offset / size * count)));
    const column = this.columns[at(offsetX, target.clientWidth, target.width)];
    const k = at(offsetY, target.clientHeight, target.height);
    return {...column, label: this.level.map.labels[k], share: column.row[k] / 255};
  }

  tell(event) {
    const {expert, label, share} = this.place(event);
    this.find('output').textContent = `Expert ${expert.n}, ${this.nameOf(label)}: ${percent(share)}`;
  }

  // ---- the generated text, shaded by one expert of the selected layer ----

  drawSample() {
    const {sample} = this.run, tokens = sample.levels[+this.select.value], sums = {};
    for (const token of tokens) for (const [n, a] of token) if (a > 0) sums[n] = (sums[n] || 0) + Number(a);
    const busiest = Object.keys(sums).sort((a, b) => sums[b] - sums[a])[0];
    const n = this.sampleExpert ?? +(busiest ?? 0);
    const own = tokens.map(token => (token.find(pair => pair[0] === n) || [n, 0])[1]);
    const most = largest(own);
    [...this.find('.written').children].forEach((span, k) => {
      shade(span, own[k], most);
      span.classList.toggle('chosen', k === this.sampleToken);
    });
    this.find('.shading').textContent = `Shaded: expert ${n}` +
      (this.sampleExpert == null ? ', the most active here' : '') +
      `; darkest ${most > 1e-9 ? most.toFixed(3) : 'nowhere'}. Click a token for its experts.`;
    this.find('.strongest').textContent = this.sampleToken == null ? '' :
      `${visible(sample.tokens[this.sampleToken])} — ` +
      tokens[this.sampleToken].map(([m, a]) => `expert ${m}: ${fixed(a, 3)}`).join(', ');
  }
}

// ---- the page ----

const all = selector => [...document.querySelectorAll(selector)];
const selects = all('.level'), counts = all('.count');
const views = all('.view').map((root, k) => new View(root, selects[k], counts[k], data[k], k));
const bring = k => views.forEach((view, each) => view.root.classList.toggle('front', each === k));
all('[name=view]').forEach(box => box.addEventListener('change', () => bring(+box.value)));
by('sort').addEventListener('change', () => views.forEach(view => view.show()));
by('search').addEventListener('input', () => views.forEach(view => view.show()));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => views.forEach(view => view.drawMap()));

// An address such as #expert=37&layer=blocks.0.mlp&level=1&model=2; everything but the expert is optional.
function follow() {
  const place = new URLSearchParams(location.hash.slice(1)), view = views[(place.get('model') ?? 1) - 1];
  const has = (key, value) => !place.has(key) || place.get(key) === String(value);
  const k = view?.run.levels.findIndex(level => has('layer', level.layer) && has('level', level.level));
  if (!place.has('expert') || !(k >= 0)) return;
  bring(views.indexOf(view));
  all('.opened').forEach(card => card.classList.remove('opened'));
  if (+view.select.value !== k) view.choose(k);
  view.open(+place.get('expert'));
}
bring(0);
addEventListener('hashchange', follow);
follow();
