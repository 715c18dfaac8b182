// The KV cache as a sheet of squares: each stands for some blocks, in the order of how firmly they are held.

import { block, colours, scheme, surface, swatch } from "./canvas.js";
import { count, percent, plural } from "./format.js";

const CELL = 12; // CSS pixels, two of them a gap

const KINDS = {
  shared: ["held by several", "striped", "common beginnings"],
  whole: ["full, held by one", "solid", "others can find them"],
  open: ["being written", "dotted", "with room for guesses"],
  cached: ["free, still known", "solid", "a prompt may hit them"],
  empty: ["free, empty", "hollow", ""],
};

export class Blocks {
  constructor(canvas, key, note) {
    [this.canvas, this.body, this.note] = [canvas, key.tBodies[0], note];
    this.blocks = {};
    this.size = 0;
    new ResizeObserver(() => this.draw()).observe(canvas);
    scheme.addEventListener("change", () => this.dress());
    this.dress();
  }

  /** Counts by kind; `size`: tokens of a block, `format`: of the numbers in it. */
  show(blocks, size, format) {
    this.blocks = blocks;
    this.note.textContent = size ? `of ${plural(size, "token")}, ${format}` : "";
    this.draw();
  }

  dress() {
    const colour = colours(...Object.keys(KINDS));
    this.body.replaceChildren(
      ...Object.entries(KINDS).map(([kind, [name, way, what]]) => {
        const row = document.createElement("tr");
        row.dataset.kind = kind;
        for (const content of [swatch(way, colour[kind]), name, "", what]) row.insertCell().append(content);
        return row;
      }),
    );
    this.draw();
  }

  draw() {
    const { context, width, height } = surface(this.canvas);
    const colour = colours(...Object.keys(KINDS));
    const total = Object.values(this.blocks).reduce((sum, number) => sum + number, 0);
    for (const row of this.body.rows) row.cells[2].textContent = total ? count(this.blocks[row.dataset.kind] ?? 0) : "–";
    if (!total) return;
    const columns = Math.floor(width / CELL);
    const cells = Math.min(total, columns * Math.floor(height / CELL));
    let [before, cell] = [0, 0];
    for (const kind of Object.keys(KINDS)) {
      before += this.blocks[kind] ?? 0;
      // What is there at all has a square, however small its share.
      const end = Math.min(cells, Math.max(Math.round((cells * before) / total), cell + (this.blocks[kind] ? 1 : 0)));
      for (; cell < end; cell++) {
        const [x, y] = [(cell % columns) * CELL, Math.floor(cell / columns) * CELL];
        block(context, KINDS[kind][1], colour[kind], x, y, CELL - 2, CELL - 2);
      }
    }
    const held = ["shared", "whole", "open"].reduce((sum, kind) => sum + (this.blocks[kind] ?? 0), 0);
    this.canvas.setAttribute("aria-label", `Blocks of the KV cache: ${percent(held / total)} of ${count(total)} are held. The table below has the numbers.`);
  }
}
