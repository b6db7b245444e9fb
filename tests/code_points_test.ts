import assert from "node:assert/strict";
import { describe, hex, markOf, nameOf, parseDscp, parseTos, sameDscp } from "../ffi/mod.ts";
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

Deno.test("what is no code point is refused with a list of what is", () => {
  for (const text of "| |64|256|-1|1.5|1e1|0x2e|046|EF |AF14|AF51|CS8|__proto__".split("|")) {
    assert.throws(
      () => parseDscp(text),
      (error) => error instanceof RangeError && /allowed are EF.*0 to 63/.test(error.message),
    );
  }
});

Deno.test("a whole byte is decimal or hex, and its ECN bits are refused because TCP owns them", () => {
  assert.deepEqual(parseTos("0xb8"), { name: "EF", dscp: 46, tos: 184 });
  const bytes = ["184", "0XB8", "0", "0x4"].map((text) => parseTos(text).tos);
  assert.deepEqual(bytes, [184, 184, 0, 4]);
  for (const text of ["", "256", "-1", "1.5", "0x", "0x1ff", "b8", "0b1", "EF"]) {
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
