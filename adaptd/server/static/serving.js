// Who serves and where traces go: servers, publisher, proxy, buffer, events; and what needs attention.
"use strict";

function publisherState(p) {
  if (!p) return DASH;
  if (!p.active) return `off: ${p.reason}`;
  if (p.halted) return [`halted: ${p.halted}`, "bad"];
  if (p.last_error) return [`last error: ${p.last_error}`, "bad"];
  return known(p.swapped_at) ? `${named(p.version)}, brought in ${clock(p.swapped_at)}` : `${named(p.version)}, nothing brought in yet`;
}

// The share in force, and why it is not more.
function captured({ in_force: share, bound_by: why, cost, budget }) {
  if (!known(share)) return "the requests captured";
  return `${percent(share, 0)} of the requests captured${why ? ` (${why})` : ""}; it slows requests by ${percent(cost)} while it is on, ` +
    `${percent(budget, 0)} over time are allowed`;
}

function renderServers(s) {
  const up = s.upstream, p = s.publisher, proxy = s.proxy;
  for (const [id, there] of [["servers-card", up], ["publisher-card", p], ["proxy-card", proxy]]) byId(id).hidden = !there;
  if (up) {
    const able = up.reason || `top ${up.top_logprobs} of ${captured(up.capture ?? {})}`;
    byId("servers-note").textContent = `${able}${up.per_step ? "" : "; no acceptance: start it with --per-request-spec-decode-metrics detailed"}`;
    fill("servers", (up.servers ?? []).map((one) => {
      const state = !one.up ? [`down: ${one.error || "no answer"}, since ${clock(one.since)}`, "bad"]
        : one.left_out ? [`left out: ${one.left_out}`, "warn"] : [`up since ${clock(one.since)}`, "good"];
      const role = up.servers.length < 2 ? "alone" : one.url === up.canary ? "canary: new drafts first" : "follows the canary";
      return [one.url, state, role, one.version ?? DASH, one.draft_version ?? DASH, count(one.in_flight), publisherState(one.publisher)];
    }), "none");
  }
  if (p) {
    facts("publisher", [
      ["state", ...[publisherState(p)].flat()],
      ["published", known(p.published) ? `${count(p.published)}; restored ${count(p.restored)}, lost ${count(p.lost)}` : ""],
      ["failed", listed(Object.entries(p.failed ?? {}).map(([reason, n]) => `${reason} ${n}`)), "warn"],
      ["longest pause", p.max_pause_s ? `${(1000 * p.max_pause_s).toFixed(0)} ms` : ""],
      ["target tensors", p.target_tensors_checked ? `${p.target_tensors_checked} checked` : ""],
      ["probe", p.last_probe],
      ["faults", p.faults ? count(p.faults) : "", "bad"],
    ]);
  }
  if (proxy) {
    const why = (counts) => listed(Object.entries(counts ?? {}).map(([reason, n]) => `${reason} ${count(n)}`)) || "none";
    facts("proxy", [
      ["requests", `${count(proxy.requests)}, ${count(proxy.in_flight)} in flight`],
      ["traces", `${count(proxy.built)} built, ${count(proxy.dropped)} dropped`, proxy.dropped ? "warn" : ""],
      ["not captured", why(proxy.uncaptured)],
      ["without a trace", why(proxy.refused)],
      ["troubles", `aborted ${count(proxy.aborted)}, unreachable ${count(proxy.unreachable)}, broken off ${count(proxy.broken)}, ` +
        `rerouted ${count(proxy.rerouted)}, faults ${count(proxy.faults)}`],
    ]);
  }
}

function renderBuffer(s) {
  const buffer = s.buffer ?? {}, note = byId("buffer-note"), writers = s.decoders ?? [];
  const written = `written ${count(total(writers, "writer", "written"))}, dropped before the buffer ${count(total(writers, "writer", "dropped"))}`;
  if (buffer.available === false) {
    note.className = "bad";
    note.textContent = `unavailable: ${buffer.error ?? "no reason given"} (serving goes on); ${written}`;
    fill("buffer", [], "not known");
    return;
  }
  const all = buffer.max_bytes ?? Math.max(1, ...Object.values(buffer.bytes ?? {}));
  const budget = known(buffer.max_bytes) ? ` of ${bytes(buffer.max_bytes)}` : "", refused = total(Object.values(buffer.refused_total ?? {}));
  note.className = "soft";
  note.textContent = `${bytes(buffer.stored_bytes)}${budget}; inserted ${count(buffer.inserted_total)}, evicted ${count(buffer.evicted_total)}, ` +
    `refused ${count(refused)}; ${written}`;
  fill("buffer", Object.entries(buffer.sizes ?? {}).map(([name, size]) => {
    const share = (buffer.bytes?.[name] ?? 0) / all;
    return [name, count(size), bytes(buffer.bytes?.[name]),
      name === "reserved" ? ["has its own", "soft"] : meter(share, `${name}: ${percent(share)}`)];
  }), "empty");
}

function renderEvents(s) {
  fill("events", [...(s.events ?? [])].reverse().map(({ at, kind, ...rest }) => [clock(at), kind ?? DASH, details(rest)]), "none yet");
}

function renderNotices(s) {
  const e = s.economics ?? {}, up = s.upstream, found = [];
  if (e.pays === false) found.push(`Speculation does not pay at the present load: tokens would come ${fixed(1 / e.speedup)} times as fast without it.`);
  if (s.buffer?.available === false) found.push("The replay buffer is unavailable: nothing is learned until it is back. Requests are served.");
  if (up && !up.up) found.push(`No server answers: ${up.error || "no reason given"}`);
  const down = (up?.servers ?? []).filter((one) => !one.up || one.left_out).map((one) => one.url);
  if (up?.up && down.length) found.push(`Without requests: ${listed(down)}`);
  for (const one of up?.servers ?? []) if (one.publisher?.halted) found.push(`The publisher of ${one.url} has halted: ${one.publisher.halted}`);
  if (s.watch?.quarantine_error) found.push(s.watch.quarantine_error);
  const list = byId("notices");
  // Written only where it changed: it is read out.
  if (list.textContent !== found.join("")) list.replaceChildren(...found.map((text) => element("li", "", text)));
}
