/**
 * `--serve`, which answers a GET with the marks that arrived, and the server of a run without a URL.
 *
 * @module
 */

import { type Arrived, keepArrivals, readArrived } from "../ffi/arrived.ts";
import { DescriptorError, formatAddress, hex, markOf, setTos } from "../ffi/mod.ts";
import { pause } from "../ffi/wait.ts";
import type { Exchange } from "./exchange.ts";
import { Exit, failureOf, isGranted } from "./failure.ts";
import { Log, onInterrupt, widthOf } from "./output.ts";
import { DEFAULT_PORT, type Header, localTarget, type Target } from "./target.ts";
import { latin1, printable, wrap } from "./text.ts";
import { unmapIPv4 } from "./verdict.ts";
import { VERSION } from "./version.ts";

const MOST_CLIENTS = 1024, LONGEST_HEAD = 16 * 1024;
/** Milliseconds for the head of a request, the same once the server is stopped, to close. */
const HEAD_TIME = 10_000, GRACE_TIME = 1000, CLOSE_TIME = 1000;

const NAME = `dscp-get/${VERSION}`, BUILT_IN_NAME = `${NAME} (built-in)`;

/** A client that sends its head, or that has its reply and has not closed yet. */
class Client {
  isAnswered = false;
  /** On the clock of `performance.now()`. */
  deadline = performance.now() + HEAD_TIME;
  readonly timeout = Promise.withResolvers<ParsedRequest>();
  constructor(readonly conn: Deno.TcpConn) {}
}

/** Answers what connects to a listener. */
class ReportingServer {
  /** Oldest first, with the end of each. */
  readonly #clients = new Map<Client, Promise<void>>();

  constructor(readonly listener: Deno.TcpListener, readonly name: string, readonly log?: Log) {}

  /** Accepts clients until the listener is closed, and answers the last of them. */
  async serve(): Promise<void> {
    for (;;) {
      try {
        const client = new Client(await this.listener.accept());
        if (this.#clients.size >= MOST_CLIENTS) this.#makeRoom();
        this.#clients.set(client, this.#answer(client).finally(() => this.#drop(client)));
      } catch (error) {
        const { BadResource, Interrupted, NotConnected } = Deno.errors;
        if (error instanceof BadResource || error instanceof Interrupted) break;
        // NotConnected is a client that was reset; all others, like EMFILE, take time to pass.
        if (!(error instanceof NotConnected)) await pause(100);
      }
    }
    await Promise.all(this.#clients.values());
  }

  async #answer(client: Client): Promise<void> {
    const { conn, timeout } = client;
    try {
      const reading = readRequest(conn);
      const request = await Promise.race([reading, timeout.promise]);
      if (request === null) return;
      const peer = unmapIPv4(conn.remoteAddr), arrived = mirrorMark(conn);
      let reply = encodeReply(request, this.name, peer, arrived);
      while (reply.length > 0) reply = reply.subarray(await conn.write(reply));
      client.isAnswered = true;
      client.deadline = performance.now() + CLOSE_TIME;
      this.log?.add(logLine(request, peer, arrived));
      // Closing with unread data sends an RST, which can discard the reply.
      await conn.closeWrite();
      await reading; // only after a timeout it goes on
      while (await conn.read(new Uint8Array(LONGEST_HEAD)) !== null);
    } catch { /* the client has gone */ }
  }

  #drop(client: Client): void {
    if (this.#clients.delete(client)) client.conn.close();
  }

  /** Drops the client that has waited longest without sending a whole head, or else the oldest. */
  #makeRoom(): void {
    const clients = [...this.#clients.keys()];
    this.#drop(clients.find(({ isAnswered }) => !isAnswered) ?? clients[0]);
  }

  /** Ends what takes too long; to be called a few times a second. */
  sweep(): void {
    for (const client of this.#clients.keys()) {
      if (performance.now() < client.deadline) continue;
      if (client.isAnswered) this.#drop(client);
      else client.timeout.resolve({ status: "408 Request Timeout" });
    }
  }

  /** Accepts no more clients, and gives the others less time. */
  stop(): void {
    this.listener.close();
    const latest = performance.now() + GRACE_TIME;
    for (const client of this.#clients.keys()) client.deadline = Math.min(client.deadline, latest);
  }
}

/** Marks what is sent from now on as the client's packets were marked. */
function mirrorMark(conn: Deno.TcpConn): Arrived {
  try {
    const arrived = readArrived(conn);
    setTos(conn, markOf(strongest(arrived) ?? 0).tos); // 0 too: all marks take the same time
    return arrived;
  } catch (error) {
    // Another connection has the same ends, on another interface.
    if (error instanceof DescriptorError) return { syn: null, ack: null, data: null };
    throw error;
  }
}

/** The byte that says most about the request. */
function strongest({ data, syn, ack }: Arrived): number | null {
  return data ?? syn ?? ack;
}

/** A request, as the status line's end that answers it, and what the server looks at. */
interface ParsedRequest {
  readonly status: string;
  readonly method?: string;
  readonly path?: string;
}

/** Reads the head of a request; `null` if the client sends nothing. */
async function readRequest(conn: Deno.TcpConn): Promise<ParsedRequest | null> {
  const buffer = new Uint8Array(4096);
  for (let text = "";;) {
    const size = await conn.read(buffer);
    if (size === null && text === "") return null;
    text += latin1(buffer.subarray(0, size ?? 0));
    const request = parseRequest(text, size === null);
    if (request !== null) return request;
  }
}

/** The request that a text begins with; `null` if its head has no end yet and more can come. */
export function parseRequest(text: string, isWhole: boolean): ParsedRequest | null {
  const end = /\n\r?\n/.exec(text), head = text.slice(0, end?.index);
  const [, method, path] = /^(?:\r?\n)?([!-~]+) ([!-~]+) HTTP\/1\.\d(?:\r?\n|\r?$)/.exec(head) ??
    [];
  const answer = (status: string) => ({ status, method, path });
  if (head.length > LONGEST_HEAD) return answer("431 Request Header Fields Too Large");
  // A TLS handshake record: the client means https.
  if (end === null && !isWhole && !text.startsWith("\x16")) return null;
  if (end === null || method === undefined) return answer("400 Bad Request");
  return answer(method === "GET" || method === "HEAD" ? "200 OK" : "405 Method Not Allowed");
}

function encodeReply(
  { status, method }: ParsedRequest,
  name: string,
  peer: Deno.NetAddr,
  arrived: Arrived,
): Uint8Array {
  const isPage = status === "200 OK" && name === BUILT_IN_NAME;
  const isJson = status === "200 OK" && !isPage;
  const json = { peer: { address: peer.hostname, port: peer.port }, ...arrived };
  const page = `This page comes from dscp-get's built-in server: nobody else answered on port \
${DEFAULT_PORT} here. Give a URL to ask another server; --help lists the options.`;
  const body = isJson
    ? `${JSON.stringify(json)}\n`
    : isPage
    ? wrap(page, widthOf(Deno.stdout))
    : `${status}\n`;
  const byteText = (tos: number | null) => tos === null ? null : hex(tos);
  const headers: Header[] = [
    ["Server", name],
    ["Allow", status.startsWith("405") ? "GET, HEAD" : null],
    ["Content-Type", isJson ? "application/json" : "text/plain; charset=utf-8"],
    ["Content-Length", String(body.length)],
    ["Arrived-ToS", byteText(strongest(arrived))],
    ["Arrived-SYN", byteText(arrived.syn)],
    ["Arrived-ACK", byteText(arrived.ack)],
    ["Arrived-Data", byteText(arrived.data)],
    ["Arrived-Peer", formatAddress(peer)],
    ["Connection", "close"],
  ];
  const lines = headers.map(([name, value]) => value === null ? "" : `${name}: ${value}\r\n`);
  const head = `HTTP/1.1 ${status}\r\n${lines.join("")}\r\n`;
  return new TextEncoder().encode(method === "HEAD" ? head : head + body);
}

function logLine(
  { method = "-", path = "-", status }: ParsedRequest,
  peer: Deno.NetAddr,
  { syn, ack, data }: Arrived,
): string {
  const [line, code] = [printable(`${method} ${path}`.slice(0, 200)), status.slice(0, 3)];
  const [s, a, d] = [syn, ack, data].map((tos) => tos === null ? "-" : hex(tos));
  return `${formatAddress(peer)} ${line} ${code} syn ${s} ack ${a} data ${d}`;
}

/** @returns `null` if another socket has the port @throws {Failure} cannot listen there */
function listenIfFree(where: { hostname: string; port: number }): Deno.TcpListener | null {
  try {
    const listener = Deno.listen(where);
    keepArrivals(listener);
    return listener;
  } catch (error) {
    if (error instanceof Deno.errors.AddrInUse) return null;
    throw failureOf(error, "listening", where);
  }
}

/** `--serve`, until SIGINT or SIGTERM. @throws {Failure} it cannot listen there */
export async function serveUntilSignal(
  where: { hostname: string; port: number },
  isSilent: boolean,
): Promise<void> {
  const log = isSilent ? undefined : new Log();
  const listener = listenIfFree(where);
  if (listener === null) throw failureOf(new Error("address already in use"), "listening", where);
  const server = new ReportingServer(listener, NAME, log);
  using _signals = onInterrupt(() => server.stop());
  const sweeping = setInterval(() => server.sweep(), 200);
  log?.add(`listening on ${formatAddress(listener.addr)}; Ctrl-C ends it`);
  await server.serve();
  clearInterval(sweeping);
  // Its reader may have stopped.
  await Promise.race([log?.written, pause(GRACE_TIME)]);
}

/** Where requests go: an existing server, or one of our own, which is closed with it. */
export interface Server extends AsyncDisposable {
  readonly target: Target;
  readonly isBuiltIn: boolean;
  /**
   * Looks at the first exchange of a run without a URL.
   *
   * @throws {ServerGone} the server has gone, or will go before a series ends
   */
  checkPresent(exchange: Exchange, isSeries?: boolean): void;
}

/** The server on the default port has gone: the run begins again, with another server. */
export class ServerGone {
  constructor(readonly replacement: Server) {}
}

/** A server that a URL names. */
export function remoteServer(target: Target): Server {
  return { target, isBuiltIn: false, checkPresent() {}, async [Symbol.asyncDispose]() {} };
}

/** The server of a run without a URL: our own if the port is free, else the one that has it. */
export function defaultServer(target: Target, asksLeft = 10): Server {
  const { host, port, url } = target;
  const checkPresent = ({ reply, failure }: Exchange, isSeries = false) => {
    const isBrief = isSeries && reply?.headers.some(([, value]) => value === BUILT_IN_NAME);
    const codes: number[] = [Exit.cannotConnect, Exit.connectionLost, Exit.emptyReply];
    if (!isBrief && (reply !== null || !codes.includes(failure?.code ?? 0))) return;
    const own = builtInServer(host, port);
    if (own !== null) throw new ServerGone(own);
    // A server that ended the connection in good order has not gone if the port still is taken.
    if (failure?.code === Exit.emptyReply) return;
    const canUseAnyPort = isGranted({ name: "net", host: new URL(url).hostname });
    if (canUseAnyPort) throw new ServerGone(builtInServer(host, 0)!);
    if (!isBrief && asksLeft > 0) throw new ServerGone(defaultServer(target, asksLeft - 1));
  };
  return builtInServer(host, port) ?? { ...remoteServer(target), checkPresent };
}

/** A server in this process; `null` if another one has the port. @throws {Failure} cannot listen */
export function builtInServer(hostname: string, port: number): Server | null {
  const listener = listenIfFree({ hostname, port });
  if (listener === null) return null;
  const serving = new ReportingServer(listener, BUILT_IN_NAME).serve();
  return {
    ...remoteServer(localTarget(listener.addr.hostname, listener.addr.port)),
    isBuiltIn: true,
    async [Symbol.asyncDispose]() {
      listener.close();
      // Others may not have sent their request yet.
      await Promise.race([serving, pause(100)]);
    },
  };
}
