const colour = name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
const options = {responsive: true, displayModeBar: false};

function theme() {
  const axis = {gridcolor: colour('grid'), linecolor: colour('line'), zeroline: false, automargin: true};
  const scene = {...axis, backgroundcolor: colour('card')};
  return {layout: {
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: colour('soft')},
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', showlegend: false, dragmode: false,
    margin: {t: 12, r: 12, b: 36, l: 44}, xaxis: axis, yaxis: axis, scene: {xaxis: scene, yaxis: scene, zaxis: scene},
    hoverlabel: {bgcolor: colour('card'), bordercolor: colour('line'), font: {color: colour('ink')}}}};
}

function put(node, make) {
  try {
    const figure = make();
    Plotly.react(node, figure.data, {...figure.layout, template: {...theme(), data: {}}}, options);
  } catch (error) { node.textContent = 'This figure could not be drawn: ' + error.message; }
}

const column = (rows, i) => rows.map(row => row[i]);
const line = (x, y, style, more) => ({type: 'scatter', mode: 'lines', x, y, line: style, hoverinfo: 'skip', ...more});
const note = (x, y, text, more) => ({x, y, text, showarrow: false, font: {color: colour('soft')}, ...more});

function themed(told) {
  if (typeof told === 'string') return told.replace(/var\(--(\w+)\)/g, (all, name) => colour(name));
  if (Array.isArray(told)) return told.length && typeof told[0] === 'number' ? told : told.map(themed);
  return told && typeof told === 'object' ? Object.fromEntries(Object.entries(told).map(([key, value]) => [key, themed(value)])) : told;
}

function exhibit(node) {
  const all = JSON.parse(node.dataset.figures), make = (kind, name) => Object.assign(document.createElement(kind), {className: name});
  const plot = make('div', 'plot'), choice = make('div', 'choice');
  const show = i => {
    node.dataset.shown = i;
    choice.childNodes.forEach((button, k) => button.setAttribute('aria-pressed', k === i));
    const {data, layout} = all[i];
    put(plot, () => themed({data, layout: {...layout}}));
  };
  all.forEach((figure, i) => {
    const button = make('button', '');
    button.textContent = figure.name;
    button.onclick = () => show(i);
    choice.append(button);
  });
  choice.hidden = all.length < 2;
  node.replaceChildren(choice, plot);
  show(Number(node.dataset.shown || 0));
}
