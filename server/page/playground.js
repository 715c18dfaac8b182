// Ask the model something, from this page: a chat or a completion, streamed, several samples side by side.

import { amount, count, plural, time } from "./format.js";
import { events, Refused, request } from "./http.js";
import { Answer, drawnTokens, legend, Rivals } from "./tokens.js";

const NUMBERS = [
  "temperature", "top_p", "max_tokens", "n", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
  "frequency_penalty",
];
const TOP = 5; // rivals shown of each token

const at = (id) => document.getElementById(id);
const rivals = new Rivals(at("rivals"));

let talk = []; // the conversation, without what is being answered
let answers = [];
let controller = null; // of the request that is running

const mode = () => new FormData(at("ask")).get("mode");

/** What the form says as the body of a request; a field that is empty is left to the server. */
function bodyOf(form) {
  const body = { stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const value = at(name).value.trim();
    if (value !== "") body[name] = Number(value);
  }
  const stops = at("stop").value.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  const wanted = at("logprobs").checked;
  if (form === "chat") {
    const system = at("system").value.trim();
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...talk];
    if (wanted) [body.logprobs, body.top_logprobs] = [true, TOP];
    return ["/v1/chat/completions", body];
  }
  body.prompt = at("prompt").value;
  if (wanted) body.logprobs = TOP;
  return ["/v1/completions", body];
}

function showTalk() {
  at("talk").replaceChildren(
    ...talk.map(({ role, content }) => {
      const item = document.createElement("li");
      item.dataset.role = role;
      item.textContent = content;
      return item;
    }),
  );
  at("talk").scrollTop = at("talk").scrollHeight;
}

function busy(running) {
  at("send").disabled = running;
  at("stop-button").disabled = !running;
}

/** A chunk's choices into their cards. */
function take(chunk) {
  for (const choice of chunk.choices) {
    const answer = answers[choice.index];
    const { reasoning = "", content } = choice.delta ?? {};
    if (reasoning) answer.think(reasoning);
    answer.add((choice.delta ? content : choice.text) ?? "", drawnTokens(choice.logprobs));
    if (choice.finish_reason) answer.say(choice.finish_reason);
  }
}

function outcome(usage, began, first) {
  if (!usage) return "";
  const parts = [`${plural(usage.prompt_tokens, "prompt token")}`];
  const cached = usage.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${count(cached)} of them from the cache`);
  parts.push(`${count(usage.completion_tokens)} drawn`);
  const accepted = usage.completion_tokens_details?.accepted_prediction_tokens;
  if (accepted) parts.push(`${count(accepted)} of them guessed ahead`);
  const seconds = (performance.now() - first) / 1000;
  parts.push(`first after ${time((first - began) / 1000)}`);
  if (usage.completion_tokens > 1 && seconds > 0) parts.push(`${amount(usage.completion_tokens / seconds)} tok/s`);
  return `${parts.join(", ")}.`;
}

async function ask(onLocked) {
  const form = mode();
  at("problem").textContent = at("outcome").textContent = "";
  if (!at("ask").reportValidity()) return;
  const before = [...talk];
  const message = at("prompt").value;
  if (form === "chat") {
    if (talk.at(-1)?.role === "user") {
      if (answers[0]?.text) talk.push({ role: "assistant", content: answers[0].text });
      else talk.pop(); // it was stopped before a word came
    }
    talk.push({ role: "user", content: message });
  }
  const [path, body] = bodyOf(form);
  answers = Array.from({ length: body.n ?? 1 }, (_, index) => new Answer(index, rivals));
  at("samples").replaceChildren(...answers.map((answer) => answer.card));
  at("scale").replaceChildren(...(at("logprobs").checked ? legend() : []));
  at("scale").hidden = !at("logprobs").checked;
  controller = new AbortController();
  busy(true);
  const began = performance.now();
  let [first, usage] = [0, null];
  try {
    const response = await request(path, { body, signal: controller.signal });
    if (form === "chat") {
      at("prompt").value = "";
      showTalk();
    }
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Refused(500, chunk.error.message, chunk.error.code);
      first ||= performance.now();
      take(chunk);
      usage = chunk.usage ?? usage;
    }
    at("outcome").textContent = outcome(usage, began, first);
  } catch (error) {
    if (error.name === "AbortError") {
      for (const answer of answers) if (!answer.state.textContent) answer.say("stopped");
      at("outcome").textContent = "Stopped; the engine has let go of it.";
    } else {
      if (!first && form === "chat") {
        talk = before;
        at("prompt").value ||= message;
        showTalk();
      }
      at("problem").textContent = error instanceof Refused ? error.message : `The answer broke off: ${error.message}`;
      if (error.wantsKey) onLocked(error.message);
    }
  } finally {
    controller = null;
    busy(false);
  }
}

function dress() {
  const chat = mode() === "chat";
  for (const element of document.querySelectorAll(".chat-only")) element.hidden = !chat;
  at("prompt-label").textContent = chat ? "Message" : "Text to go on with";
}

/** `onLocked(why)` is called when the server wants a key. */
export function startPlayground(onLocked) {
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!controller) ask(onLocked);
  });
  at("ask").addEventListener("change", dress);
  at("stop-button").addEventListener("click", () => controller?.abort());
  at("clear").addEventListener("click", () => {
    [talk, answers] = [[], []];
    at("samples").replaceChildren();
    at("outcome").textContent = at("problem").textContent = "";
    at("scale").hidden = true;
    showTalk();
    at("prompt").focus();
  });
  at("playground").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      at("ask").requestSubmit();
    }
    if (event.key === "Escape") controller?.abort();
  });
  dress();
}
