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
