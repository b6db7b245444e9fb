/**
 * Where requests go: the server that a URL names, or that of the default port; and `--serve`.
 *
 * What a server of ours does is in `answer.ts`, which is loaded when one is needed: that takes
 * 1 ms, 3 % of a run that asks another server.
 *
 * @module
 */

import { keepArrivals } from "../ffi/arrived.ts";
import { LibcError } from "../ffi/calls.ts";
import { pause } from "../ffi/deno.ts";
import { ReflectedTosError, setTos } from "../ffi/mark.ts";
import type { Exchange, Reply } from "./exchange.ts";
import { Exit, failureOf, isGranted } from "./failure.ts";
import { Log, onInterrupt } from "./output.ts";
import { localTarget, type Target } from "./target.ts";

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
  const { CLOSE_TIME, listeningLines, ReportingServer } = await import("./answer.ts");
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
  throwIfGone(exchange: Exchange, isSeries?: boolean): Promise<void>;
}

/** The server on the default port has gone: the run begins again, with another server. */
export class ServerGone {
  constructor(readonly replacement: Server) {}
}

/** A server that a URL names. */
export function remoteServer(target: Target): Server {
  return { target, isBuiltIn: false, async throwIfGone() {}, async [Symbol.asyncDispose]() {} };
}

/** The server of a run without a URL: our own if the port is free, else the one that has it. */
export async function defaultServer(target: Target, asksLeft = 10): Promise<Server> {
  const { host, port, url } = target;
  const throwIfGone = async ({ reply, failure }: Exchange, isSeries = false) => {
    const isBrief = isSeries && isFromBuiltIn(reply);
    const codes: number[] = [Exit.cannotConnect, Exit.connectionLost, Exit.emptyReply];
    if (!isBrief && (reply !== null || !codes.includes(failure?.code ?? 0))) return;
    const own = await builtInServer(host, port);
    if (own !== null) throw new ServerGone(own);
    // A server that ended the connection in good order has not gone if the port still is taken.
    if (failure?.code === Exit.emptyReply) return;
    const canUseAnyPort = isGranted({ name: "net", host: new URL(url).hostname });
    if (canUseAnyPort) throw new ServerGone((await builtInServer(host, 0))!);
    if (!isBrief && asksLeft > 0) throw new ServerGone(await defaultServer(target, asksLeft - 1));
  };
  return await builtInServer(host, port) ?? { ...remoteServer(target), throwIfGone };
}

/** A server in this process; `null` if another one has the port. @throws {Failure} cannot listen */
export async function builtInServer(hostname: string, port: number): Promise<Server | null> {
  const listener = listenIfFree({ hostname, port });
  if (listener === null) return null;
  const { ReportingServer } = await import("./answer.ts");
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

/** Whether a reply comes from the built-in server of a run, which ends with that run. */
export function isFromBuiltIn(reply: Reply | null): boolean {
  const isName = ([name, value]: readonly [string, string]) =>
    name === "server" && /^dscp-get\/\S+ \(built-in\)$/.test(value);
  return reply !== null && reply.headers.some(isName);
}
