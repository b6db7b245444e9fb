import assert from "node:assert/strict";
import { Folder, ROOT } from "./support/folder.ts";
import { execute, succeed } from "./support/processes.ts";

/** Files that users leave in a checkout, the lab's pictures and pages among them. */
const STRAYS = {
  "broken.ts": "const x: = 3",
  "untidy.ts": "console.log( 'x' )",
  "broken_test.ts": "Deno.test('x', ",
  "picture.svg": "<svg>\n  <g></svg>",
  "lab.html": "<p>\n    <b>",
  "notes.md": "*  a\n+ b",
  "data.json": "{",
};

Deno.test("files of the user in the checkout disturb neither checks, tests nor the package", async () => {
  await using copy = await Folder.create();
  for (const { name } of Deno.readDirSync(ROOT)) {
    if (name === ".git" || name === "coverage") continue;
    await succeed("cp", "-r", ROOT + name, copy.path);
  }
  for (const [name, text] of Object.entries(STRAYS)) {
    await Deno.writeTextFile(`${copy.path}/${name}`, text);
  }
  const deno = async (...words: string[]) => {
    const env = ["env", "-C", copy.path, "NO_COLOR=1"];
    const { code, stdout, stderr } = await execute([...env, Deno.execPath(), ...words]);
    assert.equal(code, 0, `deno ${words.join(" ")}: ${stdout}${stderr}`);
    return stdout + stderr;
  };
  for (
    const words of ["task check", "fmt --check", "lint", "test --no-run", "task test --no-run"]
  ) await deno(...words.split(" "));
  const published = await deno("publish", "--dry-run", "--allow-dirty");
  for (const name of Object.keys(STRAYS)) assert.ok(!published.includes(`/${name} `), name);
});
