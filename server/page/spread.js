// How a time is spread: a bar for each bucket of its histogram, marks at its percentiles.

import { block, colours, scheme, surface } from "./canvas.js";
import { count, time } from "./format.js";

const MARKS = ["p50", "p90", "p99"];

export class Spread {
  constructor(canvas, list, name) {
    [this.canvas, this.list, this.name] = [canvas, list, name];
    this.last = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    scheme.addEventListener("change", () => this.draw());
    this.say({});
  }

  show(spread) {
    this.last = spread;
    this.say(spread);
    this.draw();
  }

  say(spread) {
    this.list.replaceChildren(
      ...MARKS.map((mark) => {
        const [row, term, value] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
        [term.textContent, value.textContent] = [mark, time(spread[mark])];
        value.dataset.percentile = mark;
        row.append(term, value);
        return row;
      }),
    );
  }

  draw() {
    const { context, width, height } = surface(this.canvas);
    if (!this.last) return;
    const colour = colours("ink", "quiet", "rule", "whole");
    const { bounds, counts } = this.last;
    const total = counts.reduce((sum, number) => sum + number, 0);
    const floor = height - 16;
    context.fillStyle = colour.rule;
    context.fillRect(0, floor, width, 1);
    if (!total) return;
    // Only as many buckets as have something, and one on either side.
    const first = Math.max(0, counts.findIndex((number) => number) - 1);
    const last = Math.min(bounds.length - 1, counts.findLastIndex((number) => number) + 1);
    const step = width / (last - first + 1);
    const most = Math.max(...counts);
    const gap = step > 8 ? 2 : 1;
    for (let i = first; i <= last; i++) {
      const tall = ((floor - 14) * counts[i]) / most;
      block(context, "solid", colour.whole, (i - first) * step, floor - tall, step - gap, tall);
    }
    context.textBaseline = "top";
    context.textAlign = "right";
    context.fillStyle = colour.quiet;
    const every = Math.ceil(48 / step);
    for (let i = first + every - 1; i <= last; i += every) context.fillText(time(bounds[i]), (i - first + 1) * step - gap, floor + 4);
    MARKS.forEach((mark, i) => {
      const value = this.last[mark];
      const bucket = Math.min(bounds.findIndex((bound) => bound >= value), last);
      const low = bucket ? bounds[bucket - 1] : 0;
      const x = (bucket - first + (value - low) / (bounds[bucket] - low)) * step;
      context.fillStyle = colour.ink;
      context.fillRect(Math.min(x, width - 1), 12 + 3 * i, 1, floor - 12 - 3 * i);
      context.textAlign = x > width - 30 ? "right" : "left";
      context.fillText(mark.slice(1), x + (x > width - 30 ? -3 : 3), 3 * i * 3);
    });
    this.canvas.setAttribute("aria-label", `${this.name}, ${count(total)} in the last 30 seconds: ${MARKS.map((mark) => `${mark} ${time(this.last[mark])}`).join(", ")}.`);
  }
}
