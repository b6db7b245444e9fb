/**
 * Quantiles, the rank test, and whether one mark's times differ from another's.
 *
 * @module
 */

import type { Mark } from "../ffi/mod.ts";

/** The value below which `share` (0 to 1) of the values lie, by nearest rank; `NaN` of none. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? NaN;
}

/**
 * The two-sided p-value of the Mann–Whitney U test, by its normal approximation with corrections for
 * ties and for continuity: how likely two samples of the same kind would be as far apart in rank.
 *
 * @returns 0 to 1; 1 if a sample is empty or all values are equal
 */
export function mannWhitney(a: readonly number[], b: readonly number[]): number {
  const all = [
    ...a.map((value) => ({ value, isA: true })),
    ...b.map((value) => ({ value, isA: false })),
  ];
  all.sort((x, y) => x.value - y.value);
  const n = all.length;
  let rankSum = 0, ties = 0;
  for (let first = 0, next; first < n; first = next) {
    for (next = first + 1; next < n && all[next].value === all[first].value;) next++;
    const rank = (first + next + 1) / 2;
    for (let at = first; at < next; at++) if (all[at].isA) rankSum += rank;
    ties += (next - first) ** 3 - (next - first);
  }
  const u = rankSum - a.length * (a.length + 1) / 2;
  const variance = a.length * b.length / 12 * (n + 1 - ties / (n * (n - 1)));
  const distance = Math.max(0, Math.abs(u - a.length * b.length / 2) - 0.5);
  return variance > 0 ? Math.min(1, 2 * normalTail(distance / Math.sqrt(variance))) : 1;
}

/** The chance of a standard normal value above `z`, `z` from 0 up. */
function normalTail(z: number): number {
  const density = Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
  if (z < 3) {
    let term = z, sum = z;
    for (let k = 3; term > 1e-17; k += 2) sum += term *= z * z / k;
    return 0.5 - density * sum;
  }
  let fraction = z;
  for (let k = 60; k > 0; k--) fraction = z + k / fraction;
  return density / fraction;
}

const SIGNIFICANT = 0.01, SMALLEST_RATIO = 1.05;
/** How many replies it takes to say that there is a difference, or none. */
export const MIN_SAMPLES = 8;

/** The times with one mark. */
interface Times {
  /** The mark of all requests. */
  readonly mark: Mark;
  /** Milliseconds of each request. */
  readonly total: readonly number[];
}

/** How the times with one mark compare with those of another. */
export interface Comparison {
  /** The mark compared with. */
  readonly against: Mark;
  /** Its median total time divided by ours: above 1 is faster; `NaN` without replies. */
  readonly ratio: number;
  /** The p-value of the rank test, 0 to 1; `NaN` without replies. */
  readonly p: number;
  /** Whether there is a difference: `null` if there are too few replies to say. */
  readonly differs: boolean | null;
}

/**
 * Compares each row with best effort, or with the first row if there is no such mark.
 *
 * @returns a comparison for each row; `null` for the one that the others are compared with
 */
export function compare(rows: readonly Times[]): (Comparison | null)[] {
  const reference = rows.find(({ mark }) => mark.dscp === 0) ?? rows[0];
  return rows.map((row) => {
    if (row === reference) return null;
    const isKnown = row.total.length > 0 && reference.total.length > 0;
    const p = isKnown ? mannWhitney(row.total, reference.total) : NaN;
    const ratio = quantile(reference.total, 0.5) / quantile(row.total, 0.5);
    // Of many comparisons some would seem real by chance (Bonferroni). With many requests even a
    // negligible difference becomes significant, so it must also be large enough.
    const isReal = p < SIGNIFICANT / (rows.length - 1) &&
      Math.max(ratio, 1 / ratio) >= SMALLEST_RATIO;
    const isEnough = Math.min(row.total.length, reference.total.length) >= MIN_SAMPLES;
    return { against: reference.mark, ratio, p, differs: isEnough ? isReal : null };
  });
}
