import assert from "node:assert/strict";
import { markOf } from "../ffi/mod.ts";
import { compare, mannWhitney, MIN_SAMPLES, quantile } from "../src/statistics.ts";

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

/** Times around a median, spread by 1 %. */
const around = (median: number, count = 200) =>
  numbers(0, count).map((at) => median * (0.995 + 0.01 * at / (count - 1)));

const row = (tos: number, total: number[]) => ({ mark: markOf(tos), total });

Deno.test("marks are compared with best effort, else with the first", () => {
  const against = (...tos: number[]) =>
    compare(tos.map((byte) => row(byte, []))).map((one) => one && one.against.tos);
  assert.deepEqual(against(0xb8, 0x88, 0), [0, 0, null]);
  assert.deepEqual(against(0xb8, 0x88), [null, 0xb8]);
  assert.deepEqual(against(0xb8), [null]);
});

Deno.test("a difference takes 5 % of the median in either direction", () => {
  const best = row(0, around(1));
  for (
    const [factor, differs] of [[1.04, false], [1.049, false], [1.051, true], [2, true]] as const
  ) {
    for (const median of [factor, 1 / factor]) {
      const [one] = compare([row(0xb8, around(median)), best]);
      assert.equal(one!.differs, differs, `${median}`);
      assertClose(one!.ratio, 1 / median);
      assert.ok(one!.p < 1e-10);
    }
  }
});

Deno.test("a difference takes times that are unlikely to be alike, for all comparisons together", () => {
  // 30 values, of which the first so many of one sample are shifted: p falls as their number grows.
  const shifted = (count: number) => numbers(0, 30).map((at) => at * 10 + (at < count ? 305 : 3));
  const base = row(0, numbers(0, 30).map((at) => at * 10));
  for (const count of numbers(0, 30)) {
    const ef = row(0xb8, shifted(count)), p = mannWhitney(ef.total, base.total);
    assert.equal(compare([ef, base])[0]!.differs, p < 0.01, `${count}: ${p}`);
    assert.equal(compare([ef, base])[0]!.p, p);
    const many = compare([ef, row(0x88, base.total), row(0x28, base.total), base]);
    assert.equal(many[0]!.differs, p < 0.01 / 3, `${count}: ${p}`);
  }
});

Deno.test("too few replies are neither a difference nor none", () => {
  const enough = around(1, MIN_SAMPLES), few = around(2, MIN_SAMPLES - 1);
  assert.equal(compare([row(0xb8, few), row(0, enough)])[0]!.differs, null);
  assert.equal(compare([row(0xb8, enough), row(0, few)])[0]!.differs, null);
  assert.equal(compare([row(0xb8, around(2, MIN_SAMPLES)), row(0, enough)])[0]!.differs, true);
  const [none] = compare([row(0xb8, []), row(0, enough)]);
  assert.deepEqual([none!.p, none!.ratio, none!.differs], [NaN, NaN, null]);
});
