// Time on a line: where a moment stands between two others, which moments an axis names, and how they are written.

import { local } from "./format.js";

export const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR, YEAR = 365 * DAY;
export const LEAST = MINUTE, MOST = YEAR; // lengths of a range

export const clampSpan = (span) => Math.min(MOST, Math.max(LEAST, span));

// Maps milliseconds to pixels and back.
export class Scale {
  constructor(from, to, width) {
    Object.assign(this, { from, to, width });
  }

  x(time) {
    return ((time - this.from) / (this.to - this.from)) * this.width;
  }

  time(x) {
    return this.from + (x / this.width) * (this.to - this.from);
  }
}

const STEPS = [SECOND, 5 * SECOND, 10 * SECOND, 30 * SECOND, MINUTE, 5 * MINUTE, 10 * MINUTE, 30 * MINUTE,
  HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 7 * DAY];
const MONTHS = [1, 3, 6, 12];
const NAMES = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

// The moments that an axis names, at round times of this place: [{time, label, day}], `apart` pixels from one
// another at least. `day` says that the label is a date.
export function ticks(scale, apart = 90) {
  const least = ((scale.to - scale.from) * apart) / scale.width;
  const step = STEPS.find((each) => each >= least);
  const found = [];
  for (let time = firstTick(scale.from, step); time <= scale.to && found.length < 100; time = nextTick(time, step, least)) {
    if (time >= scale.from) found.push({ time, ...label(time, step) });
  }
  return found;
}

function monthsOf(least) {
  return MONTHS.find((each) => each * 30 * DAY >= least) ?? 12 * Math.ceil(least / YEAR);
}

function firstTick(from, step) {
  const date = new Date(from);
  if (!step) return new Date(date.getFullYear(), 0, 1).getTime();
  if (step >= DAY) return new Date(date.getFullYear(), date.getMonth(), step > DAY ? 1 : date.getDate()).getTime();
  const midnight = new Date(date.getFullYear(), date.getMonth(), date.getDate()).getTime();
  return midnight + Math.floor((from - midnight) / step) * step;
}

function nextTick(time, step, least) {
  const date = new Date(time);
  if (!step) return new Date(date.getFullYear(), date.getMonth() + monthsOf(least), 1).getTime();
  if (step < DAY) return time + step;
  const days = step / DAY, month = date.getMonth();
  const next = new Date(date.getFullYear(), month, date.getDate() + days);
  const left = new Date(date.getFullYear(), month + 1, 1).getTime() - next.getTime();
  // The last step of a month would come too near to the first of the next.
  return days > 1 && left < (days * DAY) / 2 ? new Date(date.getFullYear(), month + 1, 1).getTime() : next.getTime();
}

function label(time, step) {
  const date = new Date(time);
  if (!step) return { label: date.getMonth() === 0 ? String(date.getFullYear()) : `${NAMES[date.getMonth()]} ${date.getFullYear()}`, day: true };
  const midnight = date.getHours() === 0 && date.getMinutes() === 0 && date.getSeconds() === 0;
  if (step >= DAY || midnight) return { label: `${date.getDate()} ${NAMES[date.getMonth()]}`, day: true };
  return { label: local(date).slice(11, step < MINUTE ? 19 : 16), day: false };
}

// A range in words, with each date once.
export function rangeText(from, to) {
  const [a, b] = [from, to].map((time) => dateText(time));
  const seconds = to - from < 10 * MINUTE ? 8 : 5;
  const [x, y] = [from, to].map((time) => local(new Date(time)).slice(11, 11 + seconds));
  return a === b ? `${a}, ${x} to ${y}` : `${a}, ${x} to ${b}, ${y}`;
}

function dateText(time) {
  const date = new Date(time);
  return `${date.getDate()} ${NAMES[date.getMonth()]} ${date.getFullYear()}`;
}
