// One answer as it is drawn: text, or tokens coloured by how likely each was, with its rivals at hand.

import { amount } from "./format.js";

// A token's class is the first whose probability it reaches; underlines tell them apart without colour.
const CLASSES = [[0.9, 4], [0.5, 3], [0.2, 2], [0.05, 1], [0, 0]];
const NAMES = { 4: "90 % or more", 3: "50 to 90 %", 2: "20 to 50 %", 1: "5 to 20 %", 0: "below 5 %" };
const SPECIAL = /^<[^\s<>]+>$/; // how tokens are spelled that are no text

const probability = (logprob) => Math.exp(logprob);
const classOf = (logprob) => CLASSES.find(([least]) => probability(logprob) >= least)[1];
const shown = (logprob) => `${amount(100 * probability(logprob))} %`;
const visible = (token) => JSON.stringify(token).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "\u2423");

/** A chat's or a completion's log-probabilities in one shape: [{token, logprob, bytes?, rivals: [[token, logprob]]}]. */
export function drawnTokens(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, bytes, top_logprobs: top }) => ({
      token, logprob, bytes, rivals: top.map((rival) => [rival.token, rival.logprob]),
    }));
  }
  return (logprobs?.tokens ?? []).map((token, i) => ({
    token, logprob: logprobs.token_logprobs[i], rivals: Object.entries(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

export function legend() {
  return Object.keys(NAMES).reverse().map((name) => {
    const sample = document.createElement("span");
    const words = document.createElement("span");
    sample.className = "t";
    sample.dataset.p = name;
    sample.textContent = "token";
    words.append(sample, ` ${NAMES[name]}`);
    return words;
  });
}

/** Shows a token's rivals beside it while it is pointed at or has the focus. */
export class Rivals {
  constructor(popup) {
    this.popup = popup;
    this.of = new WeakMap();
  }

  attach(span, drawn) {
    this.of.set(span, drawn);
  }

  watch(container) {
    const open = (event) => this.of.has(event.target) && this.open(event.target);
    container.addEventListener("focusin", open);
    container.addEventListener("pointerover", open);
    for (const name of ["focusout", "pointerout"]) container.addEventListener(name, () => this.close());
    container.addEventListener("keydown", (event) => this.move(event));
    container.addEventListener("focus", (event) => event.target === container && container.querySelector(".t")?.focus());
  }

  move(event) {
    const steps = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
    const to = event.key === "Home" ? event.currentTarget.firstElementChild
      : event.key === "End" ? event.currentTarget.lastElementChild
      : event.key in steps ? event.target[steps[event.key]] : null;
    if (!to?.matches(".t")) return;
    event.preventDefault();
    to.focus();
  }

  open(span) {
    const { token, logprob, rivals } = this.of.get(span);
    const all = rivals.some(([name]) => name === token) ? rivals : [[token, logprob], ...rivals];
    const table = document.createElement("table");
    for (const [name, value] of all) {
      const row = table.insertRow();
      row.className = name === token ? "drawn" : "";
      row.insertCell().textContent = `${name === token ? "▸" : " "} ${visible(name)}`;
      row.insertCell().textContent = shown(value);
    }
    this.popup.replaceChildren(table);
    this.popup.hidden = false;
    span.setAttribute("aria-describedby", this.popup.id);
    const [box, size] = [span.getBoundingClientRect(), this.popup.getBoundingClientRect()];
    const right = document.documentElement.clientWidth - size.width - 8;
    this.popup.style.left = `${scrollX + Math.max(8, Math.min(box.left, right))}px`;
    this.popup.style.top = `${scrollY + (box.bottom + size.height + 8 > innerHeight ? box.top - size.height - 6 : box.bottom + 6)}px`;
  }

  close() {
    this.popup.hidden = true;
  }
}

/** The card of one sample. */
export class Answer {
  constructor(index, rivals) {
    this.rivals = rivals;
    this.text = "";
    this.drawn = 0;
    this.decoder = new TextDecoder();
    this.card = document.createElement("article");
    this.card.className = "sample";
    const heading = document.createElement("h3");
    this.state = document.createElement("small");
    heading.append(`Sample ${index + 1}`, this.state);
    this.thought = document.createElement("p");
    this.thought.className = "thought";
    this.thought.hidden = true;
    this.tokens = document.createElement("div");
    this.tokens.className = "tokens";
    this.tokens.tabIndex = 0;
    this.tokens.setAttribute("role", "group");
    this.tokens.setAttribute("aria-label", `Text of sample ${index + 1}; arrow keys go from token to token`);
    rivals.watch(this.tokens);
    this.card.append(heading, this.thought, this.tokens);
  }

  think(text) {
    this.thought.hidden = false;
    this.thought.append(text);
  }

  /** `text` that has been drawn; with `drawn` it is shown token by token. */
  add(text, drawn) {
    this.text += text;
    this.drawn += drawn.length;
    if (drawn.length) this.tokens.append(...drawn.map((token) => this.span(token)));
    else if (text) this.tokens.append(text);
    if (this.tokens.scrollHeight - this.tokens.scrollTop - this.tokens.clientHeight < 60) this.tokens.scrollTop = this.tokens.scrollHeight;
  }

  span(drawn) {
    const span = document.createElement("span");
    span.className = "t";
    span.tabIndex = -1;
    span.dataset.p = String(classOf(drawn.logprob));
    // Bytes: a token need not be whole characters, and those of several make one.
    if (SPECIAL.test(drawn.token)) {
      span.classList.add("special");
      span.textContent = drawn.token;
    } else {
      span.textContent = drawn.bytes ? this.decoder.decode(new Uint8Array(drawn.bytes), { stream: true }) : drawn.token;
    }
    this.rivals.attach(span, drawn);
    return span;
  }

  say(state) {
    this.state.textContent = state;
  }
}
