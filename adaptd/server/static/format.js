// Figures as text, and text as nodes. Everything that came from outside enters the page as text, never as markup.
"use strict";
const DASH = "\u2013", SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const known = (x) => typeof x === "number" && Number.isFinite(x);
const fixed = (x, digits = 2) => (known(x) ? x.toFixed(digits) : DASH);
const percent = (x, digits = 1) => (known(x) ? (100 * x).toFixed(digits) + "\u00a0%" : DASH);
const signed = (x) => (known(x) ? (x < 0 ? "\u2212" : "+") + percent(Math.abs(x)) : DASH);
const count = (x) => (known(x) ? x.toLocaleString("en") : DASH);
const named = (version) => (version ? `version ${version}` : "day 0");
const listed = (names) => names.filter((name) => name || name === 0).join(", ");

function clock(at, seconds = true) {
  if (!known(at)) return DASH;
  const when = new Date(1000 * at), time = when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: seconds ? "2-digit" : undefined, hourCycle: "h23" });
  const today = when.toDateString() === new Date().toDateString();
  return today ? time : `${when.toLocaleDateString([], { day: "numeric", month: "short" })} ${time}`;
}

function bytes(x) {
  if (!known(x)) return DASH;
  let unit = 0;
  for (; x >= 1024 && unit < 4; unit++) x /= 1024;
  return x.toFixed(unit && x < 100 ? 1 : 0) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
}

function duration(s) {
  if (!known(s)) return DASH;
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (s >= size) return (s / size).toFixed(1) + " " + unit;
  return s.toFixed(0) + " s";
}

function interval(value) {
  return known(value?.mean) ? `${signed(value.mean)} [${signed(value.low)}, ${signed(value.high)}]` : DASH;
}

function detail(value) {
  if (value && typeof value === "object" && known(value.mean)) return interval(value);
  if (Array.isArray(value)) return value.map(detail).join(", ");
  if (value && typeof value === "object") return Object.entries(value).map(([key, inner]) => `${key} ${detail(inner)}`).join(", ");
  return known(value) && !Number.isInteger(value) ? fixed(value, 3) : String(value ?? DASH);
}

const details = (event) => Object.entries(event).map(([key, value]) => `${key} ${detail(value)}`).join(", ");

function total(items, ...path) {
  return items.reduce((sum, item) => sum + (path.reduce((value, key) => value?.[key], item) ?? 0), 0);
}

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function shape(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// The body of a table. A cell is text, a node, or [text, class]; headings give alignment and, on a phone, labels. Roles are
// said, because a table that is laid out as blocks loses its own.
function fill(id, rows, empty) {
  const table = byId(id), heads = [...table.tHead.rows[0].cells];
  for (const [node, role] of [[table, "table"], [table.tHead, "rowgroup"], [table.tHead.rows[0], "row"], [table.tBodies[0], "rowgroup"]]) {
    node.setAttribute("role", role);
  }
  heads.forEach((head) => head.setAttribute("role", "columnheader"));
  const built = rows.map((cells) => {
    const row = element("tr", "", ...cells.map((cell, i) => {
      const [content, tone] = Array.isArray(cell) ? cell : [cell, ""];
      const node = element(i ? "td" : "th", [heads[i]?.className, tone].filter(Boolean).join(" "), element("span", "", content));
      if (i) node.dataset.label = heads[i]?.textContent ?? "";
      else node.scope = "row";
      node.setAttribute("role", i ? "cell" : "rowheader");
      return node;
    }));
    row.setAttribute("role", "row");
    return row;
  });
  if (!built.length) {
    const none = element("td", "soft", empty);
    none.colSpan = Math.max(1, heads.length);
    built.push(element("tr", "", none));
  }
  table.tBodies[0].replaceChildren(...built);
}

// Terms and what they are: pairs of text, or [term, text, class]; those without a value are left out.
function facts(id, pairs) {
  byId(id).replaceChildren(...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([term, value, tone]) => [element("dt", "", term), element("dd", tone ?? "", value)]));
}

function sparkline(name, values, high) {
  const width = 180, height = 34, pad = 4;
  const x = (i) => pad + (values.length < 2 ? 0 : (i * (width - 2 * pad)) / (values.length - 1));
  const y = (v) => height - pad - ((v - 1) / Math.max(high - 1, 1e-9)) * (height - 2 * pad);
  const label = `${name}: MAL ${fixed(values[0])} to ${fixed(values[values.length - 1])} over recent requests`;
  return shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    shape("line", { class: "floor", x1: 0, x2: width, y1: y(1), y2: y(1) }),
    shape("polyline", { class: "curve", points: values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" ") }),
    shape("circle", { class: "dot", r: 3, cx: x(values.length - 1), cy: y(values[values.length - 1]) }));
}

function meter(share, label, width = 240) {
  const height = 10, part = Math.max(0, Math.min(1, share));
  return shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    shape("rect", { class: "track", width, height, rx: 5 }), shape("rect", { class: "fill", width: part * width, height, rx: 5 }));
}
