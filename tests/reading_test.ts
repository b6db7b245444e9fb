import assert from "node:assert/strict";
import type { Sink } from "../main.ts";
import type { Reply } from "../src/exchange.ts";
import { Exit, Failure } from "../src/failure.ts";
import { readReply, SinkError } from "../src/reply.ts";
import { latin1 } from "./support/servers.ts";

// Replies without a network: what readReply takes and refuses, case by case.

const HEAD = "HTTP/1.1 200 OK\r\n", CHUNKED = `${HEAD}Transfer-Encoding: chunked\r\n\r\n`;

/** A connection on which these bytes came. */
class Source {
  arrivedTos: number | null = 0x20;
  /** How many reads there were. */
  reads = 0;
  readonly #bytes: Uint8Array;
  #at = 0;

  constructor(text: string, readonly atOnce = Infinity) {
    this.#bytes = latin1(text);
  }

  read(buffer: Uint8Array): Promise<number | null> {
    this.reads++;
    const piece = this.#bytes.subarray(this.#at, this.#at + Math.min(this.atOnce, buffer.length));
    buffer.set(piece);
    this.#at += piece.length;
    return Promise.resolve(piece.length === 0 ? null : piece.length);
  }
}

interface Result {
  /** The reply as far as it came. */
  reply: Reply | null;
  firstByte: number | null;
  body: string;
  /** Status line, headers and trailers as they came. */
  head: string;
  error: unknown;
}

/** Reads a reply to its end or its failure. */
async function read(source: Source, sink: Sink = {}, signal?: AbortSignal): Promise<Result> {
  const milliseconds = { connect: null, firstByte: null, total: null };
  const exchange: Parameters<typeof readReply>[1] = {
    reply: null,
    milliseconds,
    started: performance.now(),
  };
  let body = "", head = "", error: unknown = null;
  const collect: Sink = {
    head: (line) => void (head += line),
    body: (piece) => void (body += new TextDecoder("latin1").decode(piece)),
  };
  await readReply(source, exchange, { ...collect, ...sink }, signal)
    .catch((thrown) => error = thrown);
  return { reply: exchange.reply, firstByte: exchange.milliseconds.firstByte, body, head, error };
}

/** Reads a text; gives its body, or the exit code and message of its failure. */
async function outcome(text: string): Promise<string> {
  const { body, error } = await read(new Source(text));
  if (error === null) return body;
  assert.ok(error instanceof Failure, String(error));
  return `${error.code} ${error.message}`;
}

Deno.test("a status line is read with any spaces, or refused", async () => {
  const rows = [
    ["HTTP/1.1 200 OK", "200 OK"],
    ["HTTP/1.0 200 OK", "200 OK"],
    ["HTTP/1.1   404   Not  Found \t", "404 Not  Found"],
    ["HTTP/1.1 200", "200 "],
    ["HTTP/1.1 200 ", "200 "],
    ["HTTP/1.1 999 \xa0x\xa0", "999 \xa0x\xa0"],
    ["HTTP/1.1 200\rOK", "200 OK"],
    ["HTTP/1.1 2000", "'HTTP/1.1 2000', which is not HTTP/1.1"],
    ["HTTP/1.1 20", "'HTTP/1.1 20', which is not HTTP/1.1"],
    ["HTTP/1.1 200\tOK", "'HTTP/1.1 200\\x09OK', which is not HTTP/1.1"],
    ["HTTP/1.2 200 OK", "'HTTP/1.2 200 OK', which is not HTTP/1.1"],
    ["HTTP/2.1 200 OK", "'HTTP/2.1 200 OK', which is not HTTP/1.1"],
    ["xHTTP/1.1 200", "'xHTTP/1.1 200', which is not HTTP/1.1"],
    ["x".repeat(61), `'${"x".repeat(60)}', which is not HTTP/1.1`],
    ["HTTP/1.1 200 a\0b", "the status line holds a NUL byte"],
    ["HTTP/1.1 099 x", "status 099"],
    ["HTTP/1.1 101 Switching", "101 switches to a protocol that was not asked for"],
  ];
  for (const [line, expected] of rows) {
    const { reply, error } = await read(new Source(`${line}\r\n\r\n`));
    if (error === null) assert.equal(`${reply!.status} ${reply!.reason}`, expected);
    else {
      assert.ok(error instanceof Failure && error.code === Exit.badReply, String(error));
      assert.equal(error.message.replace(/^malformed reply: (it starts with )?/, ""), expected);
    }
  }
});

Deno.test("the first bytes decide whether it is HTTP; those of TLS get a hint", async () => {
  const hint = "the server speaks TLS: is it https://?";
  const rows = [
    ["\x15\x03\x01", hint],
    ["\x16\x03\x03\x00", hint],
    ["\x15\x03\n", hint],
    ["\x15\x04", undefined],
    ["\x17\x03", undefined],
    ["SSH-2.0", undefined],
  ];
  for (const [text, expected] of rows) {
    const source = new Source(`${text}${"-".repeat(100)}`, text!.length);
    const { error } = await read(source);
    assert.ok(error instanceof Failure && error.code === Exit.badReply, String(error));
    assert.deepEqual([error.hint, source.reads], [expected, 1]);
  }
  // What may still become HTTP is waited for.
  for (const text of ["H", "HTTP/1.", "HTTP/1.1", "HTTP/1.0 ", `${HEAD.slice(0, -1)}`]) {
    const expected = "52 empty reply: the connection ended before its status line";
    assert.equal(await outcome(text), expected);
  }
  const nothing = "52 empty reply: the server closed the connection without a byte";
  assert.equal(await outcome(""), nothing);
});

Deno.test("headers are read as they come, or refused", async () => {
  const rows: [string, [string, string][] | string][] = [
    ["A: b\r\n", [["a", "b"]]],
    ["A:b\nC:  d \t\n", [["a", "b"], ["c", "d"]]],
    ["A \t: b\r\n", [["a", "b"]]],
    ["A: \xa0b\xa0\r\n", [["a", "\xa0b\xa0"]]],
    ["A: b\rc\r\n", [["a", "b c"]]],
    ["A: b:c\r\n", [["a", "b:c"]]],
    ["A:\r\n", [["a", ""]]],
    ["A: b\r\n  c \r\n\td\r\n", [["a", "b c d"]]],
    ["A: b\r\n  \r\n c\r\n", [["a", "b c"]]],
    ["A:\r\n b\r\n", [["a", "b"]]],
    ["\rrest\r\n", []],
    [" A: b\r\n", [["a", "b"]]],
    ["A\r\n", "header line 'A' has no name and colon"],
    [": b\r\n", "header line ': b' has no name and colon"],
    ["A: \0\r\n", "a header holds a NUL byte"],
    [`${"x".repeat(61)}\r\n`, `header line '${"x".repeat(60)}' has no name and colon`],
  ];
  for (const [lines, expected] of rows) {
    const text = `${HEAD}${lines}\r\n`, { reply, error, head } = await read(new Source(text));
    if (error === null) {
      assert.deepEqual(reply!.headers, expected);
      if (!lines.startsWith("\r")) assert.equal(head, text);
    } else {
      assert.ok(error instanceof Failure && error.code === Exit.badReply, String(error));
      assert.equal(error.message, `malformed reply: ${expected}`);
    }
    assert.deepEqual([reply!.status, reply!.complete], [200, error === null]);
  }
});

Deno.test("trailers are read likewise, without the blank line and without a bare CR", async () => {
  const rows: [string, [string, string][] | string][] = [
    ["\r\n", []],
    ["A: b\r\n\r\n", [["a", "b"]]],
    ["A: b\n c\n\n", [["a", "b c"]]],
    ["A: b\rc\r\n\r\n", "8 malformed reply: a trailer holds a bare CR"],
    ["\rA: b\r\n\r\n", "8 malformed reply: a trailer holds a bare CR"],
    ["A: \0\r\n\r\n", "8 malformed reply: a trailer holds a NUL byte"],
    ["A\r\n\r\n", "8 malformed reply: trailer line 'A' has no name and colon"],
    ["A: b\r\n", "18 the reply ended early: in the middle of the trailers"],
    ["", "18 the reply ended early: in the middle of the trailers"],
  ];
  for (const [lines, expected] of rows) {
    const { reply, error, head } = await read(new Source(`${CHUNKED}0\r\n${lines}`));
    if (error === null) {
      assert.deepEqual(reply!.trailers, expected);
      assert.equal(head, CHUNKED + lines.replace(/\r?\n$/, ""));
    } else assert.equal(`${(error as Failure).code} ${(error as Failure).message}`, expected);
    assert.equal(reply!.complete, error === null);
  }
});

Deno.test("the head has 256 KiB at most, a line and all lines together, and 100 interim replies", async () => {
  const limit = 256 * 1024, interim = "HTTP/1.1 100 Continue\r\nA: b\r\n\r\n";
  const header = (size: number) => `A:${"x".repeat(size - "A:\r\n".length)}\r\n`;
  const half = header(limit / 2), rest = (size: number) => header(size - "\r\n".length);
  const tooLarge = "8 malformed reply: the headers are larger than 256 KiB";
  const rows = [
    [`${HEAD}${half}${rest(limit / 2)}\r\nbody`, "body"],
    [`${HEAD}${half}${rest(limit / 2 + 1)}\r\nbody`, tooLarge],
    [`${HEAD}${rest(limit)}\r\nbody`, "body"],
    [`${HEAD}${header(limit)}\r\nbody`, tooLarge],
    [`${HEAD}${header(limit + 1)}\r\nbody`, "8 malformed reply: a line is longer than 256 KiB"],
    [`${CHUNKED}0\r\n${rest(limit)}\r\n`, ""],
    [`${CHUNKED}0\r\n${half}${half}\r\n`, tooLarge.replace("headers", "trailers")],
    [`${interim.repeat(100)}${HEAD}\r\nbody`, "body"],
    [`${interim.repeat(101)}${HEAD}\r\n`, "8 malformed reply: more than 100 interim replies"],
  ];
  for (const [text, expected] of rows) assert.equal(await outcome(text), expected);
});

Deno.test("the framing of a body follows from status and headers, or is refused", async () => {
  const chunks = "2\r\nok\r\n0\r\n\r\nmore", length = (value: string) => `Content-Length: ${value}`;
  const coding = (value: string) => `Transfer-Encoding: ${value}`;
  const bad = (why: string) => `8 malformed reply: ${why}`;
  const rows: [string, number, string[], string, string][] = [
    ["until the close", 200, [], "ok", "ok"],
    ["204", 204, [length("2")], "ok", ""],
    ["304", 304, [coding("gzip")], "ok", ""],
    ["205", 205, [length("2")], "ok", "ok"],
    ["length", 200, [length("2")], "okmore", "ok"],
    ["0", 200, [length("0")], "ok", ""],
    ["equal lengths", 200, [length("2, 2"), length("02")], "okmore", "ok"],
    [
      "other lengths",
      200,
      [length("2"), length("3")],
      "ok",
      bad("conflicting Content-Length 2 and 3"),
    ],
    ["no length", 200, [length("")], "ok", bad("Content-Length ''")],
    ["no number", 200, [length("2x")], "ok", bad("Content-Length '2x'")],
    ["a second that is none", 200, [length("2, x")], "ok", bad("Content-Length 'x'")],
    ["negative", 200, [length("-2")], "ok", bad("Content-Length '-2'")],
    ["a fraction", 200, [length("2.0")], "ok", bad("Content-Length '2.0'")],
    ["hexadecimal", 200, [length("0x2")], "ok", bad("Content-Length '0x2'")],
    [
      "2^53 - 1",
      200,
      [length("9007199254740991")],
      "ok",
      `18 the reply ended early: ` +
      "9007199254740989 of 9007199254740991 bytes are missing",
    ],
    ["2^53", 200, [length("9007199254740992")], "ok", bad("Content-Length '9007199254740992'")],
    ["1 byte", 200, [length("1")], "", "18 the reply ended early: 1 of 1 byte are missing"],
    ["chunks", 200, [coding("chunked")], chunks, "ok"],
    ["any case", 200, [coding("ChunKed")], chunks, "ok"],
    ["identity too", 200, [coding("identity"), coding(", chunked")], chunks, "ok"],
    ["chunks, twice", 200, [coding("chunked, Chunked"), coding("chunked")], chunks, "ok"],
    ["chunks and a length", 200, [length("x"), coding("chunked")], chunks, "ok"],
    ["identity alone", 200, [coding("identity")], chunks, chunks],
    ["identity and a length", 200, [coding("identity"), length("1")], chunks, chunks],
    ["no coding", 200, [coding("")], chunks, chunks],
    ["gzip", 200, [coding("gzip")], "ok", bad("Transfer-Encoding 'gzip' was not asked for")],
    [
      "gzip, chunked",
      200,
      [coding("gzip, chunked")],
      chunks,
      bad("Transfer-Encoding 'gzip, chunked' was not asked for"),
    ],
    [
      "chunked, gzip",
      200,
      [coding("chunked, gzip")],
      chunks,
      bad("Transfer-Encoding 'chunked, gzip' was not asked for"),
    ],
  ];
  for (const [name, status, headers, body, expected] of rows) {
    const head = [`HTTP/1.1 ${status} x`, ...headers].map((line) => `${line}\r\n`).join("");
    assert.equal(await outcome(`${head}\r\n${body}`), expected, name);
  }
});

Deno.test("a chunk's size is up to 16 hexadecimal digits, and what follows a semicolon is skipped", async () => {
  const bad = (text: string) => `8 malformed reply: bad chunk size '${text}'`;
  const rows: [string, number | string][] = [
    ["1", 1],
    ["9", 9],
    ["a", 10],
    ["f", 15],
    ["A", 10],
    ["F", 15],
    ["10", 16],
    ["1F", 31],
    ["fA", 250],
    ["00000000000000f1", 241],
    ["2 ", 2],
    ["2\t \r", 2],
    ["2;x=y", 2],
    ["2 ; z", 2],
    ["000000000000000f1", bad("000000000000000f1")],
    ["g", bad("g")],
    ["1g", bad("1g")],
    ["G", bad("G")],
    ["/", bad("/")],
    [":", bad(":")],
    ["@", bad("@")],
    ["`", bad("`")],
    ["", bad("")],
    [";x", bad(";x")],
    [" 1", bad(" 1")],
    ["1 x", bad("1 x")],
    ["-1", bad("-1")],
    ["0x1", bad("0x1")],
    [`1${"z".repeat(70)}`, bad(`1${"z".repeat(59)}`)],
    [
      "1fffffffffffff",
      "18 the reply ended early: 9007199254740989 of a chunk's " +
      "9007199254740991 bytes are missing, after 2 bytes",
    ],
    ["20000000000000", bad("20000000000000")],
  ];
  for (const [size, expected] of rows) {
    const body = typeof expected === "number" ? "b".repeat(expected) : "bb";
    const end = typeof expected === "number" ? "\r\n0\r\n\r\n" : "";
    const result = await outcome(`${CHUNKED}${size}\r\n${body}${end}`);
    assert.equal(result, typeof expected === "number" ? body : expected, JSON.stringify(size));
  }
});

Deno.test("the data of a chunk ends with CR LF or LF; what came before an error is passed on", async () => {
  const longer = "malformed reply: a chunk is longer than its size";
  const before = "the reply ended early: before the last chunk, after 3 bytes";
  const rows: [string, string, string | null][] = [
    ["\r\n0\r\n\r\n", "abc", null],
    ["\n0\n\n", "abc", null],
    ["\r\n2\nde\n0\n\n", "abcde", null],
    ["d", "abc", longer],
    ["\rd", "abc", longer],
    ["\r\r\n0\r\n\r\n", "abc", longer],
    ["", "abc", before],
    ["\r", "abc", before],
    ["\r\n", "abc", before],
    ["\r\n1", "abc", before],
    [
      "\r\n2\r\nd",
      "abcd",
      "the reply ended early: 1 of a chunk's 2 bytes are missing, after 4 bytes",
    ],
    ["\r\nx\r\n", "abc", "malformed reply: bad chunk size 'x'"],
  ];
  for (const [end, expected, why] of rows) {
    for (const atOnce of [1, 2, 3, Infinity]) {
      const { body, error, reply } = await read(new Source(`${CHUNKED}3\r\nabc${end}`, atOnce));
      const message = error === null ? null : (error as Failure).message;
      assert.deepEqual([body, message], [expected, why], JSON.stringify([end, atOnce]));
      assert.deepEqual([reply!.bodyBytes, reply!.complete], [body.length, why === null]);
    }
  }
});

Deno.test("the data of many small chunks is passed on together", async () => {
  const pieces: number[] = [];
  const sink = { body: (piece: Uint8Array) => void pieces.push(piece.length) };
  await read(new Source(`${CHUNKED}${"1\r\nx\r\n".repeat(1000)}0\r\n\r\n`), sink);
  assert.ok(pieces.length < 5, `${pieces.length} pieces`);
});

Deno.test("firstByte, the packets' class and the reply so far are known when the body begins", async () => {
  const source = new Source(`${HEAD}A: b\r\n\r\nbody`), before = performance.now() - 0.001;
  let begun: Reply | null = null;
  const { reply, firstByte } = await read(source, { begin: (reply) => begun = { ...reply } });
  assert.ok(firstByte! >= 0 && firstByte! < performance.now() - before);
  const expected = { status: 200, reason: "OK", headers: [["a", "b"]], trailers: [], tos: 0x20 };
  assert.deepEqual(begun, { ...expected, bodyBytes: 0, complete: false });
  assert.deepEqual(reply, { ...expected, bodyBytes: 4, complete: true });
  // Of an interim reply nothing is kept.
  const interim = await read(new Source("HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"));
  assert.equal(interim.reply, null);
});

Deno.test("a failure that a sink throws is the reply's; anything else is the sink's own error", async () => {
  const reply = `${HEAD}A: b\r\n\r\nbody`,
    own = new TypeError("own"),
    failure = new Failure(22, "x");
  for (const method of ["head", "begin", "body"] as const) {
    for (const [thrown, isOwn] of [[own, true], ["text", true], [failure, false]] as const) {
      const throws = () => {
        throw thrown;
      };
      const rejects = () => Promise.reject(thrown);
      for (const call of method === "begin" ? [throws] : [throws, rejects]) {
        const { error } = await read(new Source(reply), { [method]: call });
        if (!isOwn) assert.equal(error, thrown);
        else assert.ok(error instanceof SinkError && error.cause === thrown, String(error));
      }
    }
  }
});

Deno.test("the signal ends the reading: while the sink waits, and what the sink then throws", async () => {
  const reply = `${HEAD}\r\n${"body".repeat(10)}`, reason = new Failure(28, "late");
  const waiting = new AbortController();
  const never = { body: () => (waiting.abort(reason), new Promise<void>(() => {})) };
  assert.equal((await read(new Source(reply), never, waiting.signal)).error, reason);

  const later = new AbortController();
  const wait = () => {
    setTimeout(() => later.abort(reason));
    return new Promise<void>(() => {});
  };
  assert.equal((await read(new Source(reply), { body: wait }, later.signal)).error, reason);

  const closed = new AbortController(), own = new Error("closed");
  const throws = () => {
    closed.abort(reason);
    throw own;
  };
  assert.equal((await read(new Source(reply), { body: throws }, closed.signal)).error, own);

  const between = new AbortController(), source = new Source(reply, HEAD.length + 10);
  const aborts = { body: () => between.abort(reason) };
  assert.equal((await read(source, aborts, between.signal)).error, reason);
  assert.equal(source.reads, 1);
});

Deno.test("data that is always ready leaves timers their turn", async () => {
  const giveUp = performance.now() + 5000, piece = latin1("x".repeat(100));
  let isFirst = true;
  const source = new Source("");
  source.read = (buffer) => {
    if (performance.now() > giveUp) return Promise.resolve(null);
    buffer.set(isFirst ? latin1(`${HEAD}\r\n`) : piece);
    const { length } = isFirst ? `${HEAD}\r\n` : piece;
    isFirst = false;
    return Promise.resolve(length);
  };
  const signal = AbortSignal.timeout(100);
  assert.equal((await read(source, { body() {} }, signal)).error, signal.reason);
});

Deno.test("a reply is read into 4 KiB, and a longer one into one buffer of 256 KiB", async () => {
  const long = [4096, 262144];
  const rows = [[4095, [4096]], [4097, long], [3_000_000, long], [3_000_000, long, 4096]] as const;
  for (const [size, expected, atOnce] of rows) {
    const source = new Source(`${HEAD}\r\n`.padEnd(size, "x"), atOnce);
    const buffers = new Set<ArrayBufferLike>();
    const { read: readInto } = source;
    source.read = (buffer) => (buffers.add(buffer.buffer), readInto.call(source, buffer));
    await read(source, { body() {} });
    assert.deepEqual([...buffers].map(({ byteLength }) => byteLength), expected, String(size));
  }
});
