import assert from "node:assert/strict";
import { Namespace } from "./support/namespaces.ts";
import { Background, command, dscpGet, testWith } from "./support/processes.ts";

/** A server on the default port that answers a connection by what `act` does with it; `at` counts them. */
async function onDefaultPort(namespace: Namespace, act: string): Promise<Background> {
  const script = `import { setTos } from "${new URL("../ffi/mod.ts", import.meta.url)}";
    import { reset } from "${new URL("./support/servers.ts", import.meta.url)}";
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 8086 });
    console.log("ready");
    const answer = (conn) => conn.write(new TextEncoder().encode("HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok"));
    let at = 0;
    for await (const conn of listener) {
      await conn.read(new Uint8Array(4096));
      at++;
      ${act}
      conn.close();
    }`;
  const server = new Background([...namespace.under, Deno.execPath(), "eval", script]);
  await server.until((said) => said.includes("ready"));
  return server;
}

testWith(
  ["root", "ip"],
  "a series without a URL, of which one request is reset, runs once: one table, 56",
  async () => {
    await using namespace = await Namespace.create();
    const act = "if (at === 2) reset(conn); else await answer(conn);";
    {
      await using _server = await onDefaultPort(namespace, act);
      const { code, stdout, stderr } = await dscpGet(["-n", "5"], namespace);
      assert.equal(code, 56, stderr);
      assert.equal((stdout + stderr).match(/^mark +left/gm)!.length, 1);
      assert.match(stdout + stderr, /^EF +0xB8 .* 5 +1 +0 /m);
    }
    await using _server = await onDefaultPort(namespace, act);
    const { code, stdout } = await dscpGet(["--json", "-n", "5"], namespace);
    const lines = stdout.trim().split("\n").map((line) => JSON.parse(line));
    const rounds = lines.filter((line) => "round" in line);
    assert.equal(code, 56);
    assert.deepEqual(rounds.map(({ round, error }) => [round, error?.code]), [
      [1, undefined],
      [2, 56],
      [3, undefined],
      [4, undefined],
      [5, undefined],
    ]);
  },
);

testWith(
  ["root", "ip"],
  "a live server on the default port that closes each connection is 52, and is not replaced",
  async () => {
    await using namespace = await Namespace.create();
    await using _server = await onDefaultPort(namespace, "");
    for (const args of [[], ["-n", "3"], ["--mark-syn"]]) {
      const { code, stdout, stderr } = await dscpGet(args, namespace);
      assert.equal(code, 52, stderr);
      assert.doesNotMatch(stdout + stderr, /built-in/);
    }
  },
);

testWith(
  ["root", "ip"],
  "Ctrl-C ends a run that waits for the default port to become free",
  async () => {
    await using namespace = await Namespace.create();
    await using server = await onDefaultPort(namespace, 'console.log("asked"); reset(conn);');
    await using run = new Background(command([], { under: namespace.under }));
    await server.until((said) => said.includes("asked"));
    const { code } = await run.stop("SIGINT");
    assert.equal(code, 130, run.said);
  },
);

Deno.test("--json prints an object for a bad URL in a series too", async () => {
  const { code, stdout } = await dscpGet(["--json", "-n", "2", "ftp://x/"]);
  assert.equal(code, 3);
  assert.equal(JSON.parse(stdout).error.code, 3);
});

testWith(
  ["root", "ip"],
  "a series does not lean on the built-in server of another run, which may end before it",
  async () => {
    await using namespace = await Namespace.create();
    const long = ["--json", "-n", "100000"];
    await using first = new Background([...namespace.under, ...command(long)]);
    await first.until((said) => said.includes('"round":2'));
    for (const args of [["-n", "5"], ["--trace", "-d", "EF,DF"]]) {
      await using second = new Background([...namespace.under, ...command(["--json", ...args])]);
      await second.until((said) => said.includes('"url"'));
      assert.match(second.said, /"server":"built-in"/);
      assert.equal((await second.end()).code, 0);
    }
    await first.stop("SIGINT");
    await using six = new Background([...namespace.under, ...command(["-6", ...long])]);
    await six.until((said) => said.includes('"round":2'));
    const { under } = namespace, flags = ["--allow-ffi", "--allow-net=[::1]"];
    const third = await dscpGet(["-6", "-n", "3"], { under, flags });
    assert.equal(third.code, 0, third.stderr);
  },
);
