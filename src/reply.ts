/**
 * reply
 *
 * @module
 */

import { pause } from "../ffi/wait.ts";
import { MarkedConn } from "../ffi/mod.ts";
import { type Exchange, type Field, type Reply, type Sink } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { latin1, plural, quote, trimmed } from "./text.ts";

/** What a sink has thrown is its `cause`: an error of the program's own, not of the request. */
export class SinkError extends Error {
  /** An error of a sink. */
  constructor(cause: unknown) {
    super("the sink failed", { cause });
    this.name = "SinkError";
  }
}

type Deliver = (piece: Uint8Array) => Promise<void>;

type DeliverLine = (line: string) => Promise<void>;

const TAB = 0x09, LF = 0x0a, CR = 0x0d, SPACE = 0x20, SEMICOLON = 0x3b;

const MAX_INTERIM = 100, HEAD_LIMIT = 256 * 1024;

// A small reply takes no more memory than it needs; large pieces cost less for each byte.
const FIRST_READ = 4 * 1024;

/** What has come on a connection and was not used yet. */
class Reader {
  buffer = new Uint8Array(FIRST_READ);
  /** Where the unused bytes begin and end. */
  from = 0;
  to = 0;
  /** There is no LF before this offset. */
  #searched = 0;
  #reads = 0;
  #lastYield = performance.now();

  constructor(
    private readonly source: Pick<MarkedConn, "read">,
    private readonly signal?: AbortSignal,
  ) {}

  /** Reads more behind what is here. @returns false at the end @throws {Failure} no room for more */
  async fill(): Promise<boolean> {
    this.signal?.throwIfAborted();
    // If data is always ready, timers and signals never get their turn.
    if (++this.#reads % 16 === 0 && performance.now() - this.#lastYield > 50) {
      await pause(0);
      this.#lastYield = performance.now();
    }
    if (this.to === this.buffer.length) this.#makeRoom();
    else if (this.from === this.to) this.from = this.to = this.#searched = 0;
    const size = await this.source.read(this.buffer.subarray(this.to));
    this.to += size ?? 0;
    return size !== null && size > 0;
  }

  // Only when the buffer is full; otherwise each read of a single byte would move all of it.
  #makeRoom(): void {
    const unused = this.buffer.subarray(this.from, this.to);
    if (unused.length === HEAD_LIMIT) throw badReply("a line is longer than 256 KiB");
    const size = Math.min(16 * this.buffer.length, HEAD_LIMIT);
    if (size > this.buffer.length) this.buffer = new Uint8Array(size);
    this.buffer.set(unused);
    this.#searched = Math.max(0, this.#searched - this.from);
    this.from = 0;
    this.to = unused.length;
  }

  /** How long the next line is, its end included; 0 if not all of it is here. */
  lineLength(): number {
    const { buffer, to } = this;
    let at = Math.max(this.from, this.#searched);
    while (at < to && buffer[at] !== LF) at++;
    this.#searched = at;
    return at < to ? at + 1 - this.from : 0;
  }

  /** The next line with its end, a character a byte; `null` if not all of it is here. */
  line(): string | null {
    const length = this.lineLength();
    return length === 0 ? null : latin1(this.take(length));
  }

  /** At most `max` of the bytes that are here, valid until the next call. */
  take(max: number): Uint8Array {
    const piece = this.buffer.subarray(this.from, Math.min(this.to, this.from + max));
    this.from += piece.length;
    return piece;
  }
}

function badReply(message: string): Failure {
  return new Failure(Exit.badReply, `malformed reply: ${message}`);
}

function endedEarly(message: string): Failure {
  return new Failure(Exit.endedEarly, `the reply ended early: ${message}`);
}

/**
 * Reads one reply, RFC 9112 sections 4 to 7, and passes its body on as it comes.
 *
 * @param exchange its `reply` is filled as it comes, so that a failed one is known as far as it came
 * @param signal ends the reading, also while the sink waits
 * @throws {Failure} malformed (8), ended early (18), empty (52)
 * @throws {SinkError} what the sink throws, unless that is a {@linkcode Failure}
 */
export async function readReply(
  source: Pick<MarkedConn, "read" | "arrivedTos">,
  exchange: Pick<Exchange, "reply" | "milliseconds" | "started">,
  sink: Sink,
  signal?: AbortSignal,
): Promise<void> {
  const reader = new Reader(source, signal);
  if (!await reader.fill()) {
    const message = "empty reply: the server closed the connection without a byte";
    throw new Failure(Exit.emptyReply, message);
  }
  exchange.milliseconds.firstByte = performance.now() - exchange.started;
  const { arrivedTos: tos } = source;
  let stop: (reason: unknown) => void = () => {};
  signal?.addEventListener("abort", () => stop(signal.reason));
  const deliver = async (give: () => void | Promise<void>) => {
    try {
      const passing = give();
      if (passing === undefined) return;
      signal?.throwIfAborted();
      // Not Promise.race, which would keep something of every piece until the end of the reply.
      await new Promise<void>((resolve, reject) => {
        stop = reject;
        Promise.resolve(passing).then(resolve, reject);
      });
    } catch (error) {
      throw error instanceof Failure || signal?.aborted ? error : new SinkError(error);
    }
  };
  const deliverLine = (line: string) => deliver(() => sink.head?.(line));
  const reply = await readHead(reader, tos, exchange, deliverLine);
  await deliver(() => sink.begin?.(reply));
  const deliverPiece = (piece: Uint8Array) => {
    reply.bodyBytes += piece.length;
    return deliver(() => sink.body?.(piece));
  };
  const framing = framingOf(reply);
  if (framing !== "chunked") await readLength(reader, framing, deliverPiece);
  else {
    await readChunks(reader, reply, deliverPiece);
    await readFields(reader, reply.trailers, "trailer", deliverLine);
  }
  reply.complete = true;
}

/** Status line and headers of the final reply; those of interim replies (1xx) only pass by. */
async function readHead(
  reader: Reader,
  tos: number | null,
  exchange: Pick<Exchange, "reply">,
  deliverLine: DeliverLine,
): Promise<Reply> {
  for (let interim = 0;; interim++) {
    if (interim > MAX_INTERIM) throw badReply(`more than ${MAX_INTERIM} interim replies`);
    let line;
    while ((line = reader.line()) === null) {
      // A peer that does not speak HTTP may never send an LF: look at its first bytes.
      const { buffer, from, to } = reader;
      const start = latin1(buffer.subarray(from, Math.min(to, from + 60)));
      const isHttp = /^HTTP\/1\.[01] /.test(start + "HTTP/1.1 ".slice(start.length));
      if (!isHttp) throw notHttp(start);
      if (!await reader.fill()) {
        const message = "empty reply: the connection ended before its status line";
        throw new Failure(Exit.emptyReply, message);
      }
    }
    const reply = statusOf(line, tos);
    if (reply.status >= 200) exchange.reply = reply;
    await deliverLine(line);
    await readFields(reader, reply.headers, "header", deliverLine);
    if (reply.status >= 200) return reply;
  }
}

function notHttp(line: string): Failure {
  // An alert or a handshake record, RFC 8446 section 5.1
  const isTls = line.startsWith("\x15\x03") || line.startsWith("\x16\x03");
  return new Failure(
    Exit.badReply,
    `malformed reply: it starts with ${quote(line.slice(0, 60))}, which is not HTTP/1.1`,
    isTls ? "the server speaks TLS: is it https://?" : undefined,
  );
}

function statusOf(line: string, tos: number | null): Reply {
  const text = lineText(line);
  // As lenient as curl, and as RFC 9112 section 4 allows: more than one space between the words.
  const parts = /^HTTP\/1\.[01] +(\d{3})(?![^ ])/.exec(text);
  if (parts === null) throw notHttp(text);
  const status = Number(parts[1]), reason = trimmed(text.slice(parts[0].length));
  if (reason.includes("\0")) throw badReply("the status line holds a NUL byte");
  if (status < 100) throw badReply(`status ${parts[1]}`);
  if (status === 101) throw badReply("101 switches to a protocol that was not asked for");
  return { status, reason, headers: [], trailers: [], tos, bodyBytes: 0, complete: false };
}

/** Header or trailer lines up to the blank one (RFC 9112 sections 5 and 7.1.2). */
async function readFields(
  reader: Reader,
  fields: Field[],
  what: "header" | "trailer",
  deliverLine: DeliverLine,
): Promise<void> {
  for (let budget = HEAD_LIMIT;;) {
    let line;
    while ((line = reader.line()) === null) {
      if (!await reader.fill()) throw endedEarly(`in the middle of the ${what}s`);
    }
    budget -= line.length;
    if (budget < 0) throw badReply(`the ${what}s are larger than 256 KiB`);
    const text = lineText(line);
    // As with curl, a header line that begins with CR is the blank one, whatever follows.
    const isBlank = text === "" || (what === "header" && line.startsWith("\r"));
    if (!isBlank) addField(fields, line, text, what);
    if (!isBlank || what === "header") await deliverLine(line);
    if (isBlank) return;
  }
}

/** @throws {Failure} the line holds no field, nor the rest of one */
function addField(fields: Field[], line: string, text: string, what: string): void {
  if (text.includes("\0")) throw badReply(`a ${what} holds a NUL byte`);
  if (what === "trailer" && /\r(?!\n)/.test(line)) throw badReply("a trailer holds a bare CR");
  const last = fields.at(-1);
  if (/^[ \t]/.test(line) && last !== undefined) {
    // obs-fold, RFC 9112 section 5.2
    const more = trimmed(text);
    if (more !== "") last[1] += last[1] === "" ? more : ` ${more}`;
    return;
  }
  const colon = text.indexOf(":");
  if (colon < 1) throw badReply(`${what} line ${quote(text.slice(0, 60))} has no name and colon`);
  fields.push([trimmed(text.slice(0, colon)).toLowerCase(), trimmed(text.slice(colon + 1))]);
}

/** A line without its end; a CR elsewhere counts as a space (RFC 9112 section 2.2). */
function lineText(line: string): string {
  return line.replace(/\r?\n$/, "").replaceAll("\r", " ");
}

/** The values of a header, its lines and commas taken apart; `null` if it is not there. */
function listOf({ headers }: Reply, name: string): string[] | null {
  const values = headers.flatMap(([other, value]) => other === name ? value.split(",") : []);
  return values.length === 0 ? null : values.map(trimmed);
}

/** How long the body is (RFC 9112 section 6.3): bytes, in chunks, or `Infinity` until the close. */
function framingOf(reply: Reply): number | "chunked" {
  if (reply.status === 204 || reply.status === 304) return 0;
  const codings = listOf(reply, "transfer-encoding");
  if (codings !== null) {
    // "identity" of RFC 2616 is no coding at all.
    const named = codings.map((coding) => coding.toLowerCase())
      .filter((coding) => coding !== "" && coding !== "identity");
    if (named.length === 0) return Infinity;
    if (named.length === 1 && named[0] === "chunked") return "chunked";
    const names = quote(codings.join(", ").slice(0, 60));
    throw badReply(`Transfer-Encoding ${names} was not asked for`);
  }
  const lengths = listOf(reply, "content-length");
  if (lengths === null) return Infinity;
  const first = Number(lengths[0]);
  for (const length of lengths) {
    if (!/^\d+$/.test(length) || !Number.isSafeInteger(Number(length))) {
      throw badReply(`Content-Length ${quote(length.slice(0, 60))}`);
    }
    if (Number(length) !== first) {
      throw badReply(`conflicting Content-Length ${first} and ${Number(length)}`);
    }
  }
  return first;
}

async function readLength(reader: Reader, length: number, deliver: Deliver): Promise<void> {
  for (let missing = length; missing > 0;) {
    if (reader.from === reader.to && !await reader.fill()) {
      if (length === Infinity) return;
      throw endedEarly(`${missing} of ${plural(length, "byte")} are missing`);
    }
    const piece = reader.take(missing);
    missing -= piece.length;
    await deliver(piece);
  }
}

/** RFC 9112 section 7.1; the data of all chunks that are here is moved together and passed on. */
async function readChunks(reader: Reader, reply: Reply, deliver: Deliver): Promise<void> {
  let size = 0, missing = 0, next: "size" | "data" | "end" | "trailers" = "size";
  for (;;) {
    const { buffer } = reader;
    let start = reader.from, end = start;
    try {
      while (next !== "trailers") {
        const at = reader.from, here = reader.to - at;
        if (next === "data") {
          const count = Math.min(missing, here);
          if (count === 0) break;
          if (end === start) start = end = at;
          if (end !== at) buffer.copyWithin(end, at, at + count);
          end += count;
          reader.from += count;
          missing -= count;
          if (missing === 0) next = "end";
        } else if (next === "end") {
          const length = buffer[at] === CR ? 2 : 1;
          if (here < length) break;
          if (buffer[at + length - 1] !== LF) throw badReply("a chunk is longer than its size");
          reader.from += length;
          next = "size";
        } else {
          const length = reader.lineLength();
          if (length === 0) break;
          size = missing = chunkSize(buffer, at);
          reader.from += length;
          next = size > 0 ? "data" : "trailers";
        }
      }
    } finally {
      if (end > start) await deliver(buffer.subarray(start, end));
    }
    if (next === "trailers") return;
    if (await reader.fill()) continue;
    const where = missing > 0
      ? `${missing} of a chunk's ${plural(size, "byte")} are missing`
      : "before the last chunk";
    throw endedEarly(`${where}, after ${plural(reply.bodyBytes, "byte")}`);
  }
}

/** The size that the line at `start` gives; it is there with its end. */
function chunkSize(buffer: Uint8Array, start: number): number {
  // By hand: as text, a body of small chunks takes 2 to 4 times as long.
  let size = 0, at = start;
  for (let digit; (digit = hexDigit(buffer[at])) >= 0; at++) size = size * 16 + digit;
  const digits = at - start;
  while (buffer[at] === SPACE || buffer[at] === TAB || buffer[at] === CR) at++;
  const isEnd = buffer[at] === LF || buffer[at] === SEMICOLON;
  // curl reads at most 16 digits too.
  if (isEnd && digits >= 1 && digits <= 16 && Number.isSafeInteger(size)) return size;
  const text = lineText(latin1(buffer.subarray(start, buffer.indexOf(LF, start) + 1)));
  throw badReply(`bad chunk size ${quote(text.slice(0, 60))}`);
}

/** The value of a hexadecimal digit, or -1. */
function hexDigit(byte: number): number {
  if (byte >= 0x30 && byte <= 0x39) return byte - 0x30;
  const small = byte | 0x20;
  return small >= 0x61 && small <= 0x66 ? small - 0x57 : -1;
}
