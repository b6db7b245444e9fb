import assert from "node:assert/strict";
import { Exit } from "../main.ts";
import { command, dscpGet, execute, onTerminal, testWith } from "./support/processes.ts";
import { Namespace } from "./support/namespaces.ts";
import { FarEnd, OK, replying } from "./support/servers.ts";

Deno.test("a missing permission is 103 and names the flag", async () => {
  await using server = replying(OK);
  const where = `127.0.0.1:${server.port}`;
  for (
    const [flags, hint] of [
      [[], `run with --allow-net or --allow-net=${where}`],
      [["--allow-ffi"], `run with --allow-net or --allow-net=${where}`],
      [["--allow-net"], "run with --allow-ffi"],
      [["--allow-net", "--allow-ffi=libc.so.6"], "run with --allow-ffi, not --allow-ffi=FILE"],
      [["--allow-net=127.0.0.2", "--allow-ffi"], `run with --allow-net or --allow-net=${where}`],
    ] as const
  ) {
    const { code, stdout, stderr } = await dscpGet([server.url], { flags });
    assert.equal(code, Exit.cannotRun, stderr);
    assert.deepEqual([stdout, stderr.split("\n").slice(1)], ["", [`hint: ${hint}`, ""]]);
  }
  const enough = { flags: [`--allow-net=${where}`, "--allow-ffi"] };
  assert.equal((await dscpGet([server.url], enough)).code, 0);
  const named = { flags: [`--allow-net=localhost:${server.port}`, "--allow-ffi"] };
  for (const args of [[], ["-4"], ["--mark-syn"], ["--trace", "-4"]]) {
    const { code, stderr } = await dscpGet([...args, `http://localhost:${server.port}/`], named);
    assert.equal(code, 0, stderr);
  }
});

testWith(
  ["root", "ip"],
  "of several addresses one that --deny-net denies is passed over",
  async () => {
    await using namespace = await Namespace.create("::1 localhost\n127.0.0.1 localhost\n");
    await using _server = await FarEnd.start("8086", namespace.under);
    const flags = ["--allow-ffi", "--allow-net", "--deny-net=[::1]:8086"];
    const { under } = namespace, args = ["--mark-syn", "http://localhost:8086/"];
    const { code, stderr } = await dscpGet(args, { under, flags });
    assert.equal(code, 0, stderr);
  },
);

testWith(
  ["root", "ip", "script"],
  "where libc connects, a name needs a permission without port: 103, and nobody is asked",
  async () => {
    await using namespace = await Namespace.create("127.0.0.1 localhost\n127.0.0.1 server.test\n");
    await using _server = await FarEnd.start("8086", namespace.under);
    const run = async (net: string, ...args: string[]) => {
      const options = { under: namespace.under, flags: ["--allow-ffi", `--allow-net=${net}`] };
      const words = command([...args, "http://server.test:8086/"], options);
      const line = words.filter((word) => word !== "--no-prompt").join(" ");
      return [await execute(words), await execute(onTerminal(line))];
    };
    for (const args of [["--mark-syn"], ["--trace"], ["-4"], ["-H", `X:${"x".repeat(2000)}`]]) {
      const [program, person] = await run("server.test:8086", ...args);
      assert.match(
        program.stderr + person.stdout,
        /requires net access to "server\.test"\r?\nhint: run with --allow-net=server\.test\r?\n/,
        `${args}`,
      );
      assert.deepEqual([program.code, person.code], [Exit.cannotRun, Exit.cannotRun]);
      for (const { code } of await run("server.test", ...args)) assert.equal(code, 0, `${args}`);
    }
    for (const { code } of await run("server.test:8086")) assert.equal(code, 0);
  },
);

testWith(
  ["script"],
  "on a terminal a missing permission fails as well, instead of asking",
  async () => {
    for (
      const [flags, args, error] of [
        [
          ["--allow-net"],
          ["http://127.0.0.1:1/"],
          /no permission to call libc[^]*hint: run with --allow-ffi/,
        ],
        [
          ["--allow-ffi"],
          ["http://127.0.0.1:1/"],
          /no permission to use 127\.0\.0\.1:1[^]*hint: run with --allow-net/,
        ],
        [
          ["--allow-ffi"],
          ["--mark-syn"],
          /no permission to use 127\.0\.0\.1:8086[^]*hint: run with --allow-net/,
        ],
        [
          ["--allow-ffi"],
          ["--serve", "0"],
          /no permission to use 127\.0\.0\.1:0[^]*hint: run with --allow-net/,
        ],
        [
          ["--allow-net", "--allow-ffi"],
          ["--cacert", "/etc/hostname", "https://127.0.0.1:1/"],
          /no permission to read '\/etc\/hostname'[^]*hint: run with --allow-read/,
        ],
      ] as const
    ) {
      const words = command(args, { flags }).filter((word) => word !== "--no-prompt").join(" ");
      const { code, stdout } = await execute(onTerminal(words));
      assert.equal(code, Exit.cannotRun, stdout);
      assert.match(stdout, error);
      assert.equal(stdout.match(/dscp-get: /g)!.length, 1);
    }
  },
);
