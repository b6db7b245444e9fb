import assert from "node:assert/strict";
import { Exit, get } from "../main.ts";
import { Namespace, silent } from "./support/namespaces.ts";
import { command, dscpGet, execute, MAIN, openDescriptors, testWith } from "./support/processes.ts";
import {
  Certificates,
  ENDLESS,
  EndlessServer,
  OK,
  RawServer,
  readRequest,
  replying,
  send,
} from "./support/servers.ts";

Deno.test("-m bounds the whole request: 28, and what left before is told", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await conn.read(new Uint8Array(1));
  });
  const { code, stdout, stderr } = await dscpGet(["-m", "1", "--json", server.url]);
  assert.equal(code, Exit.timeout);
  const where = new URL(server.url).host;
  assert.equal(stderr, `dscp-get: the request to ${where} took longer than 1 second\n`);
  const result = JSON.parse(stdout);
  assert.deepEqual([result.error.code, result.sent.proved, result.reply], [28, true, null]);
});

testWith(["root", "ip", "nft"], "--connect-timeout bounds the connecting: 28", async () => {
  await using namespace = await silent(8099);
  for (
    const args of [["--connect-timeout", "0.3"], ["-m", "0.3"], ["-4", "--connect-timeout", ".3"]]
  ) {
    const { code, stderr } = await dscpGet([...args, "http://127.0.0.1:8099/"], namespace);
    assert.equal(code, Exit.timeout, stderr);
    assert.match(
      stderr,
      /^dscp-get: (connecting|the request) to 127\.0\.0\.1:8099 took longer than 0\.3 seconds\n$/,
    );
  }
});

testWith(
  ["root", "ip", "nft"],
  "a name server that does not answer is named as what took long: 28",
  async () => {
    await using namespace = await Namespace.create("127.0.0.1 localhost\n");
    await Deno.writeTextFile(`${namespace.folder}/resolv.conf`, "nameserver 127.0.0.9\n");
    const chain = "add chain ip t in { type filter hook input priority 0; }";
    await namespace.run("nft", `add table ip t; ${chain}; add rule ip t in udp dport 53 drop`);
    const run = (...how: string[]) =>
      dscpGet([...how, "--connect-timeout", "0.5", "http://server.test/"], namespace);
    for (const { code, stderr } of await Promise.all([run(), run("-4"), run("--mark-syn")])) {
      const words = "looking up or connecting to server.test:80 took longer than 0.5 seconds";
      assert.deepEqual([code, stderr], [Exit.timeout, `dscp-get: ${words}\n`]);
    }
  },
);

Deno.test("0 is no limit to the time", async () => {
  await using server = replying(OK);
  assert.equal(
    (await dscpGet(["-s", "-m", "0", "--connect-timeout", "0", server.url])).stdout,
    "ok",
  );
});

testWith(
  ["root", "ip", "nft", "sysctl"],
  "a connect that the kernel gives up is 28 as well",
  async () => {
    await using namespace = await silent(8099);
    await namespace.run("sysctl", "-q", "-w", "net.ipv4.tcp_syn_retries=1");
    const run = (...how: string[]) =>
      dscpGet([...how, "--connect-timeout", "0", "http://127.0.0.1:8099/"], namespace);
    for (const { code, stderr } of await Promise.all([run(), run("--mark-syn")])) {
      assert.deepEqual([code, stderr.split("\n")[0]], [
        28,
        "dscp-get: no answer from 127.0.0.1:8099",
      ]);
    }
  },
);

Deno.test("a server that drips is read to its end within the time, and given up after it", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    for (const byte of OK) {
      await send(conn, byte);
      await new Promise((resolve) => setImmediate(resolve));
    }
  });
  assert.equal((await dscpGet([server.url])).stdout, "ok");
});

Deno.test("--connect-timeout covers the TLS handshake: 28", async () => {
  await using server = new RawServer(async (conn) => {
    while (await conn.read(new Uint8Array(4096)) !== null);
  });
  for (const path of [[], ["--mark-syn"], ["-k"]]) {
    const args = [...path, "--connect-timeout", "0.3", "-m", "5"];
    const { code, stderr } = await dscpGet([...args, `https://127.0.0.1:${server.port}/`]);
    assert.equal(code, Exit.timeout);
    const last = stderr.trimEnd().split("\n").at(-1);
    const what = `the TLS handshake with 127.0.0.1:${server.port}`;
    assert.equal(last, `dscp-get: ${what} was not over after 0.3 seconds`);
  }
});

Deno.test("interim replies without end are a bad reply: 8", async () => {
  await using server = new EndlessServer("", "HTTP/1.1 100 Continue\r\n\r\n".repeat(50), OK);
  for (const path of [[], ["--mark-syn"]]) {
    const { code, stderr } = await dscpGet(["-m", "5", ...path, server.url]);
    assert.equal(code, Exit.badReply, stderr);
  }
  assert.ok(!server.gaveUp);
});

/** The ways to connect; those for https trust the certificates that the test made. */
const PATHS = [
  { name: "http", args: [], isHttps: false },
  { name: "http, --mark-syn", args: ["--mark-syn"], isHttps: false },
  { name: "https", args: [], isHttps: true },
  { name: "https, --mark-syn", args: ["--mark-syn", "-k"], isHttps: true },
];

for (const { name, args, isHttps } of PATHS) {
  testWith(["openssl"], `a reply without end is over when -m is: 28, over ${name}`, async () => {
    await using certificates = await Certificates.create();
    const env = { DENO_CERT: certificates.root };
    for (const [what, reply] of Object.entries(ENDLESS)) {
      await using server = new EndlessServer(...reply, isHttps ? certificates : undefined);
      const outcome = await dscpGet(["-m", "1", "--json", ...args, server.url], { env });
      assert.equal(outcome.code, Exit.timeout, `${what}: ${outcome.stderr}`);
      assert.ok(JSON.parse(outcome.stdout).reply.bodyBytes > 0);
      assert.ok(!server.gaveUp, what);
    }
  });

  testWith(["openssl"], `-m ends a run whose reader is slow: 28, over ${name}`, async () => {
    await using certificates = await Certificates.create();
    const [head, piece] = ENDLESS["a body without length"];
    await using server = new EndlessServer(head, piece, "", isHttps ? certificates : undefined);
    const env = { DENO_CERT: certificates.root };
    const { code } = await readSlowly(["-s", "-m", "0.5", ...args, server.url], 3, env);
    assert.equal(code, Exit.timeout);
    assert.ok(!server.gaveUp);
  });
}

Deno.test("a TLS handshake that is given up leaves no descriptor and no connection", async () => {
  await using server = new RawServer(async (conn) => {
    const buffer = new Uint8Array(4096);
    while (await conn.read(buffer).catch(() => null) !== null);
  });
  const url = server.url.replace("http:", "https:");
  const ask = () => get(url, { maxTime: 0.1 }).catch(() => {});
  await ask();
  await server.allClosed();
  const before = openDescriptors();
  for (let at = 0; at < 5; at++) await ask();
  await server.allClosed();
  assert.equal(openDescriptors(), before);
});

Deno.test("a body that ends does not excuse a slow reader: 28", async () => {
  await using server = replying(
    `HTTP/1.1 200 OK\r\nContent-Length: ${40 << 20}\r\n\r\n`,
    ...Array<Uint8Array>(40).fill(new Uint8Array(1 << 20)),
  );
  for (const path of [[], ["--mark-syn"]]) {
    const { code, bytes } = await readSlowly(["-s", "-m", "0.5", ...path, server.url], 3);
    assert.equal(code, Exit.timeout);
    assert.ok(bytes < 40 << 20, String(bytes));
  }
});

/** Runs the script, and reads 64 KiB of its output at a time, that many milliseconds apart. */
async function readSlowly(
  args: readonly string[],
  milliseconds: number,
  env: Record<string, string> = {},
): Promise<{ code: number; bytes: number }> {
  const [program, ...words] = command(args);
  const child = new Deno.Command(program, {
    args: words,
    env,
    stdin: "null",
    stdout: "piped",
    stderr: "null",
  }).spawn();
  let bytes = 0;
  for await (const piece of child.stdout) {
    bytes += piece.length;
    await new Promise((resolve) => setTimeout(resolve, milliseconds)); // the slowness under test
  }
  return { code: (await child.status).code, bytes };
}

Deno.test("-m ends a run whose reader has stopped, however small the pieces are: 28", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await send(conn, "HTTP/1.1 200 OK\r\n\r\n");
    for (let at = 0; at < 1000; at++) {
      await send(conn, "x".repeat(1000));
      await new Promise((resolve) => setImmediate(resolve));
    }
    await conn.read(new Uint8Array(1)); // until the client is gone
  });
  for (const path of [[], ["--mark-syn"]]) {
    const [program, ...words] = command(["-s", "-m", "1", ...path, server.url]);
    const output = { stdin: "null", stdout: "piped", stderr: "null" } as const;
    const child = new Deno.Command(program, { args: words, ...output }).spawn();
    assert.equal((await child.status).code, Exit.timeout);
    await child.stdout.cancel();
  }
});

Deno.test("limits that are not reached keep no program from ending", async () => {
  await using server = replying(OK);
  const program = `import { get } from ${JSON.stringify(MAIN)};
    for (let at = 0; at < 3; at++) await get("${server.url}");
    // This timer alone keeps no process alive.
    Deno.unrefTimer(setTimeout(() => console.log("something else does"), 2000));`;
  const { code, stdout } = await execute([Deno.execPath(), "eval", program]);
  assert.deepEqual([code, stdout], [0, ""]);
});
