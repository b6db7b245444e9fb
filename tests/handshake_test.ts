import assert from "node:assert/strict";
import { lookup } from "node:dns/promises";
import { DescriptorError, dial, fdOf } from "../ffi/mod.ts";
import { get } from "../main.ts";
import { Network, SERVER, silent } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import { dscpGet, execute, MAIN, Nobody, openDescriptors, testWith } from "./support/processes.ts";
import {
  closedPort,
  FarEnd,
  OK,
  RawServer,
  readRequest,
  replying,
  replyingOn,
  reset,
  startPython,
} from "./support/servers.ts";

for (const host of ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost"]) {
  testWith(
    ["root", "tcpdump"],
    `--mark-syn marks every packet, SYN and FIN included, tcpdump agrees: ${host}`,
    async () => {
      await using server = replyingOn(host === "[::1]" ? "::1" : "127.0.0.1", OK);
      await using capture = await Capture.start(server.port);
      const args = ["--json", "--mark-syn", `http://${host}:${server.port}/`];
      const { code, stdout, stderr } = await dscpGet(args);
      assert.equal(code, 0, stderr);
      const { mark, sent } = JSON.parse(stdout);
      assert.deepEqual([mark.handshake, sent.proved], [true, true]);
      const fromClient = (await capture.connection()).filter(({ to }) => to === server.port);
      assert.deepEqual(fromClient.map(({ tos }) => tos), fromClient.map(() => 0xb8));
      const flags = fromClient.map((packet) => packet.flags).join(" ");
      assert.match(flags, /^S .*P.*F/);
    },
  );
}

testWith(
  ["root", "ip", "nft", "tcpdump", "python3"],
  "nobody sees a SYN leave: only the far end proves it, and one that this host rewrites is 102",
  async () => {
    await using network = await Network.create();
    const { client, server } = network;
    await using _plain = await startPython(["8087"], server.under);
    await using _farEnd = await FarEnd.start("[::]:8086", server.under);
    const ask = async (port: number, ...args: string[]) => {
      const url = `http://${SERVER.ipv4}:${port}/`;
      const { stdout } = await dscpGet(["--json", ...args, url], client);
      const { code, stderr } = await dscpGet([...args, url], client);
      const { sent, mark, error } = JSON.parse(stdout);
      const line = /^(?:handshake|arrived) +(.*)$/m.exec(stderr)?.[1] ?? "";
      return { code, stderr, line, sent, error, seen: [mark.handshake, mark.handshakeProved] };
    };
    const told = await ask(8086, "--mark-syn");
    assert.deepEqual([told.code, told.seen], [0, [true, true]]);
    assert.equal(told.line, "request 0xB8, SYN 0xB8: the mark survived");
    const unmarked = await ask(8086);
    assert.deepEqual([unmarked.code, unmarked.seen], [0, [false, null]]);
    assert.match(unmarked.line, /^request 0xB8: the mark survived; SYN 0x00, as it was sent$/);

    await client.run(
      "nft",
      "add table ip t; add chain ip t o { type filter hook output priority 0; }",
    );
    await client.run("nft", "add rule ip t o tcp flags & (syn|ack) == syn ip dscp set cs0");
    await using capture = await Capture.start(8087, "c0", client.under);
    const untold = await ask(8087, "--mark-syn");
    const sent = (await capture.connection()).filter(({ to }) => to === 8087);
    assert.deepEqual(sent.map(({ tos }) => tos), sent.map(({ flags }) => flags === "S" ? 0 : 0xb8));
    assert.deepEqual([untold.code, untold.seen, untold.sent.proved], [0, [true, null], true]);
    assert.match(untold.line, /^set before the SYN; not proved/);

    const rewritten = await ask(8086, "--mark-syn");
    assert.deepEqual([rewritten.code, rewritten.seen], [102, [true, false]]);
    assert.equal(rewritten.line, "request 0xB8, SYN 0x00: NOT the mark that was sent");
    const message = "SYN sent EF (0xB8), arrived DF (0x00), but the request kept its mark: " +
      "a SYN proxy on the path makes one of its own, or a rule changes SYNs only";
    assert.equal(rewritten.error.message, message);
    assert.ok(rewritten.stderr.endsWith(`dscp-get: ${message}\n`), rewritten.stderr);
  },
);

Deno.test("--mark-syn has the exit codes and messages of the plain path", async () => {
  const port = closedPort();
  await using silent = new RawServer(async (conn) => {
    await readRequest(conn);
    await conn.read(new Uint8Array(1));
  });
  await using early = replying("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel");
  await using empty = replying();
  for (
    const args of [
      [`http://127.0.0.1:${port}/`],
      ["http://does-not-exist.invalid/"],
      ["-6", "http://127.0.0.1/"],
      ["-4", "http://[::1]/"],
      ["-m", "0.3", silent.url],
      [early.url],
      [empty.url],
    ]
  ) {
    const plain = await dscpGet(args);
    const marked = await dscpGet(["--mark-syn", ...args]);
    assert.equal(marked.code, plain.code, marked.stderr);
    const error = (text: string) => text.slice(text.indexOf("dscp-get:"));
    assert.equal(error(marked.stderr), error(plain.stderr));
  }
});

testWith(
  ["root", "ip", "nft"],
  "--mark-syn keeps to --connect-timeout, and leaves no descriptor",
  async () => {
    await using namespace = await silent(8099);
    const { code, stderr } = await dscpGet(
      ["--mark-syn", "--connect-timeout", "0.3", "http://127.0.0.1:8099/"],
      namespace,
    );
    const message = "connecting to 127.0.0.1:8099 took longer than 0.3 seconds";
    const hint = "the path may drop marked SYNs: try without --mark-syn, or --mark-syn -d EF,DF";
    assert.deepEqual([code, stderr], [28, `dscp-get: ${message}\nhint: ${hint}\n`]);
  },
);

Deno.test("--mark-syn tries the next address when one fails", async () => {
  // In /etc/hosts "localhost" may have both; the server has only this one.
  await using server = replying(OK);
  const { code } = await dscpGet(["-s", "--mark-syn", `http://localhost:${server.port}/`]);
  assert.equal(code, 0);
});

Deno.test("--mark-syn cannot reach a host that --allow-net excludes", async () => {
  await using server = replying(OK);
  const url = `http://127.0.0.1:${server.port}/`;
  for (
    const flags of [
      ["--allow-net=127.0.0.1:1", "--allow-ffi"],
      ["--allow-net=127.0.0.2", "--allow-ffi"],
      ["--allow-net", `--deny-net=127.0.0.1:${server.port}`, "--allow-ffi"],
      [`--allow-net=127.0.0.1:${server.port}`, "--deny-net=127.0.0.1", "--allow-ffi"],
    ]
  ) {
    const { code, stderr } = await dscpGet(["--mark-syn", url], { flags });
    assert.equal(code, 103, stderr);
    assert.match(stderr, /no permission to use 127\.0\.0\.1:\d+\nhint: run with --allow-net/);
  }
  const { code } = await dscpGet(["--mark-syn", `http://localhost:${server.port}/`], {
    flags: ["--allow-net", "--deny-net=127.0.0.1", "--allow-ffi"],
  });
  assert.equal(code, 103, "the name is allowed, but not what it stands for");
  assert.equal(server.requests.length, 0);
  assert.equal(
    (await dscpGet(["--mark-syn", url], {
      flags: [`--allow-net=127.0.0.1:${server.port}`, "--allow-ffi"],
    })).code,
    0,
  );
});

Deno.test("a body passes byte for byte with --mark-syn too", async () => {
  const every = Uint8Array.from({ length: 3_000_000 }, (_, at) => at * 31);
  await using server = replying(
    `HTTP/1.1 200 OK\r\nContent-Length: ${every.length}\r\n\r\n`,
    every,
  );
  assert.deepEqual((await dscpGet(["-s", "--mark-syn", server.url])).bytes, every);
});

Deno.test("what waits on a dialed connection ends when it is closed, and its descriptor is not another's by then", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const conn = await dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 });
  using other = await listener.accept();
  const reading = conn.read(new Uint8Array(1));
  const writing = (async () => {
    // The send buffer may grow, so that only some later write waits.
    for (;;) await conn.write(new Uint8Array(64 << 20));
  })();
  const ended = Promise.allSettled([reading, writing]);
  await new Promise((resolve) => setImmediate(resolve));
  conn.close();
  conn.close();
  for (const { status, reason } of await ended as PromiseRejectedResult[]) {
    assert.equal(status, "rejected");
    assert.ok(
      reason instanceof Deno.errors.BadResource || reason instanceof Deno.errors.BrokenPipe,
      String(reason),
    );
  }
  await assert.rejects(conn.read(new Uint8Array(1)), Deno.errors.BadResource);
  await assert.rejects(conn.write(new Uint8Array(1)), Deno.errors.BadResource);
  assert.throws(() => fdOf(conn), DescriptorError);
  assert.ok(other.remoteAddr);
});

Deno.test("a dialed connection writes more than fits a buffer, reads to the end, and tells of a reset", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const bytes = Uint8Array.from({ length: 8_000_000 }, (_, at) => at * 31 >> 2);
  const echo = (async () => {
    using conn = await listener.accept();
    await conn.readable.pipeTo(conn.writable, { preventClose: true }).catch(() => {});
  })();
  const conn = await dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 });
  const write = async () => {
    for (let sent = 0; sent < bytes.length;) sent += await conn.write(bytes.subarray(sent));
  };
  const read = async () => {
    const got = new Uint8Array(bytes.length);
    for (let size = 0; size < got.length;) size += await conn.read(got.subarray(size)) ?? NaN;
    return got;
  };
  const [, got] = await Promise.all([write(), read()]);
  assert.deepEqual(got, bytes);
  assert.equal(await conn.read(new Uint8Array(0)), 0);
  conn.close();
  await echo;

  const [broken, server] = await Promise.all([
    dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 }),
    listener.accept(),
  ]);
  reset(server);
  server.close();
  // The kernel would report it once, and then an end.
  for (let times = 0; times < 2; times++) {
    await assert.rejects(broken.read(new Uint8Array(1)), Deno.errors.ConnectionReset);
  }
  await assert.rejects(broken.write(new Uint8Array(1)), Deno.errors.BrokenPipe);
  broken.close();

  // The error of a connection that is waited for goes to the thread that waits.
  const [waiting, other] = await Promise.all([
    dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 }),
    listener.accept(),
  ]);
  const reading = waiting.read(new Uint8Array(1));
  reset(other);
  other.close();
  await assert.rejects(reading, Deno.errors.ConnectionReset);
  waiting.close();
});

Deno.test("dialing leaves as many descriptors open as before, also when it fails or is given up", async () => {
  await using server = replying(OK);
  await get(server.url, { markSyn: true });
  const before = openDescriptors();
  for (let at = 0; at < 50; at++) await get(server.url, { markSyn: true });
  const port = closedPort();
  for (let at = 0; at < 20; at++) {
    await assert.rejects(
      dial({ hostname: "127.0.0.1", port, tos: 0xb8 }),
      Deno.errors.ConnectionRefused,
    );
  }
  await assert.rejects(dial({ hostname: "127.0.0.1", port: server.port, tos: 3 }), RangeError);
  await assert.rejects(
    dial({
      hostname: "127.0.0.1",
      port: server.port,
      tos: 0xb8,
      signal: AbortSignal.abort(new Error("no")),
    }),
    /no/,
  );
  // The server's ends, in this same process, close some turns of the event loop later.
  for (let turn = 0; openDescriptors() > before && turn < 1000; turn++) {
    await new Promise((resolve) => setImmediate(resolve));
  }
  const after = openDescriptors();
  assert.ok(after <= before, `${after} instead of ${before}`);
});

testWith(["root", "setpriv"], "nobody can mark the handshake too, and be the far end", async () => {
  await using nobody = await Nobody.create();
  await using server = await FarEnd.of([...nobody.command, "--serve", "0"]);
  const words = [...nobody.command, "--json", "--mark-syn", server.url];
  const { code, stdout, stderr } = await execute(words);
  assert.equal(code, 0, stderr);
  const { syn, ack, data } = JSON.parse(stdout).arrived;
  assert.deepEqual([syn, ack, data], [0xb8, null, 0xb8]);
});

Deno.test("200 dialed requests at once are all answered, by a server of this process that reads files", async () => {
  const where = { hostname: "127.0.0.1", port: 0, onListen() {} };
  await using server = Deno.serve(where, async () => new Response(await Deno.readTextFile(MAIN)));
  const url = `http://127.0.0.1:${server.addr.port}/`;
  const asked = Array.from({ length: 200 }, () => get(url, { markSyn: true }));
  for (const { reply, sent } of await Promise.all(asked)) {
    assert.deepEqual([reply?.status, sent.proved], [200, true]);
  }
});

Deno.test("200 dialed connections that wait hold up no file read and no name look-up", async () => {
  const go = Promise.withResolvers<void>();
  await using server = new RawServer(async (conn) => {
    await go.promise;
    await conn.write(new Uint8Array(1));
  });
  const open = () => dial({ hostname: "127.0.0.1", port: server.port, tos: 0xb8 });
  const conns = await Promise.all(Array.from({ length: 200 }, open));
  const replies = conns.map((conn) => conn.read(new Uint8Array(1)));
  // Were the file and the name to wait for the replies, all would wait for ever.
  const giveUp = setTimeout(go.resolve, 5000);
  const others = Promise.all([Deno.readTextFile(MAIN), lookup("localhost")]).then(() => "others");
  const first = await Promise.race([others, Promise.race(replies).then(() => "a reply")]);
  assert.equal(first, "others");
  clearTimeout(giveUp);
  go.resolve();
  assert.deepEqual(await Promise.all(replies), conns.map(() => 1));
  for (const conn of conns) conn.close();
});

Deno.test("a process ends once its last dialed connection is closed, also while it waits", async () => {
  const script = `import { dial } from "${new URL("../ffi/mod.ts", import.meta.url)}";
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr;
    const conn = await dial({ hostname: "127.0.0.1", port, tos: 0xb8 });
    const server = await listener.accept(), byte = new Uint8Array(1);
    // The thread's first waits end at once, as every new descriptor can be written to.
    for (let times = 0; times < 3; times++) {
      const reading = conn.read(byte);
      await server.write(byte);
      await reading;
    }
    const reading = conn.read(byte).catch(({ name }) => name);
    conn.close();
    server.close();
    listener.close();
    console.log(await reading);`;
  const words = ["timeout", "20", Deno.execPath(), "eval", script];
  const { code, stdout, stderr } = await execute(words);
  assert.deepEqual([code, stdout], [0, "BadResource\n"], stderr);
});
