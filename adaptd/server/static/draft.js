// What the draft is worth: acceptance, versions and their watch, the learner and its gate, whether speculation pays.
"use strict";

function tile(label, value, note) {
  return element("div", "card tile", element("span", "", label), element("b", "", value), element("span", "", note));
}

function renderTiles(s) {
  const draft = s.draft ?? {}, seen = s.acceptance ?? {}, decoders = s.decoders ?? [], learner = s.learner, worth = s.economics ?? {};
  const live = listed([...new Set(decoders.map((d) => d.draft_version))].sort((a, b) => a - b)) || "none up";
  const pause = Math.max(0, ...decoders.map((d) => d.swap?.max_pause_s ?? 0));
  const who = s.upstream ? "servers" : "decoders", speedup = worth.measured ?? worth.expected;
  byId("tiles").replaceChildren(
    tile("draft version", draft.version ?? DASH,
      `${known(draft.age_s) ? duration(draft.age_s) + " old" : "day 0"}, ${draft.scope ?? DASH}; ${who} at ${live}`),
    tile("MAL now", fixed(seen.now?.mal), `1 h ${fixed(seen["1h"]?.mal)}, 24 h ${fixed(seen["24h"]?.mal)}`),
    tile("accepted now", percent(seen.now?.token_acceptance),
      `1 h ${percent(seen["1h"]?.token_acceptance)}, 24 h ${percent(seen["24h"]?.token_acceptance)}`),
    tile("speed-up", known(speedup) ? fixed(speedup) + "\u00d7" : DASH,
      known(speedup) ? (known(worth.measured) ? "measured, over no speculation" : "expected, over no speculation") : "not known yet"),
    learner ? tile("learner steps", count(learner.steps),
      `loss ${fixed(learner.last_loss, 3)}; ${count(learner.promoted)} promoted, ${count(learner.rejected)} rejected`)
      : tile("learner", "off", "learn.enabled is false, or it is starting"),
    tile("swaps", count(total(decoders, "swap", "swaps")),
      `${total(decoders, "swap", "refusals")} refused; longest pause ${(1000 * pause).toFixed(1)} ms`),
    tile("in flight", count(s.in_flight), `up ${duration(s.uptime_s)}`));
}

function renderDomains(s) {
  const seen = s.acceptance ?? {}, domains = Object.entries(seen.domains ?? {}).sort();
  const high = Math.max(1.5, ...domains.flatMap(([, d]) => (d.sparkline ?? []).filter(known)));
  const drifts = seen.drift?.events ?? [];
  const rows = (domains.length ? [...domains, ["all", seen]] : []).map(([name, d]) => {
    const line = (d.sparkline ?? []).filter(known), drift = drifts.filter((e) => e.domain === name).pop();
    const moved = drift ? `${clock(drift.at)}, ${drift.direction}: ${percent(drift.before, 0)} to ${percent(drift.after, 0)}` : "none seen";
    return [name, count(d["24h"]?.requests), fixed(d.now?.mal), fixed(d["1h"]?.mal), fixed(d["24h"]?.mal),
      percent(d.now?.token_acceptance), line.length ? sparkline(name, line, high) : DASH, [moved, drift ? "warn" : "soft"]];
  });
  fill("domains", rows, "no requests yet");
}

function renderDepth(s) {
  const seen = s.acceptance ?? {}, domains = Object.entries(seen.domains ?? {}).sort();
  const rows = [...domains, ["all", seen]].filter(([, d]) => (d.now?.by_depth ?? []).some(known));
  const depths = Math.max(0, ...rows.map(([, d]) => d.now.by_depth.length));
  const heads = ["domain", ...Array.from({ length: depths }, (_, i) => `depth ${i + 1}`), "whole block"];
  const row = byId("depth").tHead.rows[0];
  if (row.cells.length !== heads.length) row.replaceChildren(...heads.map((head, i) => element("th", i > 0 && i < depths + 1 ? "" : i ? "number" : "", head)));
  const bar = (name, share, i) => {
    if (!known(share)) return DASH;
    return element("span", "", percent(share, 0), meter(share, `${name}, depth ${i + 1}: ${percent(share, 0)}`, 44));
  };
  fill("depth", rows.map(([name, d]) => [name, ...d.now.by_depth.map((share, i) => bar(name, share, i)), percent(d.now.block_acceptance)]),
    s.upstream && !s.upstream.per_step ? "the server does not tell (docs/sidecar.md)" : "no requests yet");
}

function renderEconomics(s) {
  const e = s.economics ?? {}, verdict = byId("verdict");
  verdict.className = `verdict ${e.pays === true ? "good" : e.pays === false ? "bad" : "soft"}`;
  verdict.textContent = e.pays === true ? `Yes: tokens come ${fixed(e.speedup)} times as fast as without it.`
    : e.pays === false ? `No: tokens would come ${fixed(1 / e.speedup)} times as fast without it.`
      : `Not known: ${e.reason || "nothing was measured yet"}.`;
  facts("economics", [
    ["expected", known(e.expected) ? fixed(e.expected) + "\u00d7, MAL / (1 + k c_d + c_v)" : ""],
    ["measured", known(e.measured) ? fixed(e.measured) + "\u00d7, from whole rounds" : ""],
    ["breaks even at", known(e.break_even_mal) ? `MAL ${fixed(e.break_even_mal)}; now ${fixed(e.mal)}` : ""],
    ["c_d, c_v", known(e.c_d) ? `${fixed(e.c_d, 3)}, ${fixed(e.c_v, 3)} of a target step` : ""],
    ["round", known(e.round_s) ? `${(1000 * e.round_s).toFixed(1)} ms at batch ${fixed(e.batch, 1)}` : ""],
    ["k", known(e.best_k) && e.best_k !== e.k ? `${e.k}; ${e.best_k} would give ${fixed(e.best_expected)}\u00d7` : known(e.k) ? e.k : ""],
    ["k now", Object.entries(e.draft_lengths ?? {}).map(([domain, k]) => `${domain} ${fixed(k, 1)}`).join(", ")],
  ]);
}

function renderVersions(s) {
  const w = s.watch ?? {}, quarantined = Object.entries(w.quarantined ?? {}), watching = w.watching ?? [];
  const compared = known(w.accepted) ? `; ${percent(w.accepted)} accepted, ${percent(w.expected)} expected` : "";
  facts("versions", [
    ["live", `${named(s.draft?.version)}${known(s.draft?.age_s) ? `, ${duration(s.draft.age_s)} old` : ""}`],
    ["at work", listed((s.decoders ?? []).map((d) => named(d.draft_version))) || "none up"],
    ["settled", known(w.settled) ? named(w.settled) : ""],
    ["watch", w.on === false ? "off (gate.watch is false)" : watching.length
      ? `${named(listed(watching))} against ${named(w.before)}: ${count(w.requests)} of ${count(w.max_requests)} requests${compared}`
      : "nothing unconfirmed"],
    ["promise", w.promise && w.promise !== "none" ? `${signed(w.promised_gain)}, ${w.promise}` : "", w.promise === "broken" ? "bad" : ""],
    ["confirmed", known(w.confirmed) ? `${w.confirmed}; rolled back ${w.rolled_back}` : "", w.rolled_back ? "warn" : ""],
    ["canary", s.upstream?.canary],
    ...quarantined.map(([version, reason]) => ["quarantined", `version ${version}: ${reason}`, "bad"]),
    ["quarantine", w.quarantine_error, "bad"],
  ]);
}

function renderLearner(s) {
  const l = s.learner;
  if (!l) {
    facts("learner", [["state", "off (learn.enabled is false), or it is starting"]]);
    fill("verdicts", [], "none yet");
    return;
  }
  facts("learner", [
    ["steps", `${count(l.steps)} in ${count(l.ticks)} ticks`],
    ["last loss", fixed(l.last_loss, 3)],
    ["promoted", `${count(l.promoted)}; rejected ${count(l.rejected)}`],
    ["skipped steps", l.skipped_steps ? count(l.skipped_steps) : "", "warn"],
    ["restarts", count(l.restarts)],
  ]);
  fill("verdicts", [...(l.history ?? [])].reverse().map((tick) => {
    const verdict = tick.verdict ?? {}, kept = verdict.on_base?.length ? `; on the base draft: ${listed(verdict.on_base)}` : "";
    const said = tick.published ? `version ${tick.published} published: ` : "";
    return [clock(tick.at), tick.reason ?? DASH, fixed(tick.loss, 3), interval(verdict.gain),
      [said + (verdict.reason ?? "no verdict") + kept, tick.published ? "good" : ""]];
  }), "none yet");
}
