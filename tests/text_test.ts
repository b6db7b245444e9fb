import assert from "node:assert/strict";
import {
  errorText,
  excerpt,
  latin1,
  plural,
  printable,
  quote,
  shortTime,
  trimmed,
  wrap,
} from "../src/text.ts";

/** The code points from one to another, both included. */
function range(from: number, to: number): number[] {
  return Array.from({ length: to - from + 1 }, (_, at) => from + at);
}

const char = String.fromCodePoint;

Deno.test("printable escapes every character that acts on a terminal instead of being shown", () => {
  const short = [...range(0, 0x1f), 0x7f, ...range(0x80, 0x9f), 0xad];
  for (const code of short) {
    assert.equal(printable(`a${char(code)}b`), `a\\x${code.toString(16).padStart(2, "0")}b`);
  }
  const long = [
    ...[0x61c, 0x200e, 0x200f, ...range(0x202a, 0x202e), ...range(0x2066, 0x2069)], // bidirectional
    ...[0x2028, 0x2029], // line and paragraph separator
    ...[0x200b, 0x200c, 0x200d, 0x2060, 0xfeff, 0x180e], // no width
    ...[0xd800, 0xdbff, 0xdc00, 0xdfff], // lone surrogates
    ...[0xfff9, 0xfffb, 0xe0001, 0xe007f, 0x1d173], // annotations, tags, musical controls
  ];
  for (const code of long) {
    assert.equal(printable(`ü${char(code)}b`), `ü\\u{${code.toString(16)}}b`);
  }
});

Deno.test("printable leaves everything else as it is, also beside what it escapes", () => {
  for (const text of ["", " ~", "a\\x41", "grün €", "日本", "😀", "\u00a0", "e\u0301", "\ufffd"]) {
    assert.equal(printable(text), text);
    assert.equal(printable(`${text}\x1b`), `${text}\\x1b`);
  }
  assert.equal(printable("\ud83d\ude00\ude00"), "😀\\u{de00}", "a pair and half of one");
  assert.equal(printable("\x1b[31m\r\n"), "\\x1b[31m\\x0d\\x0a", "each one, not only the first");
});

Deno.test("an excerpt has 200 characters, and says if there were more", () => {
  assert.equal(excerpt("x".repeat(200)), "x".repeat(200));
  assert.equal(excerpt("x".repeat(201)), `${"x".repeat(200)}…`);
  assert.equal(excerpt("\x07"), "\\x07");
  assert.equal(quote("a\x07'"), "'a\\x07''");
});

Deno.test("one of a kind has no s", () => {
  assert.deepEqual([0, 1, 2].map((count) => plural(count, "byte")), [
    "0 bytes",
    "1 byte",
    "2 bytes",
  ]);
});

Deno.test("text is wrapped at a width, and a longer word gets its own line", () => {
  for (
    const [text, width, lines] of [
      ["ab cd ef", 5, ["ab cd", "ef"]],
      ["ab cd ef", 4, ["ab", "cd", "ef"]],
      ["ab cd ef", 8, ["ab cd ef"]],
      ["abcdef", 6, ["abcdef"]],
      ["a bcdefgh i", 3, ["a", "bcdefgh", "i"]],
      ["ab cd", 0, ["ab", "cd"]],
      ["ab cd", -5, ["ab", "cd"]],
      ["ab\ncd\n", 9, ["ab", "cd"]],
      ["", 9, []],
    ] as const
  ) assert.equal(wrap(text, width), lines.map((line) => `${line}\n`).join(""), text);
});

Deno.test("the words of a system error go without its number, and begin small", () => {
  for (
    const [message, words] of [
      ["Connection refused (os error 111)", "connection refused"],
      ["No such file (os error 2): open '/x'", "no such file"],
      ["TLS failed", "TLS failed"],
      ["Bad thing: https://docs.deno.com/x", "bad thing"],
      ["Network: ", "network"],
      ["Ähnlich\x1b", "Ähnlich\\x1b"],
      ["A b", "a b"],
      ["see https://a.example for more", "see https://a.example for more"],
    ]
  ) assert.equal(errorText(new Error(message)), words);
});

Deno.test("blanks and tabs at both ends are trimmed, nothing else", () => {
  for (
    const [text, rest] of [
      ["", ""],
      [" \t ", ""],
      ["\ta b ", "a b"],
      ["\u00a0a\u00a0", "\u00a0a\u00a0"],
      ["\ra\n", "\ra\n"],
      ["a", "a"],
    ]
  ) assert.equal(trimmed(text), rest);
});

Deno.test("bytes become characters one by one, however many they are", () => {
  for (const length of [0, 1, 255, 256, 8191, 8192, 8193, 16384, 300_000]) {
    const bytes = Uint8Array.from({ length }, (_, at) => at % 251);
    const text = latin1(bytes);
    assert.equal(text.length, length);
    for (const at of [0, 250, 8191, 8192, length - 1]) {
      if (at >= 0 && at < length) assert.equal(text.charCodeAt(at), at % 251);
    }
  }
  assert.equal(latin1(Uint8Array.of(0x80, 0xff)), "\x80\xff");
});

Deno.test("a time has three digits or so", () => {
  for (
    const [milliseconds, text] of [
      [0, "0.00"],
      [0.424, "0.42"],
      [0.994, "0.99"],
      [1, "1.0"],
      [17.34, "17.3"],
      [99.9, "99.9"],
      [100, "100"],
      [1520.4, "1520"],
      [NaN, "-"],
      [Infinity, "-"],
    ] as const
  ) assert.equal(shortTime(milliseconds), text);
});
