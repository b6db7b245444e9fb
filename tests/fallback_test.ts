import assert from "node:assert/strict";
import type { Exchange, Reply } from "../src/exchange.ts";
import { Failure } from "../src/failure.ts";
import { builtInServer, defaultServer, ServerGone } from "../src/server.ts";
import { localTarget } from "../src/target.ts";
import { Namespace } from "./support/namespaces.ts";
import { Background, command, dscpGet, testWith } from "./support/processes.ts";
import { send } from "./support/servers.ts";
import { within } from "./support/waiting.ts";

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
    // The first request is not measured.
    const act = "if (at === 3) reset(conn); else await answer(conn);";
    {
      await using _server = await onDefaultPort(namespace, act);
      const { code, stdout, stderr } = await dscpGet(["-n", "5"], namespace);
      assert.equal(code, 56, stderr);
      assert.equal((stdout + stderr).match(/^mark +sent/gm)!.length, 1);
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
  "a server on the default port that resets each connection counts as gone, if another port may be used",
  async () => {
    await using namespace = await Namespace.create();
    await using server = await onDefaultPort(namespace, 'console.log("asked"); reset(conn);');
    const asked = () => server.said.split("asked").length - 1;
    const replaced = await dscpGet([], namespace);
    assert.equal(replaced.code, 0, replaced.stderr);
    assert.match(replaced.stdout, /built-in server/);
    assert.match(replaced.stderr, /127\.0\.0\.1:(?!8086,)\d+, the built-in server/);
    assert.equal(asked(), 1);
    // Asked again for a while, as another run may have had the port.
    const flags = ["--allow-net=127.0.0.1:8086", "--allow-ffi"];
    const { code, stderr } = await dscpGet([], { under: namespace.under, flags });
    assert.equal(code, 56, stderr);
    assert.doesNotMatch(stderr, /built-in|permission/);
    assert.equal(asked(), 12);
  },
);

testWith(
  ["root", "ip"],
  "Ctrl-C at the default port's server is not answered by another",
  async () => {
    await using namespace = await Namespace.create();
    await using server = await onDefaultPort(
      namespace,
      'console.log("asked"); await conn.read(new Uint8Array(1));',
    );
    await using run = new Background(command([], { under: namespace.under }));
    await server.until((said) => said.includes("asked"));
    const { code } = await run.stop("SIGINT");
    assert.equal(code, 130, run.said);
    assert.doesNotMatch(run.said, /built-in/);
  },
);

/** What becomes of the server at a port after this exchange: `null` if it stays. */
async function replacementAfter(
  { code, reply = null, isSeries, isTaken }: {
    code: number | null;
    reply?: Partial<Reply> | null;
    isSeries?: boolean;
    isTaken: boolean;
  },
): Promise<"the same port" | "another port" | null> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  await using server = await defaultServer(localTarget("127.0.0.1", port));
  assert.equal(server.isBuiltIn, false);
  if (!isTaken) listener.close();
  const failure = code === null ? null : new Failure(code, "failed");
  try {
    await server.throwIfGone({ reply, failure } as Exchange, isSeries);
    return null;
  } catch (error) {
    if (!(error instanceof ServerGone)) throw error;
    await using own = error.replacement;
    assert.equal(own.isBuiltIn, true);
    return own.target.port === port ? "the same port" : "another port";
  } finally {
    if (isTaken) listener.close();
  }
}

const OURS = { headers: [["server", "dscp-get/0.3.0 (built-in)"]] } as Partial<Reply>;
const THEIRS = { headers: [["server", "nginx"]] } as Partial<Reply>;

for (
  const [what, exchange, ifFree, ifTaken] of [
    ["cannot be reached", { code: 7 }, "the same port", "another port"],
    ["lost the connection", { code: 56 }, "the same port", "another port"],
    ["lost the connection in its reply", { code: 56, reply: THEIRS }, null, null],
    ["ended the connection in good order", { code: 52 }, "the same port", null],
    ["is slow", { code: 28 }, null, null],
    ["replied", { code: null, reply: THEIRS }, null, null],
    ["is another run's, for one request", { code: null, reply: OURS }, null, null],
    [
      "is another run's, for a series",
      { code: null, reply: OURS, isSeries: true },
      "the same port",
      "another port",
    ],
    ["replied to a series", { code: null, reply: THEIRS, isSeries: true }, null, null],
  ] as const
) {
  Deno.test(`the default port's server ${what}: replaced at ${ifFree}, or ${ifTaken} if it is taken`, async () => {
    assert.equal(await replacementAfter({ ...exchange, isTaken: false }), ifFree);
    assert.equal(await replacementAfter({ ...exchange, isTaken: true }), ifTaken);
  });
}

Deno.test("the built-in server ends once it has answered, and does not wait for who is silent", async () => {
  const connected = async (port: number) => {
    const conn = await Deno.connect({ port });
    await send(conn, "GET / HTTP/1.1\r\n");
    // Whoever is accepted behind it has its reply.
    using other = await Deno.connect({ port });
    await send(other, "GET / HTTP/1.1\r\n\r\n");
    assert.match(await new Response(other.readable).text(), /^HTTP\/1\.1 200 /);
    return conn;
  };
  const one = (await builtInServer("127.0.0.1", 0))!;
  const two = (await builtInServer("127.0.0.1", 0))!;
  using asking = await connected(one.target.port);
  using _silent = await connected(two.target.port);
  let isOver = false;
  const ending = one[Symbol.asyncDispose]().then(() => isOver = true);
  await send(asking, "\r\n");
  assert.ok(!isOver, "it waits for the rest of the request");
  await ending;
  assert.match(await new Response(asking.readable).text(), /^HTTP\/1\.1 200 /);
  await within(Promise.resolve(two[Symbol.asyncDispose]()), "the server to end");
});

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
