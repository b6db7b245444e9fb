import assert from "node:assert/strict";
import { behaviours, behaviourText, consequence, TELLING_MARKS } from "../src/behaviour.ts";
import { parseDscp } from "../ffi/mod.ts";

const ALL = [
  "Bleach-DSCP",
  "Bleach-ToS-Precedence",
  "Bleach-some-ToS",
  "Re-mark-ToS",
  "Bleach-low",
  "Bleach-some-low",
  "Re-mark-DSCP",
];

/** What arrives of EF, AF41, CS6, DSCP 50 and LE under each behaviour, as bytes: RFC 9435, 4. */
const TABLE: readonly (readonly [name: string, bytes: readonly number[]])[] = [
  ["Bleach-DSCP", [0x00, 0x00, 0x00, 0x00, 0x00]],
  ["Bleach-ToS-Precedence", [0x18, 0x08, 0x00, 0x08, 0x04]],
  ["Bleach-some-ToS", [0x18, 0x08, 0xc0, 0xc8, 0x04]],
  ["Re-mark-ToS", [0x38, 0x28, 0x20, 0x28, 0x24]],
  ["Bleach-low", [0xa0, 0x80, 0xc0, 0xc0, 0x00]],
  ["Bleach-some-low", [0xa0, 0x80, 0xc0, 0xc8, 0x00]],
  ["Re-mark-DSCP", [0x68, 0x68, 0x68, 0x68, 0x68]],
];
const SENT = [46, 34, 48, 50, 1];

/** Two DSCPs as bytes. */
const pair = (sent: number, arrived: number) => ({ sent: sent << 2, arrived: arrived << 2 });
const names = (...pairs: [number, number][]) =>
  behaviours(pairs.map(([sent, arrived]) => pair(sent, arrived))).map(({ name }) => name);

Deno.test("each behaviour is the only one that explains the bytes of RFC 9435's own kinds", () => {
  for (const [name, bytes] of TABLE) {
    const pairs = bytes.map((byte, at): [number, number] => [SENT[at], byte >> 2]);
    assert.deepEqual(names(...pairs), [name]);
  }
});

Deno.test("two marks distinguish all behaviours, whatever the network chose", () => {
  const [a, b] = TELLING_MARKS.split(",").map((text) => parseDscp(text).dscp);
  const rules: [string, (x: number) => number][] = [
    ["Bleach-DSCP", () => 0],
    ["Bleach-ToS-Precedence", (x) => x & 7],
    ["Bleach-some-ToS", (x) => x >= 48 ? x : x & 7],
    ["Bleach-low", (x) => x & 56],
    ["Bleach-some-low", (x) => x >= 48 ? x : x & 56],
  ];
  for (let p = 1; p < 8; p++) rules.push(["Re-mark-ToS", (x) => p * 8 + x % 8]);
  for (let y = 1; y < 64; y++) rules.push(["Re-mark-DSCP", () => y]);
  for (const [name, rule] of rules) {
    assert.deepEqual(names([a, rule(a)], [b, rule(b)]), [name], `${name} ${rule(a)} ${rule(b)}`);
  }
});

Deno.test("one pair may have several explanations, one, or none beside an unchanged mark", () => {
  const cases: [pairs: [number, number][], found: string[]][] = [
    [[[46, 6]], ["Bleach-ToS-Precedence", "Bleach-some-ToS", "Re-mark-DSCP"]],
    [[[46, 40]], ["Bleach-low", "Bleach-some-low", "Re-mark-DSCP"]],
    [[[8, 0]], ["Bleach-DSCP", "Bleach-ToS-Precedence", "Bleach-some-ToS"]],
    [[[46, 0]], ["Bleach-DSCP"]],
    [[[46, 8]], ["Re-mark-DSCP"]],
    [[[46, 62]], ["Re-mark-ToS", "Re-mark-DSCP"]],
    [[[46, 46]], []],
    [[], []],
    [[[46, 0], [34, 34]], []],
    [[[46, 0], [0, 0]], ["Bleach-DSCP"]],
    [[[46, 14], [34, 18]], []],
    [[[46, 8], [34, 16]], []],
  ];
  for (const [pairs, found] of cases) assert.deepEqual(names(...pairs), found, `${pairs}`);
  for (const { name } of behaviours([pair(46, 6)])) assert.ok(ALL.includes(name));
});

Deno.test("behaviours are told as a likeness, and an unchanged mark says nothing", () => {
  assert.equal(behaviourText([pair(46, 0)]), "as by Bleach-DSCP (RFC 9435, 4.1)");
  assert.equal(
    behaviourText([pair(46, 40)]),
    "as by Bleach-low or Bleach-some-low or Re-mark-DSCP (RFC 9435, 4, 4.3)",
  );
  assert.equal(behaviourText([pair(46, 0), pair(34, 34)]), "by no single rule of RFC 9435");
  assert.equal(behaviourText([pair(46, 46), pair(0, 0)]), null);
  assert.equal(behaviourText([]), null);
});

Deno.test("a change's consequence is told where an RFC names one", () => {
  const cases: [sent: number, arrived: number, words: RegExp | null][] = [
    [1, 0, /^LE was promoted/],
    [1, 1, null],
    [0, 0, null],
    [9, 1, /^it was demoted to LE/],
    [41, 1, /^it was demoted to LE/],
    [46, 1, null],
    [46, 40, /^Wi-Fi/],
    [40, 40, null],
    [46, 0, null],
    [4, 0, null],
    [48, 0, /^usual for hosts/],
    [56, 8, /^usual for hosts/],
    [50, 0, null],
    [48, 48, null],
    [40, 0, null],
  ];
  for (const [sent, arrived, words] of cases) {
    const text = consequence(pair(sent, arrived));
    if (words === null) assert.equal(text, null, `${sent} ${arrived}`);
    else assert.match(text ?? "", words, `${sent} ${arrived}`);
  }
});
