import assert from "node:assert/strict";
import {
  encodeReply,
  listeningLines,
  logLine,
  parseRequest,
  strongest,
  UNKNOWN,
} from "../src/answer.ts";
import { isFromBuiltIn } from "../src/server.ts";
import { VERSION } from "../src/target.ts";
import type { Reply } from "../src/exchange.ts";

const LONGEST = 16 * 1024;
/** A head of so many bytes, without its blank line. */
const headOf = (size: number) => "GET / HTTP/1.1\r\nX: ".padEnd(size, "x");

for (
  const [what, text, status, method, path] of [
    ["a head that has not ended", "GET / HTTP/1.1\r\nHost: a\r\n", null],
    ["a head that has not ended, and is as long as it may be", headOf(LONGEST), null],
    ["a head that is too long, whether it has ended or not", headOf(LONGEST + 1), 431, "GET", "/"],
    ["a head as long as it may be", `${headOf(LONGEST)}\n\n`, 200, "GET", "/"],
    ["a request", "GET /a?b=%20 HTTP/1.1\r\nHost: a\r\n\r\n", 200, "GET", "/a?b=%20"],
    ["a request without a header", "GET / HTTP/1.0\r\n\r\n", 200, "GET", "/"],
    ["bare line feeds", "GET / HTTP/1.1\nHost: a\n\n", 200, "GET", "/"],
    ["an empty line before", "\r\nGET / HTTP/1.1\r\n\r\n", 200, "GET", "/"],
    ["a long body behind", `GET / HTTP/1.1\r\n\r\n${"x".repeat(LONGEST)}`, 200, "GET", "/"],
    ["HEAD", "HEAD / HTTP/1.1\r\n\r\n", 200, "HEAD", "/"],
    ["another method", "POST /x HTTP/1.1\r\n\r\n", 405, "POST", "/x"],
    ["a method that begins like GET", "GETS / HTTP/1.1\r\n\r\n", 405, "GETS", "/"],
    ["a method that ends like GET", "FORGET / HTTP/1.1\r\n\r\n", 405, "FORGET", "/"],
    ["no version", "GET /\r\n\r\n", 400],
    ["HTTP/2", "GET / HTTP/2\r\n\r\n", 400],
    ["more behind the version", "GET / HTTP/1.1 x\r\n\r\n", 400],
    ["an empty path", "GET  HTTP/1.1\r\n\r\n", 400],
    ["control characters", "GET /\x1b[2J HTTP/1.1\r\n\r\n", 400],
    ["a TLS handshake that goes on", "\x16\x03\x01\x02\0\x01", 400],
    ["text that is none", "hello\n\nGET / HTTP/1.1\r\n\r\n", 400],
  ] as [string, string, number | null, string?, string?][]
) {
  Deno.test(`a server of ours reads ${what}: ${status ?? "more is to come"}`, () => {
    const request = parseRequest(text, false);
    if (status === null) assert.equal(request, null);
    else {
      assert.equal(request?.status.slice(0, 4), `${status} `);
      assert.deepEqual([request.method, request.path], [method, path]);
    }
    // At the end of the connection there is always an answer.
    assert.equal(parseRequest(text, true)?.status.slice(0, 3), `${status ?? 400}`);
  });
}

for (
  const [what, text, hasMore] of [
    ["a head alone", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", false],
    ["a head alone with bare line feeds", "GET / HTTP/1.1\nHost: a\n\n", false],
    ["a byte behind the head", "GET / HTTP/1.1\r\n\r\nx", true],
    ["a length", "GET / HTTP/1.1\r\ncontent-Length: 3\r\n\r\n", true],
    ["chunks", "GET / HTTP/1.1\r\nTransfer-encoding: chunked\r\n\r\n", true],
    ["another header with such words", "GET / HTTP/1.1\r\nX-Content-Length: 3\r\n\r\n", false],
    ["another method", "POST / HTTP/1.1\r\n\r\n", true],
    ["garbage", "hello\n\n", true],
  ] as const
) {
  Deno.test(`behind ${what} ${hasMore ? "more can come" : "nothing comes"}`, () => {
    assert.equal(parseRequest(text, false)?.hasMore, hasMore);
  });
}

const SEEN = {
  peer: { transport: "tcp", hostname: "::1", port: 80 } as const,
  arrived: { syn: 0, ack: null, data: 0xb8, sequence: 0xfedcba98 },
  replyTos: 0x88,
};
const OK = { status: "200 OK", method: "GET", path: "/", hasMore: false };
const NONE = { hasMore: true };

/** Status line, header and body of a reply. */
function partsOf(
  reply: Uint8Array,
): { line: string; header: Record<string, string>; body: string } {
  const [head, body] = new TextDecoder().decode(reply).split("\r\n\r\n");
  const [line, ...fields] = head.split("\r\n");
  return { line, header: Object.fromEntries(fields.map((field) => field.split(": "))), body };
}

Deno.test("a reply has what arrived in its header, and in its body for programs", () => {
  const { line, header, body } = partsOf(encodeReply(OK, SEEN, false));
  assert.equal(line, "HTTP/1.1 200 OK");
  assert.deepEqual(header, {
    "Server": `dscp-get/${VERSION}`,
    "Content-Type": "application/json",
    "Content-Length": String(body.length),
    "Arrived-ToS": "0xB8",
    "Arrived-SYN": "0x00",
    "Arrived-Data": "0xB8",
    "Arrived-Peer": "[::1]:80",
    "Arrived-Sequence": "4275878552",
    "Reply-ToS": "0x88",
    "Connection": "close",
  });
  assert.deepEqual(JSON.parse(body), { peer: { address: "::1", port: 80 }, ...SEEN.arrived });
});

Deno.test("what is unknown is not in the header: not the mark of the reply either", () => {
  const seen = { ...SEEN, arrived: UNKNOWN, replyTos: null };
  const { header } = partsOf(encodeReply(OK, seen, false));
  assert.deepEqual(Object.keys(header).filter((name) => /^Arrived|^Reply/.test(name)), [
    "Arrived-Peer",
  ]);
  const zero = { syn: 0, ack: 0, data: 0, sequence: 0 };
  const known = partsOf(encodeReply(OK, { ...SEEN, arrived: zero, replyTos: 0 }, false)).header;
  assert.deepEqual(
    [known["Arrived-ToS"], known["Arrived-ACK"], known["Arrived-Sequence"], known["Reply-ToS"]],
    ["0x00", "0x00", "0", "0x00"],
  );
});

Deno.test("HEAD gets the header alone, an error its reason, 405 the methods that are allowed", () => {
  const head = partsOf(encodeReply({ ...OK, method: "HEAD" }, SEEN, false));
  assert.equal(head.body, "");
  assert.ok(Number(head.header["Content-Length"]) > 10);
  const error = partsOf(encodeReply({ ...NONE, status: "408 Request Timeout" }, SEEN, false));
  assert.deepEqual([error.line, error.body], [
    "HTTP/1.1 408 Request Timeout",
    "408 Request Timeout\n",
  ]);
  assert.equal(error.header.Allow, undefined);
  assert.equal(error.header["Content-Type"], "text/plain; charset=utf-8");
  const other = partsOf(encodeReply({ ...NONE, status: "405 Method Not Allowed" }, SEEN, false));
  assert.equal(other.header.Allow, "GET, HEAD");
});

Deno.test("the built-in server's page is for people, and its name is recognised in any version", () => {
  const { header, body } = partsOf(encodeReply(OK, SEEN, true));
  assert.match(body, /built-in server/);
  assert.equal(Number(header["Content-Length"]), body.length, "the whole page");
  assert.equal(header["Content-Type"], "text/plain; charset=utf-8");
  assert.equal(
    partsOf(encodeReply({ ...NONE, status: "400 Bad Request" }, SEEN, true)).body.length,
    16,
  );
  const from = (name: string, value: string) =>
    isFromBuiltIn({ headers: [["date", "now"], [name, value]] } as unknown as Reply);
  assert.ok(from("server", header.Server));
  assert.ok(from("server", "dscp-get/17.0.1 (built-in)"));
  assert.ok(!from("server", `dscp-get/${VERSION}`));
  assert.ok(!from("via", header.Server));
  assert.ok(!from("server", `x ${header.Server}`));
  assert.ok(!from("server", `${header.Server} x`));
  assert.ok(!isFromBuiltIn(null));
});

Deno.test("data says most about the mark of a request, then the SYN, then the ACK", () => {
  assert.equal(strongest({ syn: 1, ack: 2, data: 3 }), 3);
  assert.equal(strongest({ syn: 1, ack: 2, data: null }), 1);
  assert.equal(strongest({ syn: null, ack: 2, data: null }), 2);
  assert.equal(strongest({ syn: 4, ack: null, data: 0 }), 0);
  assert.equal(strongest({ syn: null, ack: null, data: null }), null);
});

for (
  const [hostname, isForAll] of [
    ["127.0.0.1", false],
    ["127.1.2.3", false],
    ["::1", false],
    ["0.0.0.0", true],
    ["::", true],
    ["192.0.2.127", true],
    ["2001:db8::1", true],
    ["::12", true],
  ] as const
) {
  Deno.test(`the log says who can reach ${hostname}`, () => {
    const lines = listeningLines({ transport: "tcp", hostname, port: 80 });
    assert.match(lines[0], /^listening on .*:80; Ctrl-C ends it$/);
    assert.equal(lines.length, isForAll ? 1 : 2);
    if (!isForAll) assert.match(lines[1], /^only this host .*: --serve '\[::\]:80'$/);
  });
}

Deno.test("a line of the log is short and safe, and says what is unknown", () => {
  assert.equal(logLine(OK, SEEN), "[::1]:80 GET / 200 syn 0x00 ack - data 0xB8");
  assert.equal(
    logLine({ ...NONE, status: "400 Bad Request" }, SEEN),
    "[::1]:80 - - 400 syn 0x00 ack - data 0xB8",
  );
  const long = logLine({ ...OK, path: "x".repeat(300) }, SEEN);
  assert.equal(long.split(" 200 ")[0].length, "[::1]:80 ".length + 200);
  assert.ok(!logLine({ ...OK, path: "\x1b[2J\u202e" }, SEEN).includes("\x1b"));
});
