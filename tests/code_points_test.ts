import assert from "node:assert/strict";
import { checkTos } from "../ffi/dscp.ts";
import {
  describe,
  hex,
  markOf,
  nameOf,
  parseDscp,
  parseIpTos,
  parseTos,
  sameDscp,
} from "../ffi/mod.ts";
import "./support/waiting.ts";

// Assigned by hand from the IANA registry "Differentiated Services Field Codepoints", as bits.
const REGISTRY: Record<string, number> = {
  DF: 0b000000,
  CS1: 0b001000,
  CS2: 0b010000,
  CS3: 0b011000,
  CS4: 0b100000,
  CS5: 0b101000,
  CS6: 0b110000,
  CS7: 0b111000,
  AF11: 0b001010,
  AF12: 0b001100,
  AF13: 0b001110,
  AF21: 0b010010,
  AF22: 0b010100,
  AF23: 0b010110,
  AF31: 0b011010,
  AF32: 0b011100,
  AF33: 0b011110,
  AF41: 0b100010,
  AF42: 0b100100,
  AF43: 0b100110,
  EF: 0b101110,
  VA: 0b101100,
  NQB: 0b101101,
  LE: 0b000001,
};

Deno.test("every registered name gives its code point, in any case, and gets its name back", () => {
  for (const [name, dscp] of Object.entries(REGISTRY)) {
    assert.deepEqual(parseDscp(name), { name, dscp, tos: dscp * 4 });
    assert.equal(parseDscp(name.toLowerCase()).tos, dscp * 4);
    assert.equal(nameOf(dscp), name);
  }
  const others = ["voice-admit", "CS0", "be"].map((text) => parseDscp(text).name);
  assert.deepEqual(others, ["VA", "DF", "DF"], "of two names, one is used everywhere");
});

Deno.test("every number from 0 to 63 is taken, with its name where it has one", () => {
  const named = new Map(Object.entries(REGISTRY).map(([name, dscp]) => [dscp, name]));
  for (let dscp = 0; dscp < 64; dscp++) {
    assert.deepEqual(parseDscp(String(dscp)), {
      name: named.get(dscp) ?? null,
      dscp,
      tos: dscp * 4,
    });
  }
});

Deno.test("a number may be hexadecimal, of one digit or two", () => {
  for (let dscp = 0; dscp < 64; dscp++) {
    assert.equal(parseDscp(`0x${dscp.toString(16)}`).dscp, dscp);
    assert.equal(parseDscp(`0X${dscp.toString(16).toUpperCase().padStart(2, "0")}`).dscp, dscp);
  }
});

Deno.test("curl's names of bytes are taken, a number is the whole byte, and ECN bits are refused", () => {
  const bytes = { LOWDELAY: 0x10, throughput: 0x08, Reliability: 0x04, "0xb8": 0xb8, 184: 0xb8 };
  for (const [text, tos] of Object.entries(bytes)) assert.equal(parseIpTos(text).tos, tos, text);
  for (const [name, dscp] of Object.entries(REGISTRY)) assert.equal(parseIpTos(name).dscp, dscp);
  for (const text of ["MINCOST", "lowcost", "ECT0", "ECT1", "CE", "46", "1"]) {
    assert.throws(() => parseIpTos(text), { name: "RangeError", message: /ECN bits/ }, text);
  }
  const bits = { MINCOST: "0x02", LOWCOST: "0x02", ECT0: "0x02", ECT1: "0x01", CE: "0x03" };
  for (const [name, byte] of Object.entries(bits)) {
    assert.throws(() => parseIpTos(name), { message: new RegExp(`^ToS ${byte} sets ECN bits`) });
  }
  for (const text of ["", "256", "AF14", "all", "EF,DF"]) {
    assert.throws(() => parseIpTos(text), { name: "RangeError", message: /is not a ToS byte/ });
  }
});

Deno.test("what is no code point is refused with a list of what is", () => {
  for (
    const text
      of "| |64|99|100|256|-1|+1|1.5|1e1|0x|0x40|0x02e|046|00|EF |AF10|AF14|AF01|AF51|CS8|E|__proto__"
        .split("|")
  ) {
    assert.throws(
      () => parseDscp(text),
      (error) => error instanceof RangeError && /allowed are EF.*0 to 63/.test(error.message),
    );
  }
});

Deno.test("a whole byte is decimal or hex, and its ECN bits are refused because TCP owns them", () => {
  assert.deepEqual(parseTos("0xb8"), { name: "EF", dscp: 46, tos: 184 });
  const bytes = ["184", "0XB8", "0", "0x4", "0x00", "252", "0xfc"].map((text) =>
    parseTos(text).tos
  );
  assert.deepEqual(bytes, [184, 184, 0, 4, 0, 252, 252]);
  for (const text of " |256|1000|-1|1.5|0x|0x1ff|0x100|0x0b8|b8|0b1|00|010| 8|8 |EF|".split("|")) {
    assert.throws(() => parseTos(text), /allowed is a number from 0 to 255/);
  }
  for (const text of ["1", "0xb9", "186", "255"]) {
    assert.throws(() => parseTos(text), /ECN bits.*TCP owns/);
  }
});

Deno.test("marks are described and compared as people of the field do", () => {
  assert.deepEqual([hex(0), hex(0xb8)], ["0x00", "0xB8"]);
  assert.deepEqual([describe(markOf(0xb8)), describe(markOf(0x34)), describe(markOf(0))], [
    "EF (0xB8)",
    "DSCP 13 (0x34)",
    "DF (0x00)",
  ]);
  assert.ok(sameDscp(0xb8, 0xba), "ECN bits are not part of the DSCP");
  assert.ok(!sameDscp(0xb8, 0xb4));
});

Deno.test("a byte that a socket can be given is a whole number from 0 to 252 without ECN bits", () => {
  for (const tos of [0, 4, 184, 252]) checkTos(tos);
  for (const tos of [-4, -1, 256, 260, 1.5, 0.25, NaN, Infinity]) {
    const message =
      `${tos} is not a ToS byte; allowed is a number from 0 to 255, decimal or 0x hex, ` +
      "whose two lowest bits (ECN) are 0";
    assert.throws(() => checkTos(tos), { name: "RangeError", message });
  }
  assert.throws(() => parseTos("x"), { message: /^"x" is not a ToS byte/ });
  assert.throws(() => parseTos(""), { message: /^an empty text is not a ToS byte/ });
  for (const [tos, allowed] of [[1, 0], [2, 0], [3, 0], [0xb9, 0xb8], [0xba, 0xb8], [255, 252]]) {
    const message = `ToS ${hex(tos)} sets ECN bits (the two lowest), which TCP owns: ` +
      `the kernel would drop them; allowed is ${hex(allowed)}`;
    assert.throws(() => checkTos(tos), { name: "RangeError", message });
  }
});

Deno.test("a mark has the six upper bits of its byte", () => {
  for (const tos of [0xb8, 0xb9, 0xba, 0xbb]) {
    assert.deepEqual(markOf(tos), { name: "EF", dscp: 46, tos: 0xb8 });
  }
  assert.deepEqual(markOf(0xff), { name: null, dscp: 63, tos: 0xfc });
  for (
    const [a, b, same] of [[0xb8, 0xbb, true], [0xb8, 0xbc, false], [0, 3, true], [0, 4, false]]
  ) {
    assert.equal(sameDscp(Number(a), Number(b)), same);
  }
});
