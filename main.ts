#!/usr/bin/env -S deno run --allow-net --allow-ffi
/**
 * Sends one HTTP GET whose packets carry a DSCP mark, and proves it.
 *
 * ```sh
 * deno run --allow-net --allow-ffi main.ts                          # EF, to 127.0.0.1:8086 or the built-in server
 * deno run --allow-net --allow-ffi main.ts -d AF41 http://[::1]:8086/
 * deno run --allow-net --allow-ffi main.ts --json http://127.0.0.1:8086/
 * ```
 *
 * The story from top to bottom: arguments → connect → mark → GET → reply → report. What touches the kernel is in
 * `ffi/`, what talks HTTP or to a person is here.
 *
 * @module
 */

import {
  type Arrived,
  CannotRunError,
  describe,
  DescriptorError,
  dial,
  type Dialed,
  endText,
  fdOf,
  hex,
  keepArrivals,
  LibcError,
  type Mark,
  markAndWatch,
  MarkError,
  markOf,
  parseDscp,
  parseTos,
  prepareDial,
  resolve,
  sameDscp,
  type SentPacket,
  setBlocking,
  setTos,
  takeArrived,
  takeSent,
  watchArriving,
} from "./ffi/mod.ts";

const VERSION = "0.1.0";
const DEFAULT_HOST = "127.0.0.1";
const DEFAULT_PORT = 8086;

/** The exit codes; those below 100 are curl's. */
export const Exit = {
  ok: 0,
  usage: 2,
  badUrl: 3,
  hostNotFound: 6,
  cannotConnect: 7,
  badReply: 8,
  endedEarly: 18,
  httpError: 22,
  cannotWrite: 23,
  timeout: 28,
  tlsFailed: 35,
  emptyReply: 52,
  connectionLost: 56,
  badCertificate: 60,
  badCaFile: 77,
  notMarked: 100,
  leftChanged: 101,
  arrivedChanged: 102,
  cannotRun: 103,
} as const;

/** What ends a run: an exit code, one line for a person, and perhaps a hint what to do. */
export class Failure extends Error {
  /** `Failure`. */
  override name = "Failure";

  /**
   * A failure to end the run with.
   *
   * @param code the exit code, one of {@linkcode Exit}
   * @param message one line, free of control characters; empty where nobody is left to read it
   * @param hint what to do about it
   */
  constructor(readonly code: number, message: string, readonly hint?: string) {
    super(message);
  }
}

// ─── Usage ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const USAGE = `dscp-get ${VERSION}: send one HTTP GET whose packets carry a DSCP mark, and prove it

  deno run --allow-net --allow-ffi main.ts [options] [URL]

Without a URL it asks http://${DEFAULT_HOST}:${DEFAULT_PORT}/, and answers itself where nobody listens there.
The reply's body goes to standard output, the report to standard error.

The mark
  -d, --dscp NAME[,NAME…] EF (the default), VOICE-ADMIT or VA, LE, DF or BE, CS0 to CS7, AF11 to AF43,
                          or a number from 0 to 63; several take turns; all is the 64 of them
      --tos BYTE          the whole ToS byte or Traffic Class, such as 184 or 0xB8; ECN bits 0
      --mark-syn          mark the handshake too: on a busy link an unmarked SYN waits in the queue

The request
  -H, --header LINE       'Name: value' adds or replaces a header, 'Name:' removes one, 'Name;' sends it empty
  -4, --ipv4              IPv4 addresses only
  -6, --ipv6              IPv6 addresses only
      --connect-timeout S seconds to connect in (10)
  -m, --max-time S        seconds for the whole request (30); 0 is no limit
  -k, --insecure          https with any certificate
      --cacert FILE       https that trusts the certificates in FILE (PEM), no others; needs --allow-read

The output
  -i, --include           status line and headers before the body
  -f, --fail              exit 22 on status 400 and above, without the body
  -s, --silent            no report
      --json              one JSON object on standard output, instead of body and report
  -V, --version           the version
  -h, --help              this text

Did the network care?
  -n, --count N           N rounds of requests, one after the other, and a table of their times
      --interval S        seconds between them (0)

The far end
      --serve [HOST:]PORT answer GET and HEAD with the marks that arrived, until Ctrl-C; HOST is ${DEFAULT_HOST}

Exit codes: 0 done; as curl: 3 bad URL, 6 host not found, 7 cannot connect or listen, 8 bad reply,
18 ended early, 22 HTTP error with -f, 23 cannot write, 28 timeout, 35 TLS failed, 52 empty reply,
56 connection lost, 60 bad certificate, 77 bad --cacert file; 2 bad usage; 100 the kernel did not take the
mark, 101 packets left with another mark, 102 packets arrived with another mark, 103 cannot run here
(not Linux, or a permission or libc is missing).
`;

// ─── Arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** What a run is asked to do. */
export interface Options {
  /** Where to, or `null` for the default with its built-in server. */
  readonly url: string | null;
  /** The marks to set, in turn. */
  readonly marks: readonly Mark[];
  /** How many rounds of them. */
  readonly count: number;
  /** Seconds between requests. */
  readonly interval: number;
  /** The mark is set before the SYN goes out. */
  readonly markSyn: boolean;
  /** Any certificate will do. */
  readonly insecure: boolean;
  /** A file with roots to trust, in PEM. */
  readonly cacert: string | null;
  /** Be the far end, here. */
  readonly serve: { readonly hostname: string; readonly port: number } | null;
  /** 4 or 6 for one address family only. */
  readonly family: 4 | 6 | null;
  /** Headers of the user: a value adds or replaces, `null` removes. */
  readonly headers: readonly (readonly [name: string, value: string | null])[];
  /** Seconds; 0 is no limit. */
  readonly connectTimeout: number;
  /** Seconds for the whole request; 0 is no limit. */
  readonly maxTime: number;
  /** Status line and headers go out before the body. */
  readonly include: boolean;
  /** Status 400 and above is a failure. */
  readonly fail: boolean;
  /** No report. */
  readonly silent: boolean;
  /** One JSON object in place of body and report. */
  readonly json: boolean;
  /** Print this instead of doing anything. */
  readonly print: "help" | "version" | null;
}

/** What a run without arguments does. */
export const DEFAULTS: Options = {
  url: null,
  marks: [parseDscp("EF")],
  count: 1,
  interval: 0,
  markSyn: false,
  insecure: false,
  cacert: null,
  serve: null,
  family: null,
  headers: [],
  connectTimeout: 10,
  maxTime: 30,
  include: false,
  fail: false,
  silent: false,
  json: false,
  print: null,
};

const OPTIONS = {
  dscp: { type: "string", short: "d" },
  tos: { type: "string" },
  "mark-syn": { type: "boolean" },
  count: { type: "string", short: "n" },
  interval: { type: "string" },
  header: { type: "string", short: "H" },
  ipv4: { type: "boolean", short: "4" },
  ipv6: { type: "boolean", short: "6" },
  "connect-timeout": { type: "string" },
  "max-time": { type: "string", short: "m" },
  insecure: { type: "boolean", short: "k" },
  cacert: { type: "string" },
  serve: { type: "string" },
  include: { type: "boolean", short: "i" },
  fail: { type: "boolean", short: "f" },
  silent: { type: "boolean", short: "s" },
  json: { type: "boolean" },
  version: { type: "boolean", short: "V" },
  help: { type: "boolean", short: "h" },
} as const;

type OptionName = keyof typeof OPTIONS;

/** Reads the command line. @throws {Failure} bad usage, exit 2 */
export function parseArguments(args: readonly string[]): Options {
  const options: { -readonly [K in keyof Options]: Options[K] } = { ...DEFAULTS };
  const urls: string[] = [], headers: [string, string | null][] = [];
  let markedBy: OptionName | null = null;
  for (const token of tokensOf(args)) {
    if (token.kind === "positional") {
      urls.push(token.value);
      continue;
    }
    if (!Object.hasOwn(OPTIONS, token.name)) throw usage(`unknown option ${quote(token.rawName)}`);
    const name = token.name as OptionName;
    const value = token.value ?? "";
    if (OPTIONS[name].type === "string" && token.value === undefined) {
      throw usage(`${token.rawName} needs a value`);
    }
    if (OPTIONS[name].type === "boolean" && token.value !== undefined) {
      throw usage(`${token.rawName} takes no value`);
    }
    switch (name) {
      case "dscp":
      case "tos":
        if (markedBy !== null && markedBy !== name) {
          throw usage("--dscp and --tos exclude each other: give one of them");
        }
        markedBy = name;
        options.marks = allowed(() => name === "dscp" ? parseMarks(value) : [parseTos(value)]);
        break;
      case "header":
        headers.push(parseHeader(value));
        break;
      case "count":
        options.count = parseCount(value);
        break;
      case "interval":
        options.interval = parseSeconds(token.rawName, value);
        break;
      case "mark-syn":
        options.markSyn = true;
        break;
      case "cacert":
        options.cacert = value;
        break;
      case "serve":
        options.serve = parseListen(value);
        break;
      case "ipv4":
        options.family = 4;
        break;
      case "ipv6":
        options.family = 6;
        break;
      case "connect-timeout":
        options.connectTimeout = parseSeconds(token.rawName, value);
        break;
      case "max-time":
        options.maxTime = parseSeconds(token.rawName, value);
        break;
      case "version":
      case "help":
        options.print ??= name;
        break;
      default:
        options[name] = true;
    }
  }
  if (options.serve !== null && urls.length > 0) {
    throw usage("--serve takes no URL: it is the far end");
  }
  if (urls.length > 1) {
    throw usage(`one URL at a time, not ${urls.length}: ${urls.map(quote).join(" ")}`);
  }
  return { ...options, headers, url: urls[0] ?? null };
}

/** An argument by itself, or an option and its value, if it has one. */
type Token =
  | { readonly kind: "positional"; readonly value: string }
  | {
    readonly kind: "option";
    readonly name: string;
    readonly rawName: string;
    readonly value?: string;
  };

/** Takes arguments apart as getopt_long(3) does; an option that is not known counts as one without a value. */
function* tokensOf(args: readonly string[]): Generator<Token> {
  const rest = [...args];
  for (let arg; (arg = rest.shift()) !== undefined;) {
    if (arg === "--") {
      for (const value of rest) yield { kind: "positional", value };
      return;
    }
    if (!arg.startsWith("-") || arg === "-") yield { kind: "positional", value: arg };
    else if (arg.startsWith("--")) {
      const equals = arg.indexOf("=", 3);
      const rawName = equals < 0 ? arg : arg.slice(0, equals), name = rawName.slice(2);
      const next = () => takesValue(name) ? rest.shift() : undefined;
      const value = equals < 0 ? next() : arg.slice(equals + 1);
      yield { kind: "option", name, rawName, value };
    } else {
      for (let at = 1; at < arg.length; at++) {
        const rawName = `-${arg[at]}`, name = longNameOf(arg[at]);
        if (!takesValue(name)) yield { kind: "option", name, rawName };
        else {
          yield { kind: "option", name, rawName, value: arg.slice(at + 1) || rest.shift() };
          break;
        }
      }
    }
  }
}

function takesValue(name: string): boolean {
  return Object.hasOwn(OPTIONS, name) && OPTIONS[name as OptionName].type === "string";
}

function longNameOf(letter: string): string {
  const named = Object.entries(OPTIONS).find(([, how]) => "short" in how && how.short === letter);
  return named?.[0] ?? letter;
}

function usage(message: string): Failure {
  return new Failure(Exit.usage, printable(message), "--help lists the options");
}

function allowed<T>(parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    throw error instanceof RangeError ? usage(error.message) : error;
  }
}

function parseMarks(text: string): Mark[] {
  if (text.toLowerCase() === "all") {
    return Array.from({ length: 64 }, (_, dscp) => markOf(dscp << 2));
  }
  return text.split(",").map(parseDscp);
}

function parseCount(text: string): number {
  const most = 1_000_000;
  const count = /^[1-9]\d*$/.test(text) ? Number(text) : NaN;
  if (!(count <= most)) throw usage(`--count takes a number from 1 to ${most}, not ${quote(text)}`);
  return count;
}

function parseSeconds(option: string, text: string): number {
  // Timers hold milliseconds in 31 bits.
  const most = 2_147_483;
  const seconds = /^(\d+\.?\d*|\.\d+)$/.test(text) ? Number(text) : NaN;
  if (!(seconds <= most)) {
    throw usage(`${option} takes seconds from 0 to ${most}, such as 5 or 0.5, not ${quote(text)}`);
  }
  return seconds;
}

function parseListen(text: string): { hostname: string; port: number } {
  const parts = /^(?:(?:\[([^\]]+)\]|([^:]+)):)?(\d{1,5})$/.exec(text);
  if (parts === null || Number(parts[3]) > 65535) {
    throw usage(
      `--serve takes PORT, HOST:PORT or [IPv6]:PORT, PORT from 0 to 65535, not ${quote(text)}`,
    );
  }
  return { hostname: parts[1] ?? parts[2] ?? DEFAULT_HOST, port: Number(parts[3]) };
}

/** A header as curl's `-H` takes it. */
function parseHeader(text: string): [name: string, value: string | null] {
  const [, name, separator, rest] = /^([^:;]*)([:;]?)([^]*)$/.exec(text)!;
  // RFC 9110 section 5.6.2
  if (!/^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/.test(name)) {
    throw usage(
      `${
        quote(text)
      } is not a header: its name must be letters, digits or !#$%&'*+-.^_\`|~, as in 'Name: value'`,
    );
  }
  // RFC 9110 section 5.5
  if (/[\r\n\0]/.test(text)) {
    throw usage(`${quote(text)} is not a header: CR, LF and NUL may not be in it`);
  }
  const value = rest.trim();
  if (separator === ":") return [name, value === "" ? null : value];
  if (separator === ";" && value === "") return [name, ""];
  throw usage(
    `${
      quote(text)
    } is not a header: it must be 'Name: value', 'Name:' to remove one or 'Name;' for an empty one`,
  );
}

// ─── Target ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Where a request goes. */
export interface Target {
  /** The URL as it is asked for, without fragment. */
  readonly url: string;
  /** Whether it is https. */
  readonly secure: boolean;
  /** Host name or address, without brackets. */
  readonly host: string;
  /** 1 to 65535. */
  readonly port: number;
  /** The Host header's value (RFC 9110 section 7.2). */
  readonly authority: string;
  /** Path and query, percent-encoded. */
  readonly path: string;
}

/** Where a run without a URL goes. */
const DEFAULT_TARGET: Target = localTarget(DEFAULT_PORT);

function localTarget(port: number): Target {
  const authority = `${DEFAULT_HOST}:${port}`;
  return {
    url: `http://${authority}/`,
    secure: false,
    host: DEFAULT_HOST,
    port,
    authority,
    path: "/",
  };
}

/** Reads a URL as curl does: without a scheme it is http. @throws {Failure} bad URL, exit 3 */
export function parseTarget(text: string): Target {
  const bad = (why: string, hint?: string) =>
    new Failure(Exit.badUrl, `bad URL ${quote(text)}: ${why}`, hint);
  // The URL parser would drop these without a word.
  if ([...text].some((c) => c < " " || c === "\x7f")) {
    throw bad("control characters are not allowed");
  }
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//i.exec(text)?.[1].toLowerCase();
  if (scheme !== undefined && scheme !== "http" && scheme !== "https") {
    throw bad(`the scheme must be http or https, not ${scheme}`);
  }
  const full = scheme === undefined ? `http://${text}` : text;
  const url = /^https?:\/\/[^/?#]/i.test(full) ? URL.parse(full) : null;
  if (url === null) {
    throw bad("it should look like http://host:port/path, an IPv6 address in brackets");
  }
  if (url.username !== "" || url.password !== "") {
    throw new Failure(
      Exit.badUrl,
      "user and password in the URL are not supported",
      "send them yourself: -H 'Authorization: Basic …' with the base64 of user:password",
    );
  }
  const secure = url.protocol === "https:";
  const port = url.port === "" ? (secure ? 443 : 80) : Number(url.port);
  if (port === 0) throw bad("nobody can listen on port 0");
  url.hash = "";
  return {
    url: url.href,
    secure,
    host: url.hostname.replace(/^\[(.*)\]$/, "$1"),
    port,
    authority: url.host,
    path: `${url.pathname}${url.search}`,
  };
}

// ─── Connect ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What the script needs of a connection, whoever opened it. */
export interface Wire {
  /** This end. */
  readonly localAddr: Deno.Addr;
  /** The other end. */
  readonly remoteAddr: Deno.Addr;
  /** Reads what has come into `buffer`; the number of bytes, or `null` at the end. */
  read(buffer: Uint8Array): Promise<number | null>;
  /** Writes some of `bytes`; how many. */
  write(bytes: Uint8Array): Promise<number>;
  /** Closes the socket. */
  close(): void;
}

/** @throws {Failure} it fails: host not found 6, cannot connect 7, no answer 28 */
async function connect(
  { target, mark }: Exchange,
  options: Options,
  signal: AbortSignal,
): Promise<Wire> {
  const { host: hostname, port } = target;
  const { family } = options;
  try {
    if (needsDial(target, options)) {
      return await dial({ hostname, port, tos: options.markSyn ? mark.tos : null, family, signal });
    }
    if (family === null) return await Deno.connect({ hostname, port, signal });
    let failure: unknown;
    for (const address of await resolve(hostname, family, signal)) {
      try {
        return await Deno.connect({ hostname: address, port, signal });
      } catch (error) {
        signal.throwIfAborted();
        failure = error;
      }
    }
    throw failure;
  } catch (error) {
    throw connectFailure(error, target, options);
  }
}

/** Whether it takes a socket of libc instead of one of Deno. */
function needsDial({ secure }: Target, { markSyn, insecure, cacert }: Options): boolean {
  // Deno's own TLS trusts its roots come what may; that of node:tls does as it is told, and needs a descriptor of ours.
  return markSyn || (secure && (insecure || cacert !== null));
}

/** A connect that failed, in the words of the user. */
function connectFailure(error: unknown, target: Target, { family }: Options): unknown {
  if (
    !(error instanceof Error) || error instanceof Failure || error instanceof Deno.errors.NotCapable
  ) return error;
  if (error instanceof LibcError || error instanceof MarkError) return connectionFailure(error);
  const where = endText({ transport: "tcp", hostname: target.host, port: target.port });
  if (
    error.message.startsWith("failed to lookup address information") || error instanceof URIError
  ) {
    const why = family === null ? "not found" : `has no IPv${family} address`;
    return new Failure(Exit.hostNotFound, `host ${quote(target.host)} ${why}`);
  }
  if (error instanceof Deno.errors.TimedOut) {
    return new Failure(Exit.timeout, `no answer from ${where}`);
  }
  const hint = error instanceof Deno.errors.ConnectionRefused && !target.secure
    ? `to start a server there: python3 -m http.server ${target.port}`
    : undefined;
  return new Failure(Exit.cannotConnect, `cannot connect to ${where}: ${reason(error)}`, hint);
}

/** An operating system or TLS error without the number, or the link, that is added to it. */
function reason(error: Error): string {
  const bare = error.message.replace(/ \(os error \d+\)$|: https:\/\/\S+$/, "");
  return printable(bare.replace(/^[A-Z](?![A-Z])/, (c) => c.toLowerCase()));
}

// ─── Request ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The bytes of the GET. */
export function request(target: Target, headers: Options["headers"]): Uint8Array<ArrayBuffer> {
  const given = new Set(headers.map(([name]) => name.toLowerCase()));
  const standard: [string, string][] = [
    ["Host", target.authority],
    ["User-Agent", `dscp-get/${VERSION}`],
    ["Accept", "*/*"],
    ["Connection", "close"],
  ];
  let text = `GET ${target.path} HTTP/1.1\r\n`;
  for (const [name, value] of standard) {
    if (!given.has(name.toLowerCase())) text += `${name}: ${value}\r\n`;
  }
  for (const [name, value] of headers) if (value !== null) text += `${name}: ${value}\r\n`;
  return new TextEncoder().encode(text + "\r\n");
}

// ─── Reply ───────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A reply as far as it was read. */
export interface Reply {
  /** The status code, 200 to 999. */
  status: number;
  /** The reason phrase, a character a byte. */
  reason: string;
  /** Names in small letters, values a character a byte, in the order they came. */
  headers: [name: string, value: string][];
  /** The Traffic Class of its first packet; on IPv6 only, as the kernel tells it there. */
  tos: number | null;
  /** Bytes of the body that were read, without the framing of chunks. */
  bodyBytes: number;
  /** Whether the whole body was read. */
  complete: boolean;
}

/** Where the bytes of a reply go. */
export interface Sink {
  /** Status line or header with its line end, as it came, a character a byte. */
  head(line: string): void;
  /** The reply so far, when its headers are complete and before its body; may throw to stop. */
  begin(reply: Reply): void;
  /** A piece of the body, valid until the next call. */
  body(piece: Uint8Array): void;
}

const HEAD_LIMIT = 256 * 1024;
// Large pieces cost less for each byte; a small reply touches only the first pages of it.
const READ_SIZE = 256 * 1024;

/** Bytes from a connection, by line or by piece. */
class Reader {
  readonly #source: Pick<Wire, "read">;
  readonly #buffer: Uint8Array;
  #from = 0;
  #to = 0;

  constructor(source: Pick<Wire, "read">, buffer: Uint8Array) {
    this.#source = source;
    this.#buffer = buffer;
  }

  /** Whether something has come that was not taken yet. */
  get hasBytes(): boolean {
    return this.#from < this.#to;
  }

  /** Reads where nothing is left; false at the end. */
  async fill(): Promise<boolean> {
    if (this.hasBytes) return true;
    this.#from = 0;
    this.#to = await this.#source.read(this.#buffer) ?? 0;
    return this.#to > 0;
  }

  /** At most `most` bytes of what has come, valid until the next call. */
  take(most: number): Uint8Array {
    const end = Math.min(this.#to, this.#from + most);
    const piece = this.#buffer.subarray(this.#from, end);
    this.#from = end;
    return piece;
  }

  /** A line with its end, a character a byte, if all of it is here; else `null`. */
  lineNow(): string | null {
    const size = this.#buffer.subarray(this.#from, this.#to).indexOf(0x0a) + 1;
    return size === 0 ? null : latin1(this.take(size));
  }

  /** A line with its end; what has come without one at the end of the connection. @throws {Failure} over `limit` */
  async line(limit: number, what: string): Promise<string> {
    const pieces: string[] = [];
    for (let size = 0, isWhole = false; !isWhole && await this.fill();) {
      const now = this.lineNow();
      const piece = now ?? latin1(this.take(READ_SIZE));
      size += piece.length;
      if (size > limit) throw badReply(`${what} are larger than ${HEAD_LIMIT / 1024} KiB`);
      pieces.push(piece);
      isWhole = now !== null;
    }
    return pieces.join("");
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
 * @param reply filled as the reply comes, so that it tells how far a failed one got
 * @param buffer what is read goes there
 * @throws {Failure} malformed (8), ended early (18), empty (52)
 */
export async function readReply(
  source: Pick<Wire, "read">,
  reply: Reply,
  sink: Sink,
  buffer: Uint8Array = new Uint8Array(READ_SIZE),
): Promise<void> {
  const reader = new Reader(source, buffer);
  if (!await reader.fill()) {
    throw new Failure(
      Exit.emptyReply,
      "empty reply: the server closed the connection without a byte",
    );
  }
  do await readHead(reader, reply, sink); while (reply.status < 200);
  sink.begin(reply);
  const framing = framingOf(reply);
  if (framing === "chunked") await readChunks(reader, reply, sink);
  else {
    const missing = await pass(reader, framing, reply, sink);
    if (missing > 0 && missing !== Infinity) {
      throw endedEarly(`${missing} of ${plural(framing, "byte")} are missing`);
    }
  }
  reply.complete = true;
}

async function readHead(reader: Reader, reply: Reply, sink: Sink): Promise<void> {
  for (let budget = HEAD_LIMIT, isFirst = true, isOver = false; !isOver; isFirst = false) {
    // Nearly always the whole head is here at once, and nothing has to be waited for.
    const line = reader.lineNow() ?? await reader.line(budget, "the headers");
    budget -= line.length;
    if (budget < 0) throw badReply(`the headers are larger than ${HEAD_LIMIT / 1024} KiB`);
    if (!line.endsWith("\n")) throw endedEarly("in the middle of the headers");
    const text = lineText(line);
    if (isFirst) takeStatus(reply, text);
    else if (text === "") isOver = true;
    else takeHeader(reply, text);
    sink.head(line);
  }
}

function takeStatus(reply: Reply, line: string): void {
  // As lenient as curl, and as RFC 9112 section 4 allows: more than one space between the words.
  const status = /^HTTP\/1\.[01] +(\d{3})(?![^ ])/.exec(line);
  if (status === null) {
    throw badReply(`it starts with ${quote(line.slice(0, 60))}, which is not HTTP/1.1`);
  }
  reply.status = Number(status[1]);
  reply.reason = trimmed(line, status[0].length);
  reply.headers = [];
  if (reply.reason.includes("\0")) throw badReply("the status line holds a NUL byte");
  if (reply.status < 100) throw badReply(`status ${status[1]}`);
  if (reply.status === 101) throw badReply("101 switches to a protocol that was not asked for");
}

function takeHeader({ headers }: Reply, line: string): void {
  if (line.includes("\0")) throw badReply("a header holds a NUL byte");
  if (isBlank(line, 0) && headers.length > 0) {
    // obs-fold, RFC 9112 section 5.2
    const last = headers[headers.length - 1];
    last[1] += (last[1] === "" ? "" : " ") + trimmed(line);
    return;
  }
  const colon = line.indexOf(":");
  if (colon < 1) throw badReply(`header line ${quote(line.slice(0, 60))} has no name and colon`);
  headers.push([trimmed(line, 0, colon).toLowerCase(), trimmed(line, colon + 1)]);
}

/** A line without its end; a CR elsewhere counts as a space (RFC 9112 section 2.2). */
function lineText(line: string): string {
  const text = line.slice(
    0,
    line.length - (line.endsWith("\r\n") ? 2 : line.endsWith("\n") ? 1 : 0),
  );
  return text.includes("\r") ? text.replaceAll("\r", " ") : text;
}

// By hand, as a regular expression takes quadratic time for a line that is all blanks but its last character.
function trimmed(text: string, from = 0, to = text.length): string {
  while (from < to && isBlank(text, from)) from++;
  while (to > from && isBlank(text, to - 1)) to--;
  return text.slice(from, to);
}

function isBlank(text: string, at: number): boolean {
  const code = text.charCodeAt(at);
  return code === 0x20 || code === 0x09;
}

/** Bytes as text, a character a byte. */
function latin1(bytes: Uint8Array): string {
  // As many at once as fit the stack.
  const most = 8192;
  if (bytes.length <= most) return String.fromCharCode.apply(null, bytes as unknown as number[]);
  let text = "";
  for (let at = 0; at < bytes.length; at += most) text += latin1(bytes.subarray(at, at + most));
  return text;
}

/** The bytes of a text that {@linkcode latin1} has made. */
function bytesOf(text: string): Uint8Array {
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

/** The values of a header, its lines and commas taken apart; `null` where it is not there. */
function listOf({ headers }: Reply, name: string): string[] | null {
  let lines: string | null = null;
  for (const header of headers) {
    if (header[0] === name) lines = lines === null ? header[1] : `${lines},${header[1]}`;
  }
  return lines === null ? null : lines.split(",").map((item) => item.trim());
}

/** How long the body is (RFC 9112 section 6.3): bytes, in chunks, or `Infinity` for until the connection closes. */
function framingOf(reply: Reply): number | "chunked" {
  const codings = listOf(reply, "transfer-encoding"), lengths = listOf(reply, "content-length");
  const length = codings !== null
    ? lengthInCodings(codings)
    : lengths !== null
    ? lengthIn(lengths)
    : Infinity;
  return reply.status === 204 || reply.status === 304 ? 0 : length;
}

function lengthInCodings(given: string[]): number | "chunked" {
  const codings = given.map((coding) => coding.toLowerCase()).filter((coding) => coding !== "");
  if (codings.length === 1 && codings[0] === "chunked") return "chunked";
  if (codings.every((coding) => coding === "identity")) return Infinity;
  throw badReply(`Transfer-Encoding ${quote(codings.join(", ").slice(0, 60))} was not asked for`);
}

function lengthIn(lengths: string[]): number {
  const [length] = lengths, another = lengths.find((other) => other !== length);
  if (another !== undefined) {
    throw badReply(
      `conflicting Content-Length ${quote(length.slice(0, 60))} and ${quote(another.slice(0, 60))}`,
    );
  }
  if (/^\d+$/.test(length) && Number.isSafeInteger(Number(length))) return Number(length);
  throw badReply(`Content-Length ${quote(length.slice(0, 60))}`);
}

/** Passes on `length` bytes, or all there are where it is `Infinity`. @returns bytes that are missing */
async function pass(reader: Reader, length: number, reply: Reply, sink: Sink): Promise<number> {
  for (let left = length; left > 0;) {
    if (!reader.hasBytes && !await reader.fill()) return left;
    const piece = reader.take(left);
    left -= piece.length;
    reply.bodyBytes += piece.length;
    sink.body(piece);
  }
  return 0;
}

/** RFC 9112 section 7.1 */
async function readChunks(reader: Reader, reply: Reply, sink: Sink): Promise<void> {
  const early = (where: string) => endedEarly(`${where}, after ${plural(reply.bodyBytes, "byte")}`);
  const nextLine = async (what: string, limit: number) => {
    const line = await reader.line(limit, what);
    if (!line.endsWith("\n")) throw early("before the last chunk");
    return line;
  };
  for (;;) {
    const line = lineText(await nextLine("a chunk's extensions", HEAD_LIMIT));
    const digits = /^([0-9a-f]+)[ \t]*(?:;.*)?$/i.exec(line)?.[1];
    if (digits === undefined) throw badReply(`bad chunk size ${quote(line.slice(0, 60))}`);
    const size = parseInt(digits, 16);
    if (!Number.isSafeInteger(size)) {
      throw badReply(`chunk size ${quote(digits.slice(0, 60))} is too large`);
    }
    if (size === 0) break;
    const missing = await pass(reader, size, reply, sink);
    if (missing > 0) throw early(`${missing} of a chunk's ${plural(size, "byte")} are missing`);
    if (lineText(await nextLine("a chunk's ends", HEAD_LIMIT)) !== "") {
      throw badReply("a chunk is longer than its size");
    }
  }
  for (let budget = HEAD_LIMIT;;) {
    const trailer = await nextLine("the trailers", budget);
    const text = lineText(trailer);
    if (text === "") break;
    if (!text.includes(":")) {
      throw badReply(`trailer line ${quote(text.slice(0, 60))} has no colon`);
    }
    budget -= trailer.length;
  }
}

// ─── Exchange ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** One request and what became of it, filled as it goes. */
export interface Exchange {
  /** Where to. */
  readonly target: Target;
  /** Whether this process answers itself. */
  readonly builtIn: boolean;
  /** The mark that is set. */
  readonly mark: Mark;
  /** This end, once connected. */
  local: Deno.NetAddr | null;
  /** The other end, once connected. */
  remote: Deno.NetAddr | null;
  /** The descriptor, once found. */
  fd: number | null;
  /** The byte read back, once set. */
  readBack: number | null;
  /** The packets that left, as the kernel looped them back. */
  packets: SentPacket[];
  /** Whether the handshake was marked too. */
  readonly handshake: boolean;
  /** The reply; its status is 0 until the status line is here. */
  readonly reply: Reply;
  /** What the far end tells of the packets that arrived, or `null` where it tells nothing. */
  arrived: Arrived | null;
  /** Milliseconds since the start, as they were reached. */
  milliseconds: { connect: number | null; firstByte: number | null; total: number | null };
}

function newExchange(target: Target, builtIn: boolean, mark: Mark, { markSyn }: Options): Exchange {
  return {
    target,
    builtIn,
    mark,
    handshake: markSyn,
    local: null,
    remote: null,
    fd: null,
    readBack: null,
    packets: [],
    reply: { status: 0, reason: "", headers: [], tos: null, bodyBytes: 0, complete: false },
    arrived: null,
    milliseconds: { connect: null, firstByte: null, total: null },
  };
}

/**
 * Connects, marks, asks, reads, proves and closes.
 *
 * @param exchange filled as it goes, so that it tells how far a failed one got
 * @param asked the request
 * @param buffer what is read goes there
 * @throws {Failure} whatever went wrong, with its exit code
 */
async function perform(
  exchange: Exchange,
  options: Options,
  sink: Sink,
  asked = request(exchange.target, options.headers),
  buffer = new Uint8Array(READ_SIZE),
): Promise<void> {
  const { target, milliseconds } = exchange;
  // The network is timed, not the loading of what talks to it.
  if (needsDial(target, options)) await prepareDial();
  const started = performance.now();
  const elapsed = () => performance.now() - started;
  const roots = target.secure && options.cacert !== null ? [readCertificates(options.cacert)] : [];

  const abort = new AbortController();
  let wire: Wire | null = null;
  let expired: Failure | null = null;
  const expireAfter = (seconds: number, doing: string) =>
    after(seconds * 1000, () => {
      expired = new Failure(Exit.timeout, `${doing} took longer than ${plural(seconds, "second")}`);
      abort.abort(expired);
      end();
    });
  let isEnded = false;
  const end = () => {
    if (wire === null || isEnded) return;
    isEnded = true;
    finish(exchange, wire);
  };
  const cancelMaxTime = expireAfter(options.maxTime, "the request");
  const cancelConnectTimeout = expireAfter(options.connectTimeout, "connecting");
  try {
    wire = await connect(exchange, options, abort.signal);
    cancelConnectTimeout();
    milliseconds.connect = elapsed();
    if (expired !== null) throw expired;
    setMark(exchange, wire);
    if (target.secure) {
      wire = await secure(wire, target, options, roots, (begun) => {
        wire = begun;
        exchange.fd = fdOf(begun); // found now, it is known also after a reset
      });
    }
    await writeAll(wire, asked);
    await readReply(watchFirst(wire, exchange, elapsed), exchange.reply, sink, buffer);
    // A connection that is closed when its time is over may look like one that came to its end.
    if (expired !== null) throw expired;
  } catch (error) {
    throw expired ?? connectionFailure(error);
  } finally {
    cancelConnectTimeout();
    cancelMaxTime();
    milliseconds.total = elapsed();
    exchange.arrived = arrivedOf(exchange.reply);
    end();
  }
  checkMarks(exchange);
}

/** Marks the connection, and has the kernel keep what leaves and arrives on it. */
function setMark(exchange: Exchange, wire: Wire): void {
  exchange.local = wire.localAddr as Deno.NetAddr;
  exchange.remote = wire.remoteAddr as Deno.NetAddr;
  const { fd, readBack } = markAndWatch(wire, exchange.mark.tos);
  exchange.fd = fd;
  exchange.readBack = readBack;
  if (exchange.local.hostname.includes(":")) watchArriving(wire);
}

/** The connection, which notes when the reply begins, and on IPv6 the mark of its first packet. */
function watchFirst(
  wire: Wire,
  exchange: Exchange,
  elapsed: () => number,
): Pick<Wire, "read"> {
  return {
    async read(buffer): Promise<number | null> {
      if (exchange.milliseconds.firstByte !== null) return await wire.read(buffer);
      const size = await wire.read(buffer);
      if (size !== null && size > 0) {
        exchange.milliseconds.firstByte = elapsed();
        if (exchange.local?.hostname.includes(":")) exchange.reply.tos = takeArrived(wire).data;
      }
      return size;
    },
  };
}

/** Takes the packets that the kernel has looped back by now. */
function collectSent(exchange: Exchange, wire: Wire): void {
  try {
    if (exchange.readBack !== null) exchange.packets.push(...takeSent(wire));
  } catch { /* what cannot be read was not observed, and the report says so */ }
}

/** Takes what the kernel still has of a connection, and closes it. */
function finish(exchange: Exchange, wire: Wire): void {
  // The copies outlive a reset of the connection, but not its descriptor.
  collectSent(exchange, wire);
  try {
    wire.close();
  } catch { /* a TLS handshake that failed has closed it */ }
}

/** @throws {Failure} packets left, or arrived, with another mark */
function checkMarks(exchange: Exchange): void {
  const { mark, packets } = exchange;
  const left = packets.find(({ tos }) => !sameDscp(tos, mark.tos));
  if (left !== undefined) {
    throw new Failure(
      Exit.leftChanged,
      `set ${hex(mark.tos)}, left with ${
        hex(left.tos)
      }: something on this host, such as nftables, rewrote it`,
    );
  }
  const arrived = evidence(exchange).find(({ tos }) => !sameDscp(tos, mark.tos));
  if (arrived !== undefined) {
    throw new Failure(
      Exit.arrivedChanged,
      `sent ${describe(mark)}, arrived ${describe(markOf(arrived.tos))}: the path rewrote it`,
    );
  }
}

/** What the far end tells of packets that were marked: of the handshake only if it was. */
function evidence({ arrived, handshake }: Exchange): { packet: string; tos: number }[] {
  if (arrived === null) return [];
  const { syn, ack, data } = arrived;
  const told = [["SYN", syn, handshake], ["ACK", ack, handshake], ["data", data, true]] as const;
  return told.flatMap(([packet, tos, marked]) => marked && tos !== null ? [{ packet, tos }] : []);
}

/** The far end's evidence in a reply's headers, or `null` where there is none. */
function arrivedOf({ headers }: Reply): Arrived | null {
  const byteOf = (wanted: string): number | null => {
    const value = headers.find((header) => header[0] === wanted)?.[1];
    return value !== undefined && /^0x[0-9a-f]{2}$/i.test(value) ? Number(value) : null;
  };
  const tos = byteOf("arrived-tos");
  if (tos === null) return null;
  const arrived = {
    syn: byteOf("arrived-syn"),
    ack: byteOf("arrived-ack"),
    data: byteOf("arrived-data"),
  };
  // A server that sends the one header alone speaks of the one packet that every server can tell of.
  const isSilent = arrived.syn === null && arrived.ack === null && arrived.data === null;
  return isSilent ? { ...arrived, syn: tos } : arrived;
}

/** Goes on in TLS; `tell` hears of the new connection before it shakes hands. @throws {Failure} it fails, 60 or 35 */
async function secure(
  wire: Wire,
  target: Target,
  options: Options,
  roots: string[],
  tell: (begun: Wire) => void,
): Promise<Wire> {
  try {
    if ("startTls" in wire) {
      return await (wire as Dialed).startTls(target.host, roots, options.insecure);
    }
    const tls = await Deno.startTls(wire as Deno.TcpConn, { hostname: target.host });
    tell(tls);
    await tls.handshake();
    return tls;
  } catch (error) {
    const message = reason(error as Error);
    const why = message.replace(/^invalid peer certificate: /, "");
    if (why !== message) {
      throw new Failure(
        Exit.badCertificate,
        `the server's certificate is not valid: ${why}`,
        "--cacert FILE trusts the certificates in FILE, -k any",
      );
    }
    throw new Failure(Exit.tlsFailed, `TLS failed: ${message}`);
  }
}

/** @throws {Failure} the file cannot be read (77), or may not (103) */
function readCertificates(file: string): string {
  const permission = { name: "read", path: file } as const;
  if (Deno.permissions.querySync(permission).state !== "granted") {
    throw new Failure(
      Exit.cannotRun,
      `no permission to read ${quote(file)}`,
      `run with --allow-read or --allow-read=${printable(file)}`,
    );
  }
  try {
    const text = Deno.readTextFileSync(file);
    if (text.includes("-----BEGIN CERTIFICATE-----")) return text;
  } catch (error) {
    throw new Failure(
      Exit.badCaFile,
      `cannot read ${quote(file)}: ${reason(error as Error).split(":")[0]}`,
    );
  }
  throw new Failure(Exit.badCaFile, `${quote(file)} holds no certificate in PEM form`);
}

interface Alarm {
  readonly at: number;
  readonly action: () => void;
}

const alarms = new Set<Alarm>();
let isTicking = false;

/**
 * Runs `action` once `milliseconds` have passed, or up to 100 later, unless cancelled; 0 is never.
 *
 * @returns cancels it
 */
function after(milliseconds: number, action: () => void): () => void {
  if (milliseconds === 0) return () => {};
  const alarm: Alarm = { at: performance.now() + milliseconds, action };
  alarms.add(alarm);
  if (!isTicking) tick();
  return () => alarms.delete(alarm);
}

/**
 * Looks at the alarms every 100 milliseconds for as long as there are any.
 *
 * The first `setTimeout` of a process costs Deno a fifth of a whole plain run, a timed wait on memory nothing to speak of.
 * But V8 keeps a wait until its time is over, also when it is woken before, so there is one and not one for each alarm.
 */
async function tick(): Promise<void> {
  const cell = new Int32Array(new SharedArrayBuffer(4));
  isTicking = true;
  while (alarms.size > 0) {
    await Atomics.waitAsync(cell, 0, 0, 100).value;
    const now = performance.now();
    for (const alarm of alarms) {
      if (alarm.at > now) continue;
      alarms.delete(alarm);
      alarm.action();
    }
  }
  isTicking = false;
}

async function writeAll(wire: Wire, bytes: Uint8Array): Promise<void> {
  for (let sent = 0; sent < bytes.length;) sent += await wire.write(bytes.subarray(sent));
}

/** Whether the packets left with the mark; `null` where none was seen. */
function proved({ packets, mark }: Exchange): boolean | null {
  return packets.length === 0 ? null : packets.every(({ tos }) => sameDscp(tos, mark.tos));
}

/** An error on an open connection, in the words of the user. */
function connectionFailure(error: unknown): unknown {
  if (!(error instanceof Error) || error instanceof Failure) return error;
  if (error instanceof CannotRunError || error instanceof Deno.errors.NotCapable) return error;
  if (error instanceof DescriptorError && error.lost) {
    return new Failure(Exit.connectionLost, error.message);
  }
  if (
    error instanceof LibcError || error instanceof MarkError || error instanceof DescriptorError
  ) {
    return new Failure(Exit.notMarked, `the kernel did not take the mark: ${error.message}`);
  }
  return new Failure(Exit.connectionLost, `the connection was lost: ${reason(error)}`);
}

// ─── Output ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Writes all of `bytes` to standard output. @throws {Failure} it does not take them, exit 23 */
function toStandardOutput(bytes: Uint8Array): void {
  try {
    while (bytes.length > 0) bytes = bytes.subarray(Deno.stdout.writeSync(bytes));
  } catch (error) {
    if (error instanceof Deno.errors.BrokenPipe) throw new Failure(Exit.cannotWrite, "");
    throw new Failure(
      Exit.cannotWrite,
      `cannot write to standard output: ${reason(error as Error)}`,
    );
  }
}

/** Writes to standard error; where that is closed nobody is there to be told. */
function toStandardError(text: string): void {
  let bytes: Uint8Array = new TextEncoder().encode(text);
  try {
    while (bytes.length > 0) bytes = bytes.subarray(Deno.stderr.writeSync(bytes));
  } catch { /* see above */ }
}

/** Whether a run is for its times: then bodies are thrown away. */
function isSeries(options: Options): boolean {
  return options.marks.length * options.count > 1;
}

/** Where a reply goes under these options. */
function sinkFor(options: Options): Sink {
  const isDropped = options.json || isSeries(options);
  return {
    head: (line) => options.include && !isDropped ? toStandardOutput(bytesOf(line)) : undefined,
    begin: ({ status, reason }) => {
      if (options.fail && status >= 400) {
        throw new Failure(
          Exit.httpError,
          printable(`the server answered ${status} ${reason}`.trim()),
        );
      }
    },
    body: (piece) => isDropped ? undefined : toStandardOutput(piece),
  };
}

/** Text for a terminal: control characters and marks that turn the writing direction come out escaped. */
export function printable(text: string): string {
  // Nearly all text is plain, and the classes below take long to compile.
  if (/^[ -~]*$/.test(text)) return text;
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, (c) => {
    const code = c.codePointAt(0)!.toString(16);
    return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u{${code}}`;
  });
}

function quote(text: string): string {
  return `'${printable(text)}'`;
}

function plural(count: number, unit: string): string {
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

// ─── Report ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The report's lines: what is known of an exchange, for a person. */
function report(exchange: Exchange): string {
  const lines: [label: string, text: string][] = [];
  const { local, remote, fd, mark, readBack, packets, arrived, handshake, reply, milliseconds } =
    exchange;
  if (local !== null && remote !== null) {
    const who = exchange.builtIn ? ", the built-in server" : "";
    lines.push([
      "connected",
      `${endText(local)} → ${endText(remote)}${who}; descriptor ${fd ?? "not found"}`,
    ]);
  }
  if (readBack !== null) {
    lines.push([
      "mark",
      `${mark.name ?? "no name"} = DSCP ${mark.dscp} = byte ${
        hex(mark.tos)
      }; the kernel reads back ${hex(readBack)}`,
    ]);
    // A TLS handshake that fails takes the descriptor with it, before anything could be asked.
    if (packets.length > 0 || reply.status > 0) {
      lines.push(["left", leftText(proved(exchange), packets)]);
    }
  }
  if (arrived !== null) lines.push(["arrived", arrivedText(exchange, arrived)]);
  if (reply.status > 0) {
    const time = `${(milliseconds.total ?? 0).toFixed(1)} ms`;
    const tos = reply.tos === null ? "" : `, its packets marked ${hex(reply.tos)}`;
    const location = reply.headers.find(([name]) => name === "location")?.[1];
    const isRedirect = location !== undefined && reply.status >= 300 && reply.status < 400;
    const leads = isRedirect ? `; leads to ${printable(location)}, not followed` : "";
    const status = printable(`${reply.status} ${reply.reason}`.trim());
    lines.push(["reply", `${status}, ${plural(reply.bodyBytes, "byte")} in ${time}${tos}${leads}`]);
  }
  if (readBack !== null) {
    lines.push([
      "handshake",
      handshake
        ? "marked: the socket had the mark before its SYN"
        : "unmarked: SYN and ACK went out before the mark could be set (--mark-syn marks them)",
    ]);
  }
  const bold = Deno.stderr.isTerminal() && !Deno.noColor
    ? (text: string) => `\x1b[1m${text}\x1b[0m`
    : (text: string) => text;
  return lines.map(([label, text]) => `${bold(label.padEnd(11))}${text}\n`).join("");
}

function leftText(proof: boolean | null, packets: readonly SentPacket[]): string {
  if (proof === null) {
    return "not observed: no packet of this connection was looped back, as on devices that cannot or behind NAT on this host";
  }
  const bytes = [...new Set(packets.map(({ tos }) => hex(tos)))].join(" and ");
  return `${plural(packets.length, "packet")} with ${bytes}, read from the IP header: ${
    proof ? "proved" : "NOT the mark that was set"
  }`;
}

function arrivedText(exchange: Exchange, { syn, ack, data }: Arrived): string {
  const told = Object.entries({ SYN: syn, ACK: ack, data }).filter(([, tos]) => tos !== null);
  const bytes = told.map(([packet, tos]) => `${packet} ${hex(tos!)}`).join(", ");
  const proof = evidence(exchange);
  if (proof.length === 0) {
    return `${bytes}, told by the server: only the unmarked handshake (--mark-syn would tell more)`;
  }
  const kept = proof.every(({ tos }) => sameDscp(tos, exchange.mark.tos));
  return `${bytes}, told by the server: ${
    kept ? "the mark survived the path" : "NOT the mark that was sent"
  }`;
}

/** The exchange as one line of JSON, in the form the README describes. */
function json(exchange: Exchange | null, failure: Failure | null, round?: number): string {
  const end = (address: Deno.NetAddr | null) =>
    address && { address: address.hostname, port: address.port };
  const replyOf = ({ tos, ...reply }: Reply) =>
    reply.status > 0 ? { ...reply, ...tos !== null && { tos } } : null;
  const object = {
    ...round !== undefined && { round },
    ...exchange && {
      url: exchange.target.url,
      server: exchange.builtIn ? "built-in" : "remote",
      local: end(exchange.local),
      remote: end(exchange.remote),
      mark: { ...exchange.mark, readBack: exchange.readBack, handshake: exchange.handshake },
      left: { proved: proved(exchange), packets: exchange.packets },
      arrived: exchange.arrived,
      reply: replyOf(exchange.reply),
      milliseconds: exchange.milliseconds,
    },
    ...failure && { error: { code: failure.code, message: failure.message } },
  };
  // JSON.stringify leaves DEL, C1 and direction marks as they are, and a terminal may be reading.
  return JSON.stringify(
    object,
    (_, value) => typeof value === "number" ? Number(value.toFixed(3)) : value,
  )
    .replace(
      /[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
      (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
    ) +
    "\n";
}

// ─── Table ───────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What became of the requests with one mark. */
class Row {
  readonly mark: Mark;
  requests = 0;
  failures = 0;
  /** The bytes that packets left with and arrived with, as far as anybody saw. */
  readonly left = new Set<number>();
  readonly arrived = new Set<number>();
  /** Milliseconds of those requests whose whole reply came. */
  readonly connect: number[] = [];
  readonly total: number[] = [];

  constructor(mark: Mark) {
    this.mark = mark;
  }

  add(exchange: Exchange, failure: Failure | null): void {
    this.requests++;
    if (failure !== null) this.failures++;
    for (const { tos } of exchange.packets) this.left.add(tos);
    for (const { tos } of evidence(exchange)) this.arrived.add(tos);
    if (!exchange.reply.complete) return;
    this.connect.push(exchange.milliseconds.connect!);
    this.total.push(exchange.milliseconds.total!);
  }
}

/** The value below which `share` (0 to 1) of the values lie, by nearest rank; `NaN` of none. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? NaN;
}

const BAR = 24;

/** A bar of `share` (0 to 1) of {@linkcode BAR} characters, to an eighth of one. */
function bar(share: number): string {
  const eighths = Math.round(share * BAR * 8);
  return "█".repeat(eighths >> 3) + (eighths % 8 === 0 ? "" : "▏▎▍▌▋▊▉"[eighths % 8 - 1]);
}

/** The rows as a table, with a bar for each median of the total time. */
function table(rows: readonly Row[]): string {
  const longest = Math.max(
    ...rows.map(({ total }) => quantile(total, 0.5)).filter(Number.isFinite),
  );
  const bytes = (seen: Set<number>, mark: Mark) => {
    if (seen.size === 0) return "-";
    const text = [...seen].map(hex).join(" ");
    return [...seen].every((tos) => sameDscp(tos, mark.tos)) ? text : `${text} !`;
  };
  const times = (values: number[]) =>
    [0.5, 0.95, 1].map((share) => quantile(values, share)).map(shortTime);
  const cells = [
    [
      "mark",
      "byte",
      "left",
      "arrived",
      "requests",
      "failed",
      "connect ms",
      "p95",
      "max",
      "total ms",
      "p95",
      "max",
      "",
    ],
    ...rows.map((row) => {
      const median = quantile(row.total, 0.5);
      return [
        row.mark.name ?? String(row.mark.dscp),
        hex(row.mark.tos),
        bytes(row.left, row.mark),
        bytes(row.arrived, row.mark),
        String(row.requests),
        String(row.failures),
        ...times(row.connect),
        ...times(row.total),
        Number.isFinite(median) ? bar(median / longest) : "",
      ];
    }),
  ];
  const widths = cells[0].map((_, column) => Math.max(...cells.map((row) => row[column].length)));
  const isText = (column: number) => column < 4 || column === widths.length - 1;
  const line = (row: string[]) =>
    row.map((cell, at) => isText(at) ? cell.padEnd(widths[at]) : cell.padStart(widths[at])).join(
      "  ",
    ).trimEnd();
  return cells.map((row) => `${line(row)}\n`).join("");
}

/** Milliseconds in few characters: `0.42`, `17.3`, `1520`. */
function shortTime(milliseconds: number): string {
  if (!Number.isFinite(milliseconds)) return "-";
  return milliseconds.toFixed(milliseconds < 1 ? 2 : milliseconds < 100 ? 1 : 0);
}

/**
 * The two-sided p-value of the Mann–Whitney U test, by its normal approximation with corrections for ties and for
 * continuity: how likely two samples of the same kind would be as far apart in rank as these.
 *
 * @returns 0 to 1; 1 where a sample is empty or all values are equal
 */
export function mannWhitney(a: readonly number[], b: readonly number[]): number {
  const all = [
    ...a.map((value) => ({ value, isA: true })),
    ...b.map((value) => ({ value, isA: false })),
  ];
  all.sort((x, y) => x.value - y.value);
  const n = all.length;
  let rankSum = 0, ties = 0;
  for (let first = 0, next; first < n; first = next) {
    for (next = first + 1; next < n && all[next].value === all[first].value;) next++;
    const rank = (first + next + 1) / 2;
    for (let at = first; at < next; at++) if (all[at].isA) rankSum += rank;
    ties += (next - first) ** 3 - (next - first);
  }
  const u = rankSum - a.length * (a.length + 1) / 2;
  const variance = a.length * b.length / 12 * (n + 1 - ties / (n * (n - 1)));
  const distance = Math.max(0, Math.abs(u - a.length * b.length / 2) - 0.5);
  return variance > 0 ? Math.min(1, 2 * normalTail(distance / Math.sqrt(variance))) : 1;
}

/** The chance of a standard normal value above `z`, `z` from 0 up. */
function normalTail(z: number): number {
  const density = Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
  if (z < 3) {
    let term = z, sum = z;
    for (let k = 3; term > 1e-17; k += 2) sum += term *= z * z / k;
    return 0.5 - density * sum;
  }
  let fraction = z;
  for (let k = 60; k > 0; k--) fraction = z + k / fraction;
  return density / fraction;
}

const SIGNIFICANT = 0.01;
const FEWEST = 8;

/** In one sentence, whether the network cared: each mark against best effort. Empty where there is nothing to compare. */
function verdict(rows: readonly Row[]): string {
  const plain = rows.find(({ mark }) => mark.dscp === 0);
  const others = rows.filter(({ mark }) => mark.dscp !== 0);
  if (plain === undefined || others.length === 0) return "";
  const nameOf = ({ mark }: Row) => mark.name ?? `DSCP ${mark.dscp}`;
  if (rows.some(({ total }) => total.length < FEWEST)) {
    return `Against ${
      nameOf(plain)
    }, in median total time: no difference seen, with fewer than ${FEWEST} replies none can be.\n`;
  }
  const real = others.flatMap((row) => {
    const p = mannWhitney(row.total, plain.total);
    // Of many comparisons some would seem real by chance (Bonferroni).
    if (p >= SIGNIFICANT / others.length) return [];
    const [ours, theirs] = [quantile(row.total, 0.5), quantile(plain.total, 0.5)];
    const [ratio, word] = ours < theirs ? [theirs / ours, "faster"] : [ours / theirs, "slower"];
    return [
      `${nameOf(row)} is ${ratio.toFixed(ratio < 10 ? 2 : 0)} times ${word} (p = ${
        p.toPrecision(2)
      })`,
    ];
  });
  const same = others.length - real.length;
  const rest = same === 0
    ? []
    : [`no difference seen${real.length > 0 ? ` for ${plural(same, "other")}` : ""}`];
  return `Against ${nameOf(plain)}, in median total time: ${[...real, ...rest].join(", ")}.\n`;
}

// ─── Server ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** How much and how long the server bears with a client. */
const SERVER = { head: 16 * 1024, headSeconds: 10, lingerSeconds: 1, connections: 1024 };

/** What the server says of a connection: the built-in one to a beginner, `--serve` to a program. */
interface Page {
  readonly type: string;
  text(peer: Deno.NetAddr, arrived: Arrived): string;
}

const BUILT_IN_PAGE: Page = {
  type: "text/plain; charset=utf-8",
  text: () =>
    `This page comes from dscp-get's built-in server: nobody else was listening on ${DEFAULT_HOST}:${DEFAULT_PORT}.
Give a URL to ask another server; --help tells the rest.
`,
};

const SERVE_PAGE: Page = {
  type: "application/json",
  text: ({ hostname, port }, arrived) =>
    JSON.stringify({ peer: { address: hostname, port }, ...arrived }) + "\n",
};

/** Answers every connection with what arrived on it ({@linkcode keepArrivals} comes first), until the listener is closed and the last one is done. */
async function serve(
  listener: Deno.TcpListener,
  page: Page,
  log: (line: string) => void,
): Promise<void> {
  const open = new Set<Promise<void>>();
  for (;;) {
    if (open.size >= SERVER.connections) await Promise.race(open);
    try {
      const conn = await listener.accept();
      const done = answer(conn, page, log).finally(() => {
        conn.close();
        open.delete(done);
      });
      open.add(done);
    } catch (error) {
      if (error instanceof Deno.errors.BadResource || error instanceof Deno.errors.Interrupted) {
        break;
      }
      // A client that is gone again, or no descriptor left until another client goes.
      await Promise.race([...open, new Promise<void>((resolve) => after(100, resolve))]);
    }
  }
  await Promise.all(open);
}

/** Answers one connection; clients may do as they like, so nothing here is an error. */
async function answer(conn: Deno.TcpConn, page: Page, log: (line: string) => void): Promise<void> {
  try {
    const peer = conn.remoteAddr as Deno.NetAddr;
    const handshake = takeArrived(conn);
    const head = await within(SERVER.headSeconds, readRequestHead(conn));
    if (head === "") return;
    const { method, path, status } = judge(head);
    // The request is here, so on IPv6 the latest packet is one of its own.
    const arrived = { ...handshake, data: takeArrived(conn).data };
    const strongest = arrived.data ?? arrived.syn;
    if (strongest !== null) setTos(conn, markOf(strongest).tos);
    const body = status === 200 ? page.text(peer, arrived) : `${STATUS[status]}\n`;
    await writeAll(conn, replyTo(method, status, body, page.type, arrived));
    const told = Object.entries(arrived).map(([packet, tos]) => `${packet} ${byteText(tos) ?? "-"}`)
      .join(" ");
    log(`${endText(peer)} ${printable(`${method} ${path}`.slice(0, 200))} ${status} ${told}`);
    // Closing with bytes of the client unread would reset the reply away.
    await conn.closeWrite();
    await within(SERVER.lingerSeconds, readToEnd(conn));
  } catch { /* the client is gone */ }
}

/** What `work` gives, or `null` once the time is over. */
async function within<T>(seconds: number, work: Promise<T>): Promise<T | null> {
  const over = Promise.withResolvers<null>();
  const cancel = after(seconds * 1000, () => over.resolve(null));
  try {
    return await Promise.race([work, over.promise]);
  } finally {
    cancel();
  }
}

/** The head of a request, or as much as is allowed of it and a byte more; a character a byte. */
async function readRequestHead(conn: Deno.TcpConn): Promise<string> {
  const buffer = new Uint8Array(SERVER.head + 1);
  let size = 0;
  while (size < buffer.length) {
    const read = await conn.read(buffer.subarray(size));
    if (read === null) break;
    size += read;
    // The blank line may lie across reads.
    if (/\n\r?\n/.test(latin1(buffer.subarray(Math.max(0, size - read - 3), size)))) break;
  }
  return latin1(buffer.subarray(0, size));
}

async function readToEnd(conn: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(SERVER.head);
  while (await conn.read(buffer) !== null);
}

const STATUS: Record<number, string> = {
  200: "OK",
  400: "Bad Request",
  405: "Method Not Allowed",
  408: "Request Timeout",
  431: "Request Header Fields Too Large",
};

/** What to answer to a request's head; `null` is one that did not come in time. */
function judge(head: string | null): { method: string; path: string; status: number } {
  if (head === null) return { method: "-", path: "-", status: 408 };
  const [, method, path] = /^(?:\r?\n)?([!-~]+) ([!-~]+) HTTP\/1\.\d\r?\n/.exec(head) ?? [];
  const known = { method: method ?? "-", path: path ?? "-" };
  if (head.length > SERVER.head) return { ...known, status: 431 };
  if (method === undefined || !/\n\r?\n/.test(head)) return { ...known, status: 400 };
  return { ...known, status: method === "GET" || method === "HEAD" ? 200 : 405 };
}

function replyTo(
  method: string,
  status: number,
  body: string,
  type: string,
  arrived: Arrived,
): Uint8Array {
  const bytes = new TextEncoder().encode(body);
  const headers: [string, string | null][] = [
    ["Server", `dscp-get/${VERSION}`],
    ["Allow", status === 405 ? "GET, HEAD" : null],
    ["Content-Type", status === 200 ? type : "text/plain; charset=utf-8"],
    ["Content-Length", String(bytes.length)],
    ["Arrived-ToS", byteText(arrived.data ?? arrived.syn)],
    ["Arrived-SYN", byteText(arrived.syn)],
    ["Arrived-ACK", byteText(arrived.ack)],
    ["Arrived-Data", byteText(arrived.data)],
    ["Connection", "close"],
  ];
  const lines = headers.flatMap(([name, value]) => value === null ? [] : [`${name}: ${value}\r\n`]);
  const head = new TextEncoder().encode(
    `HTTP/1.1 ${status} ${STATUS[status]}\r\n${lines.join("")}\r\n`,
  );
  const reply = new Uint8Array(head.length + (method === "HEAD" ? 0 : bytes.length));
  reply.set(head);
  if (method !== "HEAD") reply.set(bytes, head.length);
  return reply;
}

function byteText(byte: number | null): string | null {
  return byte === null ? null : hex(byte);
}

/** `--serve`: the far end, until SIGINT or SIGTERM. */
async function serveUntilSignal(options: Options): Promise<void> {
  const { hostname, port } = options.serve!;
  const where = endText({ transport: "tcp", hostname, port });
  let listener: Deno.TcpListener;
  try {
    listener = Deno.listen({ hostname, port });
    keepArrivals(listener);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable || error instanceof CannotRunError) throw error;
    throw new Failure(Exit.cannotConnect, `cannot listen on ${where}: ${reason(error as Error)}`);
  }
  const stop = () => listener.close();
  const signals = ["SIGINT", "SIGTERM"] as const;
  for (const signal of signals) Deno.addSignalListener(signal, stop);
  const log = options.silent ? () => {} : (line: string) => toStandardError(`${line}\n`);
  log(`listening on ${endText(listener.addr)}; Ctrl-C ends it`);
  await serve(listener, SERVE_PAGE, log);
  for (const signal of signals) Deno.removeSignalListener(signal, stop);
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** @throws {Failure} a permission for this address is missing, exit 103 */
function checkPermissions(hostname: string, port: number): void {
  const where = endText({ transport: "tcp", hostname, port });
  if (Deno.permissions.querySync({ name: "net", host: where }).state !== "granted") {
    throw new Failure(
      Exit.cannotRun,
      `no permission to use ${where}`,
      `run with --allow-net or --allow-net=${where}`,
    );
  }
  if (Deno.permissions.querySync({ name: "ffi" }).state !== "granted") {
    throw new Failure(
      Exit.cannotRun,
      "no permission to call libc, which sets the mark",
      "run with --allow-ffi",
    );
  }
}

function listen(port: number): Deno.TcpListener | null {
  try {
    return Deno.listen({ hostname: DEFAULT_HOST, port });
  } catch (error) {
    if (error instanceof Deno.errors.AddrInUse) return null;
    throw error;
  }
}

/** What a run does with its target. */
type Work = (target: Target, builtIn: boolean) => Promise<void>;

/** Works with the target that was asked for. @param hasReply whether any byte of a reply came */
async function run(options: Options, work: Work, hasReply: () => boolean): Promise<void> {
  if (Deno.build.os !== "linux") {
    throw new Failure(Exit.cannotRun, `this needs Linux, and here is ${Deno.build.os}`);
  }
  const target = options.url === null ? DEFAULT_TARGET : parseTarget(options.url);
  const { hostname, port } = options.serve ?? { hostname: target.host, port: target.port };
  // On a terminal Deno would ask for what is missing, and wait for an answer.
  if (Deno.stdin.isTerminal()) checkPermissions(hostname, port);
  try {
    if (options.serve !== null) return await serveUntilSignal(options);
    // A parent may have made standard output non-blocking, and then a write may fail halfway.
    setBlocking(1, true);
    if (options.url === null) await askAnybody(work, hasReply);
    else await work(target, false);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) checkPermissions(hostname, port);
    throw error;
  }
}

/** Asks whoever has the default port, or ourselves where nobody has it. */
async function askAnybody(work: Work, hasReply: () => boolean, tries = 10): Promise<void> {
  const listener = listen(DEFAULT_PORT);
  if (listener !== null) return await askOurselves(listener, work);
  try {
    await work(DEFAULT_TARGET, false);
  } catch (error) {
    if (hasReply() || !hasVanished(error) || tries === 0) throw error;
    // Somebody had the port and is gone: another run's built-in server, which had its answer.
    const free = { name: "net", host: `${DEFAULT_HOST}:0` } as const;
    if (Deno.permissions.querySync(free).state === "granted") await askOurselves(listen(0)!, work);
    else await askAnybody(work, hasReply, tries - 1);
  }
}

function hasVanished(error: unknown): boolean {
  const codes: number[] = [Exit.cannotConnect, Exit.emptyReply, Exit.connectionLost];
  return error instanceof Failure && codes.includes(error.code);
}

/** Works with a server in this process; it goes with us, whoever else may still be asking it. */
async function askOurselves(listener: Deno.TcpListener, work: Work): Promise<void> {
  try {
    keepArrivals(listener);
    const serving = serve(listener, BUILT_IN_PAGE, () => {});
    await Promise.race([work(localTarget(listener.addr.port), true), serving]);
  } finally {
    listener.close();
  }
}

/**
 * Several marks in turn, round after round, and the table of them.
 *
 * @throws {Failure} the first that a request met, or one that makes going on pointless
 */
async function series(target: Target, builtIn: boolean, options: Options): Promise<void> {
  const rows = options.marks.map((mark) => new Row(mark));
  const count = options.count * rows.length;
  const asked = request(target, options.headers), sink = sinkFor(options);
  const buffer = new Uint8Array(READ_SIZE);
  const isQuiet = options.json || options.silent;
  const screen = new Screen(Deno.stderr.isTerminal() && !isQuiet);
  const result = () => screen.replace(isQuiet ? "" : table(rows) + verdict(rows));
  const interrupt = (code: number) => () => {
    result();
    Deno.exit(code);
  };
  const signals = [["SIGINT", interrupt(130)], ["SIGTERM", interrupt(143)]] as const;
  for (const [signal, action] of signals) Deno.addSignalListener(signal, action);
  const failures: Failure[] = [];
  let done = 0;
  try {
    await warmUp(options);
    for (let round = 1; round <= options.count; round++) {
      for (const row of rows) {
        if (done > 0 && options.interval > 0) {
          await new Promise<void>((go) => setTimeout(go, options.interval * 1000));
        }
        const exchange = newExchange(target, builtIn, row.mark, options);
        const failure = await perform(exchange, options, sink, asked, buffer).then(
          () => null,
          failureOf,
        );
        if (failure !== null) {
          // Without a permission or libc no other request would fare better.
          if (failure.code === Exit.cannotRun) throw failure;
          if (failures.push(failure) > 1) failures.length = 2;
        }
        row.add(exchange, failure);
        done++;
        if (options.json) {
          toStandardOutput(new TextEncoder().encode(json(exchange, failure, round)));
        } else {screen.offer(() =>
            `${table(rows)}${done} of ${count} requests, Ctrl-C ends it here\n`
          );}
      }
    }
  } finally {
    for (const [signal, action] of signals) Deno.removeSignalListener(signal, action);
    if (done > 0) result();
  }
  if (failures.length > 0) {
    const { code, message } = failures[0];
    const failed = rows.reduce((sum, row) => sum + row.failures, 0);
    throw new Failure(
      code,
      `${failed} of ${plural(count, "request")} failed; the first: ${message}`,
    );
  }
}

/** Asks ourselves once where that is allowed, or the first mark would pay for the code that all need to be made ready. */
async function warmUp(options: Options): Promise<void> {
  if (Deno.permissions.querySync({ name: "net", host: DEFAULT_HOST }).state !== "granted") return;
  const how = { ...options, family: null, maxTime: 1 };
  const once: Work = (target) =>
    perform(newExchange(target, true, options.marks[0], how), how, NOWHERE);
  try {
    await askOurselves(listen(0)!, once);
  } catch { /* what is wrong will show in the requests that count */ }
}

/** Text on standard error that on a terminal is replaced by newer text. */
class Screen {
  readonly #isLive: boolean;
  #lines = 0;
  #drawn = 0;

  constructor(isLive: boolean) {
    this.#isLive = isLive;
  }

  /** Draws what is offered, ten times a second at most; where it cannot be replaced it is not drawn at all. */
  offer(text: () => string): void {
    if (!this.#isLive || performance.now() - this.#drawn < 100) return;
    const lines = text().split("\n");
    // What has scrolled off the screen cannot be replaced: the last line tells enough.
    const fits = lines.length < Deno.consoleSize().rows;
    this.replace(fits ? lines.join("\n") : `${lines.at(-2)}\n`);
    this.#drawn = performance.now();
  }

  /** Draws over what was drawn last. */
  replace(text: string): void {
    const up = this.#lines > 0 ? `\x1b[${this.#lines}A\x1b[J` : "";
    toStandardError(up + text);
    this.#lines = this.#isLive ? text.split("\n").length - 1 : 0;
  }
}

/**
 * One marked GET, for other programs.
 *
 * ```ts
 * import { get } from "./main.ts";
 * const server = Deno.serve({ port: 0, onListen() {} }, () => new Response("hello"));
 * const { packets } = await get(`http://127.0.0.1:${server.addr.port}/`);
 * console.log(packets[0].tos); // 184
 * await server.shutdown();
 * ```
 *
 * @param sink where the reply goes; without one it is read and thrown away
 * @throws {Failure} whatever went wrong, with its exit code
 * @throws {Deno.errors.NotCapable} a permission is missing
 */
export async function get(
  url: string,
  options: Partial<Options> = {},
  sink: Sink = NOWHERE,
): Promise<Exchange> {
  const all = { ...DEFAULTS, ...options };
  const exchange = newExchange(parseTarget(url), false, all.marks[0], all);
  await perform(exchange, all, sink);
  return exchange;
}

const NOWHERE: Sink = { head() {}, begin() {}, body() {} };

/** Whatever was thrown, as a failure that a person can read. */
function failureOf(error: unknown): Failure {
  if (error instanceof Failure) return error;
  if (error instanceof CannotRunError) {
    const allowed = Deno.permissions.querySync({ name: "ffi" }).state === "granted";
    return new Failure(
      Exit.cannotRun,
      error.message,
      allowed ? undefined : "run with --allow-ffi, without a file name",
    );
  }
  if (error instanceof Deno.errors.NotCapable) {
    return new Failure(
      Exit.cannotRun,
      printable(error.message.split(",")[0]),
      "run with --allow-net --allow-ffi",
    );
  }
  return new Failure(
    Exit.cannotRun,
    printable(error instanceof Error ? error.message : String(error)),
  );
}

/** Runs the script. @returns the exit code */
export async function main(args: readonly string[]): Promise<number> {
  let options = DEFAULTS;
  let exchange: Exchange | null = null;
  let failure: Failure | null = null;
  try {
    options = parseArguments(args);
    if (options.print !== null) {
      toStandardOutput(
        new TextEncoder().encode(options.print === "help" ? USAGE : `dscp-get ${VERSION}\n`),
      );
      return Exit.ok;
    }
    const once: Work = async (target, builtIn) => {
      exchange = newExchange(target, builtIn, options.marks[0], options);
      await perform(exchange, options, sinkFor(options));
    };
    const many: Work = (target, builtIn) => series(target, builtIn, options);
    await run(
      options,
      isSeries(options) ? many : once,
      () => exchange !== null && exchange.reply.status > 0,
    );
  } catch (error) {
    failure = failureOf(error);
  }
  // With standard output gone there is nobody to report to.
  if (failure?.code === Exit.cannotWrite) exchange = null;
  else if (
    (options.json && !isSeries(options)) ||
    (failure?.code === Exit.usage && args.includes("--json"))
  ) {
    try {
      toStandardOutput(new TextEncoder().encode(json(exchange, failure)));
    } catch (error) {
      failure = failureOf(error);
    }
  } else if (!options.silent && exchange !== null && failure?.code !== Exit.cannotRun) {
    toStandardError(report(exchange));
  }
  if (failure !== null && failure.message !== "") {
    toStandardError(
      `dscp-get: ${failure.message}\n${
        failure.hint === undefined ? "" : `hint: ${failure.hint}\n`
      }`,
    );
  }
  return failure?.code ?? Exit.ok;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
