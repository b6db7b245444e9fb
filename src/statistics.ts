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
  const values = [...a, ...b], n = values.length;
  const ranks = ranksOf(values), mean = (n + 1) / 2;
  const distance = Math.abs(ranks.subarray(0, a.length).reduce((sum, r) => sum + r - mean, 0));
  const spread = ranks.reduce((sum, rank) => sum + (rank - mean) ** 2, 0);
  const variance = a.length * b.length / (n * (n - 1)) * spread;
  const z = Math.max(0, distance - 0.5) / Math.sqrt(variance);
  return variance > 0 ? 2 * normalTail(z) : 1;
}

/** The rank of each value, from 1; equal values share the mean of theirs. */
function ranksOf(values: readonly number[]): Float64Array {
  const order = Array.from(values, (_, at) => at).sort((x, y) => values[x] - values[y]);
  const ranks = new Float64Array(values.length);
  for (let first = 0, next; first < order.length; first = next) {
    for (next = first + 1; values[order[next]] === values[order[first]];) next++;
    for (const at of order.slice(first, next)) ranks[at] = (first + next + 1) / 2;
  }
  return ranks;
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

// With many requests even a negligible difference is significant, so it must also be large enough.
const SIGNIFICANT = 0.01, SMALLEST_RATIO = 1.05;
/** How many replies it takes to say that there is a difference, or none. */
export const MIN_SAMPLES = 8;

/** How the times with one mark compare with those of another. */
export interface Comparison {
  readonly against: Mark;
  /** The other median divided by ours: above 1 is faster; `NaN` without replies. */
  readonly ratio: number;
  /** The p-value of the rank test; `NaN` without replies. */
  readonly p: number;
  /** Whether there is a difference; `null` if there are too few replies to say. */
  readonly differs: boolean | null;
}

/**
 * Compares the times with each mark, in milliseconds, with those of best effort, or of the first mark
 * if there is no such one.
 *
 * @returns a comparison for each mark; `null` for the baseline
 */
export function compare(
  rows: readonly { readonly mark: Mark; readonly total: readonly number[] }[],
): (Comparison | null)[] {
  const baseline = rows.find(({ mark }) => mark.dscp === 0) ?? rows[0];
  return rows.map((row) => {
    if (row === baseline) return null;
    const least = Math.min(row.total.length, baseline.total.length);
    const p = least > 0 ? mannWhitney(row.total, baseline.total) : NaN;
    const ratio = quantile(baseline.total, 0.5) / quantile(row.total, 0.5);
    // Of many comparisons some would seem real by chance (Bonferroni).
    const isReal = p < SIGNIFICANT / (rows.length - 1) &&
      Math.max(ratio, 1 / ratio) >= SMALLEST_RATIO;
    return { against: baseline.mark, ratio, p, differs: least >= MIN_SAMPLES ? isReal : null };
  });
}
