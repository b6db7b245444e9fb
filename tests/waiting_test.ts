import assert from "node:assert/strict";
import { execute } from "./support/processes.ts";
import { Folder } from "./support/folder.ts";
import { until, within } from "./support/waiting.ts";

Deno.test("a wait that is in vain fails, and names what it waited for", async () => {
  await assert.rejects(
    until(() => false, "the moon", 0.01),
    /^Error: waited 0\.01 s for the moon$/,
  );
  const never = new Promise(() => {});
  await assert.rejects(within(never, "the sun", 0.01), /^Error: waited 0\.01 s for the sun$/);
  assert.equal(await within(Promise.resolve("now"), "nothing"), "now");
  let asked = 0;
  assert.equal(await until(() => ++asked === 3 && "third", "the third"), "third");
});

Deno.test("a test that does not end fails, in a wait or in a loop, and the next one runs", async () => {
  await using folder = await Folder.create();
  const waiting = new URL("support/waiting.ts", import.meta.url);
  const short = (await Deno.readTextFile(waiting)).replace(/(TEST_SECONDS =) \d+/, "$1 0.2");
  await Deno.writeTextFile(`${folder.path}/waiting.ts`, short);
  const file = `${folder.path}/x_test.ts`;
  await Deno.writeTextFile(
    file,
    `import "./waiting.ts";
Deno.test("waits", () => new Promise((resolve) => { setTimeout(resolve, 1e6); }));
Deno.test({ name: "loops", fn() { for (;;); } });
Deno.test("next", () => {});
Deno.test({ name: "sent out", ignore: true, fn() {} });
`,
  );
  const words = [Deno.execPath(), "test", "--no-config", "--no-check", file];
  const { code, stdout } = await execute(words, { NO_COLOR: "1" });
  assert.equal(code, 1);
  assert.match(stdout, /^waits \.\.\. FAILED[^]*^loops \.\.\. FAILED[^]*^next \.\.\. ok/m);
  assert.match(stdout, /Test timed out after 200ms[^]*1 passed \| 2 failed \| 1 ignored/);
});
