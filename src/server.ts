/**
 * `--serve`, which answers a GET with the marks that arrived, and the server of a run without a
 * URL.
 *
 * @module
 */

import { keepArrivals, readArrived } from "../ffi/arrived.ts";
import { DescriptorError, LibcError, markOf, ReflectedTosError, setTos } from "../ffi/mod.ts";
import { pause } from "../ffi/wait.ts";
import {
  encodeReply,
  isFromBuiltIn,
  listeningLines,
  logLine,
  type ParsedRequest,
  readRequest,
  type Seen,
  strongest,
  UNKNOWN,
} from "./answer.ts";
import type { Exchange } from "./exchange.ts";
import { Exit, failureOf, isGranted } from "./failure.ts";
import { Log, onInterrupt } from "./output.ts";
import { localTarget, type Target } from "./target.ts";
import { unmapIPv4 } from "./verdict.ts";

const MOST_CLIENTS = 1024;
/**
 * Milliseconds for the head of a request; to close after the reply, or once the server is stopped.
 */
const HEAD_TIME = 10_000, CLOSE_TIME = 1000;

/** A client that sends its head, or that has its reply and has not closed yet. */
class Client {
  isAnswered = false;
  /** On the clock of `performance.now()`. */
  deadline = performance.now() + HEAD_TIME;
  readonly timeout = Promise.withResolvers<ParsedRequest>();
  constructor(readonly conn: Deno.TcpConn) {}
}

/** How a server answers. */
interface Service {
  readonly isBuiltIn?: boolean;
  /** The ToS byte of all replies; `null` for that of the request. */
  readonly replyTos?: number | null;
  readonly log?: Log | null;
}

/** Answers what connects to a listener: clients, oldest first, with the end of each. */
class ReportingServer {
  readonly #clients = new Map<Client, Promise<void>>();

  constructor(readonly listener: Deno.TcpListener, readonly service: Service) {}

  /** Accepts clients until the listener is closed, and answers the last of them. */
  async serve(): Promise<void> {
    for (;;) {
      try {
        const client = new Client(await this.listener.accept());
        if (this.#clients.size >= MOST_CLIENTS) this.#drop(this.#clients.keys().next().value!);
        this.#clients.set(client, this.#answer(client).finally(() => this.#drop(client)));
      } catch (error) {
        if (error instanceof Deno.errors.BadResource) break;
        // NotConnected is a client that was reset; all others, like EMFILE, take time to pass.
        if (!(error instanceof Deno.errors.NotConnected)) await pause(100);
      }
    }
    await Promise.all(this.#clients.values());
  }

  async #answer(client: Client): Promise<void> {
    const { conn, timeout } = client, { isBuiltIn, replyTos, log } = this.service;
    try {
      const request = await Promise.race([readRequest(conn), timeout.promise]);
      if (request === null) return;
      const seen = { peer: unmapIPv4(conn.remoteAddr), ...markReply(conn, replyTos ?? null) };
      let reply = encodeReply(request, seen, isBuiltIn === true);
      while (reply.length > 0) reply = reply.subarray(await conn.write(reply));
      client.isAnswered = true;
      client.deadline = performance.now() + CLOSE_TIME;
      log?.add(logLine(request, seen));
      if (!request.hasMore) return;
      // Closing with unread data sends an RST, which can discard the reply.
      await conn.closeWrite();
      while (await conn.read(new Uint8Array(4096)) !== null);
    } catch { /* the client has gone */ }
  }

  #drop(client: Client): void {
    if (this.#clients.delete(client)) client.conn.close();
  }

  /** Ends what takes too long; to be called a few times a second. */
  sweep(): void {
    for (const client of this.#clients.keys()) {
      if (performance.now() < client.deadline) continue;
      if (client.isAnswered) this.#drop(client);
      else client.timeout.resolve({ status: "408 Request Timeout", hasMore: false });
    }
  }

  /** Accepts no more clients, and gives the others less time. */
  stop(): void {
    this.listener.close();
    const latest = performance.now() + CLOSE_TIME;
    for (const client of this.#clients.keys()) client.deadline = Math.min(client.deadline, latest);
  }
}

/** Reads what arrived, and gives the reply its mark: a fixed one, or that of the request. */
function markReply(conn: Deno.TcpConn, fixed: number | null): Pick<Seen, "arrived" | "replyTos"> {
  try {
    const arrived = readArrived(conn), { tos } = markOf(strongest(arrived) ?? 0);
    // A mark that the socket has already is set too: all requests take the same time.
    return { arrived, replyTos: setTos(conn, fixed ?? tos) };
  } catch (error) {
    // Another connection has the same ends, on another interface.
    if (error instanceof DescriptorError) return { arrived: UNKNOWN, replyTos: null };
    throw error;
  }
}

/** Marks the SYN-ACKs of a listener, unless this host returns each client's byte in them. */
function markListener(listener: Deno.TcpListener, tos: number): void {
  try {
    setTos(listener, tos);
  } catch (error) {
    if (!(error instanceof ReflectedTosError)) throw error;
  }
}

/** @returns `null` if another socket has the port @throws {Failure} cannot listen there */
function listenIfFree(where: { hostname: string; port: number }): Deno.TcpListener | null {
  try {
    const listener = Deno.listen(where);
    try {
      keepArrivals(listener);
    } catch (error) {
      // Multipath TCP, as by mptcpize(8), keeps nothing: then nothing is reported.
      if (!(error instanceof LibcError)) throw error;
    }
    return listener;
  } catch (error) {
    if (error instanceof Deno.errors.AddrInUse) return null;
    throw failureOf(error, "listening", where);
  }
}

/**
 * `--serve`, until SIGINT or SIGTERM.
 *
 * @param replyTos the ToS byte of all replies and SYN-ACKs; `null` for replies with the request's
 * @throws {Failure} it cannot listen there
 */
export async function serveUntilSignal(
  where: { hostname: string; port: number },
  isSilent: boolean,
  replyTos: number | null = null,
): Promise<void> {
  const log = isSilent ? null : new Log(), listener = listenIfFree(where);
  if (listener === null) throw failureOf(new Error("address already in use"), "listening", where);
  if (replyTos !== null) markListener(listener, replyTos);
  const server = new ReportingServer(listener, { replyTos, log });
  using _signals = onInterrupt(() => server.stop());
  const sweeping = setInterval(() => server.sweep(), 200);
  for (const line of listeningLines(listener.addr)) log?.add(line);
  await server.serve();
  clearInterval(sweeping);
  // Its reader may have stopped.
  await Promise.race([log?.written, pause(CLOSE_TIME)]);
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
  throwIfGone(exchange: Exchange, isSeries?: boolean): void;
}

/** The server on the default port has gone: the run begins again, with another server. */
export class ServerGone {
  constructor(readonly replacement: Server) {}
}

/** A server that a URL names. */
export function remoteServer(target: Target): Server {
  return { target, isBuiltIn: false, throwIfGone() {}, async [Symbol.asyncDispose]() {} };
}

/** The server of a run without a URL: our own if the port is free, else the one that has it. */
export function defaultServer(target: Target, asksLeft = 10): Server {
  const { host, port, url } = target;
  const throwIfGone = ({ reply, failure }: Exchange, isSeries = false) => {
    const isBrief = isSeries && isFromBuiltIn(reply);
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
  return builtInServer(host, port) ?? { ...remoteServer(target), throwIfGone };
}

/** A server in this process; `null` if another one has the port. @throws {Failure} cannot listen */
export function builtInServer(hostname: string, port: number): Server | null {
  const listener = listenIfFree({ hostname, port });
  if (listener === null) return null;
  const serving = new ReportingServer(listener, { isBuiltIn: true }).serve();
  return {
    ...remoteServer(localTarget(listener.addr.hostname, listener.addr.port)),
    isBuiltIn: true,
    async [Symbol.asyncDispose]() {
      listener.close();
      // Other runs may still be connected: with 20 at once, this halves how many need another
      // server.
      await Promise.race([serving, pause(100)]);
    },
  };
}
