import assert from "node:assert/strict";
import { ROOT } from "./support/folder.ts";
import { violations } from "./support/layout.ts";
import { missing, succeed } from "./support/processes.ts";

const lines = (count: number, line = "// x\n") => line.repeat(count);
const fn = (size: number, head: string) => `${head} {\n${lines(size - 2, "  a();\n")}}\n`;

/** A tree that keeps the rules, each of them at its limit. */
const GOOD: Record<string, string> = {
  "main.ts": `import { a } from "./src/a.ts";
import config from "./deno.json" with { type: "json" };
const dial = () => import("./ffi/dial.ts");
// Deno.dlopen() is in libc.ts
Deno.exit(a);
${lines(345)}`,
  "src/a.ts": `import type { Libc } from "../ffi/libc.ts";
import { inspect } from "node:util";
${fn(60, "export function a(): void")}class C {
  method(): void {
${lines(58, "    a();\n")}  }
}
const TABLE = {
${lines(100, "  a: [1],\n")}};
`,
  "ffi/libc.ts": `Deno.dlopen("libc.so.6", {});\n${lines(449)}`,
  "ffi/dial.ts": `// ${"é".repeat(97)}\nexport * from "./libc.ts";\n`,
  "tests/a_test.ts": lines(1000),
  "README.md": "",
  ".ci/run": "",
  "deno.json": "",
};

Deno.test("a tree that keeps the rules of the layout passes, also at each limit", () => {
  assert.deepEqual(violations(new Map(Object.entries(GOOD))), []);
});

for (
  const [change, message] of [
    [{ "main.ts": lines(351) }, /^main\.ts: 351 lines, more than 350$/],
    [{ "src/b.ts": lines(451) }, /^src\/b\.ts: 451 lines, more than 450$/],
    [{ "ffi/b.ts": lines(451) }, /^ffi\/b\.ts: 451 lines, more than 450$/],
    [{ "src/b.ts": `// ${"é".repeat(98)}` }, /^src\/b\.ts:1: over 100 columns$/],
    [{ "src/b.ts": fn(61, "async function b()") }, /^src\/b\.ts:1: a function of 61 lines$/],
    [{ "src/b.ts": fn(61, "export const b = (a: A) =>") }, /^src\/b\.ts:1: a function of 61/],
    [
      { "src/b.ts": `class B {\n  async #b(): X {\n${lines(59, "    a();\n")}  }\n}\n` },
      /:2: a .* 61/,
    ],
    [
      { "src/b.ts": fn(61, "function b(\n  a: A,\n): B").slice(0, -2) + "}\n" },
      /:1: a .* 63 lines$/,
    ],
    [{ "src/b.ts": fn(61, "function b()").replace("  a();", "  t`\nx\n`;") }, /:1: a .* 63 lines$/],
    [{ "src/b.ts": 'import "../main.ts";' }, /^src\/b\.ts: imports main\.ts, which is above it$/],
    [
      { "ffi/b.ts": 'import type { A } from "../src/a.ts";' },
      /^ffi\/b\.ts: imports src\/a\.ts, which/,
    ],
    [
      { "ffi/b.ts": 'await import("../main.ts");' },
      /^ffi\/b\.ts: imports main\.ts, which is above/,
    ],
    [{ "ffi/b.ts": "Deno.dlopen(x)" }, /^ffi\/b\.ts: Deno\.dlopen outside ffi\/libc\.ts$/],
    [{ "src/b.ts": "Deno.exit(1)" }, /^src\/b\.ts: Deno\.exit outside main\.ts$/],
    [{ "src/b.ts": 'import("./c.ts")' }, /^src\/b\.ts: imports src\/c\.ts, which is not there$/],
    [{ "src/b.ts": 'import x from "npm:x";' }, /^src\/b\.ts: imports npm:x$/],
    [{ "src/b.ts": 'export * from "jsr:@a/x";' }, /^src\/b\.ts: imports jsr:@a\/x$/],
    [{ "src/b.ts": 'import("https://a/x.ts")' }, /^src\/b\.ts: imports https:\/\/a\/x\.ts$/],
    [{ "lib/b.ts": "" }, /^lib: not allowed at the top level$/],
    [{ "notes.md": "" }, /^notes\.md: not allowed at the top level$/],
    [
      { "src/b.ts": 'import type { C } from "./c.ts";', "src/c.ts": 'import("./b.ts")' },
      /^a circle of imports: src\/b\.ts, src\/c\.ts$/,
    ],
  ] as const
) {
  Deno.test(`the layout's rules find ${message.source.replaceAll(/[\\^$]/g, "")}`, () => {
    const found = violations(new Map(Object.entries({ ...GOOD, ...change })));
    assert.equal(found.length, 1, found.join("\n"));
    assert.match(found[0], message);
  });
}

// A copy without its history has no list of its own files.
const absent = await Deno.stat(`${ROOT}.git`).then(() => missing(["git"]), () => [".git"]);
Deno.test({
  name: `the layout's rules hold for this checkout${absent.length > 0 ? ` (needs ${absent})` : ""}`,
  ignore: absent.length > 0,
  async fn() {
    // The owner of a checkout may be another user than that of the tests.
    const list = ["git", "-c", "safe.directory=*", "-C", ROOT, "ls-files"];
    const paths = (await succeed(...list)).stdout.trimEnd().split("\n");
    const files = new Map<string, string>();
    for (const path of paths) {
      // A file may be deleted, and that not yet committed.
      const text = await Deno.readTextFile(ROOT + path).catch(() => null);
      if (text !== null) files.set(path, text);
    }
    assert.deepEqual(violations(files), []);
  },
});
