#!/usr/bin/env -S deno run --allow-net --allow-ffi
/**
 * Sends one HTTP GET whose packets carry a DSCP mark, and proves it.
 *
 * ```sh
 * deno run --allow-net --allow-ffi main.ts   # EF, to 127.0.0.1:8086 or the built-in server
 * deno run --allow-net --allow-ffi main.ts -d AF41 http://[::1]:8086/
 * deno run --allow-net --allow-ffi main.ts --json http://127.0.0.1:8086/
 * ```
 *
 * `request` is the heart: connect, descriptor, setsockopt, GET, reply, proof. After it come the API
 * for other programs (`get` and `trace`), `main`, and `single`, the run with one request. What
 * touches the kernel is in `ffi/`; what speaks HTTP or talks to a person is in `src/`.
 *
 * @module
 */

import { type ConnectOptions, MarkedConn, needsOwnSocket } from "./ffi/conn.ts";
import { type Mark, parseDscp } from "./ffi/dscp.ts";
import type {
  Arrival,
  ArrivedChange,
  Change,
  Exchange,
  Field,
  Reply,
  RequestContext,
  RequestOptions,
  Returned,
  Sent,
  Sink,
} from "./src/exchange.ts";
import {
  Exit,
  Failure,
  failureOf,
  isPeerGone,
  isUnknownHost,
  missingPermission,
  rootCause,
} from "./src/failure.ts";
import { Limits } from "./src/limits.ts";
import {
  type GetOptions,
  isSeries,
  type Options,
  parseArguments,
  REQUEST_DEFAULTS,
  requestOptionsOf,
  withDefaults,
} from "./src/options.ts";
import {
  forcedExit,
  lineToStandardError,
  onInterrupt,
  sinkFor,
  toStandardError,
  toStandardOutput,
  widthOf,
} from "./src/output.ts";
import { readReply, SinkError } from "./src/reply.ts";
import { json, markedReport, outcomeReport } from "./src/report.ts";
import {
  defaultServer,
  remoteServer,
  type Server,
  ServerGone,
  serveUntilSignal,
} from "./src/server.ts";
import {
  defaultTarget,
  encodeRequest,
  type Header,
  parseTarget,
  type Target,
  VERSION,
} from "./src/target.ts";
import type { Trace, TraceOptions } from "./src/trace.ts";
import {
  assessArrival,
  assessReturn,
  assessSent,
  newExchange,
  requestFailure,
} from "./src/verdict.ts";

export { Exit, Failure };
export type {
  Arrival,
  ArrivedChange,
  Change,
  Exchange,
  Field,
  GetOptions,
  Header,
  Reply,
  RequestOptions,
  Returned,
  Sent,
  Sink,
  Target,
  Trace,
  TraceOptions,
};

// ─── One request ────────────────────────────────────────────────────────────────────────────────

/**
 * Connects, marks, sends the GET, reads the reply, closes and proves. What happens to the request
 * is the exchange's `failure`; only what the sink throws is thrown.
 */
async function request(
  target: Target,
  mark: Mark,
  options: RequestOptions,
  sink: Sink = {},
  context: RequestContext = {},
): Promise<Exchange> {
  const { limits = new Limits(options), onMarked } = context;
  const get = encodeRequest(target, options.headers);
  const to = { ...options, hostname: target.host, port: target.port, requestSize: get.length };
  if (needsOwnSocket(to)) await loadDial(target.isHttps);
  const exchange = newExchange(target, mark, options, context.started);
  const { milliseconds } = exchange, signal = limits.begin(target);
  let conn: MarkedConn | null = null, writeError: unknown = null;
  signal.addEventListener("abort", () => conn?.close());
  try {
    // Deno.connect, in `connect` below; the connection has found its descriptor, conn.fd
    conn = await (context.connect ?? connect)(to, mark, signal);
    signal.throwIfAborted();
    // setsockopt(IP_TOS), or IPV6_TCLASS, and getsockopt reads it back
    conn.setTos(mark.tos);
    milliseconds.connect = performance.now() - exchange.started;
    exchange.connection = conn;
    onMarked?.(exchange);
    limits.stage = "securing";
    if (target.isHttps) await conn.startTls(target.host.replace(/%.*/, ""), options.trust);
    limits.stage = "connected";
    // The GET; what the server has sent can be read also after our write has failed.
    conn.write(get).catch((error) => {
      writeError = error;
      if (!isPeerGone(error)) conn?.close();
    });
    // The reply
    await readReply(conn, exchange, sink, signal);
    // A connection that was closed on timeout can look like a normal end of the reply.
    signal.throwIfAborted();
    milliseconds.total = performance.now() - exchange.started;
    // TLS's close_notify, whose packet belongs to the proof
    await conn.finish();
  } catch (error) {
    if (error instanceof SinkError) throw error.cause;
    const where = { ...to, isHttps: target.isHttps }, cause = rootCause(error, writeError);
    exchange.failure = signal.aborted ? signal.reason : failureOf(cause, limits.stage, where);
  } finally {
    milliseconds.total ??= performance.now() - exchange.started;
    limits.end();
    conn?.close();
  }
  // The proof: copies of our own packets, which the connection has kept, and the server's report
  if (exchange.connection !== null) {
    exchange.sent = assessSent(exchange.connection, exchange);
    exchange.arrived = assessArrival(exchange, exchange.connection.localAddr);
    exchange.returned = assessReturn(exchange.reply, exchange.arrived);
  }
  exchange.failure = requestFailure(exchange, options);
  return exchange;
}

/** Opens a connection: with Deno's socket, or libc's if Deno's cannot do what is asked for. */
async function connect(to: ConnectOptions, mark: Mark, signal: AbortSignal): Promise<MarkedConn> {
  const { hostname, port, family, markSyn } = to;
  if (!needsOwnSocket(to)) {
    try {
      return MarkedConn.adopt(await Deno.connect({ hostname, port, signal }));
    } catch (error) {
      // Not every resolver knows localhost; dial does, as RFC 6761 section 6.3 asks.
      if (!/^localhost\.?$/.test(hostname) || !isUnknownHost(error)) throw error;
    }
  }
  const { dial } = await loadDial(false);
  const tos = markSyn ? mark.tos : null;
  return MarkedConn.adopt(await dial({ hostname, port, tos, family, signal }));
}

/** Loads what a socket of libc's needs, before a request's clock starts. */
async function loadDial(isHttps: boolean): Promise<typeof import("./ffi/dial.ts")> {
  if (isHttps) await import("./ffi/secure.ts");
  return await import("./ffi/dial.ts");
}

// ─── For other programs ─────────────────────────────────────────────────────────────────────────

/** A request of {@linkcode get} that failed. */
export class RequestFailure extends Failure {
  /** The failure of an exchange. @param exchange the request, as far as it came */
  constructor({ code, message, hint, cause }: Failure, readonly exchange: Exchange) {
    super(code, message, hint);
    this.cause = cause;
  }
}

/**
 * One marked GET, for other programs.
 *
 * ```ts
 * import { get } from "./main.ts";
 * const server = Deno.serve({ port: 0, onListen() {} }, () => new Response("hello"));
 * const { sent } = await get(`http://127.0.0.1:${server.addr.port}/`, { dscp: "AF41" });
 * console.log(sent.proved, sent.packets[0].tos); // true 136
 * await server.shutdown();
 * ```
 *
 * @param sink where the reply goes; without one it is read and thrown away
 * @throws {RequestFailure} what happened to the request, with its exit code and the exchange
 * @throws {Failure} a bad URL or header
 * @throws {RangeError} not a DSCP, or not a time limit
 * @throws whatever the sink throws
 */
export async function get(
  url: string | URL,
  options: GetOptions = {},
  sink: Sink = {},
): Promise<Exchange> {
  const { dscp, ...requestOptions } = withDefaults({ ...REQUEST_DEFAULTS, dscp: "EF" }, options);
  const target = parseTarget(String(url)), mark = parseDscp(String(dscp));
  const exchange = await request(target, mark, requestOptions, sink);
  if (exchange.failure !== null) throw new RequestFailure(exchange.failure, exchange);
  return exchange;
}

/**
 * The path to a URL's host, hop by hop, for other programs: what each router received of a mark.
 *
 * ```ts
 * import { trace } from "./main.ts";
 * const server = Deno.serve({ port: 0, onListen() {} }, () => new Response("hello"));
 * const path = await trace(`http://127.0.0.1:${server.addr.port}/`, { dscp: "AF41" });
 * for await (const { hop, address, answer } of path) {
 *   console.log(hop, address, answer); // 1 127.0.0.1 connected
 * }
 * console.log(path.changes, path.exchange?.reply?.status); // [] 200
 * await server.shutdown();
 * ```
 *
 * On IPv6 routers show the whole mark to anybody, on IPv4 to a process with CAP_NET_RAW. What goes
 * wrong is not thrown, but is the trace's `failure`; only what the sink throws comes out as it is.
 *
 * @param sink where the reply goes; without one it is read and thrown away
 * @throws {Failure} a bad URL or header
 * @throws {RangeError} not a DSCP, a time limit or a number of hops
 */
export async function trace(
  url: string | URL,
  options: TraceOptions = {},
  sink: Sink = {},
): Promise<Trace> {
  const { Trace, traceOptionsOf } = await import("./src/trace.ts");
  const { dscp, ...all } = traceOptionsOf(options);
  const route = { target: parseTarget(String(url)), options: all, sink, request };
  return new Trace(parseDscp(String(dscp)), route);
}

// ─── The script ─────────────────────────────────────────────────────────────────────────────────

/** Runs the script. @returns the exit code */
export async function main(args: readonly string[]): Promise<number> {
  let failure: Failure | null = null;
  try {
    const options = parseArguments(args);
    if (options.print === null) failure = await run(options);
    else await toStandardOutput(await printed(options.print));
  } catch (error) {
    failure = failureOf(error);
    if (args.includes("--json") && failure.code !== Exit.cannotWrite) {
      await toStandardOutput(json(null, failure)).catch(() => {});
    }
  }
  if (failure !== null && failure.message !== "") {
    lineToStandardError(`dscp-get: ${failure.message}`);
    if (failure.hint !== undefined) lineToStandardError(`hint: ${failure.hint}`);
  }
  return failure?.code ?? Exit.ok;
}

/** What `--help`, `--version` or `--completions` prints. */
async function printed(what: NonNullable<Options["print"]>): Promise<string> {
  if (what === "version") return `dscp-get ${VERSION}\n`;
  if (what !== "help") return (await import("./src/completions.ts")).completions(what);
  return (await import("./src/help.ts")).usage(widthOf(Deno.stdout), import.meta);
}

/** Serves, traces, or makes one request or many; without a URL at the default port's server. */
async function run(options: Options): Promise<Failure | null> {
  const { url, serve, family } = options;
  const target = url === null ? defaultTarget(family) : parseTarget(url);
  const place = serve ?? { hostname: target.host, port: target.port };
  // On a terminal Deno would ask for what is missing, and wait for an answer.
  const missing = Deno.stdin.isTerminal() ? missingPermission(place) : null;
  if (missing !== null) throw missing;
  if (serve !== null) {
    await serveUntilSignal(serve, options.silent, options.replyMark?.tos);
    return null;
  }
  // Loading these two rooms takes 1.4 ms, 5 % of a plain run.
  const make = options.trace
    ? (await import("./src/trace.ts")).runTrace
    : isSeries(options)
    ? (await import("./src/series.ts")).series
    : single;
  return await onServer(url === null ? await defaultServer(target) : remoteServer(target));

  // If the server on the default port has gone, the run begins again with one of our own.
  async function onServer(server: Server): Promise<Failure | null> {
    try {
      await using current = server;
      return await make(current, options, request);
    } catch (error) {
      if (error instanceof ServerGone) return await onServer(error.replacement);
      throw error;
    }
  }
}

/** One request, its report or JSON. */
async function single(server: Server, options: Options): Promise<Failure | null> {
  const requestOptions = await requestOptionsOf(options), limits = new Limits(requestOptions);
  const hasReport = !options.json && !options.silent;
  using _signals = onInterrupt((code) => {
    if (Deno.stderr.isTerminal()) toStandardError("\n");
    limits.stop(new Failure(code, "interrupted"));
  });
  const onMarked = (exchange: Exchange) =>
    toStandardError(markedReport(exchange, server.isBuiltIn));
  if (hasReport && Deno.stderr.isTerminal()) {
    AbortSignal.timeout(1000).addEventListener("abort", () => {
      if (limits.waitsFor !== null) toStandardError(`${limits.waitsFor} …\n`);
    });
  }
  const context = { limits, ...hasReport && { onMarked } }, sink = sinkFor(options);
  const exchange = await request(server.target, options.marks[0], requestOptions, sink, context);
  const failure = limits.stopped ?? exchange.failure;
  if (limits.stopped === null) await server.throwIfGone(exchange);
  if (options.json) await toStandardOutput(json(exchange, failure, server));
  else if (hasReport && failure?.code !== Exit.cannotRun) toStandardError(outcomeReport(exchange));
  return failure;
}

if (import.meta.main) Deno.exit(await Promise.race([main(Deno.args), forcedExit.promise]));
