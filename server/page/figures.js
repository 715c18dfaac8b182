// What can be said in numbers: rates, tenants, acceptance, distance from the ideal, totals.

import { amount, count, percent, time } from "./format.js";

const RATE_MS = 3000; // over which tokens a second are counted

// Totals of the feed, and the names that they have in /metrics.
const TOTALS = {
  steps_total: "quire_engine_steps_total",
  prompt_tokens_total: "quire_engine_prompt_tokens_total",
  generated_tokens_total: "quire_engine_generated_tokens_total",
  prefix_query_tokens_total: "quire_prefix_cache_queries_total",
  prefix_hit_tokens_total: "quire_prefix_cache_hits_total",
  preemptions_total: "quire_num_preemptions_total",
  evicted_blocks_total: "quire_evicted_blocks_total",
  expired_total: "quire_engine_expired_total",
  aborted_total: "quire_engine_aborted_total",
  failed_total: "quire_engine_failed_total",
};

const at = (id) => document.getElementById(id);

function say(id, text) {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
}

/** Rows of cells into a table's body; the first of each is its heading. */
function fill(table, rows) {
  table.tBodies[0].replaceChildren(
    ...rows.map(([heading, ...cells]) => {
      const row = document.createElement("tr");
      const first = document.createElement("th");
      first.scope = "row";
      first.textContent = heading;
      row.append(first);
      for (const cell of cells) row.insertCell().textContent = cell;
      return row;
    }),
  );
}

const looks = []; // [milliseconds, totals] of the last while, for rates

function rate(name) {
  const [[began, before], [ended, now]] = [looks[0], looks.at(-1)];
  return ended > began ? Math.max(0, (1000 * (now[name] - before[name])) / (ended - began)) : 0;
}

/** Forget what rates were counted from: the feed was away. */
export function forget() {
  looks.length = 0;
}

export function showFigures({ now, totals }, limits) {
  const clock = performance.now();
  looks.push([clock, totals]);
  while (looks.length > 2 && clock - looks[0][0] > RATE_MS) looks.shift();
  say("fig-generated", amount(rate("generated_tokens_total")));
  say("fig-prompt", amount(rate("prompt_tokens_total")));
  say("fig-running", count(now.running));
  say("fig-places", limits ? `of ${count(limits.max_num_seqs)}` : "");
  say("fig-waiting", count(now.waiting));
  say("fig-wait", now.queue_seconds > 0 ? `≈ ${time(now.queue_seconds)}` : "");
  say("fig-kv", amount((100 * now.kv_blocks_used) / Math.max(now.kv_blocks_total, 1)));
  const queries = totals.prefix_query_tokens_total;
  say("fig-hits", queries ? amount((100 * totals.prefix_hit_tokens_total) / queries) : "–");
}

export function showTenants(tenants) {
  const rows = tenants.map((tenant) => [tenant.tenant || "without a name", ...["waiting", "running", "blocks"].map((name) => count(tenant[name]))]);
  fill(at("tenants"), rows);
  at("tenants").hidden = !rows.length;
  at("tenants-empty").hidden = rows.length > 0;
}

export function showSpeculation({ drafted_by_position: drafted, accepted_by_position: accepted, draft_tokens_total: guessed, accepted_tokens_total: right }, limits) {
  const method = limits?.speculative_method ?? "none";
  const on = method !== "none";
  at("spec").hidden = !on;
  at("spec-empty").hidden = on;
  if (!on) return say("spec-note", "");
  say("spec-note", `${method} ${limits.speculative_tree}: ${count(right)} of ${count(guessed)} accepted, ${guessed ? percent(right / guessed) : "–"}`);
  fill(at("spec"), drafted.map((number, k) => [`${k + 1}`, count(number), number ? percent((accepted[k] ?? 0) / number) : "–"]));
}

export function showTotals(totals) {
  const rows = Object.entries(TOTALS).map(([name, metric]) => [metric, count(totals[name])]);
  fill(at("totals"), rows);
}
