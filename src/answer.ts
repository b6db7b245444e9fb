/**
 * What a server of ours makes of a request: the status, the header with the marks that arrived, the
 * body, and a line of the log.
 *
 * @module
 */

import { type Arrived, arrivedAt } from "../ffi/arrived.ts";
import { pause } from "../ffi/deno.ts";
import { hex } from "../ffi/dscp.ts";
import { DescriptorError, findConnection } from "../ffi/fd.ts";
import { setTosAt } from "../ffi/mark.ts";
import { formatAddress } from "../ffi/sockaddr.ts";
import { type Log, widthOf } from "./output.ts";
import { latin1, printable, wrap } from "./text.ts";
import { unmapIPv4 } from "./verdict.ts";
import { DEFAULT_PORT, VERSION } from "./target.ts";

/** A request as far as the server looks at it. */
interface ParsedRequest {
  /** The status of the answer, with its reason. */
  readonly status: string;
  readonly method?: string;
  readonly path?: string;
  /** Whether more has come, or is to come, than the head. */
  readonly hasMore: boolean;
}

/** What the server saw of a client, and the mark of the reply. */
export interface Seen {
  readonly peer: Deno.NetAddr;
  readonly arrived: Arrived;
  /** The ToS byte that the reply is given; `null` if it cannot be set. */
  readonly replyTos: number | null;
}

/** What arrived if nothing is known. */
export const UNKNOWN: Arrived = { syn: null, ack: null, data: null, sequence: null };

/** The request that a text begins with; `null` if its head has no end yet and more can come. */
export function parseRequest(text: string, isWhole: boolean): ParsedRequest | null {
  const LONGEST_HEAD = 16 * 1024;
  const end = /\n\r?\n/.exec(text), head = text.slice(0, end?.index);
  const line = /^(?:\r?\n)?([!-~]+) ([!-~]+) HTTP\/1\.\d\r?(?:\n|$)/.exec(head);
  const size = end === null ? text.length : end.index + end[0].length;
  const hasBody = text.length > size || /^(content-length|transfer-encoding):/im.test(head);
  const [, method, path] = line ?? [];
  const answer = (status: string, hasMore = true) => ({ status, method, path, hasMore });
  if (head.length > LONGEST_HEAD) return answer("431 Request Header Fields Too Large");
  // A TLS handshake record: the client means https.
  if (end === null && !isWhole && !text.startsWith("\x16")) return null;
  if (end === null || line === null) return answer("400 Bad Request");
  return /^(GET|HEAD)$/.test(method) ? answer("200 OK", hasBody) : answer("405 Method Not Allowed");
}

/** The byte that says most about the request. */
export function strongest({ data, syn, ack }: Omit<Arrived, "sequence">): number | null {
  return data ?? syn ?? ack;
}

/** Encodes the answer; that of the built-in server is a page for people. */
export function encodeReply(
  { status, method }: ParsedRequest,
  { peer, arrived, replyTos }: Seen,
  isBuiltIn: boolean,
  buffer = newBuffer(),
): Uint8Array {
  const { syn, ack, data, sequence } = arrived, isOk = status === "200 OK";
  const isJson = isOk && !isBuiltIn, address = peer.hostname;
  const json = `{"peer":{"address":"${address}","port":${peer.port}},` +
    `"syn":${syn},"ack":${ack},"data":${data},"sequence":${sequence}}\n`;
  const body = isJson ? json : isOk ? builtInPage() : `${status}\n`;
  const field = (name: string, tos: number | null) =>
    tos === null ? "" : `${name}: ${hex(tos)}\r\n`;
  const head = `HTTP/1.1 ${status}\r\n` +
    `Server: dscp-get/${VERSION}${isBuiltIn ? " (built-in)" : ""}\r\n` +
    (status.startsWith("405") ? "Allow: GET, HEAD\r\n" : "") +
    `Content-Type: ${isJson ? "application/json" : "text/plain; charset=utf-8"}\r\n` +
    `Content-Length: ${body.length}\r\n` +
    field("Arrived-ToS", strongest(arrived)) +
    field("Arrived-SYN", syn) + field("Arrived-ACK", ack) + field("Arrived-Data", data) +
    `Arrived-Peer: ${formatAddress(peer)}\r\n` +
    (sequence === null ? "" : `Arrived-Sequence: ${sequence}\r\n`) +
    field("Reply-ToS", replyTos) +
    "Connection: close\r\n\r\n";
  const { written } = encoder.encodeInto(method === "HEAD" ? head : head + body, buffer);
  return buffer.subarray(0, written);
}

const encoder = new TextEncoder();
/** Memory for a piece of a request, and then for the whole reply, which has at most 700 bytes. */
const newBuffer = () => new Uint8Array(1024);

function builtInPage(): string {
  const text = "This page comes from dscp-get's built-in server: nobody else answered on port " +
    `${DEFAULT_PORT} here. Give a URL to ask another server; --help lists the options.`;
  return wrap(text, widthOf(Deno.stdout));
}

/** The first lines of the log: where the server listens, and for whom. */
export function listeningLines(addr: Deno.NetAddr): string[] {
  const isLoopback = /^(127\.|::1$)/.test(addr.hostname);
  return [
    `listening on ${formatAddress(addr)}; Ctrl-C ends it`,
    ...isLoopback ? [`only this host can reach it; for all: --serve '[::]:${addr.port}'`] : [],
  ];
}

/** A line of the log, without its end, safe to print. */
export function logLine(
  { method = "-", path = "-", status }: ParsedRequest,
  { peer, arrived }: Seen,
): string {
  const { syn, ack, data } = arrived;
  const line = printable(`${method} ${path}`.slice(0, 200));
  const [s, a, d] = [syn, ack, data].map((tos) => tos === null ? "-" : hex(tos));
  return `${formatAddress(peer)} ${line} ${status.slice(0, 3)} syn ${s} ack ${a} data ${d}`;
}

// ─── The loop ───────────────────────────────────────────────────────────────────────────────────

const MOST_CLIENTS = 1024;
/** Milliseconds for the head of a request; the kernel holds who is silent back for 3 s before. */
const HEAD_TIME = 10_000;
/** Milliseconds to close after the reply, or once the server is stopped. */
export const CLOSE_TIME = 1000;

/** A client that sends its head, or that has its reply and has not closed yet. */
class Client {
  isAnswered = false;
  /** On the clock of `performance.now()`. */
  deadline = performance.now() + HEAD_TIME;
  constructor(readonly conn: Deno.TcpConn) {}
}

/** How a server answers. */
interface Service {
  readonly isBuiltIn?: boolean;
  /** The ToS byte of all replies; `null` for that of the request. */
  readonly replyTos?: number | null;
  readonly log?: Log | null;
}

/** Answers what connects to a listener. */
export class ReportingServer {
  /** The oldest first. */
  readonly #clients = new Set<Client>();
  /** Called when none is left. */
  #onIdle = () => {};

  constructor(readonly listener: Deno.TcpListener, readonly service: Service) {}

  /** Accepts clients until the listener is closed, and answers the last of them. */
  async serve(): Promise<void> {
    for (;;) {
      try {
        const client = new Client(await this.listener.accept());
        if (this.#clients.size >= MOST_CLIENTS) this.#drop(this.#clients.values().next().value!);
        this.#clients.add(client);
        this.#answer(client);
      } catch (error) {
        if (error instanceof Deno.errors.BadResource) break;
        // NotConnected is a client that was reset; all others, like EMFILE, take time to pass.
        if (!(error instanceof Deno.errors.NotConnected)) await pause(100);
      }
    }
    if (this.#clients.size > 0) await new Promise<void>((resolve) => this.#onIdle = resolve);
  }

  /** Reads the head of a request, and replies. */
  async #answer(client: Client): Promise<void> {
    const { conn } = client, buffer = newBuffer();
    try {
      for (let text = ""; !client.isAnswered;) {
        const size = await conn.read(buffer);
        if (client.isAnswered) return; // by the sweep, which drops it then
        if (size === null && text === "") break;
        text += latin1(buffer.subarray(0, size ?? 0));
        const request = parseRequest(text, size === null);
        if (request !== null) await this.#reply(client, request, buffer);
      }
    } catch { /* the client has gone */ }
    this.#drop(client);
  }

  async #reply(client: Client, request: ParsedRequest, buffer = newBuffer()): Promise<void> {
    const { conn } = client, { isBuiltIn = false, replyTos = null, log } = this.service;
    client.isAnswered = true;
    client.deadline = performance.now() + CLOSE_TIME;
    const seen = { peer: unmapIPv4(conn.remoteAddr), ...markReply(conn, replyTos) };
    let reply = encodeReply(request, seen, isBuiltIn, buffer);
    while (reply.length > 0) reply = reply.subarray(await conn.write(reply));
    log?.add(logLine(request, seen));
    if (!request.hasMore) return;
    // Closing with unread data sends an RST, which can discard the reply.
    await conn.closeWrite();
    while (await conn.read(buffer) !== null);
  }

  #drop(client: Client): void {
    if (this.#clients.delete(client)) client.conn.close();
    if (this.#clients.size === 0) this.#onIdle();
  }

  /** Ends what takes too long; to be called a few times a second. */
  sweep(): void {
    const late = { status: "408 Request Timeout", hasMore: false };
    for (const client of this.#clients) {
      if (performance.now() < client.deadline) continue;
      if (client.isAnswered) this.#drop(client);
      else this.#reply(client, late).catch(() => {}).finally(() => this.#drop(client));
    }
  }

  /** Accepts no more clients, and gives the others less time. */
  stop(): void {
    this.listener.close();
    const latest = performance.now() + CLOSE_TIME;
    for (const client of this.#clients) client.deadline = Math.min(client.deadline, latest);
  }
}

/** Reads what arrived, and gives the reply its mark: a fixed one, or that of the request. */
function markReply(conn: Deno.TcpConn, fixed: number | null): Pick<Seen, "arrived" | "replyTos"> {
  try {
    const socket = findConnection(conn), arrived = arrivedAt(socket);
    // A mark that the socket has already is set too: all requests take the same time.
    const tos = fixed ?? (strongest(arrived) ?? 0) & 0xfc;
    return { arrived, replyTos: setTosAt(socket.fd, socket.family, tos) };
  } catch (error) {
    // Another connection has the same ends, on another interface.
    if (error instanceof DescriptorError) return { arrived: UNKNOWN, replyTos: null };
    throw error;
  }
}
