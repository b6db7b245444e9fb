/**
 * Reads one HTTP/1.1 reply (RFC 9112), as lenient as curl where nothing has to be guessed. Reading
 * takes time proportional to the reply's size and constant memory, even if the reply is hostile.
 *
 * @module
 */

import type { MarkedConn } from "../ffi/conn.ts";
import { pause } from "../ffi/deno.ts";
import type { Exchange, Field, Reply, Sink } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { latin1, plural, quote, trimmed } from "./text.ts";

/** What a sink has thrown is its `cause`: an error of the program's own, not of the request. */
export class SinkError extends Error {}

type Deliver = (piece: Uint8Array) => Promise<void>;
type DeliverLine = (line: string) => Promise<void>;

const TAB = 0x09, LF = 0x0a, CR = 0x0d, SPACE = 0x20, SEMICOLON = 0x3b;

const MAX_INTERIM = 100, HEAD_LIMIT = 256 * 1024;

// A small reply takes no more memory than it needs; large pieces cost less for each byte.
const FIRST_READ = 4 * 1024;

const excerpt = (text: string) => quote(text.slice(0, 60));

/** What has come on a connection and was not used yet. */
class Reader {
  buffer = new Uint8Array(FIRST_READ);
  /** Where the unused bytes begin and end. */
  from = 0;
  to = 0;
  /** There is no LF before this offset. */
  #searched = 0;
  #lastYield = performance.now();

  constructor(
    readonly source: Pick<MarkedConn, "read" | "arrivedTos">,
    private readonly signal?: AbortSignal,
  ) {}

  /**
   * Reads more behind what is here.
   *
   * @returns false at the end
   * @throws {Failure} no room for more
   */
  async fill(): Promise<boolean> {
    this.signal?.throwIfAborted();
    // If data is always ready, timers and signals never get their turn.
    if (performance.now() - this.#lastYield > 50) {
      await pause(0);
      this.#lastYield = performance.now();
    }
    // Not before each read: if it gives a single byte, all that is here would move for it.
    if (this.from === this.to || this.to === this.buffer.length) this.#makeRoom();
    const size = await this.source.read(this.buffer.subarray(this.to));
    if (size !== null) this.to += size;
    return size !== null;
  }

  #makeRoom(): void {
    const unused = this.buffer.subarray(this.from, this.to);
    if (unused.length === HEAD_LIMIT) throw badReply("a line is longer than 256 KiB");
    if (this.to === FIRST_READ && this.buffer.length === FIRST_READ) {
      this.buffer = new Uint8Array(HEAD_LIMIT);
    }
    this.buffer.set(unused);
    this.from = this.#searched = 0;
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

  /** The next line with its end, a character a byte; `ended` is thrown if the end comes before. */
  async line(ended: () => Failure): Promise<string> {
    let length;
    while ((length = this.lineLength()) === 0) if (!await this.fill()) throw ended();
    return latin1(this.take(length));
  }

  /** At most `max` of the bytes that are here, valid until the next call. */
  take(max: number): Uint8Array {
    const piece = this.buffer.subarray(this.from, Math.min(this.to, this.from + max));
    this.from += piece.length;
    return piece;
  }
}

const badReply = (why: string) => new Failure(Exit.badReply, `malformed reply: ${why}`);
const emptyReply = (why: string) => new Failure(Exit.emptyReply, `empty reply: ${why}`);
const endedEarly = (why: string) => new Failure(Exit.endedEarly, `the reply ended early: ${why}`);

/**
 * Reads one reply, RFC 9112 sections 4 to 7, and passes its body on as it comes.
 *
 * @param exchange its `reply` is filled as it comes, so that a failed one is known as far as it
 * came
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
  if (!await reader.fill()) throw emptyReply("the server closed the connection without a byte");
  exchange.milliseconds.firstByte = performance.now() - exchange.started;
  let stop: (reason: unknown) => void = () => {};
  signal?.addEventListener("abort", () => stop(signal.reason));
  const deliver = async (give: () => void | Promise<void>) => {
    try {
      const passing = give();
      signal?.throwIfAborted();
      // Not Promise.race, which would keep something of every piece until the end of the reply.
      await new Promise<void>((resolve, reject) => {
        stop = reject;
        Promise.resolve(passing).then(resolve, reject);
      });
    } catch (error) {
      throw error instanceof Failure || signal?.aborted
        ? error
        : new SinkError("the sink failed", { cause: error });
    }
  };
  const deliverLine = (line: string) => deliver(() => sink.head?.(line));
  const reply = await readHead(reader, exchange, deliverLine);
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
  exchange: Pick<Exchange, "reply">,
  deliverLine: DeliverLine,
): Promise<Reply> {
  for (let interim = 0; interim <= MAX_INTERIM; interim++) {
    while (reader.lineLength() === 0) {
      // A peer that does not speak HTTP may never send an LF: look at its first bytes.
      const start = latin1(reader.buffer.subarray(reader.from, reader.to)).slice(0, 60);
      const isHttp = /^HTTP\/1\.[01] /.test(start + "HTTP/1.1 ".slice(start.length));
      if (!isHttp) throw notHttp(start);
      if (!await reader.fill()) throw emptyReply("the connection ended before its status line");
    }
    const line = latin1(reader.take(reader.lineLength())), reply = statusOf(line);
    if (reply.status >= 200) {
      // Of an interim reply the mark says nothing of this one.
      reply.tos = reader.source.arrivedTos;
      exchange.reply = reply;
    }
    await deliverLine(line);
    await readFields(reader, reply.headers, "header", deliverLine);
    if (reply.status >= 200) return reply;
  }
  throw badReply(`more than ${MAX_INTERIM} interim replies`);
}

function notHttp(line: string): Failure {
  // An alert or a handshake record, RFC 8446 section 5.1
  const isTls = line.startsWith("\x15\x03") || line.startsWith("\x16\x03");
  return new Failure(
    Exit.badReply,
    `malformed reply: it starts with ${excerpt(line)}, which is not HTTP/1.1`,
    isTls ? "the server speaks TLS: is it https://?" : undefined,
  );
}

function statusOf(line: string): Reply {
  const text = lineText(line);
  // As lenient as curl, and as RFC 9112 section 4 allows: more than one space between the words.
  const parts = /^HTTP\/1\.[01] +(\d{3})(?![^ ])/.exec(text);
  if (parts === null) throw notHttp(text);
  const status = Number(parts[1]), reason = trimmed(text.slice(parts[0].length));
  if (reason.includes("\0")) throw badReply("the status line holds a NUL byte");
  if (status < 100) throw badReply(`status ${parts[1]}`);
  if (status === 101) throw badReply("101 switches to a protocol that was not asked for");
  return { status, reason, headers: [], trailers: [], tos: null, bodyBytes: 0, complete: false };
}

/** Header or trailer lines up to the blank one (RFC 9112 sections 5 and 7.1.2). */
async function readFields(
  reader: Reader,
  fields: Field[],
  what: "header" | "trailer",
  deliverLine: DeliverLine,
): Promise<void> {
  for (let budget = HEAD_LIMIT;;) {
    const line = await reader.line(() => endedEarly(`in the middle of the ${what}s`));
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
  if (colon < 1) throw badReply(`${what} line ${excerpt(text)} has no name and colon`);
  fields.push([trimmed(text.slice(0, colon)).toLowerCase(), trimmed(text.slice(colon + 1))]);
}

/** A line without its end; a CR elsewhere counts as a space (RFC 9112 section 2.2). */
function lineText(line: string): string {
  return line.replace(/\r?\n$/, "").replaceAll("\r", " ");
}

/** The values of a header, its lines and commas taken apart. */
function listOf({ headers }: Reply, name: string): string[] {
  return headers.flatMap(([other, value]) => other === name ? value.split(",").map(trimmed) : []);
}

/** How long the body is (RFC 9112 section 6.3): bytes, in chunks, or `Infinity` until the close. */
function framingOf(reply: Reply): number | "chunked" {
  if (reply.status === 204 || reply.status === 304) return 0;
  const codings = listOf(reply, "transfer-encoding").map((coding) => coding.toLowerCase());
  const lengths = listOf(reply, "content-length");
  // "identity" of RFC 2616 is no coding at all, and "chunked" again is a mistake of a proxy's.
  const named = new Set(codings.filter((coding) => coding !== "" && coding !== "identity"));
  const isChunked = named.delete("chunked"), names = excerpt(codings.join(", "));
  if (named.size > 0) throw badReply(`Transfer-Encoding ${names} was not asked for`);
  if (isChunked) return "chunked";
  if (codings.length > 0 || lengths.length === 0) return Infinity;
  const first = Number(lengths[0]);
  for (const text of lengths) {
    const length = /^\d+$/.test(text) ? Number(text) : NaN;
    if (!Number.isSafeInteger(length)) throw badReply(`Content-Length ${excerpt(text)}`);
    if (length !== first) throw badReply(`conflicting Content-Length ${first} and ${length}`);
  }
  return first;
}

async function readLength(
  reader: Reader,
  length: number,
  deliver: Deliver,
): Promise<void> {
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

/**
 * RFC 9112 section 7.1. The data of all chunks that are here moves to the front, and on together.
 */
async function readChunks(
  reader: Reader,
  reply: Reply,
  deliver: Deliver,
): Promise<void> {
  let size = 0, missing = 0, end = 0;
  const flush = async () => {
    const data = reader.buffer.subarray(0, end);
    end = 0;
    if (data.length > 0) await deliver(data);
  };
  const more = async () => {
    await flush();
    if (await reader.fill()) return;
    const where = missing > 0
      ? `${missing} of a chunk's ${plural(size, "byte")} are missing`
      : "before the last chunk";
    throw endedEarly(`${where}, after ${plural(reply.bodyBytes, "byte")}`);
  };
  try {
    for (;;) {
      let length;
      while ((length = reader.lineLength()) === 0) await more();
      size = missing = chunkSize(reader.buffer, reader.from);
      reader.from += length;
      if (size === 0) return;
      while (missing > 0) {
        if (reader.from === reader.to) await more();
        const at = reader.from, count = Math.min(missing, reader.to - at);
        reader.buffer.copyWithin(end, at, at + count);
        end += count;
        missing -= count;
        reader.from += count;
      }
      if (reader.from === reader.to) await more();
      if (reader.buffer[reader.from] === CR && ++reader.from === reader.to) await more();
      if (reader.buffer[reader.from++] !== LF) throw badReply("a chunk is longer than its size");
    }
  } finally {
    await flush();
  }
}

/** The size that the line at `start` gives; it is there with its end. */
function chunkSize(buffer: Uint8Array, start: number): number {
  // By hand: with indexOf, a million chunks of a byte take three times as long, as text six times.
  let size = 0, at = start;
  for (let digit; (digit = hexDigit(buffer[at])) >= 0; at++) {
    size = size * 16 + digit;
  }
  const digits = at - start;
  while (buffer[at] === SPACE || buffer[at] === TAB || buffer[at] === CR) at++;
  const isEnd = buffer[at] === LF || buffer[at] === SEMICOLON;
  // curl reads at most 16 digits too.
  if (isEnd && digits >= 1 && digits <= 16 && Number.isSafeInteger(size)) return size;
  const text = lineText(latin1(buffer.subarray(start, buffer.indexOf(LF, start) + 1)));
  throw badReply(`bad chunk size ${excerpt(text)}`);
}

/** The value of a hexadecimal digit, or -1. */
function hexDigit(byte: number): number {
  if (byte >= 0x30 && byte <= 0x39) return byte - 0x30;
  const small = byte | 0x20;
  return small >= 0x61 && small <= 0x66 ? small - 0x57 : -1;
}
