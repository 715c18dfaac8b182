// The page: frames of the feed to its panels, the key, and how the engine is.

import { Blocks } from "./blocks.js";
import { follow } from "./feed.js";
import { forget, showFigures, showSpeculation, showTenants, showTotals } from "./figures.js";
import { count, percent } from "./format.js";
import { request, useKey } from "./http.js";
import { Ideal } from "./ideal.js";
import { startPlayground } from "./playground.js";
import { Spread } from "./spread.js";
import { Steps } from "./steps.js";

const at = (id) => document.getElementById(id);

const steps = new Steps(at("steps"), at("steps-reading"), at("steps-legend"));
const blocks = new Blocks(at("blocks"), at("blocks-key"), at("blocks-note"));
const ttft = new Spread(at("ttft"), at("ttft-percentiles"), "Time to first token");
const ideal = new Ideal(at("ideal"), at("ideal-key"), at("ideal-steps"), at("ideal-contention"));
const itl = new Spread(at("itl"), at("itl-percentiles"), "Time between tokens");

let limits = null; // what /version tells of the engine that serves
let lastState = "";

const WORDS = {
  connecting: "connecting",
  starting: "starting",
  serving: "serving",
  draining: "draining: what runs may finish",
  hung: "the engine has not moved for a while",
  restarting: "the engine has ended and is being started again",
  dead: "the engine is gone for good",
  unreachable: "the server does not answer",
  locked: "a key is needed",
};

/** The state in words, said aloud only when it changes. */
function showLife(state, detail = "") {
  const life = at("life");
  const text = WORDS[state] + detail;
  life.dataset.state = state;
  if (at("life-text").textContent !== text) at("life-text").textContent = text;
}

async function learn() {
  try {
    limits = await (await request("/version")).json();
    at("model").textContent = limits.model;
    document.title = `Quire: ${limits.model}`;
    const parameters = limits.num_parameters >= 1e9 ? `${(limits.num_parameters / 1e9).toFixed(1)} billion` : `${Math.round(limits.num_parameters / 1e6)} million`;
    const weights = limits.quantization === "none" ? limits.dtype : limits.quantization;
    at("facts").textContent = `${parameters} parameters in ${weights} on ${limits.device}, context ${count(limits.max_model_len)}, version ${limits.version}`;
  } catch {
    limits = null; // it is asked again with a later frame
  }
}

function show(frame) {
  const { life } = frame;
  const progress = life.phase ? `: ${life.phase}${life.done ? ` ${percent(life.done)}` : ""}` : "";
  const restarts = life.state === "serving" && life.restarts ? `, after ${life.restarts === 1 ? "a restart" : `${count(life.restarts)} restarts`}` : "";
  showLife(life.state, progress + restarts);
  if (life.state === "serving" && lastState !== "serving") learn();
  lastState = life.state;
  if (!frame.now) return;
  steps.add(frame.steps, frame.totals.steps_total);
  blocks.show(frame.blocks, limits?.block_size, limits?.kv_cache_dtype);
  ttft.show(frame.latency.ttft);
  itl.show(frame.latency.itl);
  showFigures(frame, limits);
  showTenants(frame.tenants);
  showSpeculation(frame.totals, limits);
  ideal.show(steps.steps, frame.latency.contention);
  if (at("totals").closest("details").open) showTotals(frame.totals);
}

function trouble(refused) {
  lastState = "";
  forget();
  if (refused.wantsKey) {
    showLife("locked");
    askForKey(refused.message);
  } else if (refused.code === "too_many_watchers") {
    showLife("unreachable", `: ${refused.message}`);
  } else {
    showLife("unreachable", "; trying again");
  }
}

function askForKey(why = "") {
  at("key-why").textContent = `${why} The key stays in this tab until you close it.`.trim();
  if (!at("key-dialog").open) at("key-dialog").showModal();
}

at("key-button").addEventListener("click", () => askForKey());
at("key-cancel").addEventListener("click", () => at("key-dialog").close("cancel"));
at("key-dialog").addEventListener("close", () => {
  if (at("key-dialog").returnValue !== "use") return;
  useKey(at("key").value.trim());
  at("key").value = "";
  again();
});
at("pause").addEventListener("click", () => {
  steps.paused = !steps.paused;
  at("pause").setAttribute("aria-pressed", String(steps.paused));
  at("pause").textContent = steps.paused ? "Go on" : "Pause";
});

startPlayground(askForKey);
const again = follow(show, trouble);
