// Acceptance over time by domain, with what happened to the draft marked: figures from /adaptd/status?since=.
"use strict";
const MARKS = { promoted: "\u25b2", rolled_back: "\u25bc", drift: "\u25c6", rejected: "\u2715", quarantined: "\u25a0" };
const TONES = { promoted: "--good", rolled_back: "--bad", drift: "--warn", rejected: "--soft", quarantined: "--bad" };
// Above so many marks only their signs are drawn, not the lines through the figures.
const LINES = 40, COLOURS = 8, SHOWN = 6;
// At most so many points are drawn, each of so many buckets: of single minutes one sees noise.
const POINTS = 180, FACTORS = [1, 2, 3, 4, 6, 10, 12, 15, 20, 30, 60];
const MEASURES = { mal: { floor: 1, show: fixed }, token_acceptance: { floor: 0, show: (x) => percent(x, 0) } };
// How the axis of time is written, by the distance of its marks: uPlot's form, of which the fourth is for a new day.
const TIMES = [
  [2419200, "{MMM}", "\n{YYYY}", null, null, null, null, null, 1],
  [86400, "{D} {MMM}", null, null, null, null, null, null, 1],
  [60, "{HH}:{mm}", null, null, "\n{D} {MMM}", null, null, null, 1],
  [1, "{HH}:{mm}:{ss}", null, null, "\n{D} {MMM}", null, null, null, 1],
];
const trends = { data: null, plot: null, hidden: new Set(), met: new Set(), names: [] };

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const tone = (i) => (trends.names[i] === "all" ? 0 : 1 + ((i + COLOURS - 1) % COLOURS));
const shown = () => trends.names.filter((name) => !trends.hidden.has(name));
const marked = () => (trends.data?.events ?? []).filter((e) => e.kind in MARKS && !(e.domain && trends.hidden.has(e.domain)));

// Fewer, longer buckets. Rounds are tokens over MAL; every round proposes alike, so they weigh the share of tokens accepted.
function coarser(data) {
  const factor = FACTORS.find((f) => data.at.length / f <= POINTS + 1) ?? FACTORS.at(-1), step = data.step_s * factor;
  if (factor === 1 || !known(step)) return data;
  const at = [...new Set(data.at.map((t) => Math.floor(t / step) * step))], place = new Map(at.map((t, i) => [t, i]));
  const merged = ({ requests, tokens, mal, token_acceptance: share }) => {
    const sums = at.map(() => ({ requests: 0, tokens: 0, rounds: 0, accepted: 0 }));
    data.at.forEach((t, i) => {
      const sum = sums[place.get(Math.floor(t / step) * step)], rounds = mal[i] ? tokens[i] / mal[i] : 0;
      sum.requests += requests[i] ?? 0;
      sum.tokens += tokens[i] ?? 0;
      sum.rounds += rounds;
      sum.accepted += rounds * (share[i] ?? 0);
    });
    return {
      requests: sums.map((s) => s.requests), tokens: sums.map((s) => s.tokens),
      mal: sums.map((s) => (s.rounds ? s.tokens / s.rounds : null)),
      token_acceptance: sums.map((s) => (s.rounds ? s.accepted / s.rounds : null)),
    };
  };
  const domains = Object.fromEntries(Object.entries(data.domains).map(([name, lines]) => [name, merged(lines)]));
  return { ...data, step_s: step, at, domains };
}

function showTrends(answer) {
  const data = Array.isArray(answer?.at) && answer.at.length ? coarser(answer) : answer;
  const note = byId("chart-note"), there = Array.isArray(data?.at) && data.at.length > 0;
  trends.data = there ? data : null;
  note.hidden = there;
  byId("trends").hidden = !there;
  if (!there) {
    note.textContent = data?.error ? `No history: ${data.error}` : "No history yet: figures over time need the replay buffer and a few requests.";
    drop();
    return;
  }
  const asked = (name) => (data.domains[name].requests ?? []).reduce((sum, n) => sum + (n ?? 0), 0);
  const others = Object.keys(data.domains).filter((name) => name !== "all").sort();
  const names = "all" in data.domains ? ["all", ...others] : others;
  // Of many domains the most asked for are shown at first, and what was chosen since stays.
  const busy = new Set([...others].sort((a, b) => asked(b) - asked(a)).slice(0, SHOWN));
  for (const name of names) {
    if (!trends.met.has(name) && name !== "all" && !busy.has(name)) trends.hidden.add(name);
    trends.met.add(name);
  }
  if (names.join("\n") !== trends.names.join("\n")) {
    trends.names = names;
    renderLegend();
  }
  draw();
}

function renderLegend() {
  byId("legend").replaceChildren(...trends.names.map((name, i) => {
    const button = element("button", `c${tone(i)}`, name);
    button.type = "button";
    button.setAttribute("aria-pressed", String(!trends.hidden.has(name)));
    button.addEventListener("click", () => {
      if (!trends.hidden.delete(name)) trends.hidden.add(name);
      button.setAttribute("aria-pressed", String(!trends.hidden.has(name)));
      draw();
    });
    return button;
  }));
}

function drop() {
  trends.plot?.destroy();
  trends.plot = null;
}

function draw() {
  if (!trends.data) return;
  const { at, domains } = trends.data, measure = chosen("measure"), slider = byId("when");
  const last = Number(slider.value) >= Number(slider.max);
  slider.max = at.length - 1;
  if (last) slider.value = slider.max;
  drop();
  const lines = shown(), data = [at, ...lines.map((name) => domains[name][measure] ?? [])];
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
  trends.plot = new uPlot({
    width: byId("chart").clientWidth,
    height: byId("chart").clientWidth < 600 ? 220 : 280,
    padding: [20, 20, 0, 0],
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, y: false },
    scales: { x: { time: true, range: [trends.data.from ?? at[0], trends.data.to ?? at.at(-1)] }, y: { range: (_, low, high) => bounds(measure, low, high) } },
    axes: [{ ...axis, values: TIMES }, { ...axis, size: 48, values: (_, ticks) => ticks.map((x) => MEASURES[measure].show(x)) }],
    series: [{}, ...lines.map((name) => {
      const i = trends.names.indexOf(name), stroke = colour(`--s${tone(i)}`);
      return { label: name, stroke, width: name === "all" ? 3 : 2, dash: i > COLOURS ? [6, 4] : [], points: { size: 5, fill: stroke } };
    })],
    hooks: { draw: [drawMarks], setCursor: [(plot) => { if (known(plot.cursor.idx)) point(plot.cursor.idx); }] },
  }, data, byId("chart"));
  describe();
  point(Number(slider.value));
}

function bounds(measure, low, high) {
  const floor = MEASURES[measure].floor;
  if (!known(high)) return [floor, floor + 1];
  return [floor, high + 0.08 * (high - floor) + 0.05];
}

function drawMarks(plot) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio, events = marked().filter((e) => e.at >= plot.scales.x.min && e.at <= plot.scales.x.max);
  ctx.save();
  ctx.textAlign = "center";
  ctx.font = `${13 * ratio}px system-ui, sans-serif`;
  for (const event of events) {
    const x = plot.valToPos(event.at, "x", true);
    ctx.strokeStyle = ctx.fillStyle = colour(TONES[event.kind]);
    if (events.length <= LINES && event.kind !== "rejected") {
      ctx.lineWidth = ratio;
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.fillText(MARKS[event.kind], x, bbox.top - 5 * ratio);
  }
  ctx.restore();
}

function namedEvent({ at, kind, ...rest }) {
  return `${MARKS[kind] ?? ""} ${kind.replace("_", " ")}${known(rest.version) ? ` ${named(rest.version)}` : ""}${rest.domain ? ` ${rest.domain}` : ""}`;
}

// The figures of one point in time, as words: under the chart, and for whoever moves the slider by keyboard.
function point(i) {
  const data = trends.data, slider = byId("when"), measure = chosen("measure");
  if (!data || !known(data.at[i])) return;
  const from = data.at[i], to = from + (data.step_s ?? 0);
  const figures = shown().filter((name) => known(data.domains[name][measure]?.[i]))
    .map((name) => `${name} ${MEASURES[measure].show(data.domains[name][measure][i])} (${count(data.domains[name].requests?.[i])} requests)`);
  const happened = marked().filter((e) => e.at >= from && e.at < to).map(namedEvent);
  const text = `${clock(from, false)}: ${listed(figures) || "no requests"}${happened.length ? "; " + listed(happened) : ""}`;
  slider.value = i;
  slider.setAttribute("aria-valuetext", text);
  byId("readout").textContent = text;
}

function describe() {
  const measure = chosen("measure"), events = trends.data.events ?? [];
  const spans = shown().map((name) => [name, (trends.data.domains[name][measure] ?? []).filter(known)]).filter(([, line]) => line.length)
    .map(([name, line]) => `${name} from ${MEASURES[measure].show(line[0])} to ${MEASURES[measure].show(line.at(-1))}`);
  byId("chart").setAttribute("aria-label", `${measure === "mal" ? "Mean acceptance length" : "Share of tokens accepted"} over ${chosen("period")}: ` +
    `${listed(spans) || "no requests"}; ${marked().length} events. The slider below gives single points.`);
  byId("marks-count").textContent = events.length;
  fill("marks", [...events].reverse().map(({ at, kind, ...rest }) =>
    [clock(at), element("span", `mark-${kind}`, `${MARKS[kind] ?? ""} ${String(kind).replace("_", " ")}`), details(rest)]), "none");
}

byId("when").addEventListener("input", (event) => {
  const i = Number(event.target.value), plot = trends.plot;
  point(i);
  if (plot) plot.setCursor({ left: plot.valToPos(trends.data.at[i], "x"), top: 0 }, false);
});
for (const radio of document.querySelectorAll('input[name="measure"]')) radio.addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => {
  const width = byId("chart").clientWidth;
  if (trends.plot && width && width !== trends.plot.width) draw();
}).observe(byId("chart"));
