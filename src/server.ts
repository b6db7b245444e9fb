/**
 * The far end: a server that reports the marks that arrived, and the one of a run without a URL.
 *
 * @module
 */

import { makeBlocking } from "../ffi/pipe.ts";
import { pause } from "../ffi/wait.ts";
import {
  type Arrived,
  DescriptorError,
  formatAddress,
  hex,
  keepArrivals,
  markOf,
  readArrived,
  setTos,
} from "../ffi/mod.ts";
import type { Exchange, Reply } from "./exchange.ts";
import { Exit, failureOf } from "./failure.ts";
import { onInterrupt, widthOf } from "./output.ts";
import { DEFAULT_PORT, type Header, localTarget, type Target } from "./target.ts";
import { latin1, plural, printable, wrap } from "./text.ts";
import { isOurs, unmapIPv4 } from "./verdict.ts";
import { VERSION } from "./version.ts";

/** How a server answers and what it says of a connection. */
interface Service {
  readonly type: string;
  /** The body for a client, in ASCII. */
  page(peer: Deno.NetAddr, arrived: Arrived): string;
  /** Gets a line for each request. */
  log?(line: string): void;
}

const BUILT_IN: Service = {
  type: "text/plain; charset=utf-8",
  page: () =>
    wrap(
      `This page comes from dscp-get's built-in server: nobody else was listening on \
port ${DEFAULT_PORT} here. Give a URL to ask another server; --help lists the options.`,
      widthOf(Deno.stdout),
    ),
};

/** A connection of the server: waiting for its head, or lingering after the answer. */
interface Client {
  readonly conn: Deno.TcpConn;
  /** When it began to wait, on the clock of `performance.now()`. */
  since: number;
  /** Whether it has sent some of its head. */
  hasBegun: boolean;
  isAnswered: boolean;
  /** Resolves when it has left. */
  gone: Promise<void>;
}

/** What the far end allows its clients. */
const LIMITS = { connections: 1024, head: 16 * 1024, headSeconds: 10, lingerSeconds: 1 };

/** Once it is stopped, how long clients have to send their heads: those who have begun, and others. */
const GRACE_SECONDS = { begun: 2, idle: 0.5 };

/** Answers what connects to a listener, until it is stopped. */
class ReportingServer {
  /** Oldest first. */
  readonly #clients = new Set<Client>();
  #isStopped = false;

  constructor(
    private readonly listener: Deno.TcpListener,
    private readonly service: Service,
  ) {}

  /** Accepts clients until the listener is closed, and answers the last of them. */
  async serve(): Promise<void> {
    for (;;) {
      let conn: Deno.TcpConn;
      try {
        conn = await this.listener.accept();
      } catch (error) {
        const { BadResource, Interrupted } = Deno.errors;
        if (error instanceof BadResource || error instanceof Interrupted) break;
        // Another client must leave before there is room. All other errors are about a client that
        // had gone before it was accepted.
        const { code } = error as { code?: string };
        if (["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"].includes(code ?? "")) await pause(100);
        continue;
      }
      if (this.#clients.size >= LIMITS.connections) this.#makeRoom();
      const since = performance.now(), gone = Promise.resolve();
      const client: Client = { conn, since, hasBegun: false, isAnswered: false, gone };
      this.#clients.add(client);
      client.gone = this.#answer(client);
    }
    await this.#allGone();
  }

  async #allGone(): Promise<void> {
    await Promise.all(Array.from(this.#clients, ({ gone }) => gone));
  }

  /** Answers one connection; a client's errors are ignored. */
  async #answer(client: Client): Promise<void> {
    const { conn } = client, service = this.service;
    try {
      const peer = unmapIPv4(conn.remoteAddr);
      const handshake = arrivedOn(conn);
      const request = await readRequest(client);
      if (request === null || client.isAnswered) return;
      client.isAnswered = true;
      client.since = performance.now();
      // The request is here, so on IPv6 the latest packet is one of its own.
      const arrived = { ...handshake, data: arrivedOn(conn).data };
      const strongest = arrived.data ?? arrived.syn ?? arrived.ack;
      if (strongest) setTos(conn, markOf(strongest).tos); // 0 is what it has
      let reply: Uint8Array = replyOf(request, service, { peer, arrived });
      while (reply.length > 0) reply = reply.subarray(await conn.write(reply));
      service.log?.(logLine(peer, request, arrived));
      if (!request.hasMore) return;
      // Closing with unread data sends an RST, which can discard the reply.
      await conn.closeWrite();
      const rest = new Uint8Array(LIMITS.head);
      while (await conn.read(rest) !== null);
    } catch {
      /* the client is gone */
    } finally {
      this.#drop(client);
    }
  }

  #drop(client: Client): void {
    // What was read just now must not be answered: the descriptor may be another's soon.
    client.isAnswered = true;
    this.#clients.delete(client);
    try {
      client.conn.close();
    } catch { /* it is closed already */ }
  }

  /** Drops the client that has waited longest without sending a whole head, or else the oldest. */
  #makeRoom(): void {
    let oldest: Client | undefined;
    for (const client of this.#clients) {
      oldest ??= client;
      if (!client.isAnswered) return this.#drop(client);
    }
    this.#drop(oldest!);
  }

  /** Ends what takes too long; to be called a few times a second. */
  sweep(): void {
    const now = performance.now();
    for (const client of this.#clients) {
      const seconds = (now - client.since) / 1000;
      if (client.isAnswered && seconds > LIMITS.lingerSeconds) this.#drop(client);
      const allowed = !this.#isStopped
        ? LIMITS.headSeconds
        : client.hasBegun
        ? GRACE_SECONDS.begun
        : GRACE_SECONDS.idle;
      if (!client.isAnswered && seconds > allowed) {
        client.since = now;
        client.isAnswered = true;
        const reply = replyOf({ status: 408 }, this.service, null);
        client.conn.write(reply).catch(() => {}).then(() => this.#drop(client));
      }
    }
  }

  /** Accepts nobody else; those who have not sent their head have {@linkcode GRACE_SECONDS}. */
  stop(): void {
    this.listener.close();
    this.#isStopped = true;
    const now = performance.now();
    for (const client of this.#clients) if (!client.isAnswered) client.since = now;
  }

  /** Stops and does not wait for anybody who is slow. */
  async close(): Promise<void> {
    this.listener.close();
    if (this.#clients.size > 0) await Promise.race([this.#allGone(), pause(100)]);
    for (const client of this.#clients) this.#drop(client);
  }
}

function logLine(peer: Deno.NetAddr, request: ParsedRequest, arrived: Arrived): string {
  const { method = "-", path = "-", status } = request;
  const marks = Object.entries(arrived).map(([packet, tos]) =>
    `${packet} ${tos === null ? "-" : hex(tos)}`
  );
  const line = printable(`${method} ${path}`.slice(0, 200));
  return `${formatAddress(peer)} ${line} ${status} ${marks.join(" ")}`;
}

const UNKNOWN: Arrived = { syn: null, ack: null, data: null };

/** What the kernel reports of a connection; nothing if another one has the same ends. */
function arrivedOn(conn: Deno.TcpConn): Arrived {
  try {
    return readArrived(conn);
  } catch (error) {
    if (error instanceof DescriptorError) return UNKNOWN;
    throw error;
  }
}

/** A request as far as the far end looks at it. */
interface ParsedRequest {
  readonly status: number;
  readonly method?: string;
  readonly path?: string;
  /** More is to come, or has come, than was read. */
  readonly hasMore?: boolean;
}

const STATUS: Record<number, string> = {
  200: "OK",
  400: "Bad Request",
  405: "Method Not Allowed",
  408: "Request Timeout",
  431: "Request Header Fields Too Large",
};

/** Reads the head of a request; `null` if the client sends nothing. */
async function readRequest(client: Client): Promise<ParsedRequest | null> {
  const buffer = new Uint8Array(1024);
  let text = "", end = 0;
  while (end === 0 && text.length <= LIMITS.head) {
    const size = await client.conn.read(buffer);
    if (size === null) break;
    client.hasBegun = true;
    // The blank line may lie across reads.
    const blank = /\n\r?\n/g;
    blank.lastIndex = Math.max(0, text.length - 2);
    text += latin1(buffer.subarray(0, size));
    if (blank.test(text)) end = blank.lastIndex;
    // A TLS handshake record, by somebody who means https
    if (text.startsWith("\x16")) break;
  }
  if (text === "") return null;
  const head = text.slice(0, end || text.length);
  const [, method, path] = /^(?:\r?\n)?([!-~]+) ([!-~]+) HTTP\/1\.\d\r?\n/.exec(head) ?? [];
  if (head.length > LIMITS.head) return { status: 431, method, path, hasMore: true };
  if (method === undefined || end === 0) return { status: 400, method, path, hasMore: true };
  if (method !== "GET" && method !== "HEAD") return { status: 405, method, path, hasMore: true };
  const hasMore = text.length > end || /^(content-length|transfer-encoding):/mi.test(head);
  return { status: 200, method, path, hasMore };
}

const encoder = new TextEncoder();

function replyOf(
  { status, method }: ParsedRequest,
  service: Service,
  seen: { peer: Deno.NetAddr; arrived: Arrived } | null,
): Uint8Array<ArrayBuffer> {
  const isOk = status === 200 && seen !== null;
  const body = isOk ? service.page(seen.peer, seen.arrived) : `${STATUS[status]}\n`;
  const { syn = null, ack = null, data = null } = seen?.arrived ?? {};
  const byteText = (tos: number | null) => tos === null ? null : hex(tos);
  const headers: Header[] = [
    ["Server", `dscp-get/${VERSION}`],
    ["Allow", status === 405 ? "GET, HEAD" : null],
    ["Content-Type", isOk ? service.type : "text/plain; charset=utf-8"],
    ["Content-Length", String(body.length)],
    ["Arrived-ToS", byteText(data ?? syn ?? ack)],
    ["Arrived-SYN", byteText(syn)],
    ["Arrived-ACK", byteText(ack)],
    ["Arrived-Data", byteText(data)],
    ["Arrived-Peer", seen === null ? null : formatAddress(seen.peer)],
    ["Connection", "close"],
  ];
  let text = `HTTP/1.1 ${status} ${STATUS[status]}\r\n`;
  for (const [name, value] of headers) if (value !== null) text += `${name}: ${value}\r\n`;
  return encoder.encode(`${text}\r\n${method === "HEAD" ? "" : body}`);
}

/** `--serve`: the far end, until SIGINT or SIGTERM. */
export async function serveUntilSignal(
  where: { hostname: string; port: number },
  isSilent: boolean,
): Promise<void> {
  let listener: Deno.TcpListener;
  try {
    listener = Deno.listen(where);
    keepArrivals(listener);
  } catch (error) {
    throw failureOf(error, "listening", where);
  }
  const log = isSilent ? null : new Log();
  const server = new ReportingServer(listener, {
    type: "application/json",
    page: ({ hostname, port }, arrived) =>
      JSON.stringify({ peer: { address: hostname, port }, ...arrived }) + "\n",
    log: log === null ? undefined : (line) => log.add(line),
  });
  const sweeping = setInterval(() => server.sweep(), 200);
  using _signals = onInterrupt(() => server.stop());
  log?.add(`listening on ${formatAddress(listener.addr)}; Ctrl-C ends it`);
  await server.serve();
  clearInterval(sweeping);
  // The second signal ends it also while the log waits for its reader.
  await Promise.race([log?.written, pause(200)]);
}

/** Logs without waiting for a slow reader: lines that do not fit are counted instead. */
class Log {
  /** Resolves when all lines so far are written, or nobody is there to read them. */
  written: Promise<void> = Promise.resolve();
  #waiting = "";
  #dropped = 0;
  #isWriting = false;

  /** Adds a line, without its end. */
  add(line: string): void {
    const MOST_WAITING = 64 * 1024;
    if (this.#waiting.length > MOST_WAITING || this.#dropped > 0) this.#dropped++;
    else this.#waiting += `${line}\n`;
    if (!this.#isWriting) this.written = this.#write();
  }

  async #write(): Promise<void> {
    this.#isWriting = true;
    try {
      // A parent may have made it non-blocking, where Deno does not say how much it has written.
      makeBlocking(2);
      while (this.#waiting !== "" || this.#dropped > 0) {
        if (this.#waiting === "") {
          this.#waiting = `… ${plural(this.#dropped, "line")} dropped\n`;
          this.#dropped = 0;
        }
        let bytes: Uint8Array = new TextEncoder().encode(this.#waiting);
        this.#waiting = "";
        while (bytes.length > 0) bytes = bytes.subarray(await Deno.stderr.write(bytes));
      }
    } catch { /* standard error is closed */ }
    this.#isWriting = false;
  }
}

/** Where requests go: an existing server, or one of our own, which is closed with it. */
export interface Server extends AsyncDisposable {
  readonly target: Target;
  readonly isBuiltIn: boolean;
  /**
   * Looks at the first exchange of a run without a URL.
   *
   * @param isSeries whether more requests follow
   * @throws {ServerGone} the default port's server has gone, or ends before a series does
   */
  checkPresent(exchange: Exchange, isSeries?: boolean): void;
}

/** The server that had the default port has gone: the run is for a server of our own. */
export class ServerGone {}

/** A server that a URL names. */
export function remoteServer(target: Target): Server {
  return { target, isBuiltIn: false, checkPresent() {}, async [Symbol.asyncDispose]() {} };
}

/** The server of a run without a URL: our own if the port is free, else the one that has it. */
export function defaultServer(target: Target): Server {
  return builtInServer(target.host, target.port) ?? {
    ...remoteServer(target),
    checkPresent({ reply, failure }, isSeries = false) {
      const codes: number[] = [Exit.cannotConnect, Exit.emptyReply, Exit.connectionLost];
      const isGone = reply === null && codes.includes(failure?.code ?? 0);
      if (isGone || (isSeries && isBuiltIn(reply))) throw new ServerGone();
    },
  };
}

/** A server in this process; `null` if another one has the port. */
export function builtInServer(hostname: string, port: number): Server | null {
  let listener: Deno.TcpListener;
  try {
    listener = Deno.listen({ hostname, port });
  } catch (error) {
    if (error instanceof Deno.errors.AddrInUse) return null;
    throw failureOf(error, "listening", { hostname, port });
  }
  keepArrivals(listener);
  const server = new ReportingServer(listener, BUILT_IN);
  const serving = server.serve();
  return {
    ...remoteServer(localTarget(listener.addr.hostname, listener.addr.port)),
    isBuiltIn: true,
    async [Symbol.asyncDispose]() {
      await server.close();
      await serving;
    },
  };
}

/** Whether a reply comes from the built-in server of another run, which ends with that run. */
function isBuiltIn(reply: Reply | null): boolean {
  return isOurs(reply) && reply!.headers.some(([, value]) => value === BUILT_IN.type);
}
