// Drawing on a canvas at the screen's own resolution, in the page's colours; patterns, so that colour is never alone.

/** The context of `canvas`, cleared and scaled to CSS pixels, with its size. */
export function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px " + getComputedStyle(canvas).fontFamily;
  return { context, width, height };
}

/** The page's colours by name, as the reader's scheme has them now. */
export function colours(...names) {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** A rectangle in one of four ways that can be told apart without colour: solid, striped, dotted, hollow. */
export function block(context, way, colour, x, y, width, height) {
  context.fillStyle = context.strokeStyle = colour;
  if (way === "solid") context.fillRect(x, y, width, height);
  if (way === "striped") {
    for (let at = 0; at < height; at += 3) context.fillRect(x, y + at, width, Math.min(2, height - at));
  }
  if (way === "dotted") {
    context.globalAlpha = 0.45;
    context.fillRect(x, y, width, height);
    context.globalAlpha = 1;
    for (let down = 1; down < height; down += 4) {
      for (let right = (width % 4) / 2 + 1.25; right < width; right += 4) {
        context.fillRect(x + right - 0.75, y + down, 1.5, Math.min(1.5, height - down));
      }
    }
  }
  if (way === "hollow" && width > 0 && height > 0) {
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, Math.max(width - 1, 0.5), Math.max(height - 1, 0.5));
  }
}

/** A small canvas that shows how something is drawn, for a legend. */
export function swatch(way, colour) {
  const canvas = document.createElement("canvas");
  canvas.className = "swatch";
  canvas.setAttribute("aria-hidden", "true");
  requestAnimationFrame(() => block(surface(canvas).context, way, colour, 0, 0, 14, 14));
  return canvas;
}

/** An end for an axis: the least of 1, 2, 3, 4, 5, 6, 8, 10, 20, 30 … that is not below `value`. */
export function round(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((m) => m * power).find((step) => step >= value * 0.999);
}

export const scheme = matchMedia("(prefers-color-scheme: dark)");
export const stillness = matchMedia("(prefers-reduced-motion: reduce)");
