import assert from "node:assert/strict";
import { type Exchange, Exit, Failure, get as request, type Reply } from "../main.ts";
import { readReply } from "../src/reply.ts";
import { dscpGet, execute, type Outcome, testWith } from "./support/processes.ts";
import { latin1, RawServer, readRequest, replying, reset, send } from "./support/servers.ts";

async function get(reply: (string | Uint8Array)[], ...args: string[]): Promise<Outcome> {
  await using server = replying(...reply);
  return await dscpGet([...args, server.url]);
}

async function gets(reply: string[], body: string, code = 0): Promise<void> {
  const { code: exit, stdout, stderr } = await get(reply);
  assert.deepEqual([exit, stdout], [code, body], stderr);
}

async function fails(reply: string, code: number, message: RegExp): Promise<void> {
  const { code: exit, stderr } = await get([reply]);
  assert.equal(exit, code, stderr);
  assert.match(stderr.split("\n").find((line) => line.startsWith("dscp-get: "))!, message);
  assert.doesNotMatch(stderr, /^\s+at /m);
}

Deno.test("a body by Content-Length, by chunks, or until close", async () => {
  await gets(["HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "ignored"], "hello");
  await gets([
    'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1;x="y"\r\n!\r\n0\r\nTrailer: x\r\n\r\n',
  ], "hello!");
  await gets(["HTTP/1.0 200 OK\r\n\r\nhel", "lo"], "hello");
  await gets(["HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"], "");
});

Deno.test("204 and 304 have no body, and 1xx replies are skipped", async () => {
  await gets(["HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n"], "");
  await gets(["HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n"], "");
  for (const length of ["Content-Length: x", "Content-Length: -1", "Transfer-Encoding: gzip, y"]) {
    await gets([`HTTP/1.1 204 No Content\r\n${length}\r\n\r\n`], "");
    await gets([`HTTP/1.1 304 Not Modified\r\n${length}\r\n\r\n`], "");
  }
  await gets([
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
  ], "x");
});

Deno.test("line ends without CR, folded and repeated headers are read as curl reads them", async () => {
  await gets(["HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 2\n\nok"], "ok");
  const { stdout } = await get(
    ["HTTP/1.1 200 OK\r\nX: a\r\n  b\r\nContent-Length:2, 2\r\n\r\nok"],
    "--json",
  );
  assert.deepEqual(JSON.parse(stdout).reply.headers, [["x", "a b"], ["content-length", "2, 2"]]);
});

/** Our exit code and standard output, and curl's, for a reply that ends with the connection. */
async function besideCurl(reply: string, ...args: string[]): Promise<[Outcome, Outcome]> {
  await using server = replying(reply);
  const options = ["-s", ...args, server.url];
  return [await dscpGet(options), await execute(["curl", ...options])];
}

const OK_HEAD = "HTTP/1.1 200 OK\r\n", CHUNKED = `${OK_HEAD}Transfer-Encoding: chunked\r\n`;

testWith(["curl"], "odd framing and odd line ends are read as curl reads them", async () => {
  const chunks = "5\r\nhello\r\n0\r\n\r\n";
  for (
    const reply of [
      `${OK_HEAD}Content-Length: 5, 05\r\n\r\nhello`,
      `${OK_HEAD}Content-Length: 5\r\nContent-Length: 005\r\n\r\nhello`,
      `${OK_HEAD}Transfer-Encoding: identity, chunked\r\n\r\n${chunks}`,
      `${OK_HEAD}Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n${chunks}`,
      `${OK_HEAD}Transfer-Encoding: chunked, identity\r\n\r\n${chunks}`,
      `${OK_HEAD}Transfer-Encoding: chunked, chunked\r\n\r\n${chunks}`,
      `${OK_HEAD}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n${chunks}`,
      `${OK_HEAD}Transfer-Encoding: identity\r\nContent-Length: 3\r\n\r\nhello`,
      `${OK_HEAD}Content-Length: 5\r\n\r\r\nhello`,
      `${OK_HEAD}Content-Length: 5\r\r\n\r\r\nhello`,
      `HTTP/1.1 200 OK\r\r\n\r\r\r\nhello`,
    ]
  ) {
    const [ours, curls] = await besideCurl(reply, "-i");
    assert.deepEqual([ours.code, ours.stdout], [0, curls.stdout], JSON.stringify(reply));
    assert.ok(ours.stdout.endsWith("hello"), ours.stdout);
  }
});

testWith(
  ["curl"],
  "-i prints trailers behind the body, as curl does; they may be folded",
  async () => {
    for (const trailers of ["X-T: 1\r\nY:2\r\n", "X-T: a\r\n  b\r\n\tc\r\n", ""]) {
      const [ours, curls] = await besideCurl(
        `${CHUNKED}\r\n5\r\nhello\r\n0\r\n${trailers}\r\n`,
        "-i",
      );
      assert.deepEqual([ours.code, ours.stdout], [curls.code, curls.stdout], ours.stderr);
      assert.ok(ours.stdout.endsWith(`hello${trailers}`), ours.stdout);
    }
    const { reply } = await read(`${CHUNKED}\r\n0\r\nX-T: a\r\n  b\r\n\tc\r\n \r\nY: z\r\n\r\n`);
    assert.deepEqual(reply?.trailers, [["x-t", "a b c"], ["y", "z"]]);
  },
);

Deno.test("what is wrong in a header is wrong in a trailer: 8, behind the body", async () => {
  for (const line of ["X: a\0b", "No colon", ": no name", "X: y\r\n\r"]) {
    const { code, stdout, stderr } = await get([
      `${CHUNKED}\r\n5\r\nhello\r\n0\r\n${line}\r\n\r\n`,
    ]);
    assert.deepEqual([code, stdout], [Exit.badReply, "hello"], stderr);
  }
});

Deno.test("what came before a broken chunk is passed on", async () => {
  for (const broken of ["x", "\r", "\r\n-1\r\n", "\r\n10000000000000000\r\n"]) {
    const { code, stdout, stderr } = await get([`${CHUNKED}\r\n5\r\nhello${broken}`, "abc"]);
    assert.deepEqual([code, stdout], [Exit.badReply, "hello"], stderr);
  }
});

/** Runs against a server that sends this and then waits until the client has gone. */
async function whileWaiting(reply: string): Promise<Outcome> {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await send(conn, reply);
    while (await conn.read(new Uint8Array(100)) !== null);
  });
  return await dscpGet(["-m", "60", server.url]);
}

Deno.test("what is not HTTP is 8 as soon as its first bytes show it", async () => {
  const interim = "HTTP/1.1 100 Continue\r\n\r\n";
  for (const reply of ["SSH-2.0", "\x15\x03\x01", "HTTP/2", "HTTP/1.12", `${interim}ICY`]) {
    const { code, stderr } = await whileWaiting(reply);
    assert.equal(code, Exit.badReply, stderr);
    assert.match(stderr, /starts with '.+', which is not HTTP/);
  }
  for (const wrong of ["1\r\nab", "1\r\na\rb"]) {
    const { code, stderr } = await whileWaiting(`${CHUNKED}\r\n${wrong}`);
    assert.equal(code, Exit.badReply, stderr);
    assert.match(stderr, /longer than its size/);
  }
});

testWith(["curl"], "the end before the first whole status line is 52, as curl's", async () => {
  const interim = "HTTP/1.1 100 Continue\r\n\r\n";
  for (const reply of ["H", "HTTP/1.1 20", "HTTP/1.1 200 OK", interim, `${interim}HTTP/1.1`]) {
    const [ours, curls] = await besideCurl(reply);
    assert.deepEqual([ours.code, curls.code], [Exit.emptyReply, Exit.emptyReply], reply);
    assert.match(ours.stderr, /^dscp-get: empty reply: /m);
  }
});

/** Runs against a server that reads 1,000 bytes of a larger request, answers and resets. */
async function interrupted(reply: string, markSyn: boolean): Promise<[Exchange | Failure, string]> {
  await using server = new RawServer(async (conn) => {
    await conn.read(new Uint8Array(1000));
    await send(conn, reply);
    reset(conn);
  });
  // More than the buffers of both ends hold, so that the write waits.
  const headers = [["X", "x".repeat(16 << 20)]] as const;
  let body = "";
  const sink = { body: (piece: Uint8Array) => void (body += decoder.decode(piece)) };
  const asked = request(server.url, { markSyn, headers }, sink);
  return [await asked.catch((error) => error), body];
}

for (const markSyn of [false, true]) {
  const how = markSyn ? "marked from the SYN on" : "plain";

  Deno.test(`a reply that comes while the request is still being written is read: ${how}`, async () => {
    const reply = "HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge";
    const [exchange, body] = await interrupted(reply, markSyn);
    assert.ok(!(exchange instanceof Failure), String(exchange));
    assert.deepEqual([exchange.reply?.status, body], [413, "large"]);
  });

  Deno.test(`a reset is 56, also if a write meets it before a read does: ${how}`, async () => {
    for (const reply of ["HTTP/1.1 413 Too Large\r\n\r\nlarge", ""]) {
      const [failure, body] = await interrupted(reply, markSyn);
      assert.ok(failure instanceof Failure);
      assert.deepEqual([failure.code, body], [Exit.connectionLost, reply.slice(-5)]);
    }
  });
}

/** A reply as `readReply` reads it, in pieces of at most this many bytes. */
async function read(reply: string | Uint8Array, atOnce = Infinity) {
  const bytes = typeof reply === "string" ? latin1(reply) : reply;
  let at = 0, body = "";
  const source = {
    read: (buffer: Uint8Array) => {
      const piece = bytes.subarray(at, at + Math.min(atOnce, buffer.length));
      buffer.set(piece);
      at += piece.length;
      return Promise.resolve(piece.length === 0 ? null : piece.length);
    },
    arrivedTos: null,
  };
  const milliseconds = { connect: null, firstByte: null, total: null };
  const into = { reply: null as Reply | null, milliseconds, started: 0 };
  await readReply(source, into, { body: (piece) => void (body += decoder.decode(piece)) });
  return { reply: into.reply, body };
}

const decoder = new TextDecoder("latin1");

Deno.test("lines, chunks and bodies across the borders of buffers are read whole", async () => {
  // The first buffer has 4 KiB, the next 64 KiB, and the largest 256 KiB.
  for (const border of [4 * 1024, 64 * 1024, 256 * 1024]) {
    for (let off = -3; off <= 3; off++) {
      for (const atOnce of [Infinity, 1000, border]) {
        const value = "v".repeat(border - OK_HEAD.length - "X: \r\n".length + off);
        const long = Math.min(value.length, 262_000);
        const head = `${OK_HEAD}X: ${value.slice(0, long)}\r\nContent-Length: 3\r\n\r\n`;
        const { reply, body } = await read(`${head}abc`, atOnce);
        assert.deepEqual([reply?.headers[0][1].length, body], [long, "abc"]);

        const data = "d".repeat(border - CHUNKED.length + off);
        const chunks = `${data.length.toString(16)};x=${
          "y".repeat(50)
        }\r\n${data}\r\n3\nabc\n0\n\n`;
        const chunked = await read(`${CHUNKED}\r\n${chunks}`, atOnce);
        assert.ok(chunked.body === `${data}abc`, `${border} ${off} ${atOnce}`);
      }
    }
  }
});

Deno.test("every split of a reply gives the same body", async () => {
  const reply = latin1(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
  );
  for (let at = 1; at < reply.length; at++) {
    const pieces = [reply.subarray(0, at), reply.subarray(at)];
    let body = "";
    const source = {
      read: (buffer: Uint8Array) =>
        Promise.resolve(
          pieces.length === 0 ? null : (buffer.set(pieces[0]), pieces.shift()!.length),
        ),
      arrivedTos: null,
    };
    const milliseconds = { connect: null, firstByte: null, total: null };
    const into = { reply: null as Reply | null, milliseconds, started: 0 };
    await readReply(source, into, {
      body: (piece) => void (body += new TextDecoder().decode(piece)),
    });
    assert.deepEqual([body, into.reply?.complete], ["abcde", true], `split at ${at}`);
  }
});

Deno.test("a body is passed on byte for byte, whatever the bytes", async () => {
  const every = Uint8Array.from({ length: 256 * 40 }, (_, at) => at);
  const { bytes } = await get([
    `HTTP/1.1 200 OK\r\nContent-Length: ${every.length}\r\n\r\n`,
    every,
  ]);
  assert.deepEqual(bytes, every);
});

Deno.test("a reply that ends early is 18 and says how much is missing", async () => {
  await fails(
    "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhel",
    Exit.endedEarly,
    /7 of 10 bytes are missing/,
  );
  await fails(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
    Exit.endedEarly,
    /3 of a chunk's 5 bytes are missing/,
  );
  await fails(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    Exit.endedEarly,
    /before the last chunk, after 5 bytes/,
  );
  await fails("HTTP/1.1 200 OK\r\nContent-Le", Exit.endedEarly, /middle of the headers/);
});

Deno.test("a malformed reply is 8 and says what is wrong", async () => {
  await fails(
    "SSH-2.0-OpenSSH_9.2\r\n",
    Exit.badReply,
    /starts with 'SSH-2.0-OpenSSH_9.2', which is not HTTP/,
  );
  await fails("HTTP/1.1 2000 OK\r\n\r\n", Exit.badReply, /not HTTP/);
  await fails(
    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    Exit.badReply,
    /conflicting Content-Length 1 and 2/,
  );
  await fails(
    "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    Exit.badReply,
    /Content-Length '-1'/,
  );
  await fails(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    Exit.badReply,
    /bad chunk size 'xyz'/,
  );
  await fails(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
    Exit.badReply,
    /longer than its size/,
  );
  await fails(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    Exit.badReply,
    /was not asked for/,
  );
  await fails("HTTP/1.1 200 OK\r\nno colon here\r\n\r\n", Exit.badReply, /has no name and colon/);
  await fails("HTTP/1.1 101 Switching Protocols\r\n\r\n", Exit.badReply, /101/);
  await fails(
    `HTTP/1.1 200 OK\r\nX: ${"x".repeat(300_000)}\r\n\r\n`,
    Exit.badReply,
    /a line is longer than 256 KiB/,
  );
  await fails(
    `HTTP/1.1 200 OK\r\n${"X: y\r\n".repeat(50_000)}\r\n`,
    Exit.badReply,
    /headers are larger than 256 KiB/,
  );
});

Deno.test("headers of 200 KiB are read", async () => {
  await gets([`HTTP/1.1 200 OK\r\nX: ${"x".repeat(200_000)}\r\nContent-Length: 2\r\n\r\nok`], "ok");
});

Deno.test("heads that are made to be slow to read are read, or refused, at once", async () => {
  const many = 250_000;
  // Each took time that grows with the square of its size.
  await fails(
    `HTTP/1.1 200 OK\r\nX${" ".repeat(many)}\r\n\r\n`,
    Exit.badReply,
    /has no name and colon/,
  );
  await gets([`HTTP/1.1 200${" ".repeat(many)}\rx\nContent-Length: 1\n\nx`], "x");
  await gets([`HTTP/1.1 200 OK\r\nX:a${" ".repeat(many)}b\r\nContent-Length: 1\r\n\r\nx`], "x");
  await gets([`HTTP/1.1 200 OK\nContent-Length: 1\nX: a\n${" b\n".repeat(many / 4)}\nx`], "x");
  await gets(
    [`HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1${" ".repeat(many)}\nx\n0\n\n`],
    "x",
  );
  for (const name of ["Content-Length", "Transfer-Encoding"]) {
    const list = Array.from({ length: many / 8 }, (_, at) => at).join(",");
    await fails(`HTTP/1.1 200 OK\r\n${name}: ${list}\r\n\r\n`, Exit.badReply, /^.{1,200}$/);
  }
});

Deno.test("an empty reply is 52", async () => {
  await using server = replying();
  const { code, stdout, stderr } = await dscpGet([server.url]);
  assert.deepEqual([code, stdout], [Exit.emptyReply, ""]);
  assert.match(stderr, /^sent +1 packet with 0xB8.*proved$/m);
  assert.match(stderr, /empty reply/);
});

Deno.test("-i prints status line and headers first, as they came", async () => {
  const reply = "HTTP/1.1 404 Gone Fishing\r\nX-Odd:  y \r\nContent-Length: 2\r\n\r\nok";
  assert.equal((await get([reply], "-i")).stdout, reply);
});

Deno.test("-f exits 22 on 400 and above without the body, and leaves 399 alone", async () => {
  const reply = (status: number) => [`HTTP/1.1 ${status} Status\r\nContent-Length: 4\r\n\r\nbody`];
  for (const [status, code, body] of [[399, 0, "body"], [400, 22, ""], [503, 22, ""]] as const) {
    const outcome = await get(reply(status), "-f");
    assert.deepEqual([outcome.code, outcome.stdout], [code, body]);
  }
  assert.match(
    (await get(reply(404), "-f")).stderr,
    /^dscp-get: the server answered 404 Status$/m,
  );
  assert.deepEqual([(await get(reply(404))).code, (await get(reply(404))).stdout], [
    0,
    "body",
  ]);
});

Deno.test("redirects are not followed, and the report shows where they lead", async () => {
  const { code, stderr } = await get([
    "HTTP/1.1 301 Moved\r\nLocation: http://example.org/\x1b[31m\r\nContent-Length: 0\r\n\r\n",
  ]);
  assert.equal(code, 0);
  assert.match(
    stderr.replaceAll(/\n +/g, " "),
    /301 Moved, 0 bytes in .*; leads to http:\/\/example\.org\/\\x1b\[31m, not followed/,
  );
});

Deno.test("bytes of the network never reach the terminal unfiltered in our own lines", async () => {
  const { stderr } = await get([
    "HTTP/1.1 200 \x1b[2J\x9b31m\x07\r\nContent-Length: 0\r\n\r\n",
  ]);
  assert.doesNotMatch(stderr, /(?!\n)\p{Cc}/u);
  const json = await get([
    "HTTP/1.1 200 \x1b[2J\x9b31m\x7f\r\nX: \x85\r\nContent-Length: 0\r\n\r\n",
  ], "--json");
  assert.doesNotMatch(json.stdout.trimEnd(), /\p{Cc}/u);
  assert.equal(JSON.parse(json.stdout).reply.reason, "\x1b[2J\x9b31m\x7f");
});

Deno.test("a long reason phrase or location is cut in the report, and does not hang it", async () => {
  for (const long of [`${"a".repeat(200_000)}\xa0b`, "a \xa0".repeat(50_000)]) {
    const status = latin1(
      `HTTP/1.1 302 ${long}\r\nLocation: /${long}\r\nContent-Length: 0\r\n\r\n`,
    );
    await using server = replying(status);
    const { code, stderr } = await dscpGet([server.url]);
    assert.equal(code, 0, stderr.slice(0, 300));
    assert.ok(stderr.length < 1500);
    assert.equal(stderr.match(/…,/g)?.length, 2, stderr);
  }
});
