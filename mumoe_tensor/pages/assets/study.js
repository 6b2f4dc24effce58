// Draws all panels, and connects them with the switches.
const plots = [...document.querySelectorAll('.plot')];
const switches = document.querySelectorAll('nav input[data-subject]'), log = document.getElementById('log');
const style = getComputedStyle(document.body);
const colour = name => style.getPropertyValue(name);
let panels;

function draw() {
  // Plotly does not support CSS variables.
  panels = JSON.parse(document.getElementById('panels').textContent, (key, value) =>
    key === 'color' && value.startsWith('var(') ? colour(value.slice(4, -1)) : value);
  const axis = {gridcolor: colour('--grid'), zeroline: false, automargin: true};
  const template = {layout: {
    font: {family: style.fontFamily, size: 12, color: colour('--text')}, xaxis: axis, yaxis: axis,
    paper_bgcolor: colour('--back'), plot_bgcolor: colour('--back'),
  }};
  plots.forEach((div, k) => Plotly.newPlot(div, panels[k].data, {...structuredClone(panels[k].layout), template},
    {responsive: true, displaylogo: false, modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d']}));
}

const choose = box => plots.forEach(div => {
  const traces = div.data.map((t, k) => t.meta === box.dataset.subject ? k : -1).filter(k => k >= 0);
  if (traces.length) Plotly.restyle(div, {visible: box.checked}, traces);
});

// A linear axis makes new ticks.
const linear = axis => ({...axis, type: 'linear', autorange: true, tickformat: '~s', range: undefined, dtick: undefined});
const scale = () => plots.forEach((div, k) => {
  const change = {};
  for (const name of ['xaxis', 'yaxis']) {
    const axis = panels[k].layout[name];
    if (axis.type === 'log') change[name] = log.checked ? {...axis} : linear(axis);
  }
  if (Object.keys(change).length) Plotly.relayout(div, change);
});

draw();
switches.forEach(box => box.addEventListener('change', () => choose(box)));
log.addEventListener('change', scale);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  draw();
  switches.forEach(choose);
  scale();
});
