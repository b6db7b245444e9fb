/**
 * Pure statistics: quantiles, two tests, and how the requests with one mark compare with another's.
 * Are typical times different, are there more slow replies, do more requests fail? Nothing is
 * called different for a p-value alone, nor for an effect alone.
 *
 * @module
 */

import type { Mark } from "../ffi/dscp.ts";

/** The value below which `share` (0 to 1) of those known lie, by nearest rank; `NaN` of none. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = Float64Array.from(values.filter(Number.isFinite)).sort();
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? NaN;
}

/**
 * The two-sided p-value of the Mann–Whitney U test, by its normal approximation with corrections
 * for ties and for continuity; 1 if a sample is empty or all values are equal.
 */
export function mannWhitney(a: readonly number[], b: readonly number[]): number {
  const values = [...a, ...b], n = values.length;
  const deviations = Array.from(ranksOf(values), (rank) => rank - (n + 1) / 2);
  const distance = Math.abs(sum(deviations.slice(0, a.length)));
  const spread = sum(deviations.map((each) => each ** 2));
  const variance = a.length * b.length / (n * (n - 1)) * spread;
  const z = Math.max(0, distance - 0.5) / Math.sqrt(variance);
  return variance > 0 ? 2 * normalTail(z) : 1;
}

/** The rank of each value, from 1; equal values share the mean of theirs; `NaN` comes last. */
function ranksOf(values: readonly number[]): Float64Array {
  const order = Array.from(values, (_, at) => at).sort((x, y) =>
    Number(isNaN(values[x])) - Number(isNaN(values[y])) || values[x] - values[y]
  );
  const ranks = new Float64Array(values.length);
  for (let first = 0, next; first < order.length; first = next) {
    for (next = first + 1; values[order[next]] === values[order[first]];) next++;
    for (const at of order.slice(first, next)) ranks[at] = (first + next + 1) / 2;
  }
  return ranks;
}

/**
 * The two-sided p-value of Fisher's exact test, if `a` of `ofA` have a property, and `b` of `ofB`.
 * Counts may be large: it adds up likelihoods relative to the likeliest.
 */
export function fisher(a: number, ofA: number, b: number, ofB: number): number {
  const both = a + b, low = Math.max(0, both - ofB), high = Math.min(both, ofA);
  // How much likelier it is that the first sample has `k` of them than `k - 1`.
  const odds = (k: number) => (ofA - k + 1) * (both - k + 1) / (k * (ofB - both + k));
  const likeliest = Math.floor((both + 1) * (ofA + 1) / (ofA + ofB + 2));
  const weights = new Float64Array(high - low + 1);
  weights[likeliest - low] = 1;
  for (let k = likeliest + 1; k <= high; k++) weights[k - low] = weights[k - low - 1] * odds(k);
  for (let k = likeliest; k > low; k--) weights[k - low - 1] = weights[k - low] / odds(k);
  // Those that are just as likely may differ in their last digits.
  const asUnlikely = weights.filter((weight) => weight <= weights[a - low] * (1 + 1e-7));
  return sum(asUnlikely) / sum(weights);
}

/** The values in a random order (Fisher and Yates). @param random gives 0 to below 1 */
export function shuffled<T>(values: readonly T[], random: () => number = Math.random): T[] {
  const all = [...values];
  for (let at = all.length - 1; at > 0; at--) {
    const other = Math.floor(random() * (at + 1));
    [all[at], all[other]] = [all[other], all[at]];
  }
  return all;
}

function sum(values: Iterable<number>): number {
  let total = 0;
  for (const value of values) total += value;
  return total;
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

/** All comparisons of a run together make a false claim less often than this. */
const SIGNIFICANT = 0.01;
// With many requests even a negligible difference is significant, so it must also be large enough:
// the ratio of medians, the shares of slow replies and of failures.
const SMALLEST_RATIO = 1.05, SMALLEST_SLOW = 0.02, SMALLEST_FAILED = 0.01;
/** A reply is slow if it takes longer than this many times the common median. */
export const SLOW = 3;
/** How many replies it takes to say that there is a difference in times, or none. */
export const MIN_SAMPLES = 8;

/** The requests with one mark, a value for each round. */
export interface Sample {
  readonly mark: Mark;
  /** Milliseconds; `NaN` if no whole reply came. */
  readonly total: readonly number[];
  readonly failures: readonly boolean[];
}

/** How many of a sample have a property, and whether that differs from the baseline. */
interface Shares {
  readonly count: number;
  readonly of: number;
  readonly against: { readonly count: number; readonly of: number };
  /** The p-value of Fisher's exact test. */
  readonly p: number;
  /** `null` if there are too few to say. */
  readonly differs: boolean | null;
}

/** How the requests with one mark compare with those of the baseline. */
export interface Comparison {
  readonly against: Mark;
  /** The baseline's median divided by ours: above 1 is faster; `NaN` without replies. */
  readonly ratio: number;
  /** The p-value of the rank test of their times; `NaN` without replies. */
  readonly p: number;
  /** Whether typical times differ; `null` if there are too few replies to say. */
  readonly differs: boolean | null;
  /** Replies that took longer than `over` milliseconds. */
  readonly slow: Shares & { readonly over: number };
  /** Requests that failed. */
  readonly failed: Shares;
}

/** The sample that the others are compared with: best effort, or the first. */
export function baselineOf<T extends { readonly mark: Mark }>(samples: readonly T[]): T {
  return samples.find(({ mark }) => mark.dscp === 0) ?? samples[0];
}

/** The p-value of a real difference is below this: of many questions some seem so (Bonferroni). */
export function thresholdFor(samples: number): number {
  return SIGNIFICANT / (3 * (samples - 1));
}

/** Compares each sample with the baseline. @returns `null` for the baseline itself */
export function compare(samples: readonly Sample[]): (Comparison | null)[] {
  const baseline = baselineOf(samples), threshold = thresholdFor(samples.length);
  return samples.map((one) => one === baseline ? null : compareTwo(one, baseline, threshold));
}

function compareTwo(ours: Sample, theirs: Sample, threshold: number): Comparison {
  const [a, b] = [ours, theirs].map(({ total }) => total.filter(Number.isFinite));
  const isEnough = Math.min(a.length, b.length) >= MIN_SAMPLES;
  const ratio = quantile(b, 0.5) / quantile(a, 0.5);
  const ranks = ranksOf([...ours.total, ...theirs.total]);
  const differences = ours.total.flatMap((time, at) =>
    isNaN(time - theirs.total[at]) ? [] : [ranks[at] - ranks[ours.total.length + at]]
  );
  const p = a.length * b.length > 0 ? strict(mannWhitney(a, b), differences, threshold) : NaN;
  const isReal = p < threshold && Math.max(ratio, 1 / ratio) >= SMALLEST_RATIO;
  const over = SLOW * quantile([...a, ...b], 0.5);
  const slowOf = ({ total }: Sample) => total.map((time) => isNaN(time) ? null : time > over);
  const slow = compareShares(slowOf(ours), slowOf(theirs), threshold, SMALLEST_SLOW);
  return {
    against: theirs.mark,
    ratio,
    p,
    differs: isEnough ? isReal : null,
    slow: { ...slow, differs: isEnough ? slow.differs : null, over },
    failed: compareShares(ours.failures, theirs.failures, threshold, SMALLEST_FAILED),
  };
}

/** Compares how many have a property; `null` is unknown. @param smallest the least that counts */
function compareShares(
  ours: readonly (boolean | null)[],
  theirs: readonly (boolean | null)[],
  threshold: number,
  smallest: number,
): Shares {
  const [share, against] = [ours, theirs].map((all) => ({
    count: all.filter((one) => one === true).length,
    of: all.filter((one) => one !== null).length,
  }));
  const differences = ours.map((one, at) =>
    Number(one ?? theirs[at] ?? 0) - Number(theirs[at] ?? one)
  );
  const exact = fisher(share.count, share.of, against.count, against.of);
  const p = strict(exact, differences, threshold);
  const isLarge = Math.abs(share.count / share.of - against.count / against.of) >= smallest;
  const isEnough = fisher(share.of, share.of, 0, against.of) < threshold;
  return { ...share, against, p, differs: isEnough ? p < threshold && isLarge : null };
}

/**
 * The p-value of a test, unless the rounds contradict it: then that of the signs. The test takes
 * all requests for independent; but if every second connection goes to a slower server, one mark's
 * luck is the other's misfortune. What is random for certain is the order in each round, and with
 * it the sign of each round's difference. If too few rounds differ to decide anything, the test
 * stands alone.
 */
function strict(p: number, differences: readonly number[], threshold: number): number {
  const scale = Math.sqrt(sum(differences.map((value) => value ** 2)));
  const most = 2 * normalTail(sum(differences.map(Math.abs)) / scale);
  const signs = 2 * normalTail(Math.abs(sum(differences)) / scale);
  return p < threshold && most < threshold && signs >= threshold ? signs : p;
}
