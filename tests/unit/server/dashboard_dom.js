// Runs the dashboard's script against a page of plain objects and prints what it would show, as JSON.
"use strict";
const fs = require("fs"), vm = require("vm");
const [script, status] = [fs.readFileSync(process.argv[2], "utf8"), JSON.parse(process.argv[3])];

class Node {
  constructor(tag) { this.tag = tag; this.children = []; this.attributes = {}; this.className = ""; this.classList = new Set(); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  get textContent() { return this.children.map((child) => (child instanceof Node ? child.textContent : child)).join(" "); }
  set textContent(text) { this.children = [text]; }
  all(tag) { return this.children.filter((c) => c instanceof Node).flatMap((c) => (c.tag === tag ? [c] : []).concat(c.all(tag))); }
}

const nodes = {}, found = { polled: null, again_ms: null };
const body = new Node("body");
body.classList.remove = body.classList.delete;
const context = {
  document: {
    body,
    getElementById: (id) => (nodes[id] ??= new Node(id)),
    createElement: (tag) => new Node(tag),
    createElementNS: (_, tag) => new Node(tag),
  },
  fetch: async (path) => {
    found.polled = path;
    if (status === null) throw new Error("connection refused");
    return { ok: true, json: async () => status };
  },
  AbortSignal: { timeout: () => undefined },
  setTimeout: (_, ms) => { found.again_ms = ms; },
};
vm.runInNewContext(script, context);
setImmediate(() => {
  const text = (id) => (nodes[id] ? nodes[id].textContent : "");
  console.log(JSON.stringify({
    ...found, state: text("state"), tiles: text("tiles"), domains: text("domains"), buffer: text("buffer"),
    buffer_note: text("buffer-note"), events: text("events"),
    curves: (nodes.domains ? nodes.domains.all("polyline") : []).map((node) => node.attributes.points),
  }));
});
