// How far the latest steps are from the ideal: what they took, taken apart.

import { block, colours, scheme, surface, swatch } from "./canvas.js";
import { percent } from "./format.js";

const JUDGED = 200; // steps by which the present is judged

const PARTS = {
  useful: ["useful tokens", "solid", "whole"],
  wasted: ["padding and guesses in vain", "hollow", "refused"],
  host: ["planning and bookkeeping", "striped", "quiet"],
  beyond: ["beyond the prediction", "dotted", "open"],
};

/**
 * Milliseconds of these steps by part. What the step-time model predicts is split into tokens of use and of none by
 * their number; what a step took beyond that, nobody planned for: other work on the machine, a pause, a model that is off.
 */
export function partsOf(steps) {
  const sum = (name) => steps.reduce((all, step) => all + step[name], 0);
  const [measured, host] = [sum("ms"), Math.min(sum("host"), sum("ms"))];
  const computing = Math.max(0, Math.min(sum("predicted"), measured) - host);
  const used = sum("decodes") + sum("packed") + sum("chunk") + sum("accepted");
  const vain = sum("refused") + Math.max(0, sum("padding"));
  const wasted = used + vain ? (computing * vain) / (used + vain) : 0;
  return { measured, useful: computing - wasted, wasted, host, beyond: Math.max(0, measured - host - computing) };
}

export class Ideal {
  constructor(canvas, key, ofSteps, ofSamples) {
    [this.canvas, this.body, this.ofSteps, this.ofSamples] = [canvas, key.tBodies[0], ofSteps, ofSamples];
    this.parts = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    scheme.addEventListener("change", () => this.dress());
    this.dress();
  }

  show(steps, contention) {
    const judged = steps.slice(-JUDGED);
    const times = (ratio) => `${ratio.toFixed(2)} ×`;
    const predicted = judged.reduce((all, step) => all + step.predicted, 0);
    this.parts = judged.length ? partsOf(judged) : null;
    this.ofSteps.textContent = predicted ? times(this.parts.measured / predicted) : "–";
    this.ofSamples.textContent = contention.p50 === null ? "–" : `${times(contention.p50)}, p90 ${times(contention.p90)}`;
    this.draw();
  }

  dress() {
    const colour = colours(...Object.values(PARTS).map(([, , name]) => name));
    this.body.replaceChildren(
      ...Object.entries(PARTS).map(([part, [name, way, shade]]) => {
        const row = document.createElement("tr");
        row.dataset.part = part;
        for (const content of [swatch(way, colour[shade]), name, "–"]) row.insertCell().append(content);
        return row;
      }),
    );
    this.draw();
  }

  draw() {
    const { context, width, height } = surface(this.canvas);
    const parts = this.parts;
    if (!parts) return;
    const colour = colours(...Object.values(PARTS).map(([, , name]) => name));
    let x = 0;
    for (const row of this.body.rows) {
      const [, way, shade] = PARTS[row.dataset.part];
      const share = parts[row.dataset.part] / parts.measured;
      row.cells[2].textContent = percent(share);
      block(context, way, colour[shade], x, 0, Math.max(share * width - 1, 0), height);
      x += share * width;
    }
    this.canvas.setAttribute("aria-label", `Of the time of the latest steps ${percent(parts.useful / parts.measured)} went into useful tokens. The table below has the rest.`);
  }
}
