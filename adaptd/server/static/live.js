// Keeps the page as the daemon is: server-sent events where they work, else a question every two seconds.
"use strict";
// Milliseconds: between two polls; for an answer; until the stream is tried again; of silence before it counts as broken;
// between two looks at the figures over time.
const PACE = { poll: 2000, answer: 5000, again: 15000, silence: 30000, trends: [10000, 60000] };
const RENDERERS = [renderTiles, renderNotices, renderDomains, renderDepth, renderEconomics, renderVersions, renderLearner, renderServers,
  renderBuffer, renderEvents];
const link = { source: null, open: false, poll: null, again: null, silence: null, trends: null, lastSeen: null, lastEvent: null };

function renderState(text, className) {
  const badge = byId("state");
  badge.className = `badge ${className}`;
  if (badge.textContent !== text) badge.textContent = text;
}

function show(status) {
  byId("about").textContent = [status.deployment, status.adaptd_version, status.engine && `engine ${status.engine}`,
    known(status.k) && `k = ${status.k}`].filter(Boolean).join(" \u00b7 ");
  for (const render of RENDERERS) render(status);
  document.body.dataset.link = link.open ? "stream" : "poll";
  document.body.classList.remove("stale");
  link.lastSeen = new Date();
  renderState(status.draining ? "draining" : "serving", status.draining ? "warn" : "good");
  const newest = JSON.stringify(status.events?.at(-1) ?? null);
  if (link.lastEvent !== null && newest !== link.lastEvent) loadTrends();
  link.lastEvent = newest;
}

function stale(reason) {
  document.body.classList.add("stale");
  renderState(`no status (${reason})${link.lastSeen ? `; shown: ${link.lastSeen.toLocaleTimeString()}` : ""}`, "bad");
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PACE.answer) });
  const body = await answer.json().catch(() => null);
  if (!answer.ok || !body) throw new Error(body?.error?.message ?? `status ${answer.status}`);
  return body;
}

async function poll() {
  clearTimeout(link.poll);
  try {
    const status = await ask("/adaptd/status");
    if (!link.open) show(status);
  } catch (error) {
    if (!link.open) stale(error.message);
  }
  if (!link.open && !document.hidden) link.poll = setTimeout(poll, PACE.poll);
}

function heard() {
  clearTimeout(link.silence);
  link.silence = setTimeout(fallBack, PACE.silence);
}

// Poll from now on, and try the stream again after a while.
function fallBack() {
  disconnect();
  poll();
  link.again = setTimeout(connect, PACE.again);
}

function disconnect() {
  for (const timer of ["silence", "again", "poll"]) clearTimeout(link[timer]);
  link.source?.close();
  link.source = null;
  link.open = false;
}

// Polling goes on until the stream is open. A connection that broke, or was refused (draining, too many viewers), is tried
// again by `fallBack` and not by the browser, which would say nothing meanwhile.
function connect() {
  if (typeof EventSource === "undefined") {
    poll();
    return;
  }
  const source = link.source = new EventSource("/adaptd/stream");
  source.addEventListener("open", () => {
    link.open = true;
    heard();
  });
  source.addEventListener("status", (event) => { heard(); show(JSON.parse(event.data)); });
  source.addEventListener("failed", (event) => { heard(); stale(JSON.parse(event.data).error); });
  source.addEventListener("alive", heard);
  source.addEventListener("error", () => {
    if (link.source === source && !document.hidden) fallBack();
  });
}

async function loadTrends() {
  clearTimeout(link.trends);
  const period = chosen("period");
  try {
    const data = (await ask(`/adaptd/status?since=${period}`)).trends;
    if (period === chosen("period")) showTrends(data ?? null);
  } catch (error) {
    // What is shown stays; the badge says whether the daemon answers.
    if (!trends.data) showTrends({ error: error.message });
  }
  const wait = Math.min(PACE.trends[1], Math.max(PACE.trends[0], 500 * (trends.data?.step_s ?? 0)));
  if (!document.hidden) link.trends = setTimeout(loadTrends, wait);
}

for (const radio of document.querySelectorAll('input[name="period"]')) {
  radio.checked = location.hash ? location.hash === `#${radio.value}` : radio.checked;
  radio.addEventListener("change", () => {
    history.replaceState(null, "", `#${radio.value}`);
    loadTrends();
  });
}
if (!document.querySelector('input[name="period"]:checked')) document.querySelector('input[name="period"][value="6h"]').checked = true;

// A page that nobody sees asks nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    disconnect();
    clearTimeout(link.trends);
  } else {
    connect();
    loadTrends();
  }
});
connect();
loadTrends();
