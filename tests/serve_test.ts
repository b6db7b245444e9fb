import assert from "node:assert/strict";
import { Namespace } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import {
  command,
  cpuTicks,
  dscpGet,
  execute,
  openDescriptors,
  testWith,
  waitsForReader,
} from "./support/processes.ts";
import { FarEnd, reset, send } from "./support/servers.ts";
import { until, within } from "./support/waiting.ts";

const decoder = new TextDecoder();

/** Sends a request as it is and reads all of the reply. */
async function exchange(
  port: number,
  request: string | Uint8Array,
  hostname = "127.0.0.1",
): Promise<string> {
  using conn = await Deno.connect({ hostname, port });
  await send(conn, request);
  const reply = [];
  for await (const piece of conn.readable) reply.push(decoder.decode(piece));
  return reply.join("");
}

/** Reads the first bytes of a reply, which hold at least its status line. */
async function firstLine(conn: Deno.Conn): Promise<string> {
  const buffer = new Uint8Array(1000);
  const size = await conn.read(buffer);
  return decoder.decode(buffer.subarray(0, size ?? 0)).split("\r\n")[0];
}

/** The resident memory of a process, proc(5). */
function residentMiB(pid: number): number {
  const status = Deno.readTextFileSync(`/proc/${pid}/status`);
  return Number(/VmRSS:\s+(\d+)/.exec(status)![1]) / 1024;
}

Deno.test("--serve answers GET and HEAD with what it saw", async () => {
  await using server = await FarEnd.start();
  using conn = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  await send(conn, "GET /x HTTP/1.1\r\nHost: a\r\n\r\n");
  const local = conn.localAddr as Deno.NetAddr;
  const reply = [];
  for await (const piece of conn.readable) reply.push(decoder.decode(piece));
  const [head, body] = reply.join("").split("\r\n\r\n");
  assert.match(head, /^HTTP\/1\.1 200 OK\r\n/);
  assert.match(head, /^Arrived-ToS: 0x00\r$/m);
  assert.deepEqual(JSON.parse(body), {
    peer: { address: local.hostname, port: local.port },
    syn: 0,
    ack: null,
    data: 0,
    sequence: Number(/^Arrived-Sequence: (\d+)\r$/m.exec(head)![1]),
  });

  const headOnly = await exchange(server.port, "HEAD / HTTP/1.0\r\n\r\n");
  assert.match(headOnly, /^HTTP\/1\.1 200 OK\r\n[^]*Content-Length: [1-9][^]*\r\n\r\n$/);
});

testWith(
  ["root", "tcpdump"],
  "--serve marks its replies with the mark that arrived, and reports what tcpdump sees",
  async () => {
    for (
      const [hostname, url] of [["127.0.0.1", "127.0.0.1"], ["[::]", "[::1]"], [
        "[::]",
        "127.0.0.1",
      ]]
    ) {
      await using server = await FarEnd.start(`${hostname}:0`);
      for (const args of [["--mark-syn", "-d", "AF41"], ["-d", "AF41"]]) {
        await using capture = await Capture.start(server.port);
        const { code, stdout, stderr } = await dscpGet([
          "--json",
          ...args,
          `http://${url}:${server.port}/`,
        ]);
        assert.equal(code, 0, stderr);
        const { arrived: { syn: sawSyn, ack: sawAck, data: sawData }, reply } = JSON.parse(stdout);
        const packets = await capture.connection();
        const [syn] = packets;
        const data = packets.find(({ to, length }) => to === server.port && length > 0)!;
        const answer = packets.find(({ from, length }) => from === server.port && length > 0)!;
        assert.deepEqual([sawSyn, sawAck, sawData], [syn.tos, null, data.tos]);
        assert.equal(answer.tos, data.tos, "the request's mark comes back");
        assert.equal(reply.tos, answer.tos);
        assert.equal(data.tos, 0x88);
      }
    }
  },
);

for (const isReflecting of [false, true]) {
  const reflecting = isReflecting ? ", net.ipv4.tcp_reflect_tos = 1" : "";

  testWith(
    ["root", "ip", "tcpdump"],
    `replies have the request's mark, or a fixed one, and Reply-ToS says which${reflecting}`,
    async () => {
      await using namespace = await Namespace.create();
      const reflect = `net.ipv4.tcp_reflect_tos=${isReflecting ? 1 : 0}`;
      await namespace.run("sysctl", "-qw", reflect);
      const server = new URL("../src/server.ts", import.meta.url);
      for (
        const [fixed, args, synAck, reply] of [
          [null, ["-d", "AF41"], 0, 0x88],
          [null, ["-d", "AF41", "--mark-syn"], isReflecting ? 0x88 : 0, 0x88],
          [null, ["-d", "DF"], 0, 0],
          [0xb8, ["-d", "AF41"], isReflecting ? 0 : 0xb8, 0xb8],
          [0xb8, ["-d", "AF41", "--mark-syn"], isReflecting ? 0x88 : 0xb8, 0xb8],
          [0, ["-d", "AF41", "--mark-syn"], isReflecting ? 0x88 : 0, 0],
        ] as const
      ) {
        const script = `import { serveUntilSignal } from "${server}";
          await serveUntilSignal({ hostname: "::", port: 8086 }, false, ${fixed});`;
        await using _far = await FarEnd.of([...namespace.under, Deno.execPath(), "eval", script]);
        for (const url of ["http://127.0.0.1:8086/", "http://[::1]:8086/"]) {
          await using capture = await Capture.start(8086, "lo", namespace.under);
          const { code, stdout, stderr } = await dscpGet(["--json", ...args, url], namespace);
          assert.equal(code, 0, stderr);
          const { headers } = JSON.parse(stdout).reply;
          const reported = headers.find(([name]: string[]) => name === "reply-tos")[1];
          const sent = (await capture.connection()).filter(({ from, flags }) =>
            from === 8086 && !flags.includes("R")
          );
          const what = `${fixed} ${args} ${url}`;
          assert.equal(sent[0].tos, synAck, what);
          const data = sent.filter(({ length }) => length > 0).map(({ tos }) => tos);
          assert.deepEqual([new Set(data), Number(reported)], [new Set([reply]), reply], what);
        }
      }
    },
  );
}

Deno.test("other methods are 405, garbage 400, a large header 431", async () => {
  await using server = await FarEnd.start();
  assert.match(
    await exchange(server.port, "POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
    /^HTTP\/1\.1 405 [^]*\r\nAllow: GET, HEAD\r\n/,
  );
  for (
    const garbage of [
      "\x16\x03\x01\x02\x00\r\n\r\n",
      "\0\0\0\n\n",
      "GET /\r\n\r\n",
      "GET  HTTP/1.1\r\n\r\n",
    ]
  ) {
    assert.match(await exchange(server.port, garbage), /^HTTP\/1\.1 400 /);
  }
  assert.match(
    await exchange(server.port, `GET / HTTP/1.1\r\nX: ${"x".repeat(65536)}\r\n\r\n`),
    /^HTTP\/1\.1 431 /,
  );
  assert.match(
    await exchange(server.port, `GET / HTTP/1.1\r\nX: ${"x".repeat(16000)}\r\n\r\n`),
    /^HTTP\/1\.1 200 /,
  );
});

Deno.test("a body does not count as a head: GET with a large one is 200, POST 405", async () => {
  await using server = await FarEnd.start();
  const body = `Content-Length: 300000\r\n\r\n${"x".repeat(300_000)}`;
  for (const [method, status] of [["GET", 200], ["HEAD", 200], ["POST", 405]] as const) {
    const reply = await exchange(server.port, `${method} / HTTP/1.1\r\n${body}`);
    assert.match(reply, new RegExp(`^HTTP/1\\.1 ${status} `));
  }
  // Requests behind the first are not read.
  const many = "GET /first HTTP/1.1\r\n\r\n".repeat(1000);
  assert.match(await exchange(server.port, many), /^HTTP\/1\.1 200 /);
});

Deno.test("a TLS ClientHello is answered 400 at once, while the client waits", async () => {
  await using server = await FarEnd.start();
  using waiting = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  await send(waiting, "GET / HT");
  // The answer comes before the 408 of the client that came first.
  const hello = exchange(server.port, "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03");
  const first = await Promise.race([hello, waiting.read(new Uint8Array(100))]);
  assert.match(String(first), /^HTTP\/1\.1 400 /);
});

Deno.test("a header that comes a byte at a time is read, and one that never ends is 408", async () => {
  await using server = await FarEnd.start();
  using slow = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  const waiting = exchange(server.port, "GET / HTTP/1.1\r\nX-Unfinished: ");
  for (const byte of "GET / HTTP/1.1\r\nHost: a\r\n\r\n") {
    await send(slow, byte);
    await new Promise((resolve) => setImmediate(resolve));
  }
  const size = await slow.read(new Uint8Array(1000));
  assert.ok(size! > 100);
  assert.match(await waiting, /^HTTP\/1\.1 408 /);
});

Deno.test("the log has one line a request, safe against control characters", async () => {
  await using server = await FarEnd.start();
  await exchange(server.port, "GET /\x1b[2J HTTP/1.1\r\n\r\n");
  await exchange(server.port, "GET /ok?q=1 HTTP/1.1\r\n\r\n");
  const said = await server.process.until((said) => said.includes("/ok"));
  const lines = said.trimEnd().split("\n");
  assert.match(lines[0], /^listening on 127\.0\.0\.1:\d+; Ctrl-C ends it$/);
  assert.equal(lines[1], `only this host can reach it; for all: --serve '[::]:${server.port}'`);
  assert.match(lines[2], /^127\.0\.0\.1:\d+ - - 400 syn 0x00 ack - data 0x00$/);
  assert.match(lines[3], /^127\.0\.0\.1:\d+ GET \/ok\?q=1 200 syn 0x00 ack - data 0x00$/);
  assert.equal(lines.length, 4);
});

Deno.test("SIGINT and SIGTERM end it: no new connections, those in progress finish, exit 0", async () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    await using server = await FarEnd.start();
    using conn = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
    await send(conn, "GET / HTTP/1.1\r\n");
    await exchange(server.port, "GET /first HTTP/1.1\r\n\r\n"); // it has accepted both by now
    server.process.child.kill(signal);
    const where = { hostname: "127.0.0.1", port: server.port };
    const isRefused = () => Deno.connect(where).then((conn) => (conn.close(), false), () => true);
    await until(isRefused, "the listener to close");
    await send(conn, "\r\n");
    const buffer = new Uint8Array(1000);
    const size = await conn.read(buffer);
    assert.match(decoder.decode(buffer.subarray(0, size!)), /^HTTP\/1\.1 200 OK/);
    conn.closeWrite();
    const { code, signal: killedBy } = await server.process.end();
    assert.deepEqual([code, killedBy], [0, null]);
  }
});

Deno.test("a port in use, a bad address or a URL beside --serve are clear errors", async () => {
  await using server = await FarEnd.start();
  const inUse = await dscpGet(["--serve", String(server.port)]);
  assert.equal(inUse.code, 7);
  assert.match(
    inUse.stderr,
    /^dscp-get: cannot listen on 127\.0\.0\.1:\d+: address already in use/,
  );
  for (const where of ["", "x", "127.0.0.1", "70000", "::1:80", "[::1]", "a:b:1"]) {
    assert.equal((await dscpGet(["--serve", where])).code, 2, where);
  }
  assert.equal((await dscpGet(["--serve", "0", "http://a/"])).code, 2);
  assert.equal((await dscpGet(["--serve", "0"], { flags: ["--allow-ffi"] })).code, 103);
  assert.equal((await dscpGet(["--serve", "0"], { flags: ["--allow-net"] })).code, 103);
});

testWith(
  ["bash"],
  "a thousand slow clients hold up none of a thousand others, and no descriptor stays open",
  async () => {
    // 1,000 slow ones, 24 at most at once of the others.
    const raised = ["bash", "-c", 'ulimit -n 4096 2>/dev/null; exec "$@"', "bash"];
    await using server = await FarEnd.start("0", raised);
    const descriptors = () => openDescriptors(server.process.child.pid);
    await exchange(server.port, "GET / HTTP/1.1\r\n\r\n");
    const before = descriptors();
    const slow: Deno.TcpConn[] = [];
    for (let at = 0; at < 1000; at++) {
      const conn = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
      await send(conn, "GET / HT");
      slow.push(conn);
    }
    let good = 0;
    const worker = async () => {
      while (good < 1000) {
        good++;
        assert.match(await exchange(server.port, "GET / HTTP/1.1\r\n\r\n"), /^HTTP\/1\.1 200/);
      }
    };
    await Promise.all(Array.from({ length: 8 }, worker));
    slow.forEach((conn, at) => {
      if (at % 2 === 0) reset(conn);
      conn.close();
    });
    await until(async () => {
      await exchange(server.port, "GET / HTTP/1.1\r\n\r\n");
      return descriptors() <= before;
    }, "the server to have its descriptors back");
  },
);

Deno.test("beyond 1,024 connections at once, the one that has waited longest without a head makes room", async () => {
  await using server = await FarEnd.start();
  const before = openDescriptors(server.process.child.pid);
  const idle: Deno.TcpConn[] = [];
  for (let at = 0; at < 1024; at++) {
    idle.push(await Deno.connect({ hostname: "127.0.0.1", port: server.port }));
    await send(idle[at], "G");
  }
  const opened = () => openDescriptors(server.process.child.pid) - before;
  await until(() => opened() >= 1024, "1,024 connections to be accepted");
  for (let at = 0; at < 3; at++) {
    assert.match(await exchange(server.port, "GET / HTTP/1.1\r\n\r\n"), /^HTTP\/1\.1 200/);
  }
  const byte = new Uint8Array(1);
  const ended = await idle[0].read(byte).then((size) => size === null, () => true);
  assert.ok(ended, "the oldest was closed");
  // The newest is still served.
  await send(idle[1023], "ET / HTTP/1.1\r\n\r\n");
  assert.equal(await idle[1023].read(byte), 1);
  for (const conn of idle) conn.close();
});

Deno.test("1,024 clients that send nothing lock nobody out, and are accepted after a while", async () => {
  await using server = await FarEnd.start();
  const before = openDescriptors(server.process.child.pid), idle: Deno.TcpConn[] = [];
  for (let at = 0; at < 1024; at++) {
    idle.push(await Deno.connect({ hostname: "127.0.0.1", port: server.port }));
  }
  assert.match(await exchange(server.port, "GET / HTTP/1.1\r\n\r\n"), /^HTTP\/1\.1 200/);
  const opened = () => openDescriptors(server.process.child.pid) - before;
  await until(() => opened() >= 1000, "the clients to be accepted", 20);
  assert.match(await exchange(server.port, "GET / HTTP/1.1\r\n\r\n"), /^HTTP\/1\.1 200/);
  for (const conn of idle) conn.close();
});

testWith(
  ["curl"],
  "curl gets the answer, and a header of 64 KiB does not end the server",
  async () => {
    await using server = await FarEnd.start();
    const { stdout } = await execute(["curl", "--silent", "--dump-header", "-", server.url]);
    assert.match(stdout, /Arrived-ToS: 0x00/);
    const header = ["-H", `X: ${"x".repeat(65536)}`];
    const words = "curl --silent --write-out %{http_code}".split(" ");
    const large = await execute([...words, ...header, server.url]);
    assert.match(large.stdout, /431$/);
    assert.equal((await execute(["curl", "--silent", "--fail", server.url])).code, 0);
  },
);

testWith(
  ["bash"],
  "more idle clients than descriptors cost next to no CPU and no memory",
  async () => {
    const few = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"];
    await using server = await FarEnd.start("0", few);
    const { pid } = server.process.child;
    const clients: Deno.TcpConn[] = [];
    for (let at = 0; at < 100; at++) {
      clients.push(await Deno.connect({ hostname: "127.0.0.1", port: server.port }));
      await send(clients[at], "G");
    }
    const before = cpuTicks(pid), memory = residentMiB(pid);
    // Those that found a place have 10 seconds, and the others wait for theirs.
    assert.match(await within(firstLine(clients[0]), "408", 18), /^HTTP\/1\.1 408 /);
    const ticks = cpuTicks(pid) - before, grown = residentMiB(pid) - memory;
    assert.ok(ticks < 100, `${ticks} ticks`);
    assert.ok(grown < 30, `${grown} MiB`);
    for (const conn of clients) conn.close();
  },
);

Deno.test("400 connections that are reset before they are accepted hold up nobody", async () => {
  await using server = await FarEnd.start();
  const { child } = server.process;
  child.kill("SIGSTOP");
  for (let at = 0; at < 400; at++) {
    using conn = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
    await send(conn, "G");
    reset(conn);
  }
  child.kill("SIGCONT");
  assert.equal((await dscpGet(["-s", "-m", "5", server.url])).code, 0);
});

Deno.test("a client that keeps its connection after the reply is closed", async () => {
  await using server = await FarEnd.start();
  const { pid } = server.process.child, before = openDescriptors(pid);
  using conn = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  await send(conn, "GET / HTTP/1.1\r\nContent-Length: 9\r\n\r\n");
  assert.match(await firstLine(conn), /^HTTP\/1\.1 200 /);
  await until(() => openDescriptors(pid) <= before, "the connection to be closed");
});

Deno.test("a log that is read late is whole: the server waits for its last lines to be written", async () => {
  const [program, ...args] = command(["--serve", "0"]);
  const output = { stdin: "null", stdout: "null", stderr: "piped" } as const;
  const child = new Deno.Command(program, { args, ...output }).spawn();
  const log = child.stderr.pipeThrough(new TextDecoderStream()).getReader();
  let said = (await log.read()).value!;
  const port = Number(/:(\d+);/.exec(said)![1]), count = 500, path = "x".repeat(190);
  for (let at = 0; at < count; at++) await exchange(port, `GET /${path} HTTP/1.1\r\n\r\n`);
  await until(() => waitsForReader(child.pid), "the pipe to be full");
  child.kill("SIGTERM");
  const isRefused = () =>
    Deno.connect({ hostname: "127.0.0.1", port }).then((conn) => (conn.close(), false), () => true);
  await until(isRefused, "the listener to close");
  for (;;) {
    const { value, done } = await within(log.read(), "the end of the log");
    if (done) break;
    said += value;
  }
  assert.equal(said.split(path).length - 1, count);
  assert.equal((await child.status).code, 0);
});

Deno.test("a second signal ends --serve at once, without a stack trace", async () => {
  await using server = await FarEnd.start();
  using idle = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  await send(idle, "G");
  await exchange(server.port, "GET / HTTP/1.1\r\n\r\n"); // it has accepted both by now
  const { child } = server.process;
  child.kill("SIGINT");
  child.kill("SIGTERM");
  const { code } = await server.process.stop("SIGTERM");
  // Whichever it heard first.
  assert.ok(code === 143 || code === 130, String(code));
  assert.doesNotMatch(server.process.said, /^ +at /m);
});

Deno.test("--serve that is stopped does not give idle clients the time that others have for a head", async () => {
  await using other = await FarEnd.start();
  using waiting = await Deno.connect({ hostname: "127.0.0.1", port: other.port });
  await send(waiting, "G");
  const timedOut = firstLine(waiting).then(() => "the other server's 408", () => "closed");

  await using server = await FarEnd.start();
  using idle = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  await send(idle, "G");
  using rest = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  await send(rest, "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n");
  assert.match(await firstLine(rest), /^HTTP\/1\.1 405 /); // it has accepted both by now
  const stopped = server.process.stop("SIGTERM").then(({ code }) => code);
  assert.match(await firstLine(idle), /^HTTP\/1\.1 408 /);
  assert.equal(await Promise.race([stopped, timedOut]), 0);
});

Deno.test("a log that nobody reads holds up neither clients nor SIGTERM; what was dropped is counted", async () => {
  const [program, ...args] = command(["--serve", "0"]);
  const output = { stdin: "null", stdout: "null", stderr: "piped" } as const;
  const child = new Deno.Command(program, { args, ...output }).spawn();
  const log = child.stderr.pipeThrough(new TextDecoderStream()).getReader();
  const { value: first } = await log.read();
  const port = Number(/:(\d+);/.exec(first!)![1]);
  // A pipe holds 64 KiB, this is much more.
  const path = "x".repeat(190), count = 2000;
  const ask = async (path: string) =>
    assert.match(await exchange(port, `GET /${path} HTTP/1.1\r\n\r\n`), /^HTTP\/1\.1 200/);
  for (let at = 0; at < count; at++) await ask(path);
  let said = "";
  const read = async (what: RegExp) => {
    while (!what.test(said)) {
      said += (await within(log.read(), `${what} in the log`)).value ?? end();
    }
  };
  const end = () => assert.fail("the log has ended");
  await read(/\n… \d+ lines dropped\n/);
  const dropped = Number(/… (\d+) lines dropped/.exec(said)![1]);
  assert.equal(said.split(path).length - 1 + dropped, count);
  assert.ok(dropped > 100, String(dropped));
  await ask("again");
  await read(/\/again 200/);

  for (let at = 0; at < count; at++) await ask(path);
  child.kill("SIGTERM");
  const { code, signal } = await child.status;
  assert.deepEqual([code, signal], [0, null]);
  await log.cancel();
});
