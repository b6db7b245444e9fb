import assert from "node:assert/strict";
import { Namespace } from "./support/namespaces.ts";
import { Background, dscpGet, testWith } from "./support/processes.ts";
import { startPython } from "./support/servers.ts";

testWith(
  ["root", "ip"],
  "with nobody on the default port it answers itself, proves, and says so",
  async () => {
    await using namespace = await Namespace.create();
    const { code, stdout, stderr } = await dscpGet([], namespace);
    assert.equal(code, 0, stderr);
    assert.match(stdout, /dscp-get's built-in server/);
    const lines = stderr.trimEnd().split("\n");
    assert.match(
      lines[0],
      /^connected {2}127\.0\.0\.1:\d+ → 127\.0\.0\.1:8086, the built-in server$/,
    );
    assert.match(lines[1], /^mark {7}EF = DSCP 46 = byte 0xB8; the kernel reads back 0xB8$/);
    assert.match(lines[2], /^sent {7}1 packet with 0xB8, read from its IP header: proved$/);
    assert.match(
      lines[3],
      /^arrived {4}request 0xB8: the mark survived; SYN 0x00, as it was sent$/,
    );
    assert.match(lines[4], /^ {11}\(--mark-syn marks it too\)$/);
    assert.match(lines[5], /^reply {6}200 OK, \d+ bytes in \d+\.\d ms/);
    assert.equal(lines.length, 6);
  },
);

testWith(["root", "ip", "python3"], "whoever has the default port is asked", async () => {
  await using namespace = await Namespace.create();
  await using _server = await startPython(["8086"], namespace.under);
  const { code, stdout } = await dscpGet(["--json"], namespace);
  assert.equal(code, 0);
  const result = JSON.parse(stdout);
  assert.equal(result.server, "remote");
  assert.match(result.reply.headers.find(([name]: [string]) => name === "server")[1], /SimpleHTTP/);
});

testWith(
  ["root", "ip"],
  "twenty runs started at once all succeed, also where only that one port is allowed",
  async () => {
    await using namespace = await Namespace.create();
    for (const flags of [undefined, ["--allow-net=127.0.0.1:8086", "--allow-ffi"]]) {
      const runs = await Promise.all(
        Array.from({ length: 20 }, () => dscpGet([], { under: namespace.under, flags })),
      );
      assert.deepEqual(runs.map(({ code, stderr }) => code === 0 ? 0 : stderr), runs.map(() => 0));
      for (const { stdout } of runs) assert.match(stdout, /built-in server/);
    }
  },
);

testWith(
  ["root", "ip"],
  "a server on the default port that vanishes before it replies is replaced by our own",
  async () => {
    await using namespace = await Namespace.create();
    const closer =
      `const l = Deno.listen({ hostname: "127.0.0.1", port: 8086 }); console.log("ready");
    const c = await l.accept(); await c.read(new Uint8Array(9)); c.close(); l.close();`;
    await using server = new Background([...namespace.under, Deno.execPath(), "eval", closer]);
    await server.until((said) => said.includes("ready"));
    const { code, stdout, stderr } = await dscpGet([], namespace);
    assert.equal(code, 0, stderr);
    assert.match(stdout, /built-in server/);
    assert.match(stderr, /127\.0\.0\.1:8086, the built-in server/);
  },
);

testWith(["root", "ip"], "-6 without a URL is for [::1]", async () => {
  await using namespace = await Namespace.create();
  const { code, stderr } = await dscpGet(["-6"], namespace);
  assert.equal(code, 0, stderr);
  assert.match(stderr, /^connected {2}\[::1\]:\d+ → \[::1\]:8086, the built-in server/);
});
