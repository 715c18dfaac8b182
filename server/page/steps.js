// The batches of the latest steps: a column each, prompts above the line, streams below, and under them the time.

import { block, colours, round, scheme, stillness, surface, swatch } from "./canvas.js";
import { amount, count, plural } from "./format.js";

const COLUMN = 5; // CSS pixels of a step, one of them a gap
const KEPT = 600; // steps: as many as fit on a wide screen
const LEFT = 46; // for the axes
const STILL_MS = 1000; // between drawings for who wants no motion

// How each part is drawn: its name in the legend, the way and the colour.
const PARTS = {
  packed: ["whole prompts, packed", "solid"],
  chunk: ["chunks of long prompts", "striped"],
  decode: ["streams, a token each", "solid"],
  accepted: ["guesses, accepted", "dotted"],
  refused: ["guesses, in vain", "hollow"],
};

/** A row of the feed, by name. */
export function stepOf(row, number) {
  const [decodes, packedPrompts, packed, chunkPrompts, chunk, drafted, accepted, padding, ms, predicted, host, guessing] = row;
  return {
    number, decodes, packedPrompts, packed, chunkPrompts, chunk, drafted, accepted, refused: drafted - accepted, padding,
    ms, predicted, host, guessing,
  };
}

/** What all but one in fifty stay below: an axis that a single pause stretched would show nothing else. */
const usual = (values) => values.toSorted((a, b) => a - b)[Math.floor(0.98 * (values.length - 1))] ?? 0;

/** One sentence that says what a step was. */
export function describe(step) {
  const parts = [];
  if (step.packed) parts.push(`${plural(step.packedPrompts, "prompt")} whole (${plural(step.packed, "token")})`);
  if (step.chunk) parts.push(`${plural(step.chunkPrompts, "prompt")} in part (${plural(step.chunk, "token")})`);
  parts.push(plural(step.decodes, "stream"));
  if (step.drafted) parts.push(`${plural(step.drafted, "guess", "guesses")}, ${count(step.accepted)} accepted`);
  if (step.padding > 0) parts.push(`${count(step.padding)} padding`);
  return `Step ${count(step.number)}: ${parts.join(", ")}; ${amount(step.ms)} ms, predicted ${amount(step.predicted)} ms.`;
}

export class Steps {
  constructor(canvas, reading, legend) {
    this.steps = [];
    this.paused = false;
    this.canvas = canvas;
    this.reading = reading;
    this.legend = legend;
    this.cursor = null; // the number of the step that is read
    this.drawnAt = -Infinity;
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("pointermove", (event) => this.read(this.at(event.offsetX)));
    canvas.addEventListener("pointerleave", () => this.read(null));
    canvas.addEventListener("blur", () => this.read(null));
    new ResizeObserver(() => this.draw()).observe(canvas);
    scheme.addEventListener("change", () => this.dress());
    this.dress();
  }

  /** `rows` of a frame whose last step has this number. */
  add(rows, last) {
    if (this.paused || !rows.length) return;
    rows.forEach((row, i) => this.steps.push(stepOf(row, last - rows.length + 1 + i)));
    this.steps.splice(0, this.steps.length - KEPT);
    if (!stillness.matches || performance.now() - this.drawnAt > STILL_MS) this.draw();
  }

  dress() {
    const colour = colours(...Object.keys(PARTS));
    this.legend.replaceChildren(
      ...Object.entries(PARTS).map(([part, [name, way]]) => {
        const item = document.createElement("li");
        item.append(swatch(way, colour[part]), name);
        return item;
      }),
    );
    this.draw();
  }

  shown() {
    return this.steps.slice(-Math.max(1, Math.floor((this.canvas.clientWidth - LEFT) / COLUMN)));
  }

  at(x) {
    const shown = this.shown();
    return shown[shown.length - 1 - Math.floor((this.canvas.clientWidth - x) / COLUMN)] ?? null;
  }

  onKey(event) {
    const shown = this.shown();
    if (!shown.length) return;
    const here = shown.findIndex((step) => step.number === this.cursor);
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
    if (event.key in moves) this.read(shown[Math.min(Math.max((here < 0 ? shown.length : here) + moves[event.key], 0), shown.length - 1)]);
    else if (event.key === "Home") this.read(shown[0]);
    else if (event.key === "End") this.read(shown.at(-1));
    else if (event.key === "Escape") this.read(null);
    else return;
    event.preventDefault();
  }

  read(step) {
    this.cursor = step?.number ?? null;
    this.reading.textContent = step ? describe(step) : "\u00a0";
    this.draw();
  }

  draw() {
    this.drawnAt = performance.now();
    const { context, width, height } = surface(this.canvas);
    const shown = this.shown();
    const colour = colours("ink", "quiet", "rule", "faint", "paper", ...Object.keys(PARTS));
    const above = round(Math.max(8, ...shown.map((step) => step.packed + step.chunk)));
    const below = round(Math.max(4, ...shown.map((step) => step.decodes + step.drafted)));
    const slowest = round(Math.max(1, usual(shown.map((step) => step.ms)), ...shown.map((step) => step.predicted)));
    const [top, line, bottom, floor] = [8, height * 0.36, height * 0.68, height - 4];
    const ceiling = bottom + 16;
    const up = (line - top) / above;
    const down = (bottom - line) / below;
    const tall = (floor - ceiling) / slowest;

    context.textAlign = "right";
    context.textBaseline = "middle";
    const rule = (y, label, dark) => {
      context.fillStyle = dark ? colour.ink : colour.faint;
      context.fillRect(LEFT, Math.round(y), width - LEFT, 1);
      context.fillStyle = colour.quiet;
      context.fillText(label, LEFT - 6, y);
    };
    rule(top, count(above), false);
    rule(bottom, count(below), false);
    rule(ceiling, `${amount(slowest)} ms`, false);
    rule(line, "0", true);
    rule(floor, "0", true);

    shown.forEach((step, i) => {
      const x = width - (shown.length - i) * COLUMN;
      const wide = COLUMN - 1;
      if (step.number === this.cursor) {
        context.fillStyle = colour.rule;
        context.fillRect(x - 1, 0, COLUMN + 1, height);
      }
      let y = line;
      for (const [part, way, amountOf] of [["packed", "solid", step.packed], ["chunk", "striped", step.chunk]]) {
        block(context, way, colour[part], x, y - amountOf * up, wide, amountOf * up);
        y -= amountOf * up;
      }
      y = line + 1;
      for (const part of ["decode", "accepted", "refused"]) {
        const tokens = part === "decode" ? step.decodes : step[part];
        block(context, PARTS[part][1], colour[part], x, y, wide, tokens * down);
        y += tokens * down;
      }
      context.fillStyle = colour.quiet;
      const rest = Math.min(step.ms, slowest) * tall;
      context.fillRect(x, floor - rest, wide, rest);
      if (step.ms > slowest) { // it goes on beyond the top
        context.fillStyle = colour.paper;
        context.fillRect(x, ceiling + 4, wide, 2);
      }
      context.fillStyle = colour.ink;
      context.fillRect(x - 0.5, floor - step.predicted * tall - 1, wide + 1, 2);
    });
    context.textAlign = "left";
    context.lineWidth = 4;
    context.strokeStyle = colour.paper;
    for (const [text, y] of [["prompt tokens", top + 8], ["streams and guesses", bottom - 8], ["time; the tick is what was predicted", ceiling + 8]]) {
      context.strokeText(text, LEFT + 4, y);
      context.fillStyle = colour.quiet;
      context.fillText(text, LEFT + 4, y);
    }
    const last = shown.at(-1);
    this.canvas.setAttribute("aria-label", last
      ? `Batches of the latest ${count(shown.length)} steps, at most ${count(above)} prompt tokens and ${count(below)} streams and guesses each. ${describe(last)}`
      : "Batches of the latest steps. No step yet.");
    this.canvas.dataset.steps = String(this.steps.length);
  }
}
