// Numbers as people read them.

const WHOLE = new Intl.NumberFormat("en");

export const whole = (number) => WHOLE.format(number);
export const percent = (share) => `${(100 * share).toFixed(1)} %`;
export const plural = (number, one, many = `${one}s`) =>
  `${whole(number)} ${number === 1 ? one : many}`;

export function seconds(value) {
  if (value === null || !Number.isFinite(value)) return "\u2013";
  if (value >= 10) return `${value.toFixed(0)} s`;
  return value >= 1
    ? `${value.toFixed(2)} s`
    : `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
}

// Of what is left to wait for.
export function duration(value) {
  if (value < 90) return `${Math.ceil(value)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

export function rate(value) {
  if (value === null || !Number.isFinite(value)) return "\u2013";
  return value >= 100 ? whole(Math.round(value)) : value.toFixed(1);
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, number)) / 10));
  const scaled = number / 1024 ** power;
  return `${power && scaled < 10 ? scaled.toFixed(1) : Math.round(scaled)} ${units[power]}`;
}
