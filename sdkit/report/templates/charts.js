"use strict";
// Draws the charts.  Reads the page's data; knows nothing of completions.
const report = JSON.parse(document.getElementById("report-data").textContent);
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b4558f", "#b47700", "#3b8fc4", "#444444", "#857300"],
  dark: ["#56a8e0", "#ff8d4a", "#3cc99b", "#e597c4", "#e8b040", "#8fd0f5", "#cccccc", "#d8cb55"],
};  // Okabe and Ito, each theme's own lightness
const CONFIGURATION = {
  responsive: true, displaylogo: false, showSendToCloud: false,
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
const DASHES = ["solid", "dot", "dash", "dashdot"];
const SMOOTHED = 0.22;  // opacity of the measured values behind a smoothed line
const SEED = 0.35;  // opacity of a seed's line behind the mean

const lastStep = Math.max(0, ...report.runs.flatMap((run) => run.steps));

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function theme() {
  return document.documentElement.dataset.theme;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function series(run, metric, axis) {
  const column = run.metrics[metric] || [];
  const points = { x: [], y: [], step: [] };
  column.forEach((value, i) => {
    if (value !== null) {
      points.x.push(run[axis][i]);
      points.y.push(value);
      points.step.push(run.steps[i]);
    }
  });
  return points;
}

function smoothed(values, inertia) {
  let mean = 0, weight = 0;
  return values.map((value) => {
    mean = inertia * mean + (1 - inertia) * value;
    weight = inertia * weight + (1 - inertia);
    return mean / weight;
  });
}

// A metric and its held-out twin have one colour; the latter is dotted.
function twin(metric) {
  return metric.replace(/^eval\//, "");
}

function looks(chart, s, m) {
  const metric = chart.metrics[m];
  const twins = [...new Set(chart.metrics.map(twin))];
  const isTwin = twins.length < chart.metrics.length && metric.startsWith("eval/");
  const palette = COLOURS[theme()];
  if (report.subjects.length > 1) return [palette[s % palette.length], DASHES[m % DASHES.length]];
  return [palette[twins.indexOf(twin(metric)) % palette.length], isTwin ? "dot" : "solid"];
}

function legendName(chart, s, m) {
  if (report.subjects.length === 1) return escaped(chart.labels[m]);
  return escaped(chart.metrics.length > 1 ? `${report.subjects[s].name}, ${chart.labels[m]}` : report.subjects[s].name);
}

function lineTraces(chart, axis, inertia) {
  return report.subjects.flatMap((subject, s) => {
    const runs = report.runs.filter((run) => run.subject === s);
    return chart.metrics.flatMap((metric, m) => {
      const points = runs.map((run) => series(run, metric, axis)).filter((one) => one.x.length);
      if (!points.length) return [];
      const [colour, dash] = looks(chart, s, m);
      const band = bandTraces(subject, metric, axis, colour);
      const thin = points.length > 1 ? points.map((one) => thinTrace(one, inertia, colour)) : [];
      const shown = points.length > 1 ? meanOf(points) : points[0];
      return [...band, ...thin, ...mainTraces(shown, axis, inertia, colour, dash, legendName(chart, s, m))];
    });
  });
}

function thinTrace(points, inertia, colour) {
  const y = inertia > 0 && points.y.length > 3 ? smoothed(points.y, inertia) : points.y;
  return { x: points.x, y, type: "scatter", mode: "lines", line: { color: colour, width: 1 }, opacity: SEED, showlegend: false, hoverinfo: "skip" };
}

// The mean over seeds at the steps that all of them have.
function meanOf(points) {
  const mean = { x: [], y: [], step: [] };
  points[0].step.forEach((step) => {
    const at = points.map((one) => one.step.indexOf(step));
    if (at.includes(-1)) return;
    mean.x.push(at.reduce((sum, i, n) => sum + points[n].x[i], 0) / points.length);
    mean.y.push(at.reduce((sum, i, n) => sum + points[n].y[i], 0) / points.length);
    mean.step.push(step);
  });
  return mean;
}

function mainTraces(points, axis, inertia, colour, dash, name) {
  const smooth = inertia > 0 && points.y.length > 3;
  const shared = { x: points.x, customdata: points.step, type: "scatter" };
  const measured = { ...shared, y: points.y, mode: "lines", line: { color: colour, width: 1 }, opacity: SMOOTHED, showlegend: false, hoverinfo: "skip" };
  const mode = points.x.length < 40 ? "lines+markers" : "lines";
  const main = {
    ...shared, y: smooth ? smoothed(points.y, inertia) : points.y, mode, name, hovertemplate: hover(axis),
    line: { color: colour, width: 2, dash }, marker: { size: 5, color: colour },
  };
  return smooth ? [measured, main] : [main];
}

function hover(axis) {
  return "%{y:.4~g}" + (axis === "steps" ? "" : " (step %{customdata})");
}

// Plotly reads a few HTML tags in texts; a name is shown as it is.
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function bandTraces(subject, metric, axis, colour) {
  const band = subject.bands[metric];
  if (!band) return [];
  return [{
    x: [...band[axis], ...band[axis].toReversed()], y: [...band.low, ...band.high.toReversed()], type: "scatter", mode: "lines",
    fill: "toself", line: { width: 0 }, fillcolor: colour + "22", hoverinfo: "skip", showlegend: false,
  }];
}

function stackedTraces(chart, axis) {
  const palette = COLOURS[theme()];
  const several = report.runs.length > 1;
  return report.runs.flatMap((run, r) => chart.metrics.map((metric, m) => {
    const points = series(run, metric, axis);
    const name = chart.labels[m];
    return {
      x: points.x, y: points.y, customdata: points.step, type: "scatter", mode: "lines", stackgroup: `run ${r}`,
      name: escaped(several ? `${run.name}, ${name}` : name), visible: several && r > 0 ? "legendonly" : true,
      line: { width: 0.5, color: palette[m % palette.length] }, hovertemplate: hover(axis),
    };
  }));
}

const PLOT = { height: 236, bottom: 44, row: 18 };  // pixels: without legend, margin below, a row of the legend

// A legend takes its own rows below the plot, so that all plots are equally high.
function legendRows(node, traces) {
  const names = traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name || "");
  const widest = Math.max(0, ...names.map((name) => name.length)) * 6.2 + 50;
  return Math.ceil(names.length / Math.max(1, Math.floor((node.clientWidth - 60) / widest)));
}

function plot(node, traces, shape) {
  const rows = shape.showlegend ? legendRows(node, traces) : 0;
  const bottom = PLOT.bottom + rows * PLOT.row;
  node.style.height = `${PLOT.height + rows * PLOT.row}px`;
  const legend = { ...shape.legend, y: -38 / (PLOT.height - PLOT.bottom - shape.margin.t) };
  Plotly.react(node, traces, { ...shape, margin: { ...shape.margin, b: bottom }, legend }, CONFIGURATION);
}

function layout(chart, axis) {
  const grid = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--line"), automargin: true };
  return {
    margin: { l: 44, r: 8, t: 10 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 11, color: css("--soft") }, hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
    xaxis: { ...grid, dtick: axis === "steps" && lastStep <= 10 ? 1 : undefined, title: { text: report.axes[axis], font: { size: 11 }, standoff: 6 } },
    yaxis: { ...grid, exponentformat: "e", rangemode: chart.kind === "stacked" ? "tozero" : "normal" },
    legend: { orientation: "h", x: 0, yanchor: "top", font: { size: 10.5 } }, dragmode: "zoom",
    showlegend: report.subjects.length > 1 || chart.metrics.length > 1,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
  };
}

function draw(node, chart) {
  const axis = document.getElementById("axis").value;
  const inertia = Number(document.getElementById("smooth").value);
  const traces = chart.kind === "stacked" ? stackedTraces(chart, axis) : lineTraces(chart, axis, inertia);
  plot(node, traces, layout(chart, axis));
}

function addChart(chart) {
  const title = element("h3", { textContent: chart.title + " " }, element("small", { textContent: chart.unit }));
  const plot = element("div", { className: "plot" });
  const card = element("div", { className: "chart" }, title, plot);
  if (chart.notes.length) {
    const formulas = element("details", {}, element("summary", { textContent: "formulas" }));
    chart.notes.forEach((note) => formulas.append(element("div", { textContent: note })));
    card.append(formulas);
  }
  document.getElementById(chart.place).append(card);
  drawn.push([plot, chart]);
  draw(plot, chart);
  return card;
}

const drawn = [], ownAxes = [];  // charts, and functions that draw plots with horizontal axes of their own
function redraw() {
  drawn.forEach(([node, chart]) => draw(node, chart));
  ownAxes.forEach((drawAgain) => drawAgain());
}

function addOwnAxis(place, title, drawPlot) {
  const node = element("div", { className: "plot" });
  document.getElementById(place).append(element("div", { className: "chart" }, element("h3", { textContent: title }), node));
  ownAxes.push(() => drawPlot(node));
}

function errorBars(below, above) {
  return { type: "data", symmetric: false, thickness: 1.2, array: above, arrayminus: below };
}

// A cross for each run: the change of retention and that of new skill, with their intervals.
function drawRetention(node) {
  const palette = COLOURS[theme()];
  const traces = report.retention.map(({ name, x, y }, i) => ({
    x: [x.mean], y: [y.mean], name: escaped(name), type: "scatter", mode: "markers", hovertemplate: "%{x:+.3f}, %{y:+.3f}",
    error_x: errorBars([x.low], [x.high]), error_y: errorBars([y.low], [y.high]), marker: { size: 8, color: palette[i % palette.length] },
  }));
  const base = layout({ kind: "lines", metrics: [] }, "steps");
  base.xaxis = { ...base.xaxis, dtick: undefined, zeroline: true, title: { ...base.xaxis.title, text: "change of retention" } };
  base.yaxis = { ...base.yaxis, zeroline: true, title: { text: "change of new skill", font: { size: 11 } } };
  plot(node, traces, { ...base, hovermode: "closest", showlegend: true });
}

// Each suite's score at the start and after every stage, with its interval.
function drawStages(node, sequence) {
  const palette = COLOURS[theme()];
  const traces = sequence.lines.map((line, i) => ({
    x: sequence.stages, y: line.mean, name: escaped(line.suite), type: "scatter", mode: "lines+markers",
    error_y: errorBars(line.low.map((low, n) => line.mean[n] - low), line.high.map((high, n) => high - line.mean[n])),
    line: { color: palette[i % palette.length], width: 2 }, hovertemplate: "%{y:.3f}",
  }));
  const chart = { kind: "lines", metrics: sequence.lines };
  const base = layout(chart, "steps");
  base.xaxis.title = { text: "" };
  base.xaxis.type = "category";
  plot(node, traces, { ...base, showlegend: true });
}

report.sequences.forEach((sequence) => addOwnAxis("stages", sequence.name, (node) => drawStages(node, sequence)));
if (report.retention.length) addOwnAxis("retention-plot", "new skill against retention, 95 % intervals", drawRetention);

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => {
  setTheme(theme() === "dark" ? "light" : "dark");
  redraw();
});
report.charts.forEach(addChart);
ownAxes.forEach((drawAgain) => drawAgain());
const thinned = report.runs.filter((run) => run.steps.length < run.all_lines).length;
if (thinned) document.getElementById("thinned").textContent = `Of ${thinned} runs not every step is drawn: a sample at even distances.`;
if (!report.charts.length) document.getElementById("charts").append(element("p", { textContent: "No step or evaluation is on record." }));
for (const id of ["axis", "smooth"]) document.getElementById(id).addEventListener("change", redraw);

let chosen = null;
const metricSelect = document.getElementById("metric");
report.metrics.forEach((name) => metricSelect.append(element("option", { value: name, textContent: name })));
metricSelect.addEventListener("change", () => {
  if (chosen) {
    chosen.remove();
    drawn.pop();
  }
  const name = metricSelect.value;
  chosen = name ? addChart({ title: name, unit: "", metrics: [name], labels: [name], kind: "lines", place: "charts", notes: [] }) : null;
  if (chosen) document.getElementById("charts").prepend(chosen);
});

document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase();
  document.querySelectorAll("#all-settings tbody tr").forEach((row) => {
    row.hidden = !row.textContent.toLowerCase().includes(words);
  });
});
