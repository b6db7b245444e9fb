import assert from "node:assert/strict";
import { Namespace } from "./support/namespaces.ts";
import { dscpGet, execute, testWith } from "./support/processes.ts";

const readme = await Deno.readTextFile(new URL("../README.md", import.meta.url));
const blocks = [...readme.matchAll(/^```(\w*)\n([^]*?)^```$/gm)].map(([, language, text]) => ({
  language,
  text,
}));

Deno.test("the README's first commands are the two, in both forms", () => {
  const first = blocks.find(({ language }) => language === "sh")!;
  assert.deepEqual(
    first.text.trim().split("\n").map((line) => line.split(/ +# or: /)),
    [["run --allow-net --allow-ffi main.ts"], ["task test"]].map((
      [rest],
    ) => [`npx --yes deno ${rest}`, `deno ${rest}`]),
  );
});

/** Lines with what differs from run to run taken out. */
function shape(report: string): string[] {
  return report.trim().split("\n").map((line) => line.replace(/\d+(\.\d+)?/g, "N"));
}

testWith(["root", "ip"], "the README's sample report is what a run prints", async () => {
  await using namespace = await Namespace.create();
  const { stderr } = await dscpGet([], namespace);
  const sample = blocks.find(({ text }) => text.startsWith("connected"))!;
  assert.deepEqual(shape(sample.text), shape(stderr));
});

testWith(["root", "ip"], "the README's sample JSON has the keys of a run's", async () => {
  await using namespace = await Namespace.create();
  const keys = (value: unknown): unknown =>
    typeof value === "object" && value !== null && !Array.isArray(value)
      ? Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, keys(inner)]))
      : typeof value;
  const sample = blocks.find(({ language }) => language === "json")!;
  const { stdout } = await dscpGet(["--json"], namespace);
  assert.deepEqual(keys(JSON.parse(sample.text)), keys(JSON.parse(stdout)));
});

Deno.test("the README and --help name every option and exit code of the script", async () => {
  const { stdout: help } = await dscpGet(["--help"]);
  const { Exit } = await import("../main.ts");
  for (const option of help.matchAll(/^ +(-\w), --\w|^ +(--[\w-]+)/gm)) {
    assert.ok(readme.includes(`\`${option[1] ?? option[2]}`), option[0]);
  }
  for (const code of Object.values(Exit).filter((code) => code > 0)) {
    assert.match(help, new RegExp(`\\b${code}\\b`));
    assert.match(readme, new RegExp(`^\\|[^|]*\\b${code}\\b[^|]*\\|`, "m"));
  }
});

Deno.test("the README's TypeScript is well-typed", async () => {
  const folder = new URL("..", import.meta.url).pathname;
  for (const { text } of blocks.filter(({ language }) => language === "ts")) {
    const file = await Deno.makeTempFile({ suffix: ".ts" });
    await Deno.writeTextFile(file, text.replaceAll('"./', `"file://${folder}`));
    const { code, stderr } = await execute([Deno.execPath(), "check", file]);
    await Deno.remove(file);
    assert.equal(code, 0, stderr);
  }
});
