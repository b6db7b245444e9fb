import assert from "node:assert/strict";
import { get } from "../main.ts";
import { Namespace } from "./support/namespaces.ts";
import { Background, command, cpuTicks, dscpGet, testWith } from "./support/processes.ts";
import { FarEnd, OK, RawServer, readRequest, send } from "./support/servers.ts";

const CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

/** A server that sends a head, and then the same piece until the client goes. */
function endless(head: string, piece: string): RawServer {
  return new RawServer(async (conn) => {
    await readRequest(conn);
    await send(conn, head);
    for (;;) await send(conn, piece);
  });
}

Deno.test("-m ends a reply that never waits and never ends: 28, however it is made", async () => {
  for (
    const [head, piece] of [[CHUNKED, "1\r\nx\r\n".repeat(1000)], ["HTTP/1.1 200 OK\r\n\r\n", "x"]]
  ) {
    for (const path of [[], ["--mark-syn"]]) {
      await using server = endless(head, piece);
      const { code, stderr } = await dscpGet(["-m", "0.5", "--json", ...path, server.url]);
      assert.equal(code, 28, stderr);
    }
  }
});

Deno.test("interim replies without end are refused: 8", async () => {
  for (const path of [[], ["--mark-syn"]]) {
    await using server = endless("", "HTTP/1.1 100 Continue\r\n\r\n");
    const { code, stderr } = await dscpGet(["-m", "5", ...path, server.url]);
    assert.equal(code, 8, stderr);
    assert.match(stderr, /interim replies/);
  }
});

Deno.test("-m ends a run whose standard output nobody reads: 28", async () => {
  for (const path of [[], ["--mark-syn"]]) {
    await using server = endless("HTTP/1.1 200 OK\r\n\r\n", "x".repeat(65536));
    const [program, ...args] = command(["-s", "-m", "0.5", ...path, server.url]);
    const run = new Deno.Command(program, { args, stdin: "null", stdout: "piped", stderr: "null" });
    const child = run.spawn();
    const { code } = await child.status;
    await child.stdout.cancel();
    assert.equal(code, 28);
  }
});

Deno.test("SIGINT ends a series whose reply never waits: 130", async () => {
  for (const path of [[], ["--mark-syn"]]) {
    const reached = Promise.withResolvers<void>();
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      await send(conn, CHUNKED);
      for (let at = 0;; at++) {
        await send(conn, "1\r\nx\r\n".repeat(100));
        if (at === 1000) reached.resolve();
      }
    });
    await using run = new Background(command(["-n", "2", "-m", "60", ...path, server.url]));
    await Promise.race([reached.promise, run.child.status]);
    assert.equal((await run.stop("SIGINT")).code, 130, run.said);
  }
});

Deno.test("--connect-timeout covers the TLS handshake: 28", async () => {
  await using server = new RawServer(async (conn) => {
    while (await conn.read(new Uint8Array(4096)) !== null);
  });
  for (const path of [[], ["--mark-syn"], ["-k"]]) {
    const url = `https://127.0.0.1:${server.port}/`;
    const { code, stderr } = await dscpGet(["--connect-timeout", "0.4", ...path, url]);
    assert.equal(code, 28, stderr);
    assert.match(stderr, /connecting took longer than 0\.4 seconds/);
  }
});

Deno.test("a hundred requests at once, marked from the SYN on, leave file reads free", async () => {
  // Each would once have held one of Deno's 32 threads for calls that wait, which read files too.
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await Deno.readTextFile(new URL(import.meta.url));
    await send(conn, OK);
  });
  const all = Array.from({ length: 100 }, () => get(server.url, { markSyn: true, maxTime: 20 }));
  for (const { reply, left } of await Promise.all(all)) {
    assert.deepEqual([reply?.status, left.proved], [200, true]);
  }
});

testWith(
  ["root", "ip", "nft", "unshare", "mount"],
  "the second address is tried in time",
  async () => {
    await using namespace = await Namespace.create();
    for (const address of ["fd00::1/128", "192.0.2.1/32", "192.0.2.2/32"]) {
      await namespace.run("ip", "addr", "add", address, "dev", "lo");
    }
    await namespace.run(
      "nft",
      "add table inet t; add chain inet t i { type filter hook input priority 0; }",
    );
    for (const dead of ["ip6 daddr fd00::1", "ip daddr 192.0.2.1"]) {
      await namespace.run("nft", `add rule inet t i ${dead} tcp dport 8086 drop`);
    }
    await using _server = await FarEnd.start("0.0.0.0:8086", namespace.under);
    const hosts = await Deno.makeTempFile({ prefix: "dscp-get-hosts-" });
    await Deno.writeTextFile(hosts, "fd00::1 six\n192.0.2.2 six\n192.0.2.1 four\n192.0.2.2 four\n");
    try {
      const inside = `mount --bind ${hosts} /etc/hosts && exec "$@"`;
      const under = [...namespace.under, "unshare", "-m", "sh", "-c", inside, "sh"];
      for (
        const args of [["--mark-syn", "http://six:8086/"], ["-4", "http://four:8086/"], [
          "--mark-syn",
          "http://four:8086/",
        ]]
      ) {
        const { code, stdout, stderr } = await dscpGet(["--json", ...args], { under });
        assert.equal(code, 0, stderr);
        assert.equal(JSON.parse(stdout).remote.address, "192.0.2.2");
      }
      const { stdout } = await namespace.run("ss", "-Htn", "state", "syn-sent");
      assert.equal(stdout, "", "no attempt is left behind");
    } finally {
      await Deno.remove(hosts);
    }
  },
);

Deno.test("a large request that waits for room costs next to no CPU, and is proved", async () => {
  const headers = Array.from({ length: 10 }, (_, at) => ["-H", `X-${at}: ${"x".repeat(90_000)}`]);
  for (const path of [[], ["--mark-syn"]]) {
    let ticks = NaN, run: Background | null = null;
    await using server = new RawServer(async (conn) => {
      // Nothing is read for a while, so that the client waits with most of its request.
      const before = cpuTicks(run!.child.pid);
      await new Promise((resolve) => setTimeout(resolve, 3000)); // the wait is what is tested
      ticks = cpuTicks(run!.child.pid) - before;
      const buffer = new Uint8Array(65536);
      for (let tail = ""; !tail.endsWith("\r\n\r\n");) {
        const size = await conn.read(buffer);
        tail = new TextDecoder().decode(buffer.subarray(Math.max(0, size! - 4), size!));
      }
      await send(conn, OK);
    });
    run = new Background(command(["--json", ...path, ...headers.flat(), server.url]));
    const { code } = await run.child.status;
    await run.stop();
    assert.equal(code, 0, run.said);
    assert.ok(ticks < 60, `${ticks} ticks of CPU in 3 s`);
    const { left } = JSON.parse(run.said.slice(run.said.indexOf("{")));
    assert.ok(left.bytes.sent > 900_000 && left.bytes.seen <= left.bytes.sent);
    assert.equal(left.proved, left.bytes.seen === left.bytes.sent ? true : null);
  }
});
