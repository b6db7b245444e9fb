import assert from "node:assert/strict";
import { Exit, type Reply } from "../main.ts";
import { dscpGet, type Outcome } from "./support/processes.ts";
import { latin1, replying } from "./support/servers.ts";

async function get(reply: (string | Uint8Array)[], ...args: string[]): Promise<Outcome> {
  await using server = replying(...reply);
  return await dscpGet([...args, server.url]);
}

async function gets(reply: string[], body: string, code = 0): Promise<void> {
  const outcome = await get(reply);
  assert.equal(outcome.code, code, outcome.stderr);
  assert.equal(outcome.stdout, body);
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

Deno.test("every split of a reply gives the same body", async () => {
  const reply = latin1(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
  );
  const { readReply } = await import("../main.ts");
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
    /conflicting Content-Length '1' and '2'/,
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
    /headers are larger than 256 KiB/,
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
  assert.match(stderr, /^left +1 packet with 0xB8.*proved$/m);
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
  assert.match((await get(reply(404), "-f")).stderr, /^dscp-get: the server answered 404 Status$/m);
  assert.deepEqual([(await get(reply(404))).code, (await get(reply(404))).stdout], [0, "body"]);
});

Deno.test("redirects are not followed, and the report shows where they lead", async () => {
  const { code, stderr } = await get([
    "HTTP/1.1 301 Moved\r\nLocation: http://example.org/\x1b[31m\r\nContent-Length: 0\r\n\r\n",
  ]);
  assert.equal(code, 0);
  assert.match(
    stderr,
    /301 Moved, 0 bytes in .*; leads to http:\/\/example\.org\/\\x1b\[31m, not followed/,
  );
});

Deno.test("bytes of the network never reach the terminal unfiltered in our own lines", async () => {
  const { stderr } = await get(["HTTP/1.1 200 \x1b[2J\x9b31m\x07\r\nContent-Length: 0\r\n\r\n"]);
  assert.doesNotMatch(stderr, /(?!\n)\p{Cc}/u);
  const json = await get([
    "HTTP/1.1 200 \x1b[2J\x9b31m\x7f\r\nX: \x85\r\nContent-Length: 0\r\n\r\n",
  ], "--json");
  assert.doesNotMatch(json.stdout.trimEnd(), /\p{Cc}/u);
  assert.equal(JSON.parse(json.stdout).reply.reason, "\x1b[2J\x9b31m\x7f");
});
