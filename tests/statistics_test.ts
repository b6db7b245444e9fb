import assert from "node:assert/strict";
import { markOf } from "../ffi/mod.ts";
import {
  baselineOf,
  compare,
  type Comparison,
  fisher,
  mannWhitney,
  MIN_SAMPLES,
  quantile,
  type Sample,
  shuffled,
  thresholdFor,
} from "../src/statistics.ts";
import { Random } from "./support/random.ts";

/** Whole numbers from `from`, as many as `count`. */
const numbers = (from: number, count: number) =>
  Array.from({ length: count }, (_, at) => from + at);

/** Fails unless two probabilities differ by less than one in a billion. */
function assertClose(actual: number, expected: number): void {
  assert.ok(Math.abs(actual / expected - 1) < 1e-9, `${actual}, not ${expected}`);
}

Deno.test("quantiles are by nearest rank", () => {
  for (
    const [values, share, expected] of [
      [[4, 1, 3, 2], 0.5, 2],
      [[4, 1, 3, 2], 0.51, 3],
      [[4, 1, 3, 2], 0.95, 4],
      [[4, 1, 3, 2], 1, 4],
      [[4, 1, 3, 2], 0, 1],
      [[10, 9, 100], 0.5, 10],
      [[7], 0.5, 7],
      [[], 0.5, NaN],
      [[NaN], 0.5, NaN],
      [[NaN, 3, NaN, 1], 0.5, 1],
      [[NaN, 3, NaN, 1], 1, 3],
    ] as const
  ) assert.equal(quantile(values, share), expected, `${share} of ${values}`);
});

Deno.test("the rank test gives the values of the textbook formula", () => {
  for (
    const [a, b, p] of [
      // scipy.stats.mannwhitneyu(a, b, method="asymptotic"), and the formula with erfc
      [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 0.012185780355344818],
      [[1, 2, 2, 3], [2, 3, 3, 4, 4], 0.09783166898477652],
      [[1, 1, 1, 1, 1, 2], [1, 2, 2, 2, 2, 2, 2], 0.02092133533779405],
      [numbers(0, 10), numbers(3, 10), 0.05811687556969593],
      [numbers(0, 50), numbers(100, 50), 7.066071930389029e-18],
    ] as const
  ) {
    assertClose(mannWhitney(a, b), p);
    assertClose(mannWhitney(b, a), p);
    assertClose(mannWhitney([...b].reverse(), a.map((value) => value)), p);
  }
});

Deno.test("the rank test sees nothing in samples that are alike, equal or empty", () => {
  for (
    const [a, b] of [
      [[1, 1, 1], [1, 1, 1]],
      [[], [1, 2]],
      [[1, 2], []],
      [[], []],
      [[5], [5]],
      [[1, 2], [1, 2]],
      [numbers(0, 50), numbers(0, 50)],
    ]
  ) assert.equal(mannWhitney(a, b), 1, `${a} and ${b}`);
});

Deno.test("Fisher's exact test gives the values of exact arithmetic", () => {
  for (
    const [a, ofA, b, ofB, p] of [
      // scipy.stats.fisher_exact, and sums of binomial coefficients in fractions
      [24, 40, 0, 40, 7.748122629352642e-10],
      [3, 3, 0, 3, 0.1],
      [6, 6, 0, 6, 0.0021645021645021645],
      [8, 8, 0, 8, 0.0001554001554001554],
      [1, 10, 9, 10, 0.001093333910671372],
      [3, 4, 1, 4, 0.4857142857142857],
      [2, 30, 9, 40, 0.10025239727627983],
      [16, 40, 0, 40, 4.662926485076606e-06],
      [200, 5000, 120, 5000, 6.480090273305157e-06],
      [1000, 2000, 1100, 3000, 9.379948183441874e-21],
      [0, 1000, 12, 1000, 0.00047234069746359466],
      [0, 5, 0, 5, 1],
      [5, 5, 5, 5, 1],
      [0, 0, 3, 5, 1],
      [3, 5, 0, 0, 1],
      [0, 0, 0, 0, 1],
      [1, 1, 1, 2, 1],
      [500_000, 1_000_000, 500_000, 1_000_000, 1],
    ] as const
  ) {
    assertClose(fisher(a, ofA, b, ofB), p);
    assertClose(fisher(b, ofB, a, ofA), p);
    assertClose(fisher(ofA - a, ofA, ofB - b, ofB), p);
  }
  // Too unlikely for a number, and neither NaN nor an overflow.
  assert.equal(fisher(1_000_000, 1_000_000, 0, 1_000_000), 0);
});

Deno.test("a shuffled order is any of all, each as often as the others", () => {
  const random = new Random(1), seen = new Map<string, number>();
  const next = () => random.below(2 ** 30) / 2 ** 30;
  for (let at = 0; at < 6000; at++) {
    const order = shuffled("abc".split(""), next).join("");
    seen.set(order, (seen.get(order) ?? 0) + 1);
  }
  assert.deepEqual([...seen.keys()].sort(), ["abc", "acb", "bac", "bca", "cab", "cba"]);
  for (const [order, count] of seen) assert.ok(count > 880 && count < 1120, `${order}: ${count}`);
  const values = [1, 2, 3];
  assert.deepEqual(shuffled(values, () => 0), [2, 3, 1]);
  assert.deepEqual(shuffled(values, () => 0.999), [1, 2, 3]);
  assert.deepEqual(values, [1, 2, 3], "it is left as it was");
  assert.deepEqual(shuffled([]), []);
});

/** A sample of these times, in a random order of rounds; `NaN` is a request that failed. */
function row(tos: number, times: readonly number[]): Sample {
  const random = new Random(tos + 1);
  const total = shuffled(times, () => random.below(2 ** 30) / 2 ** 30);
  return { mark: markOf(tos), total, failures: total.map(Number.isNaN) };
}

/** Times around a median, spread by 1 %. */
const around = (median: number, count = 200) =>
  numbers(0, count).map((at) => median * (0.995 + 0.01 * at / (count - 1)));

const comparison = (...samples: Sample[]): Comparison => compare(samples)[0]!;

Deno.test("marks are compared with best effort, else with the first", () => {
  const against = (...tos: number[]) =>
    compare(tos.map((byte) => row(byte, []))).map((one) => one && one.against.tos);
  assert.deepEqual(against(0xb8, 0x88, 0), [0, 0, null]);
  assert.deepEqual(against(0xb8, 0x88), [null, 0xb8]);
  assert.deepEqual(against(0xb8), [null]);
  assert.equal(baselineOf([row(0xb8, []), row(0, [])]).mark.tos, 0);
});

Deno.test("all questions of a run together make a false claim in one of 100 runs", () => {
  assertClose(thresholdFor(2), 0.01 / 3);
  assertClose(thresholdFor(5), 0.01 / 12);
});

Deno.test("typical times differ by 5 % of the median at least, in either direction", () => {
  const best = row(0, around(1));
  for (
    const [factor, differs] of [[1.04, false], [1.049, false], [1.051, true], [2, true]] as const
  ) {
    for (const median of [factor, 1 / factor]) {
      const one = comparison(row(0xb8, around(median)), best);
      assert.equal(one.differs, differs, `${median}`);
      assertClose(one.ratio, 1 / median);
      assert.ok(one.p < 1e-10);
    }
  }
});

Deno.test("typical times that differ are unlikely to be alike, for all comparisons together", () => {
  // 30 values, of which more and more are shifted: p falls as their number grows.
  const base = row(0, numbers(0, 30).map((at) => 500 + at * 10));
  let borders = 0;
  for (const count of numbers(0, 30)) {
    const times = numbers(0, 30).map((at) => 500 + at * 10 + (at < count ? 205 : 3));
    const ef = row(0xb8, times), p = mannWhitney(ef.total, base.total);
    for (const others of [[], [row(0x88, base.total), row(0x28, base.total)]]) {
      const one = comparison(ef, ...others, base), threshold = thresholdFor(others.length + 2);
      if (p >= threshold) assert.equal(one.differs, false, `${count}: ${p}`);
      if (p >= threshold) assert.equal(one.p, p);
      if (p < threshold && one.p === p) assert.equal(one.differs, true, `${count}: ${p}`);
      if (p < threshold && p > 0.0005) borders++;
    }
  }
  assert.ok(borders > 1, "values near the threshold were tried");
});

Deno.test("too few replies are neither a difference nor none", () => {
  assert.equal(MIN_SAMPLES, 8);
  const enough = around(1, MIN_SAMPLES), few = around(2, MIN_SAMPLES - 1);
  for (const [a, b] of [[few, enough], [enough, few]]) {
    const { differs, slow } = comparison(row(0xb8, a), row(0, b));
    assert.deepEqual([differs, slow.differs], [null, null]);
  }
  assert.equal(comparison(row(0xb8, around(2, MIN_SAMPLES)), row(0, enough)).differs, true);
  assert.equal(comparison(row(0xb8, around(1, MIN_SAMPLES)), row(0, enough)).slow.differs, false);
  for (const [a, b] of [[[], enough], [enough, []], [[NaN, NaN], enough]]) {
    const { p, ratio, differs } = comparison(row(0xb8, a), row(0, b));
    assert.deepEqual([p, ratio, differs], [NaN, NaN, null]);
  }
});

Deno.test("slow replies are those over three times the common median", () => {
  const count = 1000, base = row(0, around(1, count));
  const slowed = (share: number, time: number) =>
    row(0xb8, around(1, count).map((usual, at) => at < share * count ? time : usual));
  assert.ok(comparison(slowed(0.6, 10), base).slow.over < 3.02, "the median of both");
  const { slow } = comparison(slowed(0.1, 10), base);
  assert.deepEqual([slow.count, slow.of, slow.against], [100, 1000, { count: 0, of: 1000 }]);
  assert.ok(slow.over > 2.98 && slow.over < 3.02, `${slow.over}`);
  assertClose(slow.p, fisher(100, 1000, 0, 1000));
  for (
    const [share, time, differs] of [
      [0.1, 10, true],
      [0.1, 3.05, true],
      [0.1, 2.95, false],
      [0.02, 10, true],
      [0.019, 10, false],
    ] as const
  ) {
    const one = comparison(slowed(share, time), base);
    assert.equal(one.slow.differs, differs, `${share} take ${time}`);
    assert.equal(one.differs, false, "the medians are alike");
    const reverse = comparison({ ...base, mark: markOf(0xb8) }, {
      ...slowed(share, time),
      mark: markOf(0),
    });
    assert.equal(reverse.slow.differs, differs);
  }
  const lost = [...around(1, 20), ...Array(20).fill(NaN)];
  assert.equal(comparison(row(0xb8, lost), row(0, around(1, 40))).slow.of, 20, "of replies only");
});

Deno.test("failures differ if they are unlikely to be alike, and by one in a hundred at least", () => {
  const failing = (tos: number, count: number, of: number) =>
    row(tos, [...Array(count).fill(NaN), ...around(1, of - count)]);
  for (
    const [count, of, against, ofAgainst, differs] of [
      [24, 40, 0, 40, true],
      [0, 40, 24, 40, true],
      [8, 40, 0, 40, false],
      [10, 40, 0, 40, true],
      [10, 1000, 0, 1000, true],
      [9, 1000, 0, 1000, false],
      [0, 40, 0, 40, false],
      [40, 40, 40, 40, false],
      [6, 6, 0, 6, true],
      [3, 6, 0, 6, false],
      [5, 5, 0, 5, null],
      [0, 5, 0, 5, null],
      [3, 3, 0, 3, null],
    ] as const
  ) {
    const { failed } = comparison(failing(0xb8, count, of), failing(0, against, ofAgainst));
    const { p, ...rest } = failed;
    assert.deepEqual(rest, { count, of, against: { count: against, of: ofAgainst }, differs });
    if (differs !== false || p > 0.05) assertClose(p, fisher(count, of, against, ofAgainst));
  }
});

Deno.test("a difference that the order in the rounds explains as well is none", () => {
  // One of the two fails in each round, as with two servers in turn.
  const inTurn = (tos: number, isFailed: (round: number) => boolean): Sample => {
    const failures = numbers(0, 20).map(isFailed);
    return { mark: markOf(tos), failures, total: failures.map((failed) => failed ? NaN : 1) };
  };
  for (
    const [count, p, differs] of [
      // erfc(12 / sqrt(20) / sqrt(2)), and Fisher's exact test
      [16, 0.007290358091535644, false],
      [4, 0.007290358091535644, false],
      [17, 1.938534124054267e-5, true],
    ] as const
  ) {
    const ef = inTurn(0xb8, (round) => round < count), df = inTurn(0, (round) => round >= count);
    const { failed } = comparison(ef, df);
    assertClose(failed.p, p);
    assert.equal(failed.differs, differs);
  }
  // Slow in turn; of a last round that was interrupted only one mark's request is known.
  const slowInTurn = (tos: number, isSlow: (round: number) => boolean, ...last: number[]) => {
    const total = [...numbers(0, 20).map((round) => isSlow(round) ? 10 : 1), ...last];
    return { mark: markOf(tos), total, failures: total.map(Number.isNaN) };
  };
  for (const last of [[], [1], [NaN]]) {
    const { slow } = comparison(
      slowInTurn(0xb8, (round) => round < 16, ...last),
      slowInTurn(0, (round) => round >= 16),
    );
    assertClose(slow.p, 0.007290358091535644);
    assert.equal(slow.differs, false, `${last}`);
  }
  // The same counts, of which the rounds are independent.
  const ef = inTurn(0xb8, (round) => round < 16), df = inTurn(0, (round) => round < 4);
  assertClose(comparison(ef, df).failed.p, fisher(16, 20, 4, 20));
});

/** Fractions from 0 to below 1 that a seed repeats. */
function fractions(seed: number): () => number {
  const random = new Random(seed);
  return () => random.below(2 ** 30) / 2 ** 30;
}

/** How many of so many made-up series claim any difference. */
function claims(series: number, sampleOf: () => Sample[]): number {
  let claims = 0;
  for (let at = 0; at < series; at++) {
    const { differs, slow, failed } = comparison(...sampleOf());
    if (differs || slow.differs || failed.differs) claims++;
  }
  return claims;
}

/** A series of two marks in shuffled rounds, of which the n-th request in all takes `time(n)`. */
function shuffledSeries(
  rounds: number,
  random: () => number,
  time: (n: number) => number,
): Sample[] {
  const total: Record<number, number[]> = { 0xb8: [], 0: [] };
  for (let n = 0; n < 2 * rounds;) {
    for (const tos of shuffled([0xb8, 0], random)) total[tos].push(time(n++));
  }
  return [0xb8, 0].map((tos) => ({
    mark: markOf(tos),
    total: total[tos],
    failures: total[tos].map(Number.isNaN),
  }));
}

for (
  const [name, timeWith] of Object.entries<(random: () => number) => (n: number) => number>({
    "that are all alike": (random) => () => 1 + random() / 10,
    "with a long tail": (random) => () => (1 - random()) ** -1.2,
    "on a machine that is slow at times": (random) => {
      let factor = 1;
      return () => (factor = random() < 0.05 ? 1 + 4 * random() : factor) * (1 + random() / 5);
    },
    "of which one in five fails": (random) => () => random() < 0.2 ? NaN : 1 + random(),
    "over two ways in turn": (random) => (n) => (n % 2 === 0 ? 10 : 1) + random() / 10,
    "over two ways, of which one fails": (random) => (n) => n % 2 === 0 ? NaN : 1 + random() / 10,
    "that become slower": (random) => (n) => 1 + n / 20 + random(),
  })
) {
  Deno.test(`false claims are rare of requests ${name}`, () => {
    for (const [rounds, runs] of [[12, 2000], [50, 2000]]) {
      const random = fractions(rounds), time = timeWith(random);
      const count = claims(runs, () => shuffledSeries(rounds, random, time));
      // One in a hundred is what the threshold promises; the smallest effects leave fewer.
      assert.ok(count <= runs / 100, `${count} of ${runs} series of ${rounds} rounds`);
    }
  });
}

Deno.test("a difference of the marks themselves is seen through the noise", () => {
  const random = fractions(3);
  const count = claims(200, () => {
    const [ef, df] = shuffledSeries(50, random, () => (1 - random()) ** -0.3);
    return [{ ...ef, total: ef.total.map((time) => time * 1.3) }, df];
  });
  assert.ok(count > 180, `${count} of 200`);
});
