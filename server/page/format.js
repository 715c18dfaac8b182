// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const count = (value) => whole.format(value);

/** Three digits or so: 0.4, 12.3, 1,234. */
export const amount = (value) => (value < 100 && value !== Math.round(value) ? tenth : whole).format(value);

export const percent = (share) => `${share < 0.1 && share > 0 ? tenth.format(100 * share) : whole.format(100 * share)}\u00a0%`;

/** A time given in seconds; null is one that nobody knows. */
export function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${amount(1000 * seconds)} ms`;
  return `${seconds < 10 ? seconds.toFixed(2) : amount(seconds)} s`;
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
